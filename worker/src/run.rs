//! Starts the stages, and drains them.
//!
//! The stages are joined by channels of capacity one and end one after the other: when the consumers and the claimer stop,
//! the engine runs out of work, then the completer, and last the lease keeper, whom all of them speak to. So draining is
//! only to say stop at the front, and to watch the clock.

use std::sync::Arc;
use std::time::Duration;

use schema::{ModelName, PriorityBand, WorkerId};
use tokio::sync::{Semaphore, mpsc};
use tokio::task::{JoinError, JoinSet};
use tokio::time::{sleep, timeout};
use tokio_util::sync::CancellationToken;
use tracing::{info, warn};

use crate::batcher::Batcher;
use crate::catalog::Catalog;
use crate::claimer::Claimer;
use crate::completer::{CONCURRENT_PUTS, Completer, WorkerIdentity};
use crate::consumer::Consumer;
use crate::engine::{Engine, EngineError};
use crate::fitness::Fitness;
use crate::lease::{Deadlines, LeaseKeeper};
use crate::metrics::Metrics;
use crate::object_store::ObjectStore;
use crate::queue::{Acknowledger, Queue};
use crate::trace::Trace;

/// After the grace period, the time to give back what was stopped; then the process ends whatever is left, and leases
/// lapse. Part of what an operator has to allow between the two signals that end a process.
pub const FAREWELL: Duration = Duration::from_secs(5);
/// How often an idle worker looks whether it has been idle for long enough.
const IDLE_INTERVAL: Duration = Duration::from_millis(250);

/// How the stages are to work.
#[derive(Debug, Clone)]
pub struct RunSettings {
    /// The worker's row.
    pub worker_id: WorkerId,
    /// The model it serves.
    pub model: ModelName,
    /// The most pictures in a microbatch.
    pub max_microbatch: usize,
    /// How long an entry waits for others to fill its microbatch.
    pub max_wait: Duration,
    /// How long a lease lasts without being extended.
    pub lease: Duration,
    /// How long a running microbatch may go on after the worker was asked to stop.
    pub grace: Duration,
    /// Stop after so long without work.
    pub exit_when_idle: Option<Duration>,
    /// Stop when so many jobs in a row failed alike.
    pub unfit_after: usize,
}

/// The walls, with what stands behind them.
#[derive(Debug)]
pub struct Adapters<Q, S, C> {
    /// Where messages come from.
    pub queue: Arc<Q>,
    /// Where pictures go.
    pub store: Arc<S>,
    /// Where the truth is.
    pub catalog: Arc<C>,
    /// What draws, loaded.
    pub engine: Engine,
    /// Says when to look at the leases at once; may end.
    pub wake_ups: mpsc::Receiver<()>,
    /// Counts.
    pub metrics: Arc<Metrics>,
    /// Is told how long each stage takes.
    pub trace: Trace,
}

/// How the worker is asked to stop.
#[derive(Debug, Clone, Default)]
pub struct Shutdown {
    /// Finish what is begun, take nothing new.
    pub drain: CancellationToken,
    /// Finish nothing: give back what runs.
    pub hasten: CancellationToken,
}

/// Why a worker stopped in good order.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum StopReason {
    /// It was asked to.
    Asked,
    /// It had no work for as long as it was told to wait for some.
    Idle,
}

/// Why a worker stopped before it was asked to. The process ends with an error, so that another takes its place.
#[derive(Debug, thiserror::Error)]
pub enum RunError {
    /// The engine is no good any more.
    #[error(transparent)]
    Engine(#[from] EngineError),
    /// One fault kept coming back, whatever the job.
    #[error("this worker is unfit: {reason}")]
    Unfit {
        /// Which fault, and how often.
        reason: String,
    },
    /// A mistake in one of the stages.
    #[error("a stage of the worker died")]
    Stage(#[source] JoinError),
}

/// Consumes, draws and records until it is asked to stop, is idle for too long, or the engine fails; then drains.
pub async fn run<Q: Queue, S: ObjectStore, C: Catalog>(
    settings: RunSettings,
    adapters: Adapters<Q, S, C>,
    shutdown: Shutdown,
) -> Result<StopReason, RunError> {
    let Adapters { queue, store, catalog, engine, wake_ups, metrics, trace } = adapters;
    let Engine { identity: pipeline, microbatches, finished, ended: mut engine_end } = engine;
    let deadlines = Deadlines {
        drain: shutdown.drain.child_token(),
        give_up: shutdown.hasten.child_token(),
        grace: settings.grace,
    };
    let (drain, give_up) = (deadlines.drain.clone(), deadlines.give_up.clone());
    let acknowledger = Acknowledger::new(queue.clone(), metrics.clone());
    let (worker_id, lease) = (settings.worker_id, settings.lease);
    let identity = Arc::new(WorkerIdentity { worker_id, model: settings.model, pipeline });

    let mut stages = JoinSet::new();
    let (leases, keeper) = LeaseKeeper::new(catalog.clone(), worker_id, lease, deadlines, metrics.clone());
    stages.spawn(keeper.run(wake_ups));
    let fitness = Arc::new(Fitness::new(settings.unfit_after));
    let completer = Completer {
        acknowledger: acknowledger.clone(),
        store,
        catalog: catalog.clone(),
        leases: leases.clone(),
        identity,
        metrics: metrics.clone(),
        fitness: fitness.clone(),
        give_up: give_up.clone(),
        trace: trace.clone(),
        puts: Semaphore::new(CONCURRENT_PUTS),
    };
    stages.spawn(completer.run(finished));
    let (entry_sender, entries) = mpsc::channel(1);
    for &band in PriorityBand::ALL {
        let (queue, acknowledger) = (queue.clone(), acknowledger.clone());
        let consumer = Consumer { queue, acknowledger, band, metrics: metrics.clone() };
        stages.spawn(consumer.run(entry_sender.clone(), drain.clone()));
    }
    drop(entry_sender);
    let claimer =
        Claimer { acknowledger, catalog, leases, worker_id, lease, metrics: metrics.clone(), trace };
    let batcher = Batcher::new(settings.max_microbatch, settings.max_wait);
    stages.spawn(claimer.run(entries, microbatches, batcher, drain.clone()));

    let ended = tokio::select! {
        () = drain.cancelled() => Ok(StopReason::Asked),
        () = idle(&metrics, settings.exit_when_idle) => Ok(StopReason::Idle),
        end = engine_end.wait() => match end {
            // Being asked to stop ends the engine too, and it may be the first to tell.
            Ok(()) if drain.is_cancelled() => Ok(StopReason::Asked),
            Ok(()) => Err(EngineError::Died.into()),
            Err(error) => Err(error.into()),
        },
        reason = fitness.unfit() => {
            // What waits or runs would fail alike.
            give_up.cancel();
            Err(RunError::Unfit { reason })
        }
        panic = first_panic(&mut stages) => Err(RunError::Stage(panic)),
        never = metrics.summarize() => match never {},
    };
    info!(grace_s = settings.grace.as_secs(), "Draining: {}", describe(&ended));
    drain.cancel();
    queue.stop().await;
    let all_ended = async { while stages.join_next().await.is_some() {} };
    let grace_over = async {
        tokio::select! {
            () = sleep(settings.grace) => {}
            () = give_up.cancelled() => {}
        }
        give_up.cancel();
        sleep(FAREWELL).await;
    };
    tokio::select! {
        () = all_ended => metrics.log("Drained"),
        () = grace_over => {
            warn!("The grace period is over; what is not given back is rescued when its leases lapse");
            metrics.log("Stopped");
        }
    }
    let reason = ended?;
    // Poisoned while draining is poisoned all the same; an engine that is still busy is not waited for.
    match timeout(Duration::ZERO, engine_end.wait()).await {
        Ok(Err(error)) => Err(error.into()),
        Ok(Ok(())) | Err(_) => Ok(reason),
    }
}

/// Waits for a stage that panics. Stages that end otherwise have their reasons.
async fn first_panic(stages: &mut JoinSet<()>) -> JoinError {
    while let Some(stage) = stages.join_next().await {
        if let Err(panic) = stage {
            return panic;
        }
    }
    std::future::pending().await
}

/// Returns when there was no work for `limit`; never if there is no limit.
async fn idle(metrics: &Metrics, limit: Option<Duration>) {
    let Some(limit) = limit else { return std::future::pending().await };
    while metrics.idle_for().is_none_or(|idle| idle < limit) {
        sleep(IDLE_INTERVAL).await;
    }
}

fn describe(ended: &Result<StopReason, RunError>) -> String {
    match ended {
        Ok(StopReason::Asked) => "asked to stop".to_owned(),
        Ok(StopReason::Idle) => "idle for long enough".to_owned(),
        Err(error) => error.to_string(),
    }
}
