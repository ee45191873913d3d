//! The relay: keeps each queue filled up to the watermark from the backlog in Postgres.
//!
//! It publishes first and marks after. A crash in between leaves published jobs unmarked, so they are published a
//! second time, and the worker that finds a job claimed or final drops the message. Two relays take turns
//! ([`PgCatalog::try_relay_turn`]), and where that fails they do the same to each other. Fairness among batches is in the query; the watermark is what makes cancelling, priorities and
//! fairness quick to take effect, because what the broker holds is out of our hands.
use std::collections::HashSet;
use std::future::Future;
use std::time::Duration;

use anyhow::{Context, Result};
use schema::failpoint;
use schema::{
    CatalogError, JobId, Model, ModelId, PgCatalog, PriorityBand, PublishableJob, QueueDeclaration, job_queue,
};
use serde::Serialize;
use tracing::{debug, info, warn};

use crate::queue::{OutgoingMessage, PublishOutcome, Queue};

/// Messages in one `publish` call: enough to keep the broker busy while confirms travel, and few enough that all
/// confirms arrive long before their time limit.
const CHUNK: u32 = 1_000;

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
}

impl Relay {
    /// A relay that keeps at most `watermark` unclaimed messages per model and band.
    pub fn new(watermark: u32) -> Self {
        Self { watermark, declared: HashSet::new() }
    }

    /// Fills every queue up to the watermark, once.
    ///
    /// # Errors
    /// If the catalog or the broker cannot be asked. What was published until then stays published.
    pub async fn run_once(&mut self, backlog: &impl Backlog, queue: &impl Queue) -> Result<RelayReport> {
        let mut report = RelayReport::default();
        for model in backlog.models().await? {
            for &band in PriorityBand::ALL {
                let filled = self.fill(backlog, queue, &model, band, &mut report).await;
                filled.with_context(|| {
                    format!("cannot fill the queue of model `{}`, band {band}", model.name)
                })?;
            }
        }
        if report.published > 0 {
            info!(published = report.published, "Published {} jobs", report.published);
        }
        Ok(report)
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
        if refused > 0 {
            warn!(
                queue.name = declaration.name,
                refused, "The queue {} refused {refused} messages", declaration.name
            );
        }
        let confirmed =
            jobs.iter().zip(&outcomes).filter(|&(_, &outcome)| outcome == PublishOutcome::Confirmed);
        Ok(confirmed.map(|(job, _)| job.job_id).collect())
    }

    async fn declare(&mut self, queue: &impl Queue, declaration: &QueueDeclaration) -> Result<()> {
        if !self.declared.contains(&declaration.name) {
            queue.declare(declaration).await?;
            self.declared.insert(declaration.name.clone());
        }
        Ok(())
    }
}

#[cfg(test)]
#[expect(missing_docs, reason = "the names of a test's stand-ins say what they do")]
pub mod fakes;
#[cfg(test)]
mod tests;
