//! `make load`: many workers and one scheduler hold a backlog for a while, and nothing may grow that should not.
#![expect(clippy::print_stdout, reason = "a program whose output is its report")]

use std::process::ExitCode;

use anyhow::{Context, Result};
use fleet_tests::load::{self, Load};

/// A whole number from the environment.
fn setting(name: &str, otherwise: u32) -> Result<u32> {
    match std::env::var(name) {
        Ok(text) => text.parse().with_context(|| format!("{name} has to be a whole number, but is `{text}`")),
        Err(_) => Ok(otherwise),
    }
}

#[tokio::main]
async fn main() -> Result<ExitCode> {
    let load = Load {
        jobs: setting("LOAD_JOBS", 45_000)?,
        workers: setting("LOAD_WORKERS", 50)?,
        milliseconds: setting("LOAD_PICTURE_MS", 20)?,
    };
    let report = load::run(load, |line| println!("{line}")).await;
    println!("{report}");
    Ok(if report.is_clean() { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}
