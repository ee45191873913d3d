//! `overlap`: how close one worker comes to its pipeline's own rate (`OVERLAP_SECONDS` of drawing a case, `OVERLAP_PIXELS`).
//! With `OVERLAP_CHECKPOINT` it draws `OVERLAP_JOBS` pictures with that checkpoint on the CPU instead of plain colors.
#![expect(clippy::print_stdout, reason = "a program whose output is its report")]

use std::path::PathBuf;

use anyhow::Result;
use fleet_tests::overlap::{self, Case, Pipeline};
use fleet_tests::{fleet, setting};

#[tokio::main]
async fn main() -> Result<()> {
    let seconds: u32 = setting("OVERLAP_SECONDS", 8)?;
    let steps = setting("OVERLAP_STEPS", 20)?;
    let mut cases = Vec::new();
    let checkpoint = std::env::var_os("OVERLAP_CHECKPOINT").map(PathBuf::from);
    if checkpoint.is_some() {
        let (jobs, pipeline) = (setting("OVERLAP_JOBS", 24)?, Pipeline::Checkpoint);
        for microbatch in [1, 4] {
            cases.push(Case { pipeline, microbatch, pixels: None, steps, jobs });
        }
    } else {
        let pixels = Some(setting("OVERLAP_PIXELS", 512)?);
        for milliseconds in [10, 20, 50, 150] {
            for microbatch in [1, 4, 8] {
                let jobs = (seconds * 1000 / milliseconds).next_multiple_of(microbatch);
                let pipeline = Pipeline::SolidColor { milliseconds };
                cases.push(Case { pipeline, microbatch, pixels, steps, jobs });
            }
        }
    }
    let folder = checkpoint.unwrap_or_else(fleet::checkpoint);
    let measured = overlap::run(&cases, &folder, |line| println!("{line}")).await;
    println!("{}", serde_json::to_string(&measured)?);
    Ok(())
}
