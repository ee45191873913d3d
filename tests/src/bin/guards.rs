//! `make guards [GUARDS=P1,P4]`: takes each guard of a promise out of a copy of the tree and sees its tests fail.
#![expect(clippy::print_stdout, reason = "a program whose output is its report")]

use std::path::Path;
use std::process::ExitCode;

use anyhow::{Context, Result, ensure};
use fleet_tests::guards::{Fate, GUARDS, Guard, Scratch, Target};

/// What became of `guard`'s removal, as a row of a table, and whether its tests saw it.
fn row(guard: &Guard, fate: Result<Fate>) -> (String, bool) {
    let tests = format!("`{}`", guard.tests.join("`, `"));
    let (told, is_caught) = match fate {
        Ok(Fate::Caught) => (tests, true),
        Ok(Fate::Survived) => (format!("**not all** of {tests}"), false),
        Err(error) => (format!("**unknown**: {error:#}"), false),
    };
    (format!("| {} | {} | {told} |", guard.promise, guard.what), is_caught)
}

/// Removes `guards` one test program after the other, so that each is built as rarely as can be.
fn campaign(scratch: &Scratch, guards: &[&Guard]) -> Result<Vec<(String, bool)>> {
    let mut rows = Vec::new();
    for target in Target::ALL {
        let guards: Vec<&Guard> = guards.iter().filter(|guard| guard.target == target).copied().collect();
        if guards.is_empty() {
            continue;
        }
        println!("{target:?}: all guards in place, the tests have to pass …");
        scratch.check_that_all_pass(target, &guards)?;
        for guard in guards {
            let (row, is_caught) = row(guard, scratch.without(guard));
            println!("{row}");
            rows.push((row, is_caught));
        }
    }
    Ok(rows)
}

fn main() -> Result<ExitCode> {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).parent().context("the tests lie in the workspace")?;
    let wanted = std::env::var("GUARDS").unwrap_or_default();
    let is_wanted =
        |guard: &&Guard| wanted.is_empty() || wanted.split(',').any(|promise| promise == guard.promise);
    let guards: Vec<&Guard> = GUARDS.iter().filter(is_wanted).collect();
    ensure!(!guards.is_empty(), "GUARDS has to name promises, as in P1,P4, but is `{wanted}`");
    let scratch = Scratch::of(root)?;
    let rows = campaign(&scratch, &guards);
    scratch.restore_programs()?;
    let mut rows = rows?;
    rows.sort();
    println!("\n| promise | removed | tests that fail then |\n| --- | --- | --- |");
    for (row, _) in &rows {
        println!("{row}");
    }
    let missed = rows.iter().filter(|(_, is_caught)| !is_caught).count();
    println!("\n{} guards removed, one at a time; not seen by their tests: {missed}", rows.len());
    Ok(if missed == 0 { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}
