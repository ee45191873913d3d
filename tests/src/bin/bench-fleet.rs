//! `make bench-fleet`: the control plane with pictures that cost nothing to draw, beside each of its servers alone
//! (`BENCH_JOBS`, `BENCH_WORKERS`, `BENCH_MICROBATCH`, `BENCH_REPETITIONS`; JSON goes to `BENCH_JSON`).
#![expect(clippy::print_stdout, reason = "a program whose output is its report")]

use anyhow::Result;
use fleet_tests::bench_fleet::{self, Size};
use fleet_tests::setting;

#[tokio::main]
async fn main() -> Result<()> {
    let size = Size {
        jobs: setting("BENCH_JOBS", 4_000)?,
        workers: setting("BENCH_WORKERS", 2)?,
        microbatch: setting("BENCH_MICROBATCH", 16)?,
    };
    let report = bench_fleet::run(size, setting("BENCH_REPETITIONS", 3)?, |line| println!("{line}")).await;
    println!("\n{report}");
    if let Some(file) = std::env::var_os("BENCH_JSON") {
        std::fs::write(file, serde_json::to_string_pretty(&report)?)?;
    }
    Ok(())
}
