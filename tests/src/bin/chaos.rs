//! `make chaos`: breaks a fleet under load for `CHAOS_SECONDS` (600), as `CHAOS_SEED` says, and checks the promises.
#![expect(clippy::print_stdout, reason = "a program whose output is its report")]

use std::process::ExitCode;
use std::time::Duration;

use anyhow::Result;
use fleet_tests::{chaos, setting};

#[tokio::main]
async fn main() -> Result<ExitCode> {
    let seconds = setting("CHAOS_SECONDS", 600)?;
    // A new one is small enough to be typed again.
    let seed = setting("CHAOS_SEED", u64::from(uuid::Uuid::new_v4().as_fields().0))?;
    let report = chaos::run(seed, Duration::from_secs(seconds), |line| println!("{line}")).await;
    Ok(if report.is_clean() { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}
