//! The serve loops: each calls a reconciler's `run_once` when told and on a timer.
//!
//! The reconcilers hold no state that matters and do not retry inside: a run that fails is followed by the next. So a
//! scheduler can be killed at any point, and two can run at once.
use std::future::Future;
use std::sync::Arc;
use std::time::Duration;

use anyhow::Result;
use chrono::Utc;
use schema::{CatalogNotice, ObjectKey, PgCatalog};
use tokio::sync::Notify;
use tokio::time::{self, MissedTickBehavior};
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;
use tracing::{debug, info, warn};

use crate::amqp::AmqpQueue;
use crate::object_inspector::Depth;
use crate::object_store::S3ObjectStore;
use crate::orphan_collector::{Collection, CollectorReport};
use crate::queue::QueueError;
use crate::relay::{Relay, Watermark};
use crate::{dead_letter_recorder, object_inspector, orphan_collector, republisher, rescuer, stager};

/// Workers drain the queues meanwhile, so the watermark has to last longer than this.
const RELAY_INTERVAL: Duration = Duration::from_secs(1);
/// A retry may come this much later than scheduled.
const STAGER_INTERVAL: Duration = Duration::from_secs(1);
/// A dead worker's jobs wait for their lease to expire and then up to this long.
const RESCUER_INTERVAL: Duration = Duration::from_secs(2);
/// The republisher looks several times within the time that it waits for.
const REPUBLISHER_INTERVAL_MAX: Duration = Duration::from_secs(15);
/// Dead letters are rare, and asking for them is cheap.
const DEAD_LETTER_INTERVAL: Duration = Duration::from_secs(5);
/// Listing a bucket of a million pictures takes a thousand requests, and orphans hurry nobody.
const BUCKET_INTERVAL: Duration = Duration::from_secs(6 * 3600);
/// Objects younger than this are left alone, by default.
pub const ORPHANS_OLDER_THAN: Duration = Duration::from_secs(24 * 3600);
/// Objects that one run of the inspector looks at, by default.
pub const INSPECTED_SAMPLE: u32 = 1_000;
/// After the listener's connection failed.
const LISTEN_AGAIN: Duration = Duration::from_secs(2);

/// How the loops behave.
#[derive(Clone, Copy, Debug)]
pub struct MaintenanceSettings {
    /// Unclaimed messages per model and band.
    pub watermark: Watermark,
    /// When unclaimed messages of an empty queue count as lost.
    pub republish_after: Duration,
}

/// The bucket that the loops look after.
#[derive(Clone, Debug)]
pub struct Bucket {
    /// How to reach it.
    pub store: S3ObjectStore,
    /// Its name.
    pub name: String,
}

/// Brings one thing in order, as far as it can now.
trait Reconciler: Send + 'static {
    /// What people call it.
    const NAME: &'static str;

    /// Looks at everything once. Idempotent, and without retries inside.
    fn run_once(&mut self) -> impl Future<Output = Result<()>> + Send;
}

struct RelayLoop(PgCatalog, Arc<AmqpQueue>, Relay);
struct RepublisherLoop(PgCatalog, Arc<AmqpQueue>, Duration);
struct StagerLoop(PgCatalog);
struct RescuerLoop(PgCatalog);
struct DeadLetterLoop(PgCatalog, Arc<AmqpQueue>);
struct CollectorLoop(PgCatalog, Bucket);
struct InspectorLoop(PgCatalog, Bucket);

impl Reconciler for RelayLoop {
    const NAME: &'static str = "relay";

    async fn run_once(&mut self) -> Result<()> {
        let Self(catalog, queue, relay) = self;
        // Another scheduler has its turn. Both would publish the same jobs, which is only a waste.
        let Some(turn) = catalog.try_relay_turn().await? else { return Ok(()) };
        let ran = relay.run_once(catalog, queue.as_ref()).await;
        turn.end().await?;
        ran.map(drop)
    }
}

impl Reconciler for RepublisherLoop {
    const NAME: &'static str = "republisher";

    async fn run_once(&mut self) -> Result<()> {
        let Self(catalog, queue, older_than) = self;
        republisher::run_once(catalog, queue.as_ref(), *older_than).await.map(drop)
    }
}

impl Reconciler for StagerLoop {
    const NAME: &'static str = "stager";

    async fn run_once(&mut self) -> Result<()> {
        stager::run_once(&self.0).await.map(drop)
    }
}

impl Reconciler for RescuerLoop {
    const NAME: &'static str = "rescuer";

    async fn run_once(&mut self) -> Result<()> {
        rescuer::run_once(&self.0).await.map(drop)
    }
}

impl Reconciler for DeadLetterLoop {
    const NAME: &'static str = "dead-letter recorder";

    async fn run_once(&mut self) -> Result<()> {
        dead_letter_recorder::run_once(&self.0, &self.1).await.map(drop)
    }
}

impl Reconciler for CollectorLoop {
    const NAME: &'static str = "orphan collector";

    async fn run_once(&mut self) -> Result<()> {
        let Self(catalog, bucket) = self;
        collect(catalog, bucket, ORPHANS_OLDER_THAN, false).await.map(drop)
    }
}

impl Reconciler for InspectorLoop {
    const NAME: &'static str = "object inspector";

    async fn run_once(&mut self) -> Result<()> {
        let Self(catalog, bucket) = self;
        object_inspector::run_once(catalog, &bucket.store, INSPECTED_SAMPLE, Depth::Head, false)
            .await
            .map(drop)
    }
}

/// Runs the orphan collector over all our keys, by the store's clock.
///
/// # Errors
/// As [`orphan_collector::run_once`].
pub async fn collect(
    catalog: &PgCatalog,
    bucket: &Bucket,
    older_than: Duration,
    dry_run: bool,
) -> Result<CollectorReport> {
    let Bucket { store, name } = bucket;
    // A clock of ours that is a day ahead must not make every object old.
    let now = store.clock(name).await.unwrap_or_else(Utc::now);
    let collection = Collection { now, older_than, dry_run };
    orphan_collector::run_once(catalog, store, name, &ObjectKey::layout_prefix(), collection).await
}

/// Runs all loops until `shutdown`, then lets the runs in progress end.
pub async fn run(
    catalog: PgCatalog,
    queue: Arc<AmqpQueue>,
    bucket: Option<Bucket>,
    settings: MaintenanceSettings,
    shutdown: CancellationToken,
) {
    let loops = TaskTracker::new();
    // Written by the listener, awaited by the relay. The others have only their timers.
    let jobs_available = Arc::new(Notify::new());
    let never = || Arc::new(Notify::new());
    let MaintenanceSettings { watermark, republish_after } = settings;

    loops.spawn(listen(catalog.clone(), Arc::clone(&jobs_available), shutdown.clone()));
    let relay = RelayLoop(catalog.clone(), Arc::clone(&queue), Relay::new(watermark));
    loops.spawn(repeat(relay, RELAY_INTERVAL, jobs_available, shutdown.clone()));
    let interval = (republish_after / 4).min(REPUBLISHER_INTERVAL_MAX);
    let republisher = RepublisherLoop(catalog.clone(), Arc::clone(&queue), republish_after);
    loops.spawn(repeat(republisher, interval, never(), shutdown.clone()));
    let dead_letters = DeadLetterLoop(catalog.clone(), queue);
    loops.spawn(repeat(dead_letters, DEAD_LETTER_INTERVAL, never(), shutdown.clone()));
    if let Some(bucket) = bucket {
        let collector = CollectorLoop(catalog.clone(), bucket.clone());
        loops.spawn(repeat(collector, BUCKET_INTERVAL, never(), shutdown.clone()));
        let inspector = InspectorLoop(catalog.clone(), bucket);
        loops.spawn(repeat(inspector, BUCKET_INTERVAL, never(), shutdown.clone()));
    }
    loops.spawn(repeat(StagerLoop(catalog.clone()), STAGER_INTERVAL, never(), shutdown.clone()));
    loops.spawn(repeat(RescuerLoop(catalog), RESCUER_INTERVAL, never(), shutdown));
    loops.close();
    info!("The serve loops run");
    loops.wait().await;
    info!("The serve loops have ended");
}

/// Runs `reconciler` now, then at every tick of `interval` and whenever `told`, until `shutdown`.
async fn repeat<R: Reconciler>(
    mut reconciler: R,
    interval: Duration,
    told: Arc<Notify>,
    shutdown: CancellationToken,
) {
    let name = R::NAME;
    let mut ticks = time::interval(interval);
    ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    let mut failing = false;
    loop {
        tokio::select! {
            _ = ticks.tick() => {}
            () = told.notified() => {}
            () = shutdown.cancelled() => return,
        }
        match reconciler.run_once().await {
            Ok(()) if failing => {
                info!(reconciler = name, "The {name} works again");
                failing = false;
            }
            Ok(()) => {}
            // The supervisor of the broker connection has told of it already.
            Err(error) if is_known_outage(&error) => {
                debug!(reconciler = name, "The {name} waits for the broker")
            }
            // Once an outage, not once a second.
            Err(error) if failing => {
                debug!(reconciler = name, error = format!("{error:#}"), "The {name} still fails")
            }
            Err(error) => {
                warn!(reconciler = name, error = format!("{error:#}"), "The {name} failed; trying again");
                failing = true;
            }
        }
    }
}

fn is_known_outage(error: &anyhow::Error) -> bool {
    error.chain().filter_map(|cause| cause.downcast_ref::<QueueError>()).any(QueueError::is_known_outage)
}

/// Passes the catalog's notices on to the relay. Without it everything works, a timer's tick later.
async fn listen(catalog: PgCatalog, jobs_available: Arc<Notify>, shutdown: CancellationToken) {
    let listening = async {
        loop {
            match catalog.listen().await {
                Ok(mut listener) => loop {
                    match listener.next().await {
                        Ok(CatalogNotice::JobsAvailable | CatalogNotice::Reconnected) => {
                            jobs_available.notify_one()
                        }
                        Ok(_) => {}
                        Err(error) => {
                            debug!(
                                error = format!("{:#}", anyhow::Error::from(error)),
                                "Lost the catalog's notices"
                            );
                            break;
                        }
                    }
                },
                Err(error) => {
                    debug!(
                        error = format!("{:#}", anyhow::Error::from(error)),
                        "Cannot listen to the catalog"
                    );
                }
            }
            time::sleep(LISTEN_AGAIN).await;
        }
    };
    tokio::select! {
        () = listening => {}
        () = shutdown.cancelled() => {}
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Fails at first, and ends the loop at its third run.
    struct Third {
        runs: usize,
        told: Arc<Notify>,
        shutdown: CancellationToken,
    }

    impl Reconciler for Third {
        const NAME: &'static str = "test";

        async fn run_once(&mut self) -> Result<()> {
            self.runs += 1;
            self.told.notify_one();
            match self.runs {
                1 => anyhow::bail!("the first fails"),
                2 => {}
                _ => self.shutdown.cancel(),
            }
            Ok(())
        }
    }

    #[tokio::test]
    async fn a_loop_survives_failures_and_runs_when_told() {
        let (told, shutdown) = (Arc::new(Notify::new()), CancellationToken::new());
        let third = Third { runs: 0, told: Arc::clone(&told), shutdown: shutdown.clone() };
        let hour = Duration::from_secs(3600);
        let ended = time::timeout(Duration::from_secs(60), repeat(third, hour, told, shutdown)).await;
        assert!(ended.is_ok(), "it waited for its timer although it was told to run");
    }

    #[test]
    fn only_outages_that_were_told_are_kept_quiet() {
        let wrap = |error: QueueError| anyhow::Error::from(error).context("cannot fill the queue");
        assert!(is_known_outage(&wrap(QueueError::NotConnected)));
        assert!(is_known_outage(&wrap(QueueError::Blocked)));
        assert!(!is_known_outage(&wrap(QueueError::TimedOut { what: "x", seconds: 1 })));
    }
}
