//! `darkroom cancel`
use anyhow::{Context, Result};
use schema::JobId;

use super::{connect, counted};
use crate::cli::CancelArgs;
use crate::config::Settings;
use crate::terminal::Terminal;

pub(super) async fn run(arguments: &CancelArgs, settings: &Settings, terminal: Terminal) -> Result<()> {
    let catalog = connect(settings).await?;
    let batch_id = catalog.resolve_batch(&arguments.batch).await?;
    let counts = match arguments.job {
        None => catalog
            .cancel_batch_if_not_final(batch_id)
            .await?
            .with_context(|| format!("batch {batch_id} is gone"))?,
        Some(ordinal) => {
            let counts = catalog.cancel_job_if_not_final(JobId::of(batch_id, ordinal)).await?;
            counts.with_context(|| {
                format!("batch {batch_id} has no job {ordinal}\nhint: jobs are counted from 0")
            })?
        }
    };
    terminal.show(&counts, || {
        format!(
            "cancelled {}, {} of them running; {} final already\n",
            counted(counts.cancelled, "job"),
            counts.of_them_running,
            counts.already_final
        )
    })
}
