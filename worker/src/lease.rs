//! Keeps the leases of all microbatches in flight, and is the one who speaks to them while they run.
//!
//! Each tick extends every lease by one statement. Whoever is missing from its answer was cancelled or rescued, and its
//! microbatch is told, so that the engine drops that picture after the current step and goes on with the others. A notice
//! of a cancellation only makes the next tick come at once. When the catalog is away nothing is told: leases may lapse
//! then, and the guard of the final write decides.
//!
//! While the worker drains, the same task watches the running microbatch and stops it once it cannot end in time.

use std::sync::Arc;
use std::time::Duration;

use schema::{CatalogError, JobId, Lease, WorkerId};
use tokio::sync::{mpsc, oneshot};
use tokio::task::JoinSet;
use tokio::time::{Instant, Interval, MissedTickBehavior, interval};
use tokio_util::sync::CancellationToken;
use tracing::{debug, info, warn};

use crate::backoff::Chain;
use crate::catalog::Catalog;
use crate::control::ControlHandle;
use crate::metrics::Metrics;

/// The slowest that a cancelled job is noticed if the notice itself is lost.
const CANCEL_REACTION: Duration = Duration::from_secs(1);
/// How often a draining worker looks whether what runs still fits.
const DRAIN_INTERVAL: Duration = Duration::from_millis(100);

#[derive(Debug)]
enum Command {
    Hold(Vec<Lease>, ControlHandle),
    Forget(Vec<JobId>),
    TellWhenSettled(oneshot::Sender<()>),
}

/// The stages' end of the lease keeper.
#[derive(Debug, Clone)]
pub struct Leases {
    commands: mpsc::Sender<Command>,
}

impl Leases {
    /// From now on these leases are extended and their microbatch is told of losses.
    pub async fn hold(&self, leases: Vec<Lease>, control: ControlHandle) {
        // The keeper outlives all who hold this end, except when it panicked; then leases lapse, which is survivable.
        let _ = self.commands.send(Command::Hold(leases, control)).await;
    }

    /// These jobs' fate is settled.
    pub async fn forget(&self, job_ids: Vec<JobId>) {
        // As above.
        let _ = self.commands.send(Command::Forget(job_ids)).await;
    }

    /// Returns when the fate of every job that was held before is settled.
    pub async fn settled(&self) {
        let (tell, told) = oneshot::channel();
        // As above; without a keeper nobody can tell, and the worker is ending.
        let _ = self.commands.send(Command::TellWhenSettled(tell)).await;
        let _ = told.await;
    }
}

/// A microbatch, from its claim until the fate of its last job is settled.
#[derive(Debug)]
struct InFlight {
    leases: Vec<Lease>,
    control: ControlHandle,
    stopped: bool,
}

/// When the worker has to be done.
#[derive(Debug, Clone)]
pub struct Deadlines {
    /// Cancelled when the worker begins to drain.
    pub drain: CancellationToken,
    /// Cancelled when nothing may run on: the grace period is over, or somebody is in a hurry.
    pub give_up: CancellationToken,
    /// From the one to the other.
    pub grace: Duration,
}

/// The leases that were asked for, and which of them are still held.
type Extension = (Vec<Lease>, Result<Vec<JobId>, CatalogError>);

/// The keeper itself; see the module.
#[derive(Debug)]
pub struct LeaseKeeper<C> {
    catalog: Arc<C>,
    worker_id: WorkerId,
    lease: Duration,
    deadlines: Deadlines,
    metrics: Arc<Metrics>,
    commands: mpsc::Receiver<Command>,
    in_flight: Vec<InFlight>,
    /// Told as soon as nothing is in flight.
    waiting: Vec<oneshot::Sender<()>>,
    /// The one extension under way. Not awaited in place, so that a slow catalog does not hold up a drain.
    extension: JoinSet<Extension>,
}

impl<C: Catalog> LeaseKeeper<C> {
    /// A keeper that extends leases to `lease` from now, and the stages' end of it.
    pub fn new(
        catalog: Arc<C>,
        worker_id: WorkerId,
        lease: Duration,
        deadlines: Deadlines,
        metrics: Arc<Metrics>,
    ) -> (Leases, Self) {
        let (sender, commands) = mpsc::channel(1);
        let (in_flight, waiting, extension) = (Vec::new(), Vec::new(), JoinSet::new());
        (
            Leases { commands: sender },
            Self { catalog, worker_id, lease, deadlines, metrics, commands, in_flight, waiting, extension },
        )
    }

    /// Works until all [`Leases`] are dropped. `wake_ups` says when to look at once.
    pub async fn run(mut self, mut wake_ups: mpsc::Receiver<()>) {
        let mut ticks = delayed_interval((self.lease / 3).min(CANCEL_REACTION));
        let mut drain_ticks = delayed_interval(DRAIN_INTERVAL);
        let mut draining_until = None;
        loop {
            tokio::select! {
                command = self.commands.recv() => match command {
                    Some(Command::Hold(leases, control)) => {
                        self.in_flight.push(InFlight { leases, control, stopped: false });
                    }
                    Some(Command::Forget(job_ids)) => {
                        for microbatch in &mut self.in_flight {
                            microbatch.leases.retain(|lease| !job_ids.contains(&lease.job_id));
                        }
                        self.in_flight.retain(|microbatch| !microbatch.leases.is_empty());
                    }
                    Some(Command::TellWhenSettled(tell)) => self.waiting.push(tell),
                    None => return,
                },
                _ = ticks.tick() => self.extend(),
                Some(()) = wake_ups.recv() => self.extend(),
                Some(extended) = self.extension.join_next() => {
                    if let Ok((asked, answer)) = extended {
                        self.heard(&asked, answer);
                    }
                }
                () = self.deadlines.drain.cancelled(), if draining_until.is_none() => {
                    draining_until = Some(Instant::now() + self.deadlines.grace);
                }
                _ = drain_ticks.tick(), if draining_until.is_some() => {
                    self.drain(draining_until.unwrap_or_else(Instant::now));
                }
            }
            if self.in_flight.is_empty() {
                for tell in self.waiting.drain(..) {
                    // Whoever asked may have stopped waiting.
                    let _ = tell.send(());
                }
            }
        }
    }

    fn extend(&mut self) {
        if self.in_flight.is_empty() || !self.extension.is_empty() {
            return;
        }
        let leases: Vec<Lease> =
            self.in_flight.iter().flat_map(|microbatch| microbatch.leases.clone()).collect();
        let (catalog, worker_id, lease) = (self.catalog.clone(), self.worker_id, self.lease);
        self.extension.spawn(async move {
            let answer = catalog.extend_leases_if_held(&leases, worker_id, lease).await;
            (leases, answer)
        });
    }

    fn heard(&mut self, asked: &[Lease], answer: Result<Vec<JobId>, CatalogError>) {
        let still_held = match answer {
            Ok(still_held) => still_held,
            Err(error) => {
                return warn!(error = %Chain(&error), "Leases could not be extended; they may lapse");
            }
        };
        for lost in asked.iter().filter(|lease| !still_held.contains(&lease.job_id)) {
            // A lease that was forgotten or drawn anew in the meantime is not in here, and the answer not about it.
            for microbatch in self.in_flight.iter_mut().filter(|microbatch| microbatch.leases.contains(lost))
            {
                debug!(job.id = %lost.job_id, "The lease is gone; its microbatch is told");
                microbatch.control.lease_lost(lost.job_id);
                microbatch.leases.retain(|lease| lease != lost);
            }
        }
        self.in_flight.retain(|microbatch| !microbatch.leases.is_empty());
    }

    /// Stops what cannot be done and stored before `until`.
    fn drain(&mut self, until: Instant) {
        let left = until.saturating_duration_since(Instant::now());
        let hurry = left.is_zero() || self.deadlines.give_up.is_cancelled();
        for microbatch in self.in_flight.iter_mut().filter(|microbatch| !microbatch.stopped) {
            let progress = microbatch.control.progress();
            let needed = progress.remaining_steps().map(|steps| steps + self.metrics.finishing());
            // What is through its steps cannot be stopped any more and is best stored.
            let fits = needed.is_some_and(|needed| progress.is_over() || needed <= left);
            if hurry || !fits {
                let (done, of) = (progress.steps_done, progress.num_steps);
                info!(
                    batch.size = microbatch.leases.len(),
                    "Stopping a microbatch after step {done} of {of}"
                );
                microbatch.control.stop();
                microbatch.stopped = true;
            }
        }
    }
}

fn delayed_interval(period: Duration) -> Interval {
    let mut ticks = interval(period);
    ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    ticks
}
