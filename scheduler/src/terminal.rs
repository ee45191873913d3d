//! What people see: lines, tables and JSON on standard output, errors with their hints on standard error.
//!
//! Prompts and file names are other people's text, so control characters are taken out before they reach a terminal.
use std::fmt::Write as _;
use std::io::{self, Write as _};

use anyhow::Result;
use comfy_table::{ContentArrangement, Table, presets};
use serde::Serialize;

/// A person made a mistake at the command line or in an input file; the program exits with 2.
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
pub struct UsageError(pub String);

/// The reader of our output went away, as `head` does: nothing to complain about.
#[derive(Debug, thiserror::Error)]
#[error("nobody reads standard output any more")]
pub struct ClosedOutput;

/// Standard output, in the form that the user asked for.
#[derive(Clone, Copy, Debug)]
pub struct Terminal {
    /// Whether data is printed as JSON.
    pub json: bool,
}

impl Terminal {
    /// Prints `data` as one line of JSON if JSON was asked for, else the lines that `describe` makes.
    ///
    /// # Errors
    /// If standard output is closed.
    pub fn show<T: Serialize>(self, data: &T, describe: impl FnOnce() -> String) -> Result<()> {
        let mut text = if self.json { serde_json::to_string(data)? } else { describe() };
        if !text.is_empty() && !text.ends_with('\n') {
            text.push('\n');
        }
        let mut output = io::stdout().lock();
        let written = output.write_all(text.as_bytes()).and_then(|()| output.flush());
        written.map_err(|error| match error.kind() {
            io::ErrorKind::BrokenPipe => ClosedOutput.into(),
            _ => anyhow::Error::from(error).context("cannot write to standard output"),
        })
    }

    /// Tells a person how things go, on standard error, so that it never mixes with data.
    pub fn tell(self, text: &str) {
        // Nobody may be listening, which is no reason to stop working.
        let _ = writeln!(io::stderr().lock(), "{text}");
    }
}

/// A table with `header`, without lines around it.
pub fn table<const N: usize>(header: [&str; N], rows: impl IntoIterator<Item = [String; N]>) -> String {
    let mut table = Table::new();
    table.load_style(presets::NOTHING).set_content_arrangement(ContentArrangement::Dynamic);
    table.set_header(header.map(str::to_uppercase));
    for row in rows {
        table.add_row(row.map(|cell| printable(&cell)));
    }
    for column in table.column_iter_mut() {
        column.set_padding((0, 2));
    }
    let text = table.to_string();
    text.lines().map(|line| format!("{}\n", line.trim_end())).collect()
}

/// `text` without what a terminal would obey: control characters become `·`, line ends a space.
pub fn printable(text: &str) -> String {
    let replace = |character: char| match character {
        '\n' | '\t' => ' ',
        '\r' => ' ',
        // Also the marks that turn the writing direction of what follows.
        '\u{200e}'..='\u{200f}' | '\u{202a}'..='\u{202e}' | '\u{2066}'..='\u{2069}' => '·',
        other if other.is_control() => '·',
        other => other,
    };
    text.chars().map(replace).collect()
}

/// An error with its causes on one line, and the hints of all of them below.
pub fn describe_error(error: &anyhow::Error) -> String {
    let mut text = String::from("error: ");
    let mut hints = Vec::new();
    for (index, cause) in error.chain().enumerate() {
        let message = cause.to_string();
        let (hint_lines, lines): (Vec<&str>, Vec<&str>) =
            message.lines().partition(|line| line.starts_with("hint: "));
        // A transparent error repeats its source word for word.
        let lines = lines.join("\n");
        if index > 0 && !text.ends_with(&lines) {
            text.push_str(": ");
            text.push_str(&lines);
        } else if index == 0 {
            text.push_str(&lines);
        }
        for hint in hint_lines {
            if !hints.contains(&hint.to_owned()) {
                hints.push(hint.to_owned());
            }
        }
    }
    for hint in hints {
        let _ = write!(text, "\n{hint}");
    }
    text
}

#[cfg(test)]
mod tests {
    use anyhow::{Context, anyhow};

    use super::*;

    #[test]
    fn hints_come_last_and_causes_in_one_line() {
        let error = Err::<(), _>(anyhow!("no such model\nhint: list them"))
            .context("cannot submit\nhint: read the manual")
            .unwrap_err();
        insta::assert_snapshot!(describe_error(&error), @"
        error: cannot submit: no such model
        hint: read the manual
        hint: list them
        ");
    }

    #[test]
    fn a_terminal_is_not_given_orders() {
        assert_eq!(printable("a\u{1b}[31mred\u{7}\nb\u{202e}c"), "a·[31mred· b·c");
        assert_eq!(printable("Grüße, 猫"), "Grüße, 猫");
    }

    #[test]
    fn tables_have_no_trailing_blanks() {
        let text = table(
            ["name", "jobs"],
            [["a".to_owned(), "1".to_owned()], ["long name".to_owned(), String::new()]],
        );
        insta::assert_snapshot!(text, @"
        NAME       JOBS
        a          1
        long name
        ");
        assert!(text.lines().all(|line| line.trim_end() == line));
    }
}
