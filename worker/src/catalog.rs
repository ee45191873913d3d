//! The wall towards Postgres: the five things a job's life needs from the catalog once the worker is registered.
//!
//! Each method's name carries its guard, and an answer that comes too late is a typed one. What only the start and the
//! end of a worker need (its model's row, its registration) is not here but in `registration.rs`.

use std::future::Future;
use std::time::Duration;

use schema::{
    CatalogError, ClaimedJob, CompletedJob, FailDisposition, Failure, ImageId, JobId, Lease, LeaseLost,
    LeaseReturn, MicrobatchId, PgCatalog, WorkerId,
};

/// The catalog as the stages see it. [`PgCatalog`] is the real one; its methods of the same names say more.
pub trait Catalog: Send + Sync + 'static {
    /// Claims those of the jobs that are available; the others are left out of the answer.
    fn claim_if_available(
        &self,
        job_ids: &[JobId],
        worker_id: WorkerId,
        microbatch_id: MicrobatchId,
        lease: Duration,
    ) -> impl Future<Output = Result<Vec<ClaimedJob>, CatalogError>> + Send;

    /// Extends leases and answers whose are still held.
    fn extend_leases_if_held(
        &self,
        leases: &[Lease],
        worker_id: WorkerId,
        lease: Duration,
    ) -> impl Future<Output = Result<Vec<JobId>, CatalogError>> + Send;

    /// Gives jobs back unharmed.
    fn release_if_leased(
        &self,
        leases: &[Lease],
        messages: LeaseReturn,
    ) -> impl Future<Output = Result<Vec<JobId>, CatalogError>> + Send;

    /// Ends one attempt with an error.
    fn fail_if_leased(
        &self,
        lease: Lease,
        failure: &Failure,
    ) -> impl Future<Output = Result<Result<FailDisposition, LeaseLost>, CatalogError>> + Send;

    /// Records pictures and completes their jobs, in one transaction.
    fn complete_if_leased(
        &self,
        completed: &[CompletedJob],
    ) -> impl Future<Output = Result<Vec<Result<ImageId, LeaseLost>>, CatalogError>> + Send;
}

impl Catalog for PgCatalog {
    async fn claim_if_available(
        &self,
        job_ids: &[JobId],
        worker_id: WorkerId,
        microbatch_id: MicrobatchId,
        lease: Duration,
    ) -> Result<Vec<ClaimedJob>, CatalogError> {
        PgCatalog::claim_if_available(self, job_ids, worker_id, microbatch_id, lease).await
    }

    async fn extend_leases_if_held(
        &self,
        leases: &[Lease],
        worker_id: WorkerId,
        lease: Duration,
    ) -> Result<Vec<JobId>, CatalogError> {
        PgCatalog::extend_leases_if_held(self, leases, worker_id, lease).await
    }

    async fn release_if_leased(
        &self,
        leases: &[Lease],
        messages: LeaseReturn,
    ) -> Result<Vec<JobId>, CatalogError> {
        PgCatalog::release_if_leased(self, leases, messages).await
    }

    async fn fail_if_leased(
        &self,
        lease: Lease,
        failure: &Failure,
    ) -> Result<Result<FailDisposition, LeaseLost>, CatalogError> {
        PgCatalog::fail_if_leased(self, lease, failure).await
    }

    async fn complete_if_leased(
        &self,
        completed: &[CompletedJob],
    ) -> Result<Vec<Result<ImageId, LeaseLost>>, CatalogError> {
        PgCatalog::complete_if_leased(self, completed).await
    }
}
