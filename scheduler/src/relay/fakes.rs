//! A backlog and a queue in memory, for the tests of the reconcilers.
use std::collections::{BTreeMap, BTreeSet};
use std::sync::Mutex;
use std::time::Duration;

use schema::{
    BatchId, CatalogError, JobId, Model, ModelId, NoiseScheduler, PriorityBand, PublishableJob,
    QueueDeclaration, Sha256Digest,
};
use tokio::sync::watch;

use super::Backlog;
use crate::queue::{OutgoingMessage, PublishOutcome, Queue, QueueError};

/// One model with jobs that are published in their order.
#[derive(Debug)]
pub struct FakeBacklog {
    model: Model,
    jobs: Vec<(PriorityBand, PublishableJob)>,
    published: Mutex<BTreeSet<JobId>>,
    looks: Mutex<Vec<PriorityBand>>,
    marks: Mutex<usize>,
    /// Marks, by their place among all, that the catalog does not take.
    failing_marks: Mutex<BTreeSet<usize>>,
    /// Each mark but the last waits until a chunk later than its own is on its way to this queue.
    next_chunk: Option<NextChunk>,
    is_claimed_at_once: bool,
    microbatch_capacity: u64,
    republished_after: Mutex<Vec<Duration>>,
}

/// What a mark waits for.
#[derive(Debug)]
struct NextChunk {
    calls: watch::Receiver<usize>,
    /// There are no more chunks than these.
    last: usize,
}

impl FakeBacklog {
    /// All in the band `normal`.
    pub fn with_jobs(count: u32) -> Self {
        Self::with_jobs_in(&[PriorityBand::Normal], count)
    }

    /// So many in each of `bands`.
    pub fn with_jobs_in(bands: &[PriorityBand], count: u32) -> Self {
        let jobs_of = |band| {
            let batch_id = BatchId::generate();
            let job = move |ordinal| PublishableJob {
                job_id: JobId::of(batch_id, ordinal),
                batch_id,
                microbatch_key: "512x512/50/pndm/cfg".parse().unwrap(),
                traceparent: (ordinal == 0).then(|| "00-trace".to_owned()),
                microbatch_limit: None,
            };
            (0..count).map(move |ordinal| (band, job(ordinal)))
        };
        let model = Model {
            model_id: ModelId::generate(),
            name: "demo".parse().unwrap(),
            kind: "stable-diffusion-v1".to_owned(),
            folder: "/models/demo".to_owned(),
            licence_id: schema::LicenceId::generate(),
            weights_sha256: Sha256Digest::of(b""),
            components: Vec::new(),
            default_width: 512,
            default_height: 512,
            default_noise_scheduler: NoiseScheduler::Pndm,
            registered_at: chrono::DateTime::UNIX_EPOCH,
        };
        Self {
            model,
            jobs: bands.iter().copied().flat_map(jobs_of).collect(),
            published: Mutex::default(),
            looks: Mutex::default(),
            marks: Mutex::default(),
            failing_marks: Mutex::default(),
            next_chunk: None,
            is_claimed_at_once: false,
            microbatch_capacity: 0,
            republished_after: Mutex::default(),
        }
    }

    /// Workers that take so many jobs in one microbatch each.
    pub fn with_workers_for(self, microbatch_capacity: u64) -> Self {
        Self { microbatch_capacity, ..self }
    }

    /// Workers that are faster than any relay.
    pub fn claimed_at_once(self) -> Self {
        Self { is_claimed_at_once: true, ..self }
    }

    /// No mark ends, and none shows, before the chunk after it is on its way to `queue`, which gets `last` of them, all in one window.
    pub fn marked_beside(self, queue: &FakeQueue, last: usize) -> Self {
        Self { next_chunk: Some(NextChunk { calls: queue.begun.subscribe(), last }), ..self }
    }

    pub fn fail_mark(&self, place: usize) {
        self.failing_marks.lock().unwrap().insert(place);
    }

    pub fn mark_all_published(&self) {
        self.mark_published(self.jobs.len());
    }

    /// The first `count` jobs.
    pub fn mark_published(&self, count: usize) {
        self.published.lock().unwrap().extend(self.jobs.iter().take(count).map(|(_, job)| job.job_id));
    }

    /// How often somebody asked how much of a band is on the way.
    pub fn looks(&self, band: PriorityBand) -> usize {
        self.looks.lock().unwrap().iter().filter(|&&of| of == band).count()
    }

    pub fn published(&self) -> usize {
        self.published.lock().unwrap().len()
    }

    pub fn republished_after(&self) -> Vec<Duration> {
        self.republished_after.lock().unwrap().clone()
    }
}

impl Backlog for FakeBacklog {
    async fn models(&self) -> Result<Vec<Model>, CatalogError> {
        Ok(vec![self.model.clone()])
    }

    async fn jobs_to_publish(
        &self,
        _model_id: ModelId,
        band: PriorityBand,
        limit: u32,
    ) -> Result<Vec<PublishableJob>, CatalogError> {
        let published = self.published.lock().unwrap();
        let jobs = self.jobs.iter().filter(|(of, _)| *of == band).map(|(_, job)| job);
        let waiting = jobs.filter(|job| !published.contains(&job.job_id));
        Ok(waiting.take(limit as usize).cloned().collect())
    }

    async fn mark_published_if_available(&self, job_ids: &[JobId]) -> Result<u64, CatalogError> {
        let place = {
            let mut marks = self.marks.lock().unwrap();
            *marks += 1;
            *marks - 1
        };
        if let Some(NextChunk { calls, last }) = &self.next_chunk {
            calls.clone().wait_for(|&begun| begun >= (place + 2).min(*last)).await.unwrap();
        }
        if self.failing_marks.lock().unwrap().contains(&place) {
            return Err(CatalogError::Unreachable("the test says so".into()));
        }
        self.published.lock().unwrap().extend(job_ids);
        Ok(job_ids.len() as u64)
    }

    async fn microbatch_capacity(&self, _model_id: ModelId) -> Result<u64, CatalogError> {
        Ok(self.microbatch_capacity)
    }

    async fn published_unclaimed_count(
        &self,
        _model_id: ModelId,
        band: PriorityBand,
    ) -> Result<u64, CatalogError> {
        self.looks.lock().unwrap().push(band);
        let published = self.published.lock().unwrap();
        let unclaimed = self.jobs.iter().filter(|(of, job)| *of == band && published.contains(&job.job_id));
        Ok(if self.is_claimed_at_once { 0 } else { unclaimed.count() as u64 })
    }

    async fn republish_if_unclaimed_for(
        &self,
        _model_id: ModelId,
        _band: PriorityBand,
        older_than: Duration,
    ) -> Result<u64, CatalogError> {
        self.republished_after.lock().unwrap().push(older_than);
        Ok(std::mem::take(&mut *self.published.lock().unwrap()).len() as u64)
    }
}

/// A broker that answers as it is told.
#[derive(Debug, Default)]
pub struct FakeQueue {
    /// The outcome of each message by its place in a call; confirmed where nothing is said.
    outcomes: Mutex<BTreeMap<usize, PublishOutcome>>,
    ready: Mutex<Option<u32>>,
    questions: Mutex<usize>,
    declared: Mutex<Vec<String>>,
    deleted: Mutex<Vec<String>>,
    calls: Mutex<Vec<(String, Vec<OutgoingMessage>)>>,
    /// How many calls have begun.
    begun: watch::Sender<usize>,
    /// Calls, by their place among all, that find no connection.
    failing_calls: Mutex<BTreeSet<usize>>,
}

impl FakeQueue {
    pub fn fail_call(&self, place: usize) {
        self.failing_calls.lock().unwrap().insert(place);
    }

    pub fn answer(&self, place: usize, outcome: PublishOutcome) {
        self.outcomes.lock().unwrap().insert(place, outcome);
    }

    pub fn forget_answers(&self) {
        self.outcomes.lock().unwrap().clear();
    }

    pub fn set_ready(&self, ready: Option<u32>) {
        *self.ready.lock().unwrap() = ready;
    }

    pub fn questions(&self) -> usize {
        *self.questions.lock().unwrap()
    }

    pub fn declared(&self) -> Vec<String> {
        self.declared.lock().unwrap().clone()
    }

    pub fn deleted(&self) -> Vec<String> {
        self.deleted.lock().unwrap().clone()
    }

    /// The messages of each call that published something, with the queue's name.
    pub fn calls(&self) -> Vec<(String, Vec<OutgoingMessage>)> {
        self.calls.lock().unwrap().clone()
    }
}

impl Queue for FakeQueue {
    async fn declare(&self, declaration: &QueueDeclaration) -> Result<(), QueueError> {
        self.declared.lock().unwrap().push(declaration.name.clone());
        Ok(())
    }

    async fn publish(
        &self,
        name: &str,
        messages: &[OutgoingMessage],
    ) -> Result<Vec<PublishOutcome>, QueueError> {
        let place = *self.begun.borrow();
        self.begun.send_replace(place + 1);
        if self.failing_calls.lock().unwrap().contains(&place) {
            return Err(QueueError::NotConnected);
        }
        self.calls.lock().unwrap().push((name.to_owned(), messages.to_vec()));
        let outcomes = self.outcomes.lock().unwrap();
        let outcome = |place| outcomes.get(&place).copied().unwrap_or(PublishOutcome::Confirmed);
        Ok((0..messages.len()).map(outcome).collect())
    }

    async fn ready_count(&self, _name: &str) -> Result<Option<u32>, QueueError> {
        *self.questions.lock().unwrap() += 1;
        Ok(*self.ready.lock().unwrap())
    }

    async fn delete(&self, name: &str) -> Result<(), QueueError> {
        self.deleted.lock().unwrap().push(name.to_owned());
        Ok(())
    }
}
