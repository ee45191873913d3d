//! `darkroom status`
use anyhow::Result;
use schema::{BatchProgress, WorkerSummary};
use serde_json::json;

use super::batches::batch_table;
use super::{batch, connect, counted, unsigned};
use crate::cli::StatusArgs;
use crate::config::Settings;
use crate::terminal::{Terminal, printable, table};

/// Unfinished batches are looked for among this many of the latest.
const LOOKED_AT: u32 = 1_000;

pub(super) async fn run(arguments: &StatusArgs, settings: &Settings, terminal: Terminal) -> Result<()> {
    let catalog = connect(settings).await?;
    if let Some(text) = &arguments.batch {
        let progress = batch(&catalog, text).await?;
        return terminal.show(&progress, || describe(&progress));
    }
    let mut batches = catalog.batches(LOOKED_AT).await?;
    batches.retain(|batch| batch.final_count < batch.job_count);
    let workers = catalog.workers().await?;
    terminal.show(&json!({ "unfinished_batches": batches, "workers": workers }), || {
        let batches =
            if batches.is_empty() { "no unfinished batches\n".to_owned() } else { batch_table(&batches) };
        format!("{batches}\n{}", worker_table(&workers))
    })
}

fn describe(progress: &BatchProgress) -> String {
    let mut lines = vec![format!(
        "batch {} ({}) of {}, model {}, priority {}",
        printable(&progress.name),
        progress.batch_id,
        printable(&progress.principal),
        progress.model,
        progress.band
    )];
    lines.push(format!(
        "  {} of {} final",
        unsigned(progress.final_count()),
        counted(unsigned(progress.job_count), "job")
    ));
    for (count, what) in [
        (progress.completed - progress.flagged, "drawn"),
        (progress.flagged, "withheld by the safety checker"),
        (progress.running, "running"),
        (progress.available, "waiting"),
        (progress.retryable, "waiting to be tried again"),
        (progress.cancelled, "cancelled"),
        (progress.discarded, "discarded"),
    ] {
        if count > 0 {
            lines.push(format!("  {count:>6} {what}"));
        }
    }
    lines.join("\n")
}

fn worker_table(workers: &[WorkerSummary]) -> String {
    if workers.is_empty() {
        return "no workers\n".to_owned();
    }
    let rows = workers.iter().map(|worker| {
        let state = match (&worker.stopped_at, &worker.stop_reason) {
            (None, _) => format!("running {}", counted(unsigned(worker.running_count), "job")),
            (Some(_), reason) => {
                let how = if worker.is_unfit { "unfit" } else { "stopped" };
                format!("{how}: {}", reason.as_deref().unwrap_or("no reason given"))
            }
        };
        [
            worker.name.clone(),
            worker.host.clone(),
            worker.model.to_string(),
            worker.pipeline.clone(),
            format!("{} {}", worker.device, worker.dtype),
            state,
            worker.last_seen_at.format("%H:%M:%S").to_string(),
        ]
    });
    table(["worker", "host", "model", "pipeline", "device", "state", "last seen (UTC)"], rows)
}
