//! `darkroom batches`
use anyhow::Result;
use schema::BatchSummary;

use super::connect;
use crate::cli::BatchesArgs;
use crate::config::Settings;
use crate::terminal::{Terminal, table};

/// Digits of a batch's id to show: the first 13 are its time, which two batches seldom share.
const SHORT_ID: usize = 13;

pub(super) async fn run(arguments: &BatchesArgs, settings: &Settings, terminal: Terminal) -> Result<()> {
    let batches = connect(settings).await?.batches(arguments.limit).await?;
    terminal.show(&batches, || {
        if batches.is_empty() {
            return "no batches yet; submit one with `darkroom submit FILE`\n".to_owned();
        }
        batch_table(&batches)
    })
}

/// One line a batch.
pub(super) fn batch_table(batches: &[BatchSummary]) -> String {
    let rows = batches.iter().map(|batch| {
        let state = if batch.cancelled_at.is_some() {
            "cancelled".to_owned()
        } else if batch.final_count == batch.job_count {
            "finished".to_owned()
        } else {
            format!("{} left", batch.job_count - batch.final_count)
        };
        [
            batch.batch_id.to_string()[..SHORT_ID].to_owned(),
            batch.name.clone(),
            batch.model.to_string(),
            batch.principal.clone(),
            batch.band.to_string(),
            batch.job_count.to_string(),
            state,
            batch.created_at.format("%Y-%m-%d %H:%M").to_string(),
        ]
    });
    table(["batch", "name", "model", "principal", "priority", "jobs", "state", "submitted (UTC)"], rows)
}
