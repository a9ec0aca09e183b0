//! How a measurement is taken and judged: two things are run in turns, so that whatever else the machine does falls on
//! both; medians are compared, and the spread is told with them. Knows neither what is measured nor how it is set up.

use std::io::Read;
use std::os::fd::AsFd;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use serde_json::{Value, json};

/// One of the two: prepares itself, takes one sample, and says how much it was.
pub type Side = Box<dyn FnMut() -> Result<f64>>;

/// What a number counts.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Unit {
    Milliseconds,
    Microseconds,
    Mebibytes,
}

impl Unit {
    pub fn symbol(self) -> &'static str {
        match self {
            Self::Milliseconds => "ms",
            Self::Microseconds => "µs",
            Self::Mebibytes => "MiB",
        }
    }
}

/// What was promised, of the median of ours.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Target {
    /// At most this many times theirs.
    Ratio(f64),
    /// At most this much more than theirs.
    Extra(f64),
    /// At most this much.
    Most(f64),
    /// Shown for comparison, nothing promised.
    Shown,
}

/// The middle of some samples and how far they spread.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Summary {
    pub median: f64,
    /// The middle half lies between these.
    pub low: f64,
    pub high: f64,
}

impl Summary {
    /// Of at least one sample.
    pub fn of(samples: &[f64]) -> Self {
        let mut sorted = samples.to_vec();
        sorted.sort_by(f64::total_cmp);
        Self { median: quantile(&sorted, 0.5), low: quantile(&sorted, 0.25), high: quantile(&sorted, 0.75) }
    }
}

/// Between two samples the line through them counts.
fn quantile(sorted: &[f64], at: f64) -> f64 {
    let place = at * (sorted.len() - 1) as f64;
    let (below, above) = (sorted[place.floor() as usize], sorted[place.ceil() as usize]);
    below + (above - below) * place.fract()
}

/// Samples of both sides, or of ours alone.
#[derive(Debug, Clone, PartialEq)]
pub struct Samples {
    pub ours: Vec<f64>,
    pub theirs: Vec<f64>,
}

/// Takes `count` samples of each side in turns: A B, B A, A B… What a run leaves behind for the next one (the kernel tears
/// namespaces down behind its back) then falls on both alike.
///
/// # Errors
/// The first sample that could not be taken.
pub fn interleave(count: usize, ours: &mut Side, theirs: Option<&mut Side>) -> Result<Samples> {
    let mut samples = Samples { ours: Vec::new(), theirs: Vec::new() };
    let Some(theirs) = theirs else {
        for _ in 0..count {
            samples.ours.push(ours().context("ours")?);
        }
        return Ok(samples);
    };
    for turn in 0..count {
        if turn % 2 == 0 {
            samples.ours.push(ours().context("ours")?);
        }
        samples.theirs.push(theirs().context("theirs")?);
        if turn % 2 == 1 {
            samples.ours.push(ours().context("ours")?);
        }
    }
    Ok(samples)
}

/// How a row came out against its target.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Judgement {
    /// What the target is about: a ratio, a difference or the number itself.
    pub value: f64,
    /// Where that would lie if the run were repeated, 19 times out of 20 (by resampling).
    pub interval: (f64, f64),
    pub verdict: Verdict,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Verdict {
    Met,
    /// Met, but the target lies within the interval: another run may say otherwise.
    BarelyMet,
    BarelyMissed,
    Missed,
    Shown,
}

impl Verdict {
    pub fn word(self) -> &'static str {
        match self {
            Self::Met => "ok",
            Self::BarelyMet => "ok ?",
            Self::BarelyMissed => "MISS ?",
            Self::Missed => "MISS",
            Self::Shown => "-",
        }
    }
}

/// Compares medians as the target asks.
pub fn judge(samples: &Samples, target: Target) -> Judgement {
    let compare = |ours: f64, theirs: f64| match target {
        Target::Ratio(_) => ours / theirs,
        Target::Extra(_) => ours - theirs,
        Target::Shown if theirs.is_finite() => ours / theirs,
        Target::Most(_) | Target::Shown => ours,
    };
    let median = |samples: &[f64]| if samples.is_empty() { f64::NAN } else { Summary::of(samples).median };
    let value = compare(median(&samples.ours), median(&samples.theirs));
    let interval = resample(samples, compare);
    let verdict = match target {
        Target::Shown => Verdict::Shown,
        Target::Ratio(most) | Target::Extra(most) | Target::Most(most) => {
            // Two digits are shown; what is shown as equal is equal.
            let met = (value * 100.0).round() <= (most * 100.0).round();
            match (met, interval.0 <= most && most <= interval.1 && interval.0 < interval.1) {
                (true, false) => Verdict::Met,
                (true, true) => Verdict::BarelyMet,
                (false, true) => Verdict::BarelyMissed,
                (false, false) => Verdict::Missed,
            }
        }
    };
    Judgement { value, interval, verdict }
}

/// The bootstrap: the same comparison of many draws from the samples; the middle 95 % of them. The generator starts alike
/// each time, so that the same samples give the same interval.
fn resample(samples: &Samples, compare: impl Fn(f64, f64) -> f64) -> (f64, f64) {
    const DRAWS: usize = 1000;
    let mut state = 0x9e37_79b9_7f4a_7c15_u64;
    let mut draw = |from: &[f64]| -> f64 {
        if from.is_empty() {
            return f64::NAN;
        }
        let drawn: Vec<f64> = from
            .iter()
            .map(|_| {
                // xorshift64 (Marsaglia).
                state ^= state << 13;
                state ^= state >> 7;
                state ^= state << 17;
                from[(state % from.len() as u64) as usize]
            })
            .collect();
        Summary::of(&drawn).median
    };
    let mut all: Vec<f64> = (0..DRAWS).map(|_| compare(draw(&samples.ours), draw(&samples.theirs))).collect();
    all.sort_by(f64::total_cmp);
    (quantile(&all, 0.025), quantile(&all, 0.975))
}

/// Runs a program to its end, which is a success, and returns what it wrote on stdout. It is killed at the deadline. For
/// programs that say little: nothing is read before the end, so that reading costs the measured time nothing.
///
/// # Errors
/// The program not starting, failing or taking longer than `limit`.
pub fn run(command: &mut Command, limit: Duration) -> Result<String> {
    let shown = shown(command);
    let child = command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn();
    finish(child.with_context(|| shown.clone())?, limit).with_context(|| shown)
}

/// As [`run`], and returns how many milliseconds it took.
///
/// # Errors
/// As [`run`].
pub fn time(command: &mut Command, limit: Duration) -> Result<f64> {
    let start = Instant::now();
    run(command, limit)?;
    Ok(milliseconds(start))
}

pub fn milliseconds(since: Instant) -> f64 {
    since.elapsed().as_secs_f64() * 1000.0
}

fn shown(command: &Command) -> String {
    let words = std::iter::once(command.get_program()).chain(command.get_args());
    words.map(|word| word.to_string_lossy()).collect::<Vec<_>>().join(" ")
}

/// Waits for a child that was started elsewhere, as [`run`] does.
///
/// # Errors
/// As [`run`].
pub fn finish(mut child: Child, limit: Duration) -> Result<String> {
    let process = sysbox_sys::process::identify(i32::try_from(child.id()).context("a pid")?)?;
    let pidfd = sysbox_sys::process::pidfd_open(process)?;
    let patience = PollTimeout::try_from(limit).unwrap_or(PollTimeout::MAX);
    if poll(&mut [PollFd::new(pidfd.as_fd(), PollFlags::POLLIN)], patience)? == 0 {
        child.kill()?;
        child.wait()?;
        bail!("did not end within {} s", limit.as_secs());
    }
    let status = child.wait()?;
    let (mut out, mut err) = (String::new(), String::new());
    if let Some(mut pipe) = child.stdout.take() {
        pipe.read_to_string(&mut out).context("its output")?;
    }
    if let Some(mut pipe) = child.stderr.take() {
        pipe.read_to_string(&mut err).context("its errors")?;
    }
    if status.success() { Ok(out) } else { bail!("{status}: {}", err.trim()) }
}

/// Asks until there is an answer. For what gives no event to wait for, as another program's socket.
///
/// # Errors
/// None in time.
pub fn until<T>(what: &str, limit: Duration, mut probe: impl FnMut() -> Option<T>) -> Result<T> {
    let deadline = Instant::now() + limit;
    loop {
        if let Some(found) = probe() {
            return Ok(found);
        }
        if Instant::now() >= deadline {
            bail!("waited {} s for {what}", limit.as_secs());
        }
        std::thread::sleep(Duration::from_millis(1));
    }
}

/// A row as it came out.
#[derive(Debug)]
pub struct Outcome {
    pub name: &'static str,
    pub label: String,
    pub unit: Unit,
    pub target: Target,
    pub result: Result<(Samples, Judgement), Trouble>,
}

/// Why a row has no numbers.
#[derive(Debug)]
pub enum Trouble {
    /// This machine cannot measure it, which is no failure.
    Skipped(String),
    Failed(String),
}

pub const HEADER: &str = concat!(
    "row            n   ours                     theirs                   ours : theirs          target    \n",
    "-----------------------------------------------------------------------------------------------------------"
);

impl Outcome {
    pub fn is_failure(&self) -> bool {
        matches!(self.result, Err(Trouble::Failed(_)))
    }

    /// A line of the table, below [`HEADER`].
    pub fn line(&self) -> String {
        let name = self.name;
        match &self.result {
            Err(Trouble::Skipped(why)) => format!("{name:<14} skipped: {why}"),
            Err(Trouble::Failed(why)) => format!("{name:<14} FAILED: {why}"),
            Ok((samples, judgement)) => {
                let cell =
                    |samples: &[f64]| if samples.is_empty() { "-".to_owned() } else { self.cell(samples) };
                format!(
                    "{name:<14}{:>3}   {:<25}{:<25}{:<24}{:<10}{:<7} {}",
                    samples.ours.len(),
                    cell(&samples.ours),
                    cell(&samples.theirs),
                    self.comparison(samples, judgement),
                    self.promise(),
                    judgement.verdict.word(),
                    self.label,
                )
                .trim_end()
                .to_owned()
            }
        }
    }

    fn cell(&self, samples: &[f64]) -> String {
        let summary = Summary::of(samples);
        let digits = if summary.median < 100.0 { 2 } else { 0 };
        format!(
            "{:.digits$} ({:.digits$}-{:.digits$}) {}",
            summary.median,
            summary.low,
            summary.high,
            self.unit.symbol()
        )
    }

    fn comparison(&self, samples: &Samples, judgement: &Judgement) -> String {
        let (low, high) = judgement.interval;
        match self.target {
            Target::Extra(_) => {
                format!("{:+.1} [{low:+.1} {high:+.1}] {}", judgement.value, self.unit.symbol())
            }
            Target::Ratio(_) | Target::Shown if !samples.theirs.is_empty() => {
                format!("{:.2} x [{low:.2} {high:.2}]", judgement.value)
            }
            _ => "-".to_owned(),
        }
    }

    fn promise(&self) -> String {
        match self.target {
            Target::Ratio(most) => format!("<= {most:.2} x"),
            Target::Extra(most) => format!("<= +{most} {}", self.unit.symbol()),
            Target::Most(most) => format!("<= {most} {}", self.unit.symbol()),
            Target::Shown => "-".to_owned(),
        }
    }

    pub fn json(&self) -> Value {
        let mut row = json!({ "name": self.name, "label": self.label, "unit": self.unit.symbol(), "target": self.promise() });
        match &self.result {
            Err(Trouble::Skipped(why)) => row["skipped"] = json!(why),
            Err(Trouble::Failed(why)) => row["failed"] = json!(why),
            Ok((samples, judgement)) => {
                let side = |samples: &[f64]| {
                    let summary = Summary::of(samples);
                    json!({ "median": summary.median, "low": summary.low, "high": summary.high, "samples": samples })
                };
                row["ours"] = side(&samples.ours);
                if !samples.theirs.is_empty() {
                    row["theirs"] = side(&samples.theirs);
                }
                row["value"] = json!(judgement.value);
                row["interval"] = json!(judgement.interval);
                row["verdict"] = json!(judgement.verdict.word());
            }
        }
        row
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn samples(ours: &[f64], theirs: &[f64]) -> Samples {
        Samples { ours: ours.to_vec(), theirs: theirs.to_vec() }
    }

    #[test]
    fn a_summary_is_the_middle_and_the_middle_half() {
        let check =
            |given: &[f64], median, low, high| assert_eq!(Summary::of(given), Summary { median, low, high });
        check(&[7.0], 7.0, 7.0, 7.0);
        check(&[4.0, 1.0, 3.0, 2.0, 5.0], 3.0, 2.0, 4.0);
        check(&[1.0, 2.0], 1.5, 1.25, 1.75);
    }

    #[test]
    fn turns_change_their_order() {
        use std::cell::RefCell;
        use std::rc::Rc;
        let seen = Rc::new(RefCell::new(String::new()));
        let side = |name: char| -> Side {
            let seen = Rc::clone(&seen);
            Box::new(move || {
                seen.borrow_mut().push(name);
                Ok(1.0)
            })
        };
        let (mut ours, mut theirs) = (side('A'), side('B'));
        interleave(3, &mut ours, Some(&mut theirs)).unwrap();
        assert_eq!(*seen.borrow(), "ABBAAB");
    }

    #[test]
    fn a_target_is_met_missed_or_too_near_to_say() {
        let check = |ours: &[f64], theirs: &[f64], target, expected| {
            let judged = judge(&samples(ours, theirs), target);
            assert_eq!(judged.verdict, expected, "{ours:?} {theirs:?} {target:?}: {judged:?}");
        };
        check(&[8.0, 8.0], &[10.0, 10.0], Target::Ratio(0.8), Verdict::Met);
        check(&[8.1, 8.1], &[10.0, 10.0], Target::Ratio(0.8), Verdict::Missed);
        check(&[7.0, 7.5, 9.0], &[10.0, 10.0], Target::Ratio(0.8), Verdict::BarelyMet);
        check(&[7.0, 8.5, 9.0], &[10.0, 10.0], Target::Ratio(0.8), Verdict::BarelyMissed);
        check(&[19.0], &[10.0], Target::Extra(10.0), Verdict::Met);
        check(&[21.0], &[10.0], Target::Extra(10.0), Verdict::Missed);
        check(&[14.0], &[], Target::Most(15.0), Verdict::Met);
        check(&[16.0], &[], Target::Most(15.0), Verdict::Missed);
        check(&[16.0], &[1.0], Target::Shown, Verdict::Shown);
    }

    #[test]
    fn a_program_that_hangs_or_fails_is_told_by_name() {
        let hanging = run(Command::new("sleep").arg("1000"), Duration::from_millis(20)).unwrap_err();
        assert_eq!(format!("{hanging:#}"), "sleep 1000: did not end within 0 s");
        let failing =
            run(Command::new("sh").args(["-c", "echo no >&2; exit 3"]), Duration::from_secs(60)).unwrap_err();
        assert_eq!(format!("{failing:#}"), "sh -c echo no >&2; exit 3: exit status: 3: no");
        assert_eq!(run(Command::new("echo").arg("yes"), Duration::from_secs(60)).unwrap(), "yes\n");
    }

    #[test]
    fn a_row_says_what_was_promised_and_what_came_out() {
        let both = samples(&[8.0], &[10.0]);
        let judged = judge(&both, Target::Ratio(0.7));
        let mut row = Outcome {
            name: "run",
            label: "a label".into(),
            unit: Unit::Milliseconds,
            target: Target::Ratio(0.7),
            result: Ok((both, judged)),
        };
        assert_eq!(
            row.line(),
            "run             1   8.00 (8.00-8.00) ms      10.00 (10.00-10.00) ms   0.80 x [0.80 0.80]      <= 0.70 x MISS    a label"
        );
        assert_eq!(row.json()["verdict"], "MISS");
        row.result = Err(Trouble::Failed("why".into()));
        assert_eq!(row.line(), "run            FAILED: why");
        assert!(row.is_failure());
    }
}
