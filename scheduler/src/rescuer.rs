//! The rescuer: running jobs whose lease has expired become available again. Their worker died, hung, or lost the
//! catalog; whichever it was, its fencing token is outdated when the next worker claims the job. The attempt is
//! given back, because a crash is not a failure. Whether one of the lost jobs was the reason is found out by letting them run
//! in ever smaller company; one that is lost alone again and again is discarded.
use anyhow::Result;
use schema::{JobState, PgCatalog};
use serde::Serialize;
use tracing::{error, warn};

/// Jobs in one statement: short enough to hold no lock for long.
const LIMIT: u32 = 1_000;

/// What one run did.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub struct RescuerReport {
    /// Jobs that are available again.
    pub rescued: u64,
    /// Jobs that were lost alone so often that they are given up.
    pub discarded: u64,
}

/// Rescues every job whose lease has expired. Safe to run twice, and by two schedulers at once.
///
/// # Errors
/// If the catalog cannot be asked.
pub async fn run_once(catalog: &PgCatalog) -> Result<RescuerReport> {
    let mut report = RescuerReport::default();
    loop {
        let lost = catalog.rescue_if_lease_expired(LIMIT).await?;
        for (job_id, state) in &lost {
            if *state == JobState::Discarded {
                error!(job.id = %job_id, "Job {job_id} was lost with its worker again, alone, and is given up");
                report.discarded += 1;
            } else {
                warn!(job.id = %job_id, "The lease on job {job_id} expired; another worker may take it");
                report.rescued += 1;
            }
        }
        if lost.len() < LIMIT as usize {
            return Ok(report);
        }
    }
}
