//! `make load`: many workers and one scheduler hold a backlog for a while, and nothing may grow that should not.
#![expect(clippy::print_stdout, reason = "a program whose output is its report")]

use std::process::ExitCode;

use anyhow::Result;
use fleet_tests::load::{self, Load};
use fleet_tests::setting;

#[tokio::main]
async fn main() -> Result<ExitCode> {
    let load = Load {
        jobs: setting("LOAD_JOBS", 45_000)?,
        workers: setting("LOAD_WORKERS", 50)?,
        milliseconds: setting("LOAD_PICTURE_MS", 20)?,
    };
    let report = load::run(load, |line| println!("{line}")).await;
    Ok(if report.is_clean() { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}
