//! `compatibility [--whole] FILE...`: takes results of runs over into docs/compatibility.tsv and prints docs/COMPATIBILITY.md from it.
//! With --whole they are those of all parts there are, and what was known of others goes. Run at the top of the tree; `make
//! test-matrix` does.

use std::fs;

use anyhow::{Context, Result};
use sysbox_tests::compat::{PAGE, RESULTS, Row, merge, page, parse};

fn main() -> Result<()> {
    let mut files: Vec<String> = std::env::args().skip(1).collect();
    let is_whole = files.first().is_some_and(|word| word == "--whole");
    if is_whole {
        files.remove(0);
    }
    let mut rows = if !is_whole && fs::exists(RESULTS)? { read(RESULTS)? } else { Vec::new() };
    for path in files {
        rows = merge(rows, read(&path)?);
    }
    let lines: String = rows.iter().map(|row| format!("{row}\n")).collect();
    fs::write(RESULTS, lines).context(RESULTS)?;
    fs::write(PAGE, page(&rows)).context(PAGE)?;
    Ok(())
}

fn read(path: &str) -> Result<Vec<Row>> {
    let text = fs::read_to_string(path).with_context(|| path.to_owned())?;
    parse(&text).map_err(|why| anyhow::anyhow!("{path}: {why}"))
}
