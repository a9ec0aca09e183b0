//! What a search begins with: a document for each field there is, alone in one that is in order, and the words that
//! documents are made of.

use std::collections::BTreeSet;
use std::fs;
use std::path::Path;

use serde_json::Value;

/// What no container is without.
const NEEDED: &[&str] =
    &["/ociVersion", "/root", "/process/args", "/process/cwd", "/process/user", "/linux/namespaces"];

fn words(value: &Value, found: &mut BTreeSet<String>) {
    match value {
        Value::Object(map) => {
            found.extend(map.keys().cloned());
            map.values().for_each(|value| words(value, found));
        }
        Value::Array(list) => list.iter().for_each(|value| words(value, found)),
        Value::String(text) => {
            found.insert(text.clone());
        }
        _ => {}
    }
}

/// Takes out all members of `at` that are neither needed nor `kept`, nor lead there.
fn thin(value: &mut Value, at: &str, kept: &str) {
    let Value::Object(map) = value else { return };
    map.retain(|key, value| {
        let at = format!("{at}/{key}");
        let leads = |to: &str| to == at || to.starts_with(&format!("{at}/"));
        let within = at == kept || at.starts_with(&format!("{kept}/"));
        if !within && !leads(kept) && !NEEDED.iter().any(|needed| leads(needed)) {
            return false;
        }
        if !within && !NEEDED.contains(&at.as_str()) {
            thin(value, &at, kept);
        }
        true
    });
}

/// Writes to the directory, and the words beside it.
pub fn write(dir: &Path) -> std::io::Result<()> {
    let base = sysbox_runc::base();
    let mut places = vec!["/ociVersion".to_owned(), String::new()];
    for (key, value) in base.as_object().into_iter().flatten() {
        places.push(format!("/{key}"));
        places.extend(value.as_object().into_iter().flatten().map(|(inner, _)| format!("/{key}/{inner}")));
    }
    fs::create_dir_all(dir)?;
    for place in places {
        let mut document = base.clone();
        if !place.is_empty() {
            thin(&mut document, "", &place);
        }
        fs::write(dir.join(format!("seed{}", place.replace('/', "-"))), document.to_string())?;
    }
    let mut found = BTreeSet::new();
    words(&base, &mut found);
    // A dictionary of libFuzzer has no escapes but its own.
    found.retain(|word| {
        !word.is_empty() && word.chars().all(|c| c == ' ' || c.is_ascii_graphic() && c != '"' && c != '\\')
    });
    fs::write(
        dir.with_extension("words"),
        found.iter().map(|word| format!("\"{word}\"\n")).collect::<String>(),
    )
}
