//! A worker with all its stages, between walls of memory.
#![allow(dead_code, reason = "each test program uses its own part of this")]

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use schema::{
    BatchId, JobId, JobMessage, JobSpec, JobState, NoiseScheduler, PriorityBand, SpecDefaults, WorkerId,
};
use tokio::sync::{mpsc, watch};
use tokio::task::JoinHandle;
use worker::engine::{Engine, Lanes};
use worker::metrics::Metrics;
use worker::pipeline::Pipeline;
use worker::queue::Requeue;
use worker::run::{Adapters, RunError, RunSettings, Shutdown, StopReason, run};
use worker::solid_color::SolidColorPipeline;
use worker::trace::Trace;

use crate::catalog::{MemoryCatalog, Row};
use crate::pipelines::ScriptedPipeline;
use crate::queue::MemoryQueue;
use crate::store::MemoryStore;

/// How long a test waits for what has to happen. Only a failing test waits as long.
pub const PATIENCE: Duration = Duration::from_secs(60);

/// What happened at a wall. Jobs are named by their ordinals, calls of the pipeline by their seeds.
#[derive(Debug, Clone, PartialEq)]
pub enum Event {
    Claimed(Vec<u32>),
    Called(Vec<u32>),
    Denoised(Vec<u32>),
    Finishing(Vec<u32>),
    FinishEnded(Vec<u32>),
    Stored(u32),
    StoreFailed,
    Completed(Vec<u32>),
    Failed(u32),
    Released(Vec<u32>),
    CatalogFailed,
    Acked(Option<JobId>),
    Requeued(Option<JobId>),
    DeadLettered,
    ConsumingStopped,
}

fn job_of(body: &[u8]) -> Option<JobId> {
    JobMessage::decode(body).ok().map(|message| message.job_id)
}

impl Event {
    pub fn acked(body: Vec<u8>) -> Self {
        Self::Acked(job_of(&body))
    }

    pub fn nacked(body: Vec<u8>, requeue: Requeue) -> Self {
        match requeue {
            Requeue::Yes => Self::Requeued(job_of(&body)),
            Requeue::No => Self::DeadLettered,
        }
    }
}

/// All events so far, in order; tests wait on it.
#[derive(Debug, Clone)]
pub struct EventLog(watch::Sender<Vec<Event>>);

impl EventLog {
    pub fn push(&self, event: Event) {
        self.0.send_modify(|events| events.push(event));
    }

    pub fn events(&self) -> Vec<Event> {
        self.0.borrow().clone()
    }

    pub fn position(&self, event: &Event) -> usize {
        let events = self.events();
        events.iter().position(|found| found == event).unwrap_or_else(|| panic!("no {event:?} in {events:?}"))
    }

    pub fn count(&self, is_wanted: impl Fn(&Event) -> bool) -> usize {
        self.events().iter().filter(|event| is_wanted(event)).count()
    }

    /// As [`Self::wait_for`], for a thread of the engine; for ever, as the test itself waits and gives up.
    pub fn wait_for_here(&self, count: usize, is_wanted: impl Fn(&Event) -> bool) {
        let mut receiver = self.0.subscribe();
        let enough =
            receiver.wait_for(|events| events.iter().filter(|event| is_wanted(event)).count() >= count);
        let _ = futures::executor::block_on(enough);
    }

    /// Waits until there are `count` such events.
    pub async fn wait_for(&self, count: usize, is_wanted: impl Fn(&Event) -> bool) {
        let mut receiver = self.0.subscribe();
        let enough =
            receiver.wait_for(|events| events.iter().filter(|event| is_wanted(event)).count() >= count);
        if tokio::time::timeout(PATIENCE, enough).await.is_err() {
            panic!("waited in vain; so far {:?}", self.events());
        }
    }
}

/// What the jobs of these tests have in common.
pub fn spec() -> JobSpec {
    JobSpec { prompt: "picture".to_owned(), num_inference_steps: Some(10), ..JobSpec::default() }
}

/// The settings that tests vary.
pub struct Setup {
    pub max_microbatch: usize,
    pub max_wait: Duration,
    pub grace: Duration,
    pub exit_when_idle: Option<Duration>,
    pub unfit_after: usize,
}

impl Default for Setup {
    fn default() -> Self {
        Self {
            max_microbatch: 4,
            max_wait: Duration::from_millis(20),
            grace: PATIENCE,
            exit_when_idle: None,
            unfit_after: 1_000,
        }
    }
}

impl Setup {
    /// Microbatches wait until they have exactly so many jobs, however slow the machine is.
    pub fn full_microbatches(of: usize) -> Self {
        Self { max_microbatch: of, max_wait: PATIENCE, ..Self::default() }
    }
}

pub struct WorkerUnderTest {
    pub queue: Arc<MemoryQueue>,
    pub store: Arc<MemoryStore>,
    pub catalog: Arc<MemoryCatalog>,
    pub metrics: Arc<Metrics>,
    pub log: EventLog,
    pub shutdown: Shutdown,
    pub wake_up: mpsc::Sender<()>,
    pub batch_id: BatchId,
    pub trace: Trace,
    setup: Setup,
    wake_ups: Option<mpsc::Receiver<()>>,
    running: Option<JoinHandle<Result<StopReason, RunError>>>,
}

impl WorkerUnderTest {
    /// Walls without a worker yet, so that a test can fill the queue first.
    pub fn new(setup: Setup) -> Self {
        let log = EventLog(watch::Sender::new(Vec::new()));
        let (wake_up, wake_ups) = mpsc::channel(1);
        Self {
            queue: Arc::new(MemoryQueue::new(log.clone())),
            store: Arc::new(MemoryStore::new(log.clone())),
            catalog: Arc::new(MemoryCatalog::new(log.clone())),
            metrics: Arc::new(Metrics::default()),
            log,
            shutdown: Shutdown::default(),
            wake_up,
            batch_id: BatchId::generate(),
            trace: Trace::default(),
            setup,
            wake_ups: Some(wake_ups),
            running: None,
        }
    }

    pub async fn start_solid_color(&mut self, time_per_picture: Duration) {
        self.start(move || Box::new(SolidColorPipeline::new(time_per_picture))).await;
    }

    pub async fn start_scripted(
        &mut self,
        script: impl FnOnce(EventLog) -> ScriptedPipeline + Send + 'static,
    ) {
        let log = self.log.clone();
        self.start(move || Box::new(script(log))).await;
    }

    pub async fn start(&mut self, pipeline: impl FnOnce() -> Box<dyn Pipeline> + Send + 'static) {
        self.start_on(crate::LANES, pipeline).await;
    }

    pub async fn start_on(
        &mut self,
        lanes: Lanes,
        pipeline: impl FnOnce() -> Box<dyn Pipeline> + Send + 'static,
    ) {
        let engine = Engine::load(Box::new(move || Ok(pipeline())), lanes, self.trace.clone())
            .await
            .expect("the pipeline loads");
        let settings = RunSettings {
            worker_id: WorkerId::generate(),
            model: "demo".parse().expect("a slug"),
            max_microbatch: self.setup.max_microbatch,
            max_wait: self.setup.max_wait,
            lease: Duration::from_secs(60),
            grace: self.setup.grace,
            exit_when_idle: self.setup.exit_when_idle,
            unfit_after: self.setup.unfit_after,
        };
        let adapters = Adapters {
            queue: self.queue.clone(),
            store: self.store.clone(),
            catalog: self.catalog.clone(),
            engine,
            wake_ups: self.wake_ups.take().expect("a worker is started once"),
            metrics: self.metrics.clone(),
            trace: self.trace.clone(),
        };
        self.running = Some(tokio::spawn(run(settings, adapters, self.shutdown.clone())));
    }

    /// A row and its message. The seed is the ordinal.
    pub fn submit(&self, ordinal: u32, band: PriorityBand) -> JobId {
        self.submit_sized(ordinal, band, 64)
    }

    pub fn submit_sized(&self, ordinal: u32, band: PriorityBand, width: u32) -> JobId {
        let spec = JobSpec {
            prompt: format!("picture {ordinal}"),
            seed: Some(ordinal.into()),
            width: Some(width),
            ..spec()
        };
        let job_id = self.insert(ordinal, spec);
        self.publish(job_id, band);
        job_id
    }

    /// A row without a message.
    pub fn insert(&self, ordinal: u32, spec: JobSpec) -> JobId {
        let spec =
            spec.validate(&SpecDefaults::of_model(64, 64, NoiseScheduler::Pndm)).expect("a valid spec");
        self.catalog.insert(self.batch_id, ordinal, spec)
    }

    pub fn publish(&self, job_id: JobId, band: PriorityBand) {
        let row = self.catalog.row(job_id);
        self.publish_with_limit(job_id, band, row.microbatch_limit);
    }

    /// A message that says how large a company its job may run in, whatever the row says.
    pub fn publish_with_limit(&self, job_id: JobId, band: PriorityBand, microbatch_limit: Option<u32>) {
        let microbatch_key = self.catalog.row(job_id).spec.microbatch_key();
        self.queue.publish(band, JobMessage { job_id, microbatch_key, microbatch_limit }.encode());
    }

    pub fn submit_many(&self, ordinals: std::ops::Range<u32>) -> Vec<JobId> {
        ordinals.map(|ordinal| self.submit(ordinal, PriorityBand::Normal)).collect()
    }

    pub fn row(&self, job_id: JobId) -> Row {
        self.catalog.row(job_id)
    }

    pub fn state(&self, job_id: JobId) -> JobState {
        self.row(job_id).state
    }

    pub async fn wait_for_acks(&self, count: usize) {
        self.log.wait_for(count, |event| matches!(event, Event::Acked(_))).await;
    }

    /// Asks the worker to stop and waits until it has.
    pub async fn drain(&mut self) -> Result<StopReason, RunError> {
        self.shutdown.drain.cancel();
        self.ended().await
    }

    pub async fn ended(&mut self) -> Result<StopReason, RunError> {
        let running = self.running.take().expect("a worker runs");
        let ended = tokio::time::timeout(PATIENCE, running).await;
        let Ok(ended) = ended else { panic!("the worker does not end; so far {:?}", self.log.events()) };
        let (taken, settled) = (self.metrics.deliveries.get(), self.metrics.settled.get());
        assert_eq!(taken, settled, "every delivery is settled exactly once");
        ended.expect("the worker does not panic")
    }

    pub fn disconnect(&self) {
        self.queue.disconnected.store(true, Ordering::SeqCst);
    }
}
