//! The rescuer: running jobs whose lease has expired become available again. Their worker died, hung, or lost the
//! catalog; whichever it was, its fencing token is outdated when the next worker claims the job. The attempt is
//! given back, because the job did nothing wrong.
use anyhow::Result;
use schema::PgCatalog;
use serde::Serialize;
use tracing::warn;

/// Jobs in one statement: short enough to hold no lock for long.
const LIMIT: u32 = 1_000;

/// What one run did.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub struct RescuerReport {
    /// Jobs that are available again.
    pub rescued: u64,
}

/// Rescues every job whose lease has expired. Safe to run twice, and by two schedulers at once.
///
/// # Errors
/// If the catalog cannot be asked.
pub async fn run_once(catalog: &PgCatalog) -> Result<RescuerReport> {
    let mut report = RescuerReport::default();
    loop {
        let rescued = catalog.rescue_if_lease_expired(LIMIT).await?;
        for job_id in &rescued {
            warn!(job.id = %job_id, "The lease on job {job_id} expired; another worker may take it");
        }
        report.rescued += rescued.len() as u64;
        if rescued.len() < LIMIT as usize {
            return Ok(report);
        }
    }
}
