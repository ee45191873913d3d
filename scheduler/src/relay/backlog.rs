//! The wall to the catalog: what the relay and the republisher need of it.
use std::future::Future;
use std::time::Duration;

use schema::{CatalogError, JobId, Model, ModelId, PgCatalog, PriorityBand, PublishableJob};

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
    /// How many jobs the model's workers take in one microbatch each.
    fn microbatch_capacity(
        &self,
        model_id: ModelId,
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

    async fn microbatch_capacity(&self, model_id: ModelId) -> Result<u64, CatalogError> {
        self.microbatch_capacity(model_id).await
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
