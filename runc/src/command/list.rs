//! `list`: the containers of a root.

use std::io::Write;

use anyhow::Result;
use serde_json::Value;

use super::Call;
use super::state::document;
use crate::state::all;

/// # Errors
/// The root not being readable, or standard output.
pub fn list(call: &Call<'_>, format: &str, quiet: bool) -> Result<()> {
    let mut documents = Vec::new();
    for id in all(&call.global.root)? {
        let home = call.home(id.as_str())?;
        match home.load() {
            Ok(state) => documents.push(document(&home, &state)),
            Err(error) => call.log.warn(&error.to_string()),
        }
    }
    let mut out = std::io::stdout().lock();
    let text = |document: &Value, key: &str| match &document[key] {
        Value::String(text) => text.clone(),
        other => other.to_string(),
    };
    if quiet {
        for document in &documents {
            writeln!(out, "{}", text(document, "id"))?;
        }
    } else if format == "json" {
        // runc prints `null` where there is none.
        let printed = if documents.is_empty() { Value::Null } else { Value::Array(documents) };
        writeln!(out, "{printed}")?;
    } else if format == "table" {
        const KEYS: [&str; 6] = ["id", "pid", "status", "bundle", "created", "owner"];
        let mut rows = vec![KEYS.map(str::to_uppercase)];
        rows.extend(documents.iter().map(|document| {
            KEYS.map(|key| if key == "owner" { "root".to_owned() } else { text(document, key) })
        }));
        let width =
            |column: usize| rows.iter().map(|row| row[column].len() + 3).max().unwrap_or_default().max(12);
        let widths: Vec<usize> = (0..KEYS.len() - 1).map(width).collect();
        for row in &rows {
            let line: String =
                row.iter().zip(&widths).map(|(cell, width)| format!("{cell:<width$}")).collect();
            writeln!(out, "{line}{}", row[KEYS.len() - 1])?;
        }
    } else {
        anyhow::bail!("invalid format option");
    }
    Ok(())
}
