//! What was tried with which part of the field, and what came of it: the lines that a run records, and docs/COMPATIBILITY.md as
//! it is printed from them. Knows the format; refuses to know what is tried.
//!
//! A run appends to the file that `SYSBOX_COMPAT` names, one line a trial, fields between tabs:
//! section, part, version, what, result, message, date, kernel.

use std::fmt;
use std::fs::OpenOptions;
use std::io::Write;

/// The results that the page is printed from, and the page, from the top of the tree.
pub const RESULTS: &str = "docs/compatibility.tsv";
pub const PAGE: &str = "docs/COMPATIBILITY.md";

/// What came of a trial.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Outcome {
    Ok,
    /// Not given, on purpose, and with a message that says so.
    Refused,
    /// Should work, and does not.
    Fails,
}

impl fmt::Display for Outcome {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Ok => "ok",
            Self::Refused => "refused",
            Self::Fails => "fails",
        })
    }
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Row {
    /// A heading of the page.
    pub section: String,
    /// A row of the page's table: the program, where it is from, how it is set up.
    pub part: String,
    /// As it names itself.
    pub version: String,
    /// What was tried.
    pub what: String,
    pub outcome: Outcome,
    /// What a user sees; empty for what works.
    pub message: String,
    pub date: String,
    pub kernel: String,
}

impl Row {
    fn fields(&self) -> [String; 8] {
        let outcome = self.outcome.to_string();
        let text = [
            &self.section,
            &self.part,
            &self.version,
            &self.what,
            &outcome,
            &self.message,
            &self.date,
            &self.kernel,
        ];
        text.map(|field| field.split_whitespace().collect::<Vec<_>>().join(" "))
    }

    /// # Errors
    /// What is wrong with the line.
    pub fn parse(line: &str) -> Result<Self, String> {
        let fields: Vec<&str> = line.split('\t').collect();
        let [section, part, version, what, outcome, message, date, kernel] = fields[..] else {
            return Err(format!("{} fields instead of 8: {line}", fields.len()));
        };
        let outcome = [Outcome::Ok, Outcome::Refused, Outcome::Fails]
            .into_iter()
            .find(|known| known.to_string() == outcome)
            .ok_or_else(|| format!("no result is called `{outcome}`: {line}"))?;
        let [section, part, version, what, message, date, kernel] =
            [section, part, version, what, message, date, kernel].map(str::to_owned);
        Ok(Self { section, part, version, what, outcome, message, date, kernel })
    }
}

impl fmt::Display for Row {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.fields().join("\t"))
    }
}

/// Every line of a file of results.
///
/// # Errors
/// The first line that is none.
pub fn parse(text: &str) -> Result<Vec<Row>, String> {
    text.lines().filter(|line| !line.is_empty()).map(Row::parse).collect()
}

/// Appends a result to the file that the environment names; without one, the run is not for the page.
///
/// # Panics
/// If the file cannot be written: a run whose results are lost is no run.
pub fn record(section: &str, part: &str, version: &str, what: &str, outcome: Outcome, message: &str) {
    let Some(path) = std::env::var_os("SYSBOX_COMPAT") else { return };
    let row = Row {
        section: section.to_owned(),
        part: part.to_owned(),
        version: version.to_owned(),
        what: what.to_owned(),
        outcome,
        message: if outcome == Outcome::Ok { String::new() } else { plain(message) },
        date: chrono::Utc::now().format("%Y-%m-%d").to_string(),
        kernel: nix::sys::utsname::uname().expect("uname").release().to_string_lossy().into_owned(),
    };
    // One write: tests run side by side.
    let line = format!("{row}\n");
    let file = OpenOptions::new().create(true).append(true).open(&path);
    file.and_then(|mut file| file.write_all(line.as_bytes()))
        .unwrap_or_else(|error| panic!("SYSBOX_COMPAT={path:?}: {error}"));
}

/// A message as any run would give it: without terminal colours, times and made-up names.
fn plain(message: &str) -> String {
    let mut text = String::new();
    let mut rest = message;
    while let Some((before, after)) = rest.split_once('\u{1b}') {
        text.push_str(before);
        rest = after.split_once('m').map_or("", |(_, after)| after);
    }
    text.push_str(rest);
    let is_id = |word: &str| word.len() >= 12 && word.bytes().all(|byte| byte.is_ascii_hexdigit());
    let mut words = String::new();
    for piece in text.split_inclusive(|c: char| !c.is_ascii_alphanumeric()) {
        let word = piece.trim_end_matches(|c: char| !c.is_ascii_alphanumeric());
        words.push_str(&if is_id(word) { piece.replacen(word, "ID", 1) } else { piece.to_owned() });
    }
    const MOST: usize = 300;
    match words.char_indices().nth(MOST) {
        Some((at, _)) => format!("{}…", &words[..at]),
        None => words,
    }
}

/// `old` with what a newer run says: the parts that it looked at are replaced whole, the others stay.
pub fn merge(old: Vec<Row>, new: Vec<Row>) -> Vec<Row> {
    let key = |row: &Row| (row.section.clone(), row.part.clone());
    let again: Vec<_> = new.iter().map(key).collect();
    let mut rows: Vec<Row> = old.into_iter().filter(|row| !again.contains(&key(row))).collect();
    // The last line of a trial counts.
    for row in new {
        rows.retain(|known| (key(known), &known.what) != (key(&row), &row.what));
        rows.push(row);
    }
    // Within a part, the order in which things were tried.
    rows.sort_by_key(key);
    rows
}

/// The page.
pub fn page(rows: &[Row]) -> String {
    let mut page = "# What runs inside, and beside

Printed by `make test-matrix` from the results of its last run (docs/compatibility.tsv): nothing here is written by hand. A row is a
part of the field, unchanged, that was run in or with a system container. `refused` is meant to be so, with the message that a user
sees; `fails` is not, and has the message, or whose fault it is where that is known.
"
    .to_owned();
    let mut sections: Vec<&str> = rows.iter().map(|row| row.section.as_str()).collect();
    sections.dedup();
    for section in sections {
        page.push_str(&format!("\n## {section}\n\n| part | version | what | result | message | date, kernel |\n|---|---|---|---|---|---|\n"));
        let rows: Vec<&Row> = rows.iter().filter(|row| row.section == section).collect();
        // What works, of one part, is one line; everything else has its own.
        let mut at = 0;
        while at < rows.len() {
            let row = rows[at];
            let same = |other: &&&Row| {
                (&other.part, &other.version, &other.date, &other.kernel)
                    == (&row.part, &row.version, &row.date, &row.kernel)
            };
            let group: Vec<&&Row> = rows[at..].iter().take_while(same).collect();
            at += group.len();
            let works: Vec<&str> =
                group.iter().filter(|row| row.outcome == Outcome::Ok).map(|row| row.what.as_str()).collect();
            if !works.is_empty() {
                page.push_str(&line(row, &works.join("; "), Outcome::Ok, ""));
            }
            for row in group.into_iter().filter(|row| row.outcome != Outcome::Ok) {
                page.push_str(&line(row, &row.what, row.outcome, &row.message));
            }
        }
    }
    page
}

fn line(row: &Row, what: &str, outcome: Outcome, message: &str) -> String {
    let message = if message.is_empty() {
        String::new()
    } else {
        format!("`{}`", message.replace('`', "'").replace('|', "\\|"))
    };
    let cells = [&row.part, &row.version, what].map(|cell| cell.replace('|', "\\|"));
    format!("| {} | {outcome} | {message} | {}, {} |\n", cells.join(" | "), row.date, row.kernel)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn row(part: &str, what: &str, outcome: Outcome, message: &str) -> Row {
        Row {
            section: "S".to_owned(),
            part: part.to_owned(),
            version: "1".to_owned(),
            what: what.to_owned(),
            outcome,
            message: message.to_owned(),
            date: "2026-01-01".to_owned(),
            kernel: "6.1".to_owned(),
        }
    }

    #[test]
    fn a_line_is_read_as_it_was_written() {
        let one = row("p", "w", Outcome::Refused, "a\tb\nc");
        let text = format!("{one}\n");
        assert_eq!(text, "S\tp\t1\tw\trefused\ta b c\t2026-01-01\t6.1\n");
        assert_eq!(parse(&text).map(|rows| rows[0].message.clone()), Ok("a b c".to_owned()));
        assert!(Row::parse("S\tp").is_err());
        assert!(Row::parse(&text.trim_end().replace("refused", "maybe")).is_err());
    }

    #[test]
    fn a_part_that_was_tried_again_is_replaced_whole() {
        let old = vec![
            row("a", "1", Outcome::Fails, "x"),
            row("a", "2", Outcome::Ok, ""),
            row("b", "1", Outcome::Ok, ""),
        ];
        let new = vec![row("a", "1", Outcome::Fails, "y"), row("a", "1", Outcome::Ok, "")];
        assert_eq!(merge(old, new), [row("a", "1", Outcome::Ok, ""), row("b", "1", Outcome::Ok, "")]);
    }

    #[test]
    fn the_page_says_what_works_in_one_line_and_each_refusal_in_its_own() {
        let rows = [
            row("a", "1", Outcome::Ok, ""),
            row("a", "2", Outcome::Refused, "no | `x`"),
            row("a", "3", Outcome::Ok, ""),
        ];
        let page = page(&rows);
        let lines: Vec<&str> = page.lines().skip_while(|line| !line.starts_with("|---")).skip(1).collect();
        assert_eq!(
            lines,
            [
                "| a | 1 | 1; 3 | ok |  | 2026-01-01, 6.1 |",
                "| a | 1 | 2 | refused | `no \\| 'x'` | 2026-01-01, 6.1 |"
            ]
        );
    }

    #[test]
    fn a_message_has_no_names_of_one_run() {
        assert_eq!(plain("\u{1b}[31mno\u{1b}[0m 0123456789ab: bad"), "no ID: bad");
        assert_eq!(plain(&"é".repeat(400)).chars().count(), 301);
    }
}
