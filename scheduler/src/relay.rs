//! The relay: keeps each queue filled up to the watermark from the backlog in Postgres.
//!
//! It publishes first and marks after. A crash in between leaves published jobs unmarked, so they are published a
//! second time, and the worker that finds a job claimed or final drops the message. Two relays take turns
//! ([`PgCatalog::try_relay_turn`]), and where that fails they do the same to each other. Fairness among batches is in the query; the watermark is what makes cancelling, priorities and
//! fairness quick to take effect, because what the broker holds is out of our hands.
//!
//! A queue can break alone, and for good: its process is gone or finds no leader, while the broker around it answers
//! (RabbitMQ 3.10 does this when queues are deleted and declared in a hurry, and its node is then killed). Nobody can
//! publish to such a queue or consume from it. Since messages are only hints, the relay makes it anew.
use std::collections::{HashMap, HashSet};
use std::future::Future;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use schema::failpoint;
use schema::{
    CatalogError, JobId, Model, ModelId, PgCatalog, PriorityBand, PublishableJob, QueueDeclaration, job_queue,
};
use serde::Serialize;
use tracing::{debug, info, warn};

use crate::queue::{OutgoingMessage, PublishOutcome, Queue, QueueError};

/// Messages in one `publish` call: enough to keep the broker busy while confirms travel, and few enough that all
/// confirms arrive long before their time limit.
const CHUNK: u32 = 1_000;

/// So often in a row, each time on a fresh connection, may a queue be silent or refuse everything while it is empty...
const SILENCES: u32 = 2;
/// ...and for so long, before it counts as broken. A quorum that elects a leader takes seconds.
const SILENCE_LIMIT: Duration = Duration::from_secs(30);

/// What the relay and the republisher need of the catalog.
pub trait Backlog: Send + Sync {
    /// All registered models.
    fn models(&self) -> impl Future<Output = Result<Vec<Model>, CatalogError>> + Send;
    /// Up to `limit` unpublished jobs, fair among batches.
    fn jobs_to_publish(
        &self,
        model_id: ModelId,
        band: PriorityBand,
        limit: u32,
    ) -> impl Future<Output = Result<Vec<PublishableJob>, CatalogError>> + Send;
    /// Marks jobs as published, unless they were claimed meanwhile.
    fn mark_published_if_available(
        &self,
        job_ids: &[JobId],
    ) -> impl Future<Output = Result<u64, CatalogError>> + Send;
    /// How many jobs are published and unclaimed.
    fn published_unclaimed_count(
        &self,
        model_id: ModelId,
        band: PriorityBand,
    ) -> impl Future<Output = Result<u64, CatalogError>> + Send;
    /// Takes the mark off jobs that were published longer ago than `older_than` and never claimed.
    fn republish_if_unclaimed_for(
        &self,
        model_id: ModelId,
        band: PriorityBand,
        older_than: Duration,
    ) -> impl Future<Output = Result<u64, CatalogError>> + Send;
}

impl Backlog for PgCatalog {
    async fn models(&self) -> Result<Vec<Model>, CatalogError> {
        self.models().await
    }

    async fn jobs_to_publish(
        &self,
        model_id: ModelId,
        band: PriorityBand,
        limit: u32,
    ) -> Result<Vec<PublishableJob>, CatalogError> {
        self.jobs_to_publish(model_id, band, limit).await
    }

    async fn mark_published_if_available(&self, job_ids: &[JobId]) -> Result<u64, CatalogError> {
        self.mark_published_if_available(job_ids).await
    }

    async fn published_unclaimed_count(
        &self,
        model_id: ModelId,
        band: PriorityBand,
    ) -> Result<u64, CatalogError> {
        self.published_unclaimed_count(model_id, band).await
    }

    async fn republish_if_unclaimed_for(
        &self,
        model_id: ModelId,
        band: PriorityBand,
        older_than: Duration,
    ) -> Result<u64, CatalogError> {
        self.republish_if_unclaimed_for(model_id, band, older_than).await
    }
}

/// What one run did.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub struct RelayReport {
    /// Messages that the broker holds now.
    pub published: u64,
    /// Messages that the broker did not take, or did not say so. Their jobs wait for the next run.
    pub not_published: u64,
}

/// The relay with what it remembers between runs.
#[derive(Debug)]
pub struct Relay {
    watermark: u32,
    /// Queues that are known to exist. Forgotten when a message comes back.
    declared: HashSet<String>,
    /// The queues that do not take messages although the broker answers.
    silences: HashMap<String, Silence>,
    silence_limit: Duration,
}

/// Since when a queue takes nothing, and how often it was tried.
#[derive(Clone, Copy, Debug)]
struct Silence {
    since: Instant,
    count: u32,
}

impl Silence {
    fn is_longer_than(&self, limit: Duration) -> bool {
        self.count >= SILENCES && self.since.elapsed() >= limit
    }
}

impl Relay {
    /// A relay that keeps at most `watermark` unclaimed messages per model and band.
    pub fn new(watermark: u32) -> Self {
        Self { watermark, declared: HashSet::new(), silences: HashMap::new(), silence_limit: SILENCE_LIMIT }
    }

    /// Fills every queue up to the watermark, once. One that fails does not keep the others waiting.
    ///
    /// # Errors
    /// If the catalog or the broker cannot be asked: the first reason. What was published stays published.
    pub async fn run_once(&mut self, backlog: &impl Backlog, queue: &impl Queue) -> Result<RelayReport> {
        let mut report = RelayReport::default();
        let mut failed = None;
        for model in backlog.models().await? {
            for &band in PriorityBand::ALL {
                let filled = self.fill(backlog, queue, &model, band, &mut report).await;
                let filled = filled
                    .with_context(|| format!("cannot fill the queue of model `{}`, band {band}", model.name));
                if let Err(error) = filled {
                    failed.get_or_insert(error);
                }
            }
        }
        if report.published > 0 {
            info!(published = report.published, "Published {} jobs", report.published);
        }
        failed.map_or(Ok(report), Err)
    }

    async fn fill(
        &mut self,
        backlog: &impl Backlog,
        queue: &impl Queue,
        model: &Model,
        band: PriorityBand,
        report: &mut RelayReport,
    ) -> Result<()> {
        let declaration = job_queue(&model.name, band);
        if self
            .silences
            .get(&declaration.name)
            .is_some_and(|silence| silence.is_longer_than(self.silence_limit))
        {
            self.make_anew(backlog, queue, model, band, &declaration.name).await?;
        }
        // Declared also while it is empty, so that workers and autoscalers find it.
        self.declare(queue, &declaration).await?;
        loop {
            let unclaimed = backlog.published_unclaimed_count(model.model_id, band).await?;
            let room = u64::from(self.watermark).saturating_sub(unclaimed);
            let limit = u32::try_from(room).unwrap_or(u32::MAX).min(CHUNK);
            if limit == 0 {
                return Ok(());
            }
            let jobs = backlog.jobs_to_publish(model.model_id, band, limit).await?;
            if jobs.is_empty() {
                return Ok(());
            }
            let confirmed = self.publish(queue, &declaration, &jobs).await?;
            failpoint::reached("relay::after_publish");
            let marked = backlog.mark_published_if_available(&confirmed).await?;
            failpoint::reached("relay::after_mark");
            debug!(
                queue.name = declaration.name,
                confirmed = confirmed.len(),
                marked,
                "Published {} jobs to {}",
                confirmed.len(),
                declaration.name
            );
            report.published += confirmed.len() as u64;
            report.not_published += (jobs.len() - confirmed.len()) as u64;
            // A queue that does not take all it is offered gets a pause until the next run.
            if confirmed.len() < jobs.len() || jobs.len() < limit as usize {
                return Ok(());
            }
        }
    }

    /// Publishes `jobs` and returns those that the broker holds.
    async fn publish(
        &mut self,
        queue: &impl Queue,
        declaration: &QueueDeclaration,
        jobs: &[PublishableJob],
    ) -> Result<Vec<JobId>> {
        let messages: Vec<OutgoingMessage> = jobs
            .iter()
            .map(|job| OutgoingMessage { body: job.message().encode(), traceparent: job.traceparent.clone() })
            .collect();
        let asked = Instant::now();
        let outcomes = queue.publish(&declaration.name, &messages).await?;
        let count = |wanted| outcomes.iter().filter(|&&outcome| outcome == wanted).count();
        let (returned, refused) = (count(PublishOutcome::Returned), count(PublishOutcome::Refused));
        if returned > 0 {
            // Somebody deleted the queue, or the broker lost everything. The next run makes it again.
            self.declared.remove(&declaration.name);
            warn!(
                queue.name = declaration.name,
                returned, "The queue {} is gone; making it again", declaration.name
            );
        }
        // Once a queue, not once a second.
        if refused > 0 && !self.silences.contains_key(&declaration.name) {
            warn!(
                queue.name = declaration.name,
                refused, "The queue {} refused {refused} messages", declaration.name
            );
        }
        if count(PublishOutcome::Silent) == jobs.len() {
            self.note_silence(&declaration.name, asked);
        } else if refused == jobs.len() && queue.ready_count(&declaration.name).await? == Some(0) {
            // It is not full: nothing of it is left that could store a message.
            self.note_silence(&declaration.name, asked);
        } else if count(PublishOutcome::Confirmed) > 0 {
            self.silences.remove(&declaration.name);
        }
        let confirmed =
            jobs.iter().zip(&outcomes).filter(|&(_, &outcome)| outcome == PublishOutcome::Confirmed);
        Ok(confirmed.map(|(job, _)| job.job_id).collect())
    }

    async fn declare(&mut self, queue: &impl Queue, declaration: &QueueDeclaration) -> Result<()> {
        if !self.declared.contains(&declaration.name) {
            let asked = Instant::now();
            let declared = queue.declare(declaration).await;
            if declared.as_ref().is_err_and(QueueError::may_be_the_queue) {
                self.note_silence(&declaration.name, asked);
            }
            declared?;
            self.declared.insert(declaration.name.clone());
        }
        Ok(())
    }

    fn note_silence(&mut self, name: &str, asked: Instant) {
        self.silences.entry(name.to_owned()).or_insert(Silence { since: asked, count: 0 }).count += 1;
    }

    /// Removes a broken queue. What it held is published again, to the queue that the next declaration makes.
    async fn make_anew(
        &mut self,
        backlog: &impl Backlog,
        queue: &impl Queue,
        model: &Model,
        band: PriorityBand,
        name: &str,
    ) -> Result<()> {
        // Each silence has replaced the connection, and this one was built since: the broker itself answers.
        queue.delete(name).await?;
        let lost = backlog.republish_if_unclaimed_for(model.model_id, band, Duration::ZERO).await?;
        warn!(
            queue.name = name,
            lost, "The queue {name} did not answer {SILENCES} times in a row; it is made anew"
        );
        self.silences.remove(name);
        self.declared.remove(name);
        Ok(())
    }
}

#[cfg(test)]
#[expect(missing_docs, reason = "the names of a test's stand-ins say what they do")]
pub mod fakes;
#[cfg(test)]
mod tests;
