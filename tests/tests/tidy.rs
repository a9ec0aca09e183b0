//! The house rules, as far as a program can see them: reads the source tree and nothing else, and needs no privilege.
//!
//! A rule that fails names each place. Bring the place in order, or change the rule here with its reason; there are no
//! lists of exceptions.
#![allow(clippy::unwrap_used)] // all of it is tests; the lint's exception misses their helpers

#[path = "tidy/text.rs"]
mod text;

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};

use sysbox_tests::compat;
use text::{
    bench_rows, code, crate_name, dependencies, functions, has_word, links, machine_calls, pages_named, rows,
    targets, test_names,
};

// ---- the tree ----

/// A file of the tree: its path from the top, and its text.
struct File {
    path: String,
    text: String,
}

impl File {
    fn is(&self, extension: &str) -> bool {
        Path::new(&self.path).extension().is_some_and(|found| found == extension)
    }

    /// Numbered from one.
    fn lines(&self) -> impl Iterator<Item = (usize, &str)> {
        self.text.lines().enumerate().map(|(at, line)| (at + 1, line))
    }
}

fn top() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).parent().unwrap().to_owned()
}

/// Every text file of the tree, sorted; what is built and what git keeps for itself left out.
fn files() -> Vec<File> {
    fn walk(dir: &Path, found: &mut Vec<PathBuf>) {
        for entry in fs::read_dir(dir).unwrap() {
            let entry = entry.unwrap();
            let kind = entry.file_type().unwrap();
            if kind.is_dir() && entry.file_name() != ".git" && entry.file_name() != "target" {
                walk(&entry.path(), found);
            } else if kind.is_file() && entry.file_name() != ".git" {
                found.push(entry.path());
            }
        }
    }
    let (top, mut paths) = (top(), Vec::new());
    walk(&top, &mut paths);
    paths.sort();
    let file = |path: &PathBuf| {
        let name = path.strip_prefix(&top).unwrap().to_str().unwrap().to_owned();
        // A file that an editor removes meanwhile, or that is no text, is none of ours.
        fs::read_to_string(path).ok().map(|text| File { path: name, text })
    };
    paths.iter().filter_map(file).collect()
}

fn sources() -> Vec<File> {
    files().into_iter().filter(|file| file.is("rs")).collect()
}

fn file(path: &str) -> String {
    fs::read_to_string(top().join(path)).unwrap_or_else(|error| panic!("{path}: {error}"))
}

#[track_caller]
fn none(rule: &str, faults: &[String]) {
    assert!(faults.is_empty(), "{rule}:\n  {}", faults.join("\n  "));
}

// ---- SPECIFICATION.md ----

/// Why `holder` (`path::test`, `bench:row` or `make target`) holds nothing.
fn missing(holder: &str, files: &[File]) -> Option<String> {
    let text = |path: &str| files.iter().find(|file| file.path == path).map(|file| file.text.as_str());
    if let Some(row) = holder.strip_prefix("bench:") {
        let there = bench_rows(text("tests/src/bin/bench/main.rs").unwrap_or_default()).contains(row);
        return (!there).then(|| format!("the bench has no row {row}"));
    }
    if let Some(target) = holder.strip_prefix("make ") {
        let there = targets(text("Makefile").unwrap_or_default()).contains(target);
        return (!there).then(|| format!("the Makefile has no target {target}"));
    }
    let Some((path, name)) = holder.split_once("::") else {
        return Some("neither `path::test`, `bench:row` nor `make target`".to_owned());
    };
    match text(path) {
        None => Some(format!("there is no {path}")),
        Some(text) if test_names(text).contains(name) => None,
        Some(_) => Some(format!("{path} has no test {name}")),
    }
}

#[test]
fn every_row_that_holds_names_tests_that_exist() {
    let (files, mut faults) = (files(), Vec::new());
    let rows = rows(&file("docs/SPECIFICATION.md"));
    assert!(rows.len() > 20, "docs/SPECIFICATION.md has {} rows", rows.len());
    for row in &rows {
        let mut fault = |why: String| {
            faults.push(format!("docs/SPECIFICATION.md:{}: {:.60}: {why}", row.line, row.promise));
        };
        match row.status.split_once(": ") {
            None if row.status == "holds" => {
                if row.held_by.is_empty() {
                    fault("it holds and nothing holds it".to_owned());
                }
                row.held_by.iter().filter_map(|holder| missing(holder, &files)).for_each(&mut fault);
            }
            None if row.status == "open" => {}
            Some(("open" | "refused", reason)) if !reason.is_empty() => {}
            _ => fault(format!("status `{}` is not `holds`, `open`, `open: …` or `refused: …`", row.status)),
        }
    }
    none("what holds is held by something", &faults);
}

// ---- who may know what ----

#[test]
fn unsafe_is_in_sys_alone() {
    let mut faults = Vec::new();
    for file in sources().iter().filter(|file| !file.path.starts_with("lib/sys/")) {
        for (number, line) in file.lines() {
            let code = code(line);
            if has_word(&code, "unsafe") || code.contains(concat!("allow(unsafe", "_code")) {
                faults.push(format!("{}:{number}: {}", file.path, line.trim()));
            }
        }
    }
    none("only lib/sys may be unsafe", &faults);
}

/// The manifests of the members, by directory.
fn manifests() -> Vec<(String, String)> {
    let root = file("Cargo.toml");
    let list = root.lines().find_map(|line| line.strip_prefix("members = ")).expect("members on one line");
    let members = list.split('"').skip(1).step_by(2);
    members.map(|member| (member.to_owned(), file(&format!("{member}/Cargo.toml")))).collect()
}

#[test]
fn programs_never_import_each_other() {
    const PROGRAMS: [&str; 5] =
        ["sysbox-runc", "sysbox-fs", "sysbox-mgr", "sysbox-tests", "containerd-shim-sysbox-v1"];
    let mut faults = Vec::new();
    for (member, manifest) in manifests() {
        let forbidden: &[&str] = match member.as_str() {
            "lib/ipc" => &["sysbox-sys", "nix", "libc"],
            _ => &[],
        };
        for name in dependencies(&manifest).into_iter().map(crate_name) {
            if PROGRAMS.contains(&name) || forbidden.contains(&name) {
                faults.push(format!("{member}/Cargo.toml: {name}"));
            }
        }
    }
    none("programs meet in lib/ipc; lib/ipc knows no kernel", &faults);
}

#[test]
fn what_decides_touches_nothing() {
    const PURE: [&str; 3] = ["runc/src/plan/", "lib/ipc/src/", "mgr/src/ledger.rs"];
    const DOORS: [&str; 9] = [
        "sysbox_sys",
        "std::fs",
        "std::net",
        "std::process",
        "std::os::unix::net",
        "nix::",
        "libc::open",
        "File::",
        "Command::",
    ];
    let mut faults = Vec::new();
    for file in sources().iter().filter(|file| PURE.iter().any(|pure| file.path.starts_with(pure))) {
        for (number, line) in file.lines() {
            let code = code(line);
            if DOORS.iter().any(|door| code.contains(door)) {
                faults.push(format!("{}:{number}: {}", file.path, line.trim()));
            }
        }
    }
    none("the plan, the words and the ledger open nothing", &faults);
}

#[test]
fn libcontainer_is_known_to_two_files() {
    let knows = |file: &&File| file.lines().any(|(_, line)| has_word(&code(line), "libcontainer"));
    let found: Vec<String> = sources().iter().filter(knows).map(|file| file.path.clone()).collect();
    assert_eq!(found, ["runc/src/init.rs", "runc/src/launch.rs"]);
}

// ---- shape ----

#[test]
fn files_open_with_what_they_are() {
    let faults =
        sources().into_iter().filter(|file| !file.text.starts_with("//! ")).map(|file| file.path.clone());
    none("a file begins with a `//!` paragraph", &faults.collect::<Vec<_>>());
}

#[test]
fn files_are_of_a_size_that_can_be_read() {
    const MOST: usize = 600;
    let long = |file: &File| (file.is("rs") || file.is("sh")) && file.text.lines().count() > MOST;
    let faults = files()
        .into_iter()
        .filter(long)
        .map(|file| format!("{}: {} lines", file.path, file.text.lines().count()));
    none("a file has 600 lines at most: split it along a noun", &faults.collect::<Vec<_>>());
}

#[test]
fn functions_fit_a_screen() {
    const MOST: usize = 100;
    let mut faults = Vec::new();
    for file in sources() {
        for (number, name, length) in functions(&file.text).into_iter().filter(|(.., length)| *length > MOST)
        {
            faults.push(format!("{}:{number}: {length} lines: {name}", file.path));
        }
    }
    none("a function has 100 lines at most", &faults);
}

#[test]
fn nothing_is_left_for_later_without_a_word() {
    // Put together here, so that this file is not its own fault.
    const LEFT: [&str; 6] = [
        concat!("to", "do!("),
        concat!("unimple", "mented!("),
        concat!("db", "g!("),
        concat!("FIX", "ME"),
        concat!("XX", "X:"),
        concat!("#[ig", "nore]"),
    ];
    let mut faults = Vec::new();
    for file in files().iter().filter(|file| file.is("rs") || file.is("sh") || file.is("toml")) {
        for (number, line) in file.lines() {
            if let Some(left) = LEFT.iter().find(|left| line.contains(**left)) {
                faults.push(format!("{}:{number}: {left}", file.path));
            }
        }
    }
    none("no marks for later, and no test is ignored without a reason", &faults);
}

// ---- what the tree depends on ----

#[test]
fn versions_are_in_the_workspace_manifest_alone() {
    let mut faults = Vec::new();
    for (member, manifest) in manifests() {
        for line in dependencies(&manifest) {
            if !line.contains("workspace = true") {
                faults.push(format!("{member}/Cargo.toml: {line}"));
            }
        }
        if !manifest.contains("[lints]\nworkspace = true") && member != "lib/sys" {
            faults.push(format!("{member}/Cargo.toml: no `[lints] workspace = true`"));
        }
    }
    none("members inherit versions and lints", &faults);
}

#[test]
fn every_package_has_its_sentence() {
    let page = file("docs/decisions/0001-packages.md");
    let root = file("Cargo.toml");
    let names = dependencies(&root).into_iter().map(crate_name).filter(|name| !name.starts_with("sysbox-"));
    let faults = names.filter(|name| !page.contains(&format!("`{name}`"))).map(str::to_owned);
    none("docs/decisions/0001-packages.md says what a package is for", &faults.collect::<Vec<_>>());
}

#[test]
fn nothing_names_a_registry_or_this_machine() {
    const HOSTS: [&str; 10] = [
        concat!("crates", ".io"),
        concat!("static.rust-lang", ".org"),
        concat!("pypi", ".org"),
        concat!("npmjs", ".org"),
        concat!("proxy.golang", ".org"),
        concat!("ghcr", ".io"),
        concat!("quay", ".io"),
        concat!("gcr", ".io"),
        concat!("debian", ".org"),
        concat!("registry-1.docker", ".io"),
    ];
    const PLACES: [&str; 3] = [concat!("/wo", "rk/"), concat!("/fa", "rm/"), concat!("/ho", "me/")];
    let mut faults = Vec::new();
    // Cargo writes lock files by itself.
    for file in files().iter().filter(|file| !file.path.ends_with("Cargo.lock")) {
        for (number, line) in file.lines() {
            // A path of the machine begins there; `overlay/…` has such a part further on.
            let begins = |place: &str| {
                let inside = |c: char| c.is_alphanumeric() || "/_.-$}>)".contains(c);
                line.match_indices(place).any(|(at, _)| !line[..at].ends_with(inside))
            };
            let host = HOSTS.iter().find(|host| line.contains(**host));
            let place = PLACES.iter().find(|place| begins(place) && !line.contains("passwd"));
            if let Some(found) = host.or(place).filter(|_| file.path != "tests/tests/tidy.rs") {
                faults.push(format!("{}:{number}: {found}", file.path));
            }
        }
    }
    none("no host name of a registry, no path of a developer's machine", &faults);
}

// ---- documents ----

#[test]
fn what_documents_refer_to_is_there() {
    let (top, mut faults) = (top(), Vec::new());
    for file in files() {
        let dir = Path::new(&file.path).parent().unwrap().to_owned();
        for (number, line) in file.lines() {
            let linked = if file.is("md") { links(line) } else { Vec::new() };
            let relative = linked.into_iter().map(|target| dir.join(target));
            let named =
                if file.is("md") || file.path.contains("/tidy") { Vec::new() } else { pages_named(line) };
            for path in relative.chain(named.into_iter().map(PathBuf::from)) {
                if !top.join(&path).exists() {
                    faults.push(format!("{}:{number}: {}", file.path, path.display()));
                }
            }
        }
    }
    none("links and references lead somewhere", &faults);
}

#[test]
fn every_call_that_is_allowed_besides_has_its_reason() {
    let page = file("docs/SECURITY.md");
    let source = file("runc/src/plan/profile.rs");
    let calls = machine_calls(&source);
    assert!(calls.len() > 50, "{calls:?}");
    let faults = calls.into_iter().filter(|call| !has_word(&page, call)).map(str::to_owned);
    none("docs/SECURITY.md has every call of MACHINE_CALLS in its table", &faults.collect::<Vec<_>>());
}

#[test]
fn the_page_on_compatibility_is_printed_from_its_results() {
    let rows = compat::parse(&file(compat::RESULTS)).unwrap();
    let printed = compat::page(&rows);
    assert!(file(compat::PAGE) == printed, "{}: run `make test-matrix`, or its last command", compat::PAGE);
}

#[test]
fn every_decision_is_listed_and_numbered() {
    let index = file("docs/decisions/README.md");
    let pages = files().into_iter().filter_map(|file| {
        let name = file.path.strip_prefix("docs/decisions/")?.to_owned();
        (name != "README.md").then_some(name)
    });
    let mut faults = Vec::new();
    for (at, name) in pages.enumerate() {
        if !name.starts_with(&format!("{:04}-", at + 1)) {
            faults.push(format!("{name}: its number is not {:04}", at + 1));
        }
        if !links(&index).contains(&name.as_str()) {
            faults.push(format!("{name}: docs/decisions/README.md has no link to it"));
        }
    }
    none("decisions are numbered from 0001 and listed", &faults);
}

#[test]
fn the_house_is_complete() {
    let mut faults = Vec::new();
    for path in [
        "README.md",
        "ARCHITECTURE.md",
        "CONTRIBUTING.md",
        "CHANGELOG.md",
        "SECURITY.md",
        "LICENSE",
        "docs/KERNEL.md",
        "docs/DIFFERENCES.md",
        "docs/SECURITY.md",
        "docs/user-guide.md",
    ] {
        if !top().join(path).is_file() {
            faults.push(path.to_owned());
        }
    }
    let (makefile, ci) = (file("Makefile"), file(".ci/run"));
    let targets = targets(&makefile);
    for target in [
        "demo",
        "up",
        "env",
        "images",
        "down",
        "build",
        "check",
        "test",
        "bench",
        "test-matrix",
        "test-vm",
        "test-bare",
    ] {
        if !targets.contains(target) {
            faults.push(format!("Makefile: no target {target}"));
        }
    }
    for target in ["make check", "make test"] {
        if !ci.contains(target) {
            faults.push(format!(".ci/run does not {target}"));
        }
    }
    for path in [".ci/run", "tests/bed/up.sh", "tests/bed/test.sh", "tests/bed/demo.sh"] {
        if fs::metadata(top().join(path)).is_ok_and(|facts| facts.permissions().mode() & 0o111 == 0) {
            faults.push(format!("{path} is not executable"));
        }
    }
    none("the house is complete", &faults);
}

/// Every crate and every file of a program stands in the code map.
#[test]
fn the_code_map_names_every_file() {
    let map = file("ARCHITECTURE.md");
    let in_program = |file: &File| {
        ["runc/src/", "mgr/src/", "fs/src/", "lib/"].iter().any(|dir| file.path.starts_with(dir))
    };
    let mut faults = Vec::new();
    for file in sources().into_iter().filter(in_program) {
        let path = Path::new(&file.path);
        let name = path.file_name().unwrap().to_str().unwrap();
        // A folder's own file is named by its folder, and tests stand beside what they test.
        let known = ["mod.rs", "lib.rs", "main.rs"].contains(&name) || has_word(&map, name);
        let is_test = name.ends_with("tests.rs") || file.path.contains("/tests/");
        if !known && !is_test {
            faults.push(file.path.clone());
        }
    }
    none("ARCHITECTURE.md has a word for each file", &faults);
}

// A rule that sees nothing would be silently green.
#[test]
fn what_holds_nothing_is_found_out() {
    let file = |path: &str, text: &str| File { path: path.to_owned(), text: text.to_owned() };
    let files = [
        file("Makefile", "demo up:\n\t@x\n"),
        file(
            "t.rs",
            "#[test]\nfn is_one() {}\nfn is_none() {}\n    #[test]\n    #[ignore = \"why\"]\n    fn within(x in 0..1) {}\n",
        ),
        file("tests/src/bin/bench/main.rs", "row(\"start\", 1), row(\n    \"stop\","),
    ];
    for holder in ["t.rs::is_one", "t.rs::within", "bench:start", "bench:stop", "make up"] {
        assert_eq!(missing(holder, &files), None, "{holder}");
    }
    for holder in ["t.rs::is_none", "t.rs::is", "u.rs::is_one", "bench:star", "make down", "words"] {
        assert!(missing(holder, &files).is_some(), "{holder}");
    }
}
