//! The stager: failed jobs whose time has come become available again.
use anyhow::Result;
use schema::PgCatalog;
use serde::Serialize;
use tracing::info;

/// Jobs in one statement: short enough to hold no lock for long.
const LIMIT: u32 = 1_000;

/// What one run did.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub struct StagerReport {
    /// Jobs that are available again.
    pub staged: u64,
}

/// Stages every due job. Safe to run twice, and by two schedulers at once.
///
/// # Errors
/// If the catalog cannot be asked.
pub async fn run_once(catalog: &PgCatalog) -> Result<StagerReport> {
    let mut report = StagerReport::default();
    loop {
        let staged = catalog.stage_if_due(LIMIT).await?.len() as u64;
        report.staged += staged;
        if staged < u64::from(LIMIT) {
            break;
        }
    }
    if report.staged > 0 {
        info!(staged = report.staged, "{} failed jobs are tried again", report.staged);
    }
    Ok(report)
}
