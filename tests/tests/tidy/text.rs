//! What the house rules read out of a text: each takes text and returns what is in it. Knows no files and no rules.

use std::collections::BTreeSet;

/// Whether `word` stands in `text` by itself, not as a part of a longer name.
pub fn has_word(text: &str, word: &str) -> bool {
    let is_part = |c: char| c.is_alphanumeric() || c == '_';
    text.match_indices(word)
        .any(|(at, _)| !text[..at].ends_with(is_part) && !text[at + word.len()..].starts_with(is_part))
}

/// A line of Rust without its comment and without what is in its quotes. Good enough for one line at a time.
pub fn code(line: &str) -> String {
    let (mut kept, mut quoted, mut escaped, mut last) = (String::new(), false, false, ' ');
    for (at, c) in line.char_indices() {
        if !quoted && line[at..].starts_with("//") {
            break;
        }
        // A quote between apostrophes is a character.
        let quote = c == '"' && !escaped && last != '\'';
        if quote {
            quoted = !quoted;
        } else if !quoted {
            kept.push(c);
        }
        escaped = quoted && c == '\\' && !escaped;
        last = c;
    }
    kept
}

/// A row of the table: what is promised, who holds it, and whether it does.
#[derive(Debug, PartialEq, Eq)]
pub struct Row {
    pub line: usize,
    pub promise: String,
    pub held_by: Vec<String>,
    pub status: String,
}

/// The rows of all tables with the columns `promise | held by | status`. What holds a row stands in backticks.
pub fn rows(text: &str) -> Vec<Row> {
    let mut found = Vec::new();
    for (at, line) in text.lines().enumerate() {
        // `\|` is a bar within a cell.
        let plain = line.trim().trim_matches('|').replace("\\|", "/");
        let cells: Vec<&str> = plain.split('|').map(str::trim).collect();
        let is_row = line.starts_with('|') && cells[0] != "promise" && !cells[0].starts_with("---");
        if !is_row {
            continue;
        }
        let [promise, held_by, status] = cells[..] else {
            panic!("docs/SPECIFICATION.md:{}: a row has three cells, this one {}", at + 1, cells.len());
        };
        let held_by = held_by.split('`').skip(1).step_by(2).map(str::to_owned).collect();
        found.push(Row { line: at + 1, promise: promise.to_owned(), held_by, status: status.to_owned() });
    }
    found
}

/// The functions of a file that are marked as tests, those within `proptest!` included.
pub fn test_names(text: &str) -> BTreeSet<&str> {
    let (mut names, mut marked) = (BTreeSet::new(), false);
    for line in text.lines().map(str::trim) {
        if line == "#[test]" {
            marked = true;
        } else if let Some(rest) = line.strip_prefix("fn ").filter(|_| marked) {
            names.insert(rest.split(['(', '<']).next().unwrap());
            marked = false;
        }
    }
    names
}

/// The lines `crate… = …` of all tables of dependencies.
pub fn dependencies(manifest: &str) -> Vec<&str> {
    let (mut found, mut within) = (Vec::new(), false);
    for line in manifest.lines().map(str::trim) {
        if line.starts_with('[') {
            within = line.ends_with("dependencies]");
        } else if within && !line.is_empty() && !line.starts_with('#') {
            found.push(line);
        }
    }
    found
}

pub fn crate_name(line: &str) -> &str {
    line.split(['.', '=', ' ']).next().unwrap()
}

/// First line, name and length of the functions in a text that rustfmt has been over: each ends at its own indentation.
pub fn functions(text: &str) -> Vec<(usize, String, usize)> {
    let lines: Vec<&str> = text.lines().collect();
    let mut found = Vec::new();
    for (at, line) in lines.iter().enumerate() {
        let code = line.trim_start();
        let indent = &line[..line.len() - code.len()];
        let words: Vec<&str> = code.split_whitespace().collect();
        let is_function = words.iter().take(5).position(|word| *word == "fn").is_some_and(|fn_at| {
            words[..fn_at].iter().all(|word| matches!(*word, "const" | "async") || word.starts_with("pub"))
        });
        if is_function && !code.ends_with('}') && !code.ends_with(';') {
            let end = format!("{indent}}}");
            let length = lines[at..].iter().position(|line| *line == end).unwrap_or_default() + 1;
            found.push((at + 1, code.to_owned(), length));
        }
    }
    found
}

/// Where the links `[text](target)` of a page lead, those into the web and within the page left out.
pub fn links(text: &str) -> Vec<&str> {
    let targets = text.split("](").skip(1).filter_map(|rest| rest.split([')', ' ', '#']).next());
    targets
        .filter(|target| !target.is_empty() && !target.contains("://") && !target.starts_with("mailto:"))
        .collect()
}

/// `docs/….md` in comments and messages of the sources.
pub fn pages_named(line: &str) -> Vec<&str> {
    let is_path = |c: char| c.is_ascii_alphanumeric() || "/_-.".contains(c);
    let found = line.match_indices("docs/").map(|(at, _)| {
        let rest = &line[at..];
        rest[..rest.find(|c| !is_path(c)).unwrap_or(rest.len())].trim_end_matches('.')
    });
    found.filter(|path| path.ends_with(".md")).collect()
}

/// What a Makefile can make.
pub fn targets(makefile: &str) -> BTreeSet<&str> {
    let rules =
        makefile.lines().filter(|line| !line.starts_with(['\t', '#', '.', ' ']) && !line.contains('='));
    rules.filter_map(|line| line.split_once(':')).flat_map(|(names, _)| names.split_whitespace()).collect()
}

/// The names of the rows of the bench's table: the first argument of each `row(…)`.
pub fn bench_rows(source: &str) -> BTreeSet<&str> {
    let arguments = source.split("row(").skip(1).filter_map(|rest| rest.trim_start().strip_prefix('"'));
    arguments.filter_map(|rest| rest.split('"').next()).collect()
}

/// The names in `MACHINE_CALLS`.
pub fn machine_calls(source: &str) -> Vec<&str> {
    let list =
        source.split("MACHINE_CALLS").nth(1).and_then(|rest| rest.split("];").next()).unwrap_or_default();
    list.lines()
        .map(|line| line.split("//").next().unwrap())
        .flat_map(|line| line.split('"').skip(1).step_by(2))
        .collect()
}

#[test]
fn rows_are_taken_apart() {
    let text = "words\n\n| promise | held by | status |\n|---|---|---|\n| a `b` | `x.rs::t`, `bench:r` | holds |\n| c | | open: later |\n";
    let row = |line, promise: &str, held_by: &[&str], status: &str| Row {
        line,
        promise: promise.to_owned(),
        held_by: held_by.iter().map(|holder| (*holder).to_owned()).collect(),
        status: status.to_owned(),
    };
    assert_eq!(
        rows(text),
        [row(5, "a `b`", &["x.rs::t", "bench:r"], "holds"), row(6, "c", &[], "open: later")]
    );
}

#[test]
fn code_is_told_from_words() {
    for (line, expected) in [
        ("let a = 1; // b", "let a = 1; "),
        ("x(\"unsafe // \\\" y\", z)", "x(, z)"),
        ("c == '\"' && d", "c == '\"' && d"),
        ("/// unsafe", ""),
    ] {
        assert_eq!(code(line), expected);
    }
    assert!(has_word("pub unsafe fn", "unsafe") && !has_word("unsafe_code not_unsafe", "unsafe"));
}

#[test]
fn functions_are_measured() {
    let text = "impl X {\n    pub(super) fn a(\n        b: u8,\n    ) {\n        if c {\n        }\n    }\n}\nfn one() {}\nconst fn d() {\n}\n";
    let found: Vec<(usize, usize)> =
        functions(text).into_iter().map(|(line, _, length)| (line, length)).collect();
    assert_eq!(found, [(2, 6), (10, 2)]);
}

#[test]
fn links_and_pages_are_found() {
    assert_eq!(links("[a](b.md#c) [d](https://e) [f](#g) ![h](../i.png)"), ["b.md", "../i.png"]);
    assert_eq!(
        pages_named("see docs/A-b.md. And docs/decisions/0001-x.md, docs/x"),
        ["docs/A-b.md", "docs/decisions/0001-x.md"]
    );
}

#[test]
fn manifests_are_read() {
    let manifest = "[package]\nname = \"x\"\n[dependencies]\na.workspace = true\n# c\nb = { path = \"y\" }\n[lints]\nworkspace = true\n[dev-dependencies]\nc = \"1\"\n";
    assert_eq!(dependencies(manifest), ["a.workspace = true", "b = { path = \"y\" }", "c = \"1\""]);
    assert_eq!(dependencies(manifest).into_iter().map(crate_name).collect::<Vec<_>>(), ["a", "b", "c"]);
}
