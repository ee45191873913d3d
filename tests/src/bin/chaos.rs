//! `make chaos`: breaks a fleet under load for `CHAOS_SECONDS` (600), as `CHAOS_SEED` says, and checks the promises.
#![expect(clippy::print_stdout, reason = "a program whose output is its report")]

use std::process::ExitCode;
use std::time::Duration;

use anyhow::{Context, Result};
use fleet_tests::chaos;

/// A whole number from the environment.
fn setting(name: &str) -> Result<Option<u64>> {
    match std::env::var(name) {
        Ok(text) => Ok(Some(
            text.parse().with_context(|| format!("{name} has to be a whole number, but is `{text}`"))?,
        )),
        Err(_) => Ok(None),
    }
}

#[tokio::main]
async fn main() -> Result<ExitCode> {
    let seconds = setting("CHAOS_SECONDS")?.unwrap_or(600);
    let seed = match setting("CHAOS_SEED")? {
        Some(seed) => seed,
        // Small enough to be typed again.
        None => u64::from(uuid::Uuid::new_v4().as_fields().0),
    };
    let report = chaos::run(seed, Duration::from_secs(seconds), |line| println!("{line}")).await;
    println!("{report}");
    Ok(if report.is_clean() { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}
