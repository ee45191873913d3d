//! A backlog and a queue in memory, for the tests of the reconcilers.
use std::collections::{BTreeMap, BTreeSet};
use std::sync::Mutex;
use std::time::Duration;

use schema::{
    BatchId, CatalogError, JobId, Model, ModelId, NoiseScheduler, PriorityBand, PublishableJob,
    QueueDeclaration, Sha256Digest,
};

use super::Backlog;
use crate::queue::{OutgoingMessage, PublishOutcome, Queue, QueueError};

/// One model whose jobs are all in the band `normal`.
#[derive(Debug)]
pub struct FakeBacklog {
    model: Model,
    jobs: Vec<PublishableJob>,
    published: Mutex<BTreeSet<JobId>>,
    republished_after: Mutex<Vec<Duration>>,
}

impl FakeBacklog {
    pub fn with_jobs(count: u32) -> Self {
        let batch_id = BatchId::generate();
        let jobs = (0..count).map(|ordinal| PublishableJob {
            job_id: JobId::of(batch_id, ordinal),
            batch_id,
            microbatch_key: "512x512/50/pndm/cfg".parse().unwrap(),
            traceparent: (ordinal == 0).then(|| "00-trace".to_owned()),
            microbatch_limit: None,
        });
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
        let (published, republished_after) = Default::default();
        Self { model, jobs: jobs.collect(), published, republished_after }
    }

    pub fn mark_all_published(&self) {
        self.published.lock().unwrap().extend(self.jobs.iter().map(|job| job.job_id));
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
        let waiting =
            self.jobs.iter().filter(|job| band == PriorityBand::Normal && !published.contains(&job.job_id));
        Ok(waiting.take(limit as usize).cloned().collect())
    }

    async fn mark_published_if_available(&self, job_ids: &[JobId]) -> Result<u64, CatalogError> {
        self.published.lock().unwrap().extend(job_ids);
        Ok(job_ids.len() as u64)
    }

    async fn published_unclaimed_count(
        &self,
        _model_id: ModelId,
        band: PriorityBand,
    ) -> Result<u64, CatalogError> {
        Ok(if band == PriorityBand::Normal { self.published() as u64 } else { 0 })
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
}

impl FakeQueue {
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
