//! `make guards [GUARDS=P4]`: takes each guard of a promise out of a copy of the tree and sees its tests fail.
#![expect(clippy::print_stdout, reason = "a program whose output is its report")]

use std::path::Path;
use std::process::ExitCode;

use anyhow::{Context, Result, ensure};
use fleet_tests::guards::{Fate, GUARDS, Guard, Scratch};

fn main() -> Result<ExitCode> {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).parent().context("the tests lie in the workspace")?;
    let wanted = std::env::var("GUARDS").unwrap_or_default();
    let guards: Vec<&Guard> = GUARDS.iter().filter(|guard| guard.promise.starts_with(&wanted)).collect();
    ensure!(!guards.is_empty(), "GUARDS has to be a promise, P1 to P8, but is `{wanted}`");
    let scratch = Scratch::of(root)?;
    println!("All guards in place: their tests have to pass …");
    let passed = scratch.check_that_all_pass(&guards);
    let mut fates = Vec::new();
    if passed.is_ok() {
        println!("| promise | guard that was removed | tests that then failed |\n| --- | --- | --- |");
        for guard in guards {
            let fate = scratch.without(guard);
            let told = match &fate {
                Ok(Fate::Caught) => format!("`{}`", guard.tests.join("`, `")),
                Ok(Fate::Survived) => format!("**NOT ALL** of `{}`", guard.tests.join("`, `")),
                Err(error) => format!("**BROKEN**: {error:#}"),
            };
            println!("| {} | {} | {told} |", guard.promise, guard.what);
            fates.push(fate);
        }
    }
    scratch.restore_programs()?;
    passed?;
    let missed = fates.iter().filter(|fate| !matches!(fate, Ok(Fate::Caught))).count();
    println!("{} guards removed, one at a time; missed by their tests: {missed}", fates.len());
    Ok(if missed == 0 { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}
