//! `darkroom reconcile`
use std::time::Duration;

use anyhow::{Result, ensure};
use schema::{PgCatalog, dead_letter_queue};
use serde_json::{Value, json};

use super::{Outcome, connect, counted};
use crate::amqp::{self, AmqpQueue};
use crate::cli::ReconcileArgs;
use crate::config::Settings;
use crate::maintenance::{Bucket, collect};
use crate::object_inspector::{Depth, InspectorReport};
use crate::object_store::S3ObjectStore;
use crate::orphan_collector::CollectorReport;
use crate::queue::Queue;
use crate::terminal::{Terminal, printable};
use crate::{dead_letter_recorder, object_inspector, republisher};

/// Lines of each kind to show people; `--json` has more.
const SHOWN: usize = 20;

/// What was found about messages.
struct Messages {
    /// Jobs whose messages are lost, or may be.
    lost: u64,
    dead_letters: u64,
}

pub(super) async fn run(
    arguments: &ReconcileArgs,
    settings: &Settings,
    terminal: Terminal,
) -> Result<Outcome> {
    let catalog = connect(settings).await?;
    let status = catalog.migration_status().await?;
    ensure!(status.is_current(), "the database lacks migrations\nhint: run `darkroom migrate`");
    let dry_run = arguments.dry_run;
    let s3 = settings.s3()?;
    let amqp_url = settings.amqp_url()?;
    // Says what is wrong, where a supervisor would go on trying.
    amqp::log_in(&amqp_url).await?;

    let queue = AmqpQueue::start(&amqp_url)?;
    queue.connected().await;
    let messages = messages(&catalog, &queue, arguments).await;
    queue.close().await;
    let messages = messages?;

    let bucket = Bucket { store: S3ObjectStore::new(&s3).await, name: s3.bucket };
    let older_than = Duration::from_secs(arguments.orphans_older_than);
    let orphans = collect(&catalog, &bucket, older_than, dry_run).await?;
    let depth = if arguments.deep { Depth::HeadOrDownload } else { Depth::Head };
    let objects =
        object_inspector::run_once(&catalog, &bucket.store, arguments.sample, depth, dry_run).await?;

    let data = data(dry_run, &orphans, &objects, &messages);
    terminal.show(&data, || describe(dry_run, &orphans, &objects, &messages))?;
    Ok(if objects.faults.is_empty() { Outcome::Done } else { Outcome::Incomplete })
}

async fn messages(catalog: &PgCatalog, queue: &AmqpQueue, arguments: &ReconcileArgs) -> Result<Messages> {
    if arguments.dry_run {
        let dead_letters = queue.ready_count(&dead_letter_queue().name).await?.unwrap_or(0);
        let lost = republisher::suspected(catalog, queue).await?;
        return Ok(Messages { lost, dead_letters: dead_letters.into() });
    }
    let republish_after = Duration::from_secs(arguments.republish_after);
    Ok(Messages {
        lost: republisher::run_once(catalog, queue, republish_after).await?.unpublished,
        dead_letters: dead_letter_recorder::run_once(catalog, queue).await?.recorded,
    })
}

fn data(dry_run: bool, orphans: &CollectorReport, objects: &InspectorReport, messages: &Messages) -> Value {
    json!({
        "dry_run": dry_run,
        "orphans": orphans,
        "objects": objects,
        "lost_messages": messages.lost,
        "dead_letters": messages.dead_letters,
    })
}

fn describe(
    dry_run: bool,
    orphans: &CollectorReport,
    objects: &InspectorReport,
    messages: &Messages,
) -> String {
    let done = |done: &'static str, to_do: &'static str| if dry_run { to_do } else { done };
    let mut lines = vec![format!(
        "{}: {} named by image rows, {} of unfinished jobs, {} too young, {} of others",
        counted(orphans.listed, "object"),
        orphans.named,
        orphans.open,
        orphans.young,
        orphans.foreign
    )];
    lines.push(format!(
        "{} ({} bytes), {}",
        counted(orphans.orphaned, "orphan"),
        orphans.orphaned_bytes,
        if dry_run { "left alone".to_owned() } else { format!("{} deleted", orphans.deleted) }
    ));
    lines.extend(orphans.keys.iter().take(SHOWN).map(|key| format!("  {}", printable(key))));
    lines.push(format!(
        "{} compared with their image rows: {} missing or not what the row says{}",
        counted(objects.inspected, "object"),
        objects.faults.len(),
        match objects.digest_unknown {
            0 => String::new(),
            unknown => format!(", {unknown} by size alone"),
        }
    ));
    lines.extend(objects.faults.iter().take(SHOWN).map(|fault| format!("  {}", printable(&fault.found))));
    lines.push(format!(
        "{} {}",
        counted(messages.lost, "job"),
        done(
            "published again, because the broker lost their messages",
            "whose messages the broker may have lost"
        )
    ));
    lines.push(format!(
        "{} {}",
        counted(messages.dead_letters, "dead letter"),
        done("recorded in the table dead_letters", "waiting in the broker")
    ));
    lines.join("\n")
}
