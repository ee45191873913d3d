//! What this worker counts, and the line that says so now and then.
//!
//! Written by all stages, only read by the summary, the idle watch and the drain's estimate; nothing decides about a job by
//! a counter.

use std::convert::Infallible;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use tokio::sync::watch;
use tokio::time::{Instant, MissedTickBehavior, interval};
use tracing::info;

/// How often the summary is logged.
const SUMMARY_INTERVAL: Duration = Duration::from_secs(30);

/// A number that only grows.
#[derive(Debug, Default)]
pub struct Counter(AtomicU64);

impl Counter {
    /// Adds one.
    pub fn increment(&self) {
        self.add(1);
    }

    /// Adds `count`.
    pub fn add(&self, count: usize) {
        self.0.fetch_add(count as u64, Ordering::Relaxed);
    }

    /// The number now.
    pub fn get(&self) -> u64 {
        self.0.load(Ordering::Relaxed)
    }
}

/// The counters of one worker process.
#[derive(Debug)]
pub struct Metrics {
    /// Deliveries taken from the broker.
    pub deliveries: Counter,
    /// Deliveries acked or nacked, with effect or without.
    pub settled: Counter,
    /// Of those, settled on a channel that was gone: the broker hands the message out again.
    pub settled_ineffective: Counter,
    /// Unreadable messages sent to the dead letters.
    pub unreadable: Counter,
    /// Messages about jobs that were not to be had: finished, cancelled, held elsewhere, or doubled.
    pub not_claimed: Counter,
    /// Connections to the broker made, the first included.
    pub broker_connections: Counter,
    /// Microbatches given to the engine.
    pub microbatches: Counter,
    /// Jobs in them.
    pub claimed: Counter,
    /// Pictures whose row is written.
    pub completed: Counter,
    /// Of those, flagged by the safety checker.
    pub flagged: Counter,
    /// Of the stored ones, pictures that an earlier run had stored already.
    pub already_there: Counter,
    /// Jobs whose lease was gone before they were done.
    pub leases_lost: Counter,
    /// Jobs given back unharmed.
    pub released: Counter,
    /// Jobs given back because one of them may have broken the engine.
    pub suspected: Counter,
    /// Attempts ended with an error.
    pub failed: Counter,
    /// How long a picture takes from its last denoising step to its ack, lately.
    finishing: watch::Sender<Duration>,
    started: Instant,
    last_activity: watch::Sender<Instant>,
}

impl Default for Metrics {
    fn default() -> Self {
        Self {
            deliveries: Counter::default(),
            settled: Counter::default(),
            suspected: Counter::default(),
            settled_ineffective: Counter::default(),
            unreadable: Counter::default(),
            not_claimed: Counter::default(),
            broker_connections: Counter::default(),
            microbatches: Counter::default(),
            claimed: Counter::default(),
            completed: Counter::default(),
            flagged: Counter::default(),
            already_there: Counter::default(),
            leases_lost: Counter::default(),
            released: Counter::default(),
            failed: Counter::default(),
            // Before the first measurement: a second, which decoding and storing one small picture takes at most.
            finishing: watch::Sender::new(Duration::from_secs(1)),
            started: Instant::now(),
            last_activity: watch::Sender::new(Instant::now()),
        }
    }
}

impl Metrics {
    /// Notes that there was work.
    pub fn touch(&self) {
        self.last_activity.send_replace(Instant::now());
    }

    /// How long there was no work, or `None` while a delivery is unsettled.
    pub fn idle_for(&self) -> Option<Duration> {
        let busy = self.deliveries.get() > self.settled.get();
        (!busy).then(|| self.last_activity.borrow().elapsed())
    }

    /// Notes how long a microbatch took from its last denoising step to its acks.
    pub fn finishing_took(&self, duration: Duration) {
        self.finishing.send_replace(duration);
    }

    /// How long the last microbatch took from its last denoising step to its acks.
    pub fn finishing(&self) -> Duration {
        *self.finishing.borrow()
    }

    /// Logs a summary every half minute in which something happened.
    pub async fn summarize(&self) -> Infallible {
        let mut ticks = interval(SUMMARY_INTERVAL);
        ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
        ticks.tick().await;
        let mut before = (Instant::now(), 0, 0);
        loop {
            ticks.tick().await;
            let now = (Instant::now(), self.completed.get(), self.settled.get());
            if now.2 != before.2 {
                let per_second = (now.1 - before.1) as f64 / (now.0 - before.0).as_secs_f64();
                self.log(&format!("{per_second:.2} pictures/s"));
            }
            before = now;
        }
    }

    /// Logs all counters behind `headline`.
    pub fn log(&self, headline: &str) {
        info!(
            uptime_s = self.started.elapsed().as_secs(),
            completed = self.completed.get(),
            flagged = self.flagged.get(),
            failed = self.failed.get(),
            released = self.released.get(),
            leases_lost = self.leases_lost.get(),
            microbatches = self.microbatches.get(),
            claimed = self.claimed.get(),
            deliveries = self.deliveries.get(),
            not_claimed = self.not_claimed.get(),
            unreadable = self.unreadable.get(),
            settled_ineffective = self.settled_ineffective.get(),
            already_there = self.already_there.get(),
            broker_connections = self.broker_connections.get(),
            "{headline}"
        );
    }
}
