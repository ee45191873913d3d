//! `darkroom licence show | accept`
use std::io::{self, Write as _};

use anyhow::{Result, bail};
use schema::{Licence, ModelName};
use serde_json::json;

use super::{connect, no_such_model};
use crate::cli::LicenceCommand;
use crate::config::{self, Settings};
use crate::terminal::{Terminal, UsageError, printable};

/// What has to be typed.
const WORD: &str = "ACCEPT";
/// Fewer digits of a digest could be those of another text.
const MIN_DIGITS: usize = 12;

pub(super) async fn run(command: LicenceCommand, settings: &Settings, terminal: Terminal) -> Result<()> {
    let (LicenceCommand::Show { model } | LicenceCommand::Accept { model, .. }) = &command;
    let catalog = connect(settings).await?;
    let Some(licence) = catalog.licence_of_model(model).await? else { return Err(no_such_model(model)) };
    let LicenceCommand::Accept { model, who, yes } = command else {
        return terminal.show(&licence, || text(&licence));
    };
    let principal = config::principal(who.principal)?;
    if let Some(known) = catalog.valid_acceptance(&principal, licence.licence_id).await? {
        return terminal.show(&json!({ "acceptance": known, "was_known": true }), || {
            format!(
                "{principal} accepted {} on {}\n",
                licence.name,
                known.accepted_at.format("%Y-%m-%d %H:%M UTC")
            )
        });
    }
    let statement = statement(&principal, &licence, &model);
    let method = match yes {
        Some(digits) => {
            check_digits(&digits, &licence)?;
            "cli, by digest"
        }
        None => {
            ask(&licence, &statement)?;
            "cli, typed"
        }
    };
    let acceptance = catalog.accept_licence(&principal, licence.licence_id, method, &statement).await?;
    terminal.show(&json!({ "acceptance": acceptance, "was_known": false }), || {
        format!("{principal} accepts {}\n", licence.name)
    })
}

/// The sentence that is agreed to and kept.
fn statement(principal: &str, licence: &Licence, model: &ModelName) -> String {
    format!(
        "I, {principal}, have read {} (SHA-256 {}), the licence of model {model}, and accept it, its use restrictions \
         included.",
        licence.name, licence.text_sha256
    )
}

fn text(licence: &Licence) -> String {
    // Line by line, because the text comes from a file and goes to a terminal.
    let text: String = licence.text.lines().map(|line| printable(line) + "\n").collect();
    format!("{text}\n{}\nSHA-256 {}\n", licence.name, licence.text_sha256)
}

/// Shows the text and waits until somebody types the word. The text goes to standard error, like the question.
fn ask(licence: &Licence, statement: &str) -> Result<()> {
    let mut output = io::stderr().lock();
    write!(output, "{}\n{statement}\nType {WORD} to agree: ", text(licence))?;
    output.flush()?;
    let mut line = String::new();
    let read = io::stdin().read_line(&mut line)?;
    if read == 0 {
        writeln!(output)?;
    }
    if line.trim() != WORD {
        bail!(
            "the licence was not accepted\nhint: type {WORD}, or give the digest of the text you have read: \
             --yes {}",
            licence.text_sha256
        );
    }
    Ok(())
}

fn check_digits(digits: &str, licence: &Licence) -> Result<()> {
    let digest = licence.text_sha256.to_string();
    if digits.len() < MIN_DIGITS || !digest.starts_with(&digits.to_lowercase()) {
        return Err(UsageError(format!(
            "--yes has to be the SHA-256 of the licence text, or at least its first {MIN_DIGITS} digits, but is \
             {digits:?}\nhint: `darkroom licence show` prints the text and its digest"
        ))
        .into());
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use schema::{LicenceId, Sha256Digest};

    use super::*;

    fn licence() -> Licence {
        let text = "Some licence\n\u{1b}[2J\n";
        Licence {
            licence_id: LicenceId::generate(),
            name: "Some licence".to_owned(),
            text: text.to_owned(),
            text_sha256: Sha256Digest::of(text.as_bytes()),
            registered_at: chrono::DateTime::UNIX_EPOCH,
        }
    }

    #[test]
    fn only_this_texts_digest_accepts_it() {
        let licence = licence();
        let digest = licence.text_sha256.to_string();
        for good in [digest.clone(), digest.to_uppercase(), digest[..12].to_owned()] {
            check_digits(&good, &licence).unwrap();
        }
        let other = Sha256Digest::of(b"other").to_string();
        for bad in ["", "yes", &digest[..11], &other, &format!("{digest}0")] {
            assert!(check_digits(bad, &licence).unwrap_err().is::<UsageError>(), "{bad}");
        }
    }

    #[test]
    fn the_statement_names_who_what_and_which_text() {
        let statement = statement("ann", &licence(), &"demo".parse().unwrap());
        insta::assert_snapshot!(statement, @"I, ann, have read Some licence (SHA-256 6bb3787f0b2efd1ea62912626ff05061c22a8619fa572e9d61c4bb22a0cb3ae6), the licence of model demo, and accept it, its use restrictions included.");
        assert!(!text(&licence()).contains('\u{1b}'));
    }
}
