//! Leases: claiming jobs, extending and returning the right to run them.
//!
//! A claim adds one to the job's `lease_generation`, and every later statement about the job names that number. A
//! claim waits for a row that another statement holds instead of skipping it: the relay may still be marking the job
//! as published when its message arrives, and a skipped job's message would be lost.

use std::time::Duration;

use super::connection::PgCatalog;
use super::error::CatalogError;
use super::rescue::LOSE;
use super::rows::SpecColumns;
use crate::id::{AcceptanceId, BatchId, JobId, MicrobatchId, WorkerId};
use crate::job_spec::valid::ValidJobSpec;
use crate::sha256::Sha256Digest;
use crate::state::{JobState, Lease};

/// A job that this worker may now run.
#[derive(Clone, Debug, PartialEq)]
pub struct ClaimedJob {
    /// The job and its fencing token.
    pub lease: Lease,
    /// The batch it belongs to.
    pub batch_id: BatchId,
    /// Its place in the batch, from 0.
    pub ordinal: u32,
    /// Which attempt this is, from 1.
    pub attempt: u32,
    /// How many it has.
    pub max_attempts: u32,
    /// What to draw.
    pub spec: ValidJobSpec,
    /// The digest of the weights to draw it with.
    pub weights_sha256: Sha256Digest,
    /// The licence acceptance it was submitted under.
    pub acceptance_id: AcceptanceId,
    /// The W3C trace context it was submitted under.
    pub traceparent: Option<String>,
    /// The most jobs that it may share a microbatch with, itself included. With 1 its worker may hold nothing else: it is
    /// suspected of killing workers. `None` for a job that was never lost.
    pub microbatch_limit: Option<u32>,
}

/// What becomes of the messages of released jobs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum LeaseReturn {
    /// They go back to the queue (nack with requeue): the broker will deliver them again.
    MessageRequeued,
    /// They are settled or lost: the relay has to publish the jobs again.
    MessageSettled,
    /// They are settled, and the process cannot go on: one of the jobs may be what broke it. Counted as lost, as if the
    /// leases had expired; see [`PgCatalog::rescue_if_lease_expired`].
    Suspected,
}

#[derive(sqlx::FromRow)]
struct ClaimedRow {
    job_id: JobId,
    lease_generation: i64,
    batch_id: BatchId,
    #[sqlx(try_from = "i32")]
    ordinal: u32,
    attempt: i16,
    max_attempts: i16,
    weights_sha256: Sha256Digest,
    acceptance_id: AcceptanceId,
    traceparent: Option<String>,
    microbatch_limit: Option<i32>,
    #[sqlx(flatten)]
    spec: SpecColumns,
}

/// Locks those of the given leases that are still held. Like what every microbatch asks, it names the jobs in an array and hides
/// the state from the index `jobs_running`: with statistics of a time when nothing ran, Postgres would otherwise walk
/// through every running job of the fleet to find these.
const HELD: &str = "
                SELECT jobs.job_id, lease_generation FROM jobs
                JOIN unnest($1::uuid[], $2::bigint[]) AS given (job_id, lease_generation)
                    USING (job_id, lease_generation)
                WHERE jobs.job_id = ANY (ARRAY(SELECT unnest($1))) AND (state = 'running') IS TRUE
                ORDER BY jobs.job_id FOR NO KEY UPDATE OF jobs";

/// The jobs and generations of `leases` as two arrays, for `unnest`.
pub(super) fn unzip(leases: &[Lease]) -> (Vec<JobId>, Vec<i64>) {
    leases.iter().map(|lease| (lease.job_id, lease.lease_generation)).unzip()
}

impl PgCatalog {
    /// Claims those of `job_ids` that are available, for `worker_id`, until `lease` from now, and opens an attempt for each.
    /// Jobs that are not available (finished, cancelled, held by another worker) are left out of the answer, which has
    /// the order of `job_ids`.
    ///
    /// # Errors
    /// When the worker is not registered or serves another model, and when Postgres fails.
    pub async fn claim_if_available(
        &self,
        job_ids: &[JobId],
        worker_id: WorkerId,
        microbatch_id: MicrobatchId,
        lease: Duration,
    ) -> Result<Vec<ClaimedJob>, CatalogError> {
        // The array is hidden in a subquery, so that a plan for it is as good as a plan for any: Postgres would plan the statement
        // anew for each small microbatch, which takes half as long again as running it. As in `HELD`, the state is hidden from
        // indexes, all of whose available jobs would else be walked through where that looked short.
        let sql = "
            WITH claimable AS (
                SELECT job_id FROM jobs
                WHERE job_id = ANY (ARRAY(SELECT unnest($1))) AND (state = 'available') IS TRUE
                ORDER BY job_id FOR NO KEY UPDATE
            ), claimed AS (
                UPDATE jobs SET
                    state = 'running',
                    attempt = attempt + 1,
                    lease_generation = lease_generation + 1,
                    leased_by = $2,
                    lease_expires_at = clock_timestamp() + make_interval(secs => $4),
                    started_at = coalesce(started_at, now())
                FROM claimable
                WHERE jobs.job_id = claimable.job_id AND jobs.job_id = ANY (ARRAY(SELECT job_id FROM claimable))
                  AND (jobs.state = 'available') IS TRUE
                RETURNING jobs.*
            ), opened AS (
                INSERT INTO attempts (job_id, lease_generation, attempt, worker_id, microbatch_id, microbatch_size)
                SELECT job_id, lease_generation, attempt, $2, $3, (SELECT count(*) FROM claimed) FROM claimed
            )
            SELECT claimed.*, batches.acceptance_id, models.weights_sha256
            FROM claimed JOIN batches USING (batch_id) JOIN models ON models.model_id = claimed.model_id
            ORDER BY array_position($1, claimed.job_id)";
        let rows: Vec<ClaimedRow> = sqlx::query_as(sql)
            .bind(job_ids)
            .bind(worker_id)
            .bind(microbatch_id)
            .bind(lease.as_secs_f64())
            .fetch_all(&self.pool)
            .await?;
        rows.into_iter().map(ClaimedRow::into_claimed).collect()
    }

    /// Looks which of the leases `worker_id` still holds, and returns the jobs of those. A job that is missing from the answer was
    /// rescued or cancelled: stop working on it. Leases of which a third has passed are extended to `lease` from now; the others
    /// are only read, because a worker asks every second, and a row written each time would cost Postgres more than the
    /// picture does.
    ///
    /// # Errors
    /// When Postgres fails.
    pub async fn extend_leases_if_held(
        &self,
        leases: &[Lease],
        worker_id: WorkerId,
        lease: Duration,
    ) -> Result<Vec<JobId>, CatalogError> {
        let sql = "
            WITH held AS (
                SELECT job_id, lease_generation,
                       lease_expires_at <= clock_timestamp() + make_interval(secs => $4 * 2 / 3) AS is_due
                FROM jobs
                JOIN unnest($1::uuid[], $2::bigint[]) AS given (job_id, lease_generation)
                    USING (job_id, lease_generation)
                WHERE job_id = ANY (ARRAY(SELECT unnest($1))) AND (state = 'running') IS TRUE AND leased_by = $3
            ), due AS (
                SELECT jobs.job_id FROM jobs JOIN held USING (job_id)
                WHERE jobs.job_id = ANY (ARRAY(SELECT job_id FROM held WHERE is_due))
                  AND jobs.lease_generation = held.lease_generation
                  AND (jobs.state = 'running') IS TRUE AND jobs.leased_by = $3
                ORDER BY jobs.job_id FOR NO KEY UPDATE OF jobs
            ), extended AS (
                UPDATE jobs SET lease_expires_at = clock_timestamp() + make_interval(secs => $4)
                FROM due
                WHERE jobs.job_id = due.job_id AND jobs.job_id = ANY (ARRAY(SELECT job_id FROM due))
                  AND (jobs.state = 'running') IS TRUE
                RETURNING jobs.job_id
            )
            SELECT job_id FROM held WHERE NOT is_due UNION ALL SELECT job_id FROM extended";
        let (job_ids, generations) = unzip(leases);
        let query = sqlx::query_scalar(sql).bind(job_ids).bind(generations).bind(worker_id);
        Ok(query.bind(lease.as_secs_f64()).fetch_all(&self.pool).await?)
    }

    /// Gives jobs back: available again, the attempt not counted. Returns the jobs whose lease was still held.
    ///
    /// # Errors
    /// When Postgres fails.
    pub async fn release_if_leased(
        &self,
        leases: &[Lease],
        messages: LeaseReturn,
    ) -> Result<Vec<JobId>, CatalogError> {
        let (job_ids, generations) = unzip(leases);
        if messages == LeaseReturn::Suspected {
            let sql = format!("WITH lost AS ({HELD}), {LOSE}");
            let query = sqlx::query_as::<_, (JobId, JobState)>(&sql).bind(job_ids).bind(generations);
            return Ok(query.fetch_all(&self.pool).await?.into_iter().map(|(job_id, _)| job_id).collect());
        }
        // With its message requeued a job counts as published now, even if the claim came before the relay's mark.
        let sql = format!(
            "WITH held AS ({HELD}), released AS (
                UPDATE jobs SET
                    state = 'available',
                    attempt = attempt - 1,
                    leased_by = NULL,
                    lease_expires_at = NULL,
                    published_at = CASE WHEN $3 THEN now() END
                FROM held
                WHERE jobs.job_id = held.job_id AND jobs.job_id = ANY (ARRAY(SELECT job_id FROM held))
                  AND (jobs.state = 'running') IS TRUE
                RETURNING jobs.job_id
            ), closed AS (
                UPDATE attempts SET ended_at = clock_timestamp(), outcome = 'preempted'
                FROM held
                WHERE attempts.job_id = held.job_id AND attempts.lease_generation = held.lease_generation
            ), woken AS (
                SELECT pg_notify('darkroom_jobs', '') FROM released WHERE NOT $3 LIMIT 1
            )
            SELECT job_id FROM released WHERE (SELECT count(*) FROM woken) >= 0"
        );
        let requeued = messages == LeaseReturn::MessageRequeued;
        Ok(sqlx::query_scalar(&sql)
            .bind(job_ids)
            .bind(generations)
            .bind(requeued)
            .fetch_all(&self.pool)
            .await?)
    }
}

impl ClaimedRow {
    fn into_claimed(self) -> Result<ClaimedJob, CatalogError> {
        let count = |count: i16| u32::try_from(count).unwrap_or(0);
        Ok(ClaimedJob {
            lease: Lease { job_id: self.job_id, lease_generation: self.lease_generation },
            batch_id: self.batch_id,
            ordinal: self.ordinal,
            attempt: count(self.attempt),
            max_attempts: count(self.max_attempts),
            spec: self.spec.into_spec(self.job_id)?,
            weights_sha256: self.weights_sha256,
            acceptance_id: self.acceptance_id,
            traceparent: self.traceparent,
            microbatch_limit: self.microbatch_limit.map(|limit| u32::try_from(limit).unwrap_or(1)),
        })
    }
}
