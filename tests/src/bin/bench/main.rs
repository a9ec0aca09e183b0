//! `make bench`: the promises with numbers (docs/SPECIFICATION.md), measured against plain runc in the same run. Owns the
//! table of rows and what is done with one; how a sample of each is taken is in `rows.rs`, of what in `lab.rs`.
//!
//! Status 1 if something could not be measured. A target that was missed is marked and is no failure of the bench.

mod bundles;
mod facts;
mod inner;
mod lab;
mod rows;

use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Instant;

use anyhow::{Context, Result, bail};
use serde_json::json;
use sysbox_tests::measure::{self, Outcome, Side, Target, Trouble, Unit};

use lab::Lab;

/// One measurement: what is compared, how often, and what was promised.
struct Row {
    name: &'static str,
    label: &'static str,
    unit: Unit,
    target: Target,
    count: usize,
    /// With `--quick`: whether it works, rather than how fast it is.
    quick: usize,
    prepare: fn(&Lab) -> Result<Pair>,
}

/// How to take a sample of ours, and of what it is compared with.
enum Pair {
    Both(Side, Side),
    Ours(Side),
    /// This machine cannot measure it.
    Skip(String),
}

const fn row(
    name: &'static str,
    label: &'static str,
    unit: Unit,
    target: Target,
    (count, quick): (usize, usize),
    prepare: fn(&Lab) -> Result<Pair>,
) -> Row {
    Row { name, label, unit, target, count, quick, prepare }
}

/// "runc" is plain runc with all capabilities that this machine has and no seccomp, on the same engine or root directory.
const ROWS: &[Row] = {
    use Target::{Extra, Most, Ratio, Shown};
    use Unit::{Mebibytes, Microseconds, Milliseconds};
    &[
        row("run", "run /bin/true on a directory", Milliseconds, Ratio(0.8), (40, 5), rows::run),
        row(
            "run-userns",
            "the same : runc in a user namespace",
            Milliseconds,
            Shown,
            (40, 5),
            rows::run_userns,
        ),
        row(
            "run-crun",
            "the same : crun, cgroups of version 1",
            Milliseconds,
            Shown,
            (40, 5),
            rows::run_crun,
        ),
        row("docker-run", "docker run --rm true", Milliseconds, Ratio(1.0), (20, 3), rows::docker_run),
        row("docker-run-16", "16 of them, 4 at once", Milliseconds, Ratio(1.0), (5, 1), rows::docker_run_16),
        row(
            "layers-1",
            "docker run --rm true, image of 1 layer",
            Milliseconds,
            Ratio(1.0),
            (20, 2),
            rows::docker_run_layers::<1>,
        ),
        row("layers-20", "of 20 layers", Milliseconds, Ratio(1.0), (20, 2), rows::docker_run_layers::<20>),
        row("layers-100", "of 100 layers", Milliseconds, Ratio(1.0), (20, 2), rows::docker_run_layers::<100>),
        row("docker-exec", "docker exec true", Milliseconds, Ratio(1.0), (30, 5), rows::docker_exec),
        row(
            "inner-ready",
            "dockerd inside until it answers",
            Milliseconds,
            Ratio(1.05),
            (6, 1),
            inner::inner_ready,
        ),
        row("inner-run", "docker run --rm true inside", Milliseconds, Ratio(1.05), (12, 2), inner::inner_run),
        row("stop", "docker stop with 1 GB of inner images", Milliseconds, Extra(10.0), (8, 2), inner::stop),
        row("start", "docker start of the same", Milliseconds, Ratio(1.05), (8, 2), inner::start),
        row("inner-load", "docker load inside", Milliseconds, Ratio(1.02), (8, 1), inner::load),
        row("inner-build", "docker build inside, 5 x RUN", Milliseconds, Shown, (8, 1), inner::build),
        row(
            "build-store",
            "the same, containerd's store (sid)",
            Milliseconds,
            Ratio(1.05),
            (8, 1),
            inner::build_store,
        ),
        row("inner-untar", "untar of /usr inside", Milliseconds, Ratio(1.02), (10, 1), inner::untar),
        row(
            "commit",
            "docker commit with 256 MB of inner images : of files",
            Milliseconds,
            Ratio(1.05),
            (6, 1),
            inner::commit,
        ),
        row(
            "leaf",
            "open+read+close of /proc/meminfo : the kernel's",
            Microseconds,
            Shown,
            (10, 2),
            rows::leaf,
        ),
        row("leaf-lxcfs", "the same : LXCFS", Microseconds, Ratio(0.6), (10, 2), rows::leaf_lxcfs),
        row("uptime", "open+read+close of /proc/uptime", Microseconds, Ratio(1.0), (10, 2), rows::uptime),
        row("sysctl", "the same of a sysctl that is native", Microseconds, Ratio(1.0), (10, 2), rows::sysctl),
        row("memory-1", "PSS of both daemons, 1 idle container", Mebibytes, Shown, (1, 1), rows::memory::<1>),
        row("memory", "30 idle containers", Mebibytes, Most(15.0), (1, 1), rows::memory::<30>),
        row("memory-100", "100 idle containers", Mebibytes, Most(20.0), (1, 1), rows::memory::<100>),
    ]
};

#[derive(Debug, Default)]
struct Options {
    rows: Option<Vec<String>>,
    quick: bool,
}

const USAGE: &str = "usage: bench [--quick] [--rows NAME,...]";

fn options(args: impl Iterator<Item = String>) -> Result<Options> {
    let mut options = Options::default();
    let mut args = args;
    while let Some(arg) = args.next() {
        match (arg.as_str(), arg.strip_prefix("--rows=")) {
            ("--quick", _) => options.quick = true,
            ("--rows", _) => options.rows = Some(names(&args.next().context(USAGE)?)?),
            (_, Some(list)) => options.rows = Some(names(list)?),
            _ => bail!("`{arg}` is not known\n{USAGE}"),
        }
    }
    Ok(options)
}

fn names(list: &str) -> Result<Vec<String>> {
    let names: Vec<String> = list.split(',').filter(|name| !name.is_empty()).map(str::to_owned).collect();
    for name in &names {
        if !ROWS.iter().any(|row| row.name == name) {
            let all: Vec<&str> = ROWS.iter().map(|row| row.name).collect();
            bail!("there is no row `{name}`\nhint: the rows are {}", all.join(", "));
        }
    }
    Ok(names)
}

fn main() -> ExitCode {
    match bench() {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(error) => {
            eprintln!("bench: {error:#}");
            ExitCode::FAILURE
        }
    }
}

/// Whether all rows could be measured.
fn bench() -> Result<bool> {
    let options = options(std::env::args().skip(1))?;
    let lab = Lab::open(options.quick)?;
    let facts = facts::gather(&lab)?;
    for (name, value) in &facts {
        println!("{name:<10} {value}");
    }
    println!("\n{}", measure::HEADER);
    let started = Instant::now();
    let mut outcomes = Vec::new();
    for row in ROWS {
        if options.rows.as_ref().is_some_and(|names| !names.iter().any(|name| name == row.name)) {
            continue;
        }
        let outcome = take(&lab, row, options.quick);
        println!("{}", outcome.line());
        outcomes.push(outcome);
    }
    println!(
        "\nmedian (the middle half); [where a repeated run would come out, 19 times out of 20]; ? = the target lies in there"
    );
    println!("took {:.0} s, load now {}", started.elapsed().as_secs_f64(), facts::load()?);
    let facts: serde_json::Map<_, _> =
        facts.into_iter().map(|(name, value)| (name.to_owned(), json!(value))).collect();
    let rows: Vec<_> = outcomes.iter().map(Outcome::json).collect();
    let report =
        json!({ "quick": options.quick, "machine": facts, "load_after": facts::load()?, "rows": rows });
    let path = report_path();
    std::fs::write(&path, format!("{report:#}\n")).with_context(|| format!("write {}", path.display()))?;
    println!("{}", path.display());
    lab.close()?;
    Ok(!outcomes.iter().any(Outcome::is_failure))
}

fn take(lab: &Lab, row: &Row, quick: bool) -> Outcome {
    eprintln!("bench: {}: {}", row.name, row.label);
    let count = if quick { row.quick } else { row.count };
    let taken = (row.prepare)(lab).context("prepare").and_then(|pair| match pair {
        Pair::Both(mut ours, mut theirs) => measure::interleave(count, &mut ours, Some(&mut theirs)).map(Ok),
        Pair::Ours(mut ours) => measure::interleave(count, &mut ours, None).map(Ok),
        Pair::Skip(why) => Ok(Err(why)),
    });
    let result = match taken {
        Ok(Ok(samples)) => {
            let judgement = measure::judge(&samples, row.target);
            Ok((samples, judgement))
        }
        Ok(Err(why)) => Err(Trouble::Skipped(why)),
        // A line of the table, however much a program had to say.
        Err(error) => {
            Err(Trouble::Failed(format!("{error:#}").split_whitespace().collect::<Vec<_>>().join(" ")))
        }
    };
    Outcome { name: row.name, label: row.label.to_owned(), unit: row.unit, target: row.target, result }
}

fn report_path() -> PathBuf {
    let target = std::env::var_os("CARGO_TARGET_DIR").map(PathBuf::from);
    target
        .unwrap_or_else(|| PathBuf::from(concat!(env!("CARGO_MANIFEST_DIR"), "/../target")))
        .join("bench.json")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rows_are_chosen_by_names_that_exist() {
        let parse = |line: &str| options(line.split(' ').map(str::to_owned));
        let chosen = parse("--quick --rows run,stop").unwrap();
        assert!(chosen.quick);
        assert_eq!(chosen.rows.unwrap(), ["run", "stop"]);
        assert_eq!(parse("--rows=start").unwrap().rows.unwrap(), ["start"]);
        assert!(parse("--rows nope").unwrap_err().to_string().starts_with("there is no row `nope`"));
        assert!(parse("--fast").is_err());
        assert!(parse("--rows").is_err());
    }
}
