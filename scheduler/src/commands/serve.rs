//! `darkroom serve`
use std::sync::Arc;

use anyhow::{Context, Result, bail};
use schema::PgCatalog;
use tokio::signal::unix::{SignalKind, signal};
use tokio_util::sync::CancellationToken;
use tracing::warn;

use crate::amqp::AmqpQueue;
use crate::cli::ServeArgs;
use crate::config::Settings;
use crate::maintenance::{self, Bucket};
use crate::object_store::S3ObjectStore;
use crate::preflight;

/// One for each loop and one for the listener, and some to spare.
pub(super) const CONNECTIONS: u32 = 8;

pub(super) async fn run(arguments: ServeArgs, settings: &Settings) -> Result<()> {
    let catalog = PgCatalog::connect(&settings.database_url()?, CONNECTIONS).await?;
    let status = catalog.migration_status().await?;
    if !status.is_current() {
        bail!("the database lacks {} migrations\nhint: run `darkroom migrate`", status.pending.len());
    }
    let amqp_url = settings.amqp_url()?;
    preflight::check(&catalog, &amqp_url).await?;
    let queue = Arc::new(AmqpQueue::start(&amqp_url)?);
    let bucket = match settings.s3() {
        Ok(s3) => Some(Bucket { store: S3ObjectStore::new(&s3).await, name: s3.bucket }),
        Err(error) => {
            warn!(error = format!("{error:#}"), "Nobody looks after the bucket: its name is not known here");
            None
        }
    };
    let shutdown = CancellationToken::new();
    let (catalog_of_loops, queue_of_loops) = (catalog.clone(), Arc::clone(&queue));
    let loops =
        maintenance::run(catalog_of_loops, queue_of_loops, bucket, arguments.settings(), shutdown.clone());
    let stop = async {
        let received = stop_signal().await;
        shutdown.cancel();
        received
    };
    let ((), stopped) = tokio::join!(loops, stop);
    if let Some(queue) = Arc::into_inner(queue) {
        queue.close().await;
    }
    catalog.close().await;
    stopped
}

/// Waits for SIGTERM or Ctrl-C.
pub(super) async fn stop_signal() -> Result<()> {
    let mut terminate = signal(SignalKind::terminate()).context("cannot wait for SIGTERM")?;
    let mut interrupt = signal(SignalKind::interrupt()).context("cannot wait for Ctrl-C")?;
    tokio::select! {
        _ = terminate.recv() => {}
        _ = interrupt.recv() => {}
    }
    Ok(())
}
