//! Jobs whose worker is gone, and failed jobs whose time has come: both become available again.

use super::connection::PgCatalog;
use super::error::CatalogError;
use crate::id::JobId;
use crate::state::JobState;

/// What becomes of the jobs in `lost (job_id, lease_generation)`, whose rows the statement holds: a loss spends no
/// attempt, halves the company that the job may run in, and after some losses alone proves that it is the job.
pub(super) const LOSE: &str = "
            judged AS (
                SELECT lost.job_id, lost.lease_generation,
                       greatest(1, least(microbatch_limit, microbatch_size) / 2) AS company,
                       losses_alone + (microbatch_limit IS NOT DISTINCT FROM 1)::integer AS losses
                FROM lost JOIN jobs USING (job_id) JOIN attempts
                    ON attempts.job_id = lost.job_id AND attempts.lease_generation = lost.lease_generation
            ), released AS (
                UPDATE jobs SET
                    state = CASE WHEN losses < max_losses_alone() THEN 'available' ELSE 'discarded' END::job_state,
                    finalized_at = CASE WHEN losses < max_losses_alone() THEN NULL ELSE now() END,
                    error_class = CASE WHEN losses < max_losses_alone() THEN error_class ELSE 'bug' END,
                    error_message = CASE WHEN losses < max_losses_alone() THEN error_message
                        ELSE format('its worker died or hung %s times while it ran alone', losses) END,
                    can_retry_help = CASE WHEN losses < max_losses_alone() THEN can_retry_help ELSE false END,
                    microbatch_limit = company,
                    losses_alone = losses,
                    attempt = attempt - 1,
                    leased_by = NULL, lease_expires_at = NULL, published_at = NULL
                FROM judged WHERE jobs.job_id = judged.job_id AND jobs.state = 'running'
                RETURNING jobs.job_id, jobs.state
            ), closed AS (
                UPDATE attempts SET ended_at = clock_timestamp(), outcome = 'lost'
                FROM lost
                WHERE attempts.job_id = lost.job_id AND attempts.lease_generation = lost.lease_generation
            ), woken AS (
                SELECT pg_notify('darkroom_jobs', '') FROM released LIMIT 1
            )
            SELECT job_id, state FROM released WHERE (SELECT count(*) FROM woken) >= 0";

impl PgCatalog {
    /// Takes up to `limit` running jobs from workers whose leases on them have expired. They become available again,
    /// unpublished and with the attempt given back: losing a worker is not the job's failure. But each loss halves the
    /// company that a job may share a microbatch with, and one that was lost `max_losses_alone()` times while it ran
    /// alone is discarded. Returns the jobs and what became of them.
    ///
    /// # Errors
    /// When Postgres fails.
    pub async fn rescue_if_lease_expired(&self, limit: u32) -> Result<Vec<(JobId, JobState)>, CatalogError> {
        let sql = format!(
            "WITH lost AS (
                SELECT job_id, lease_generation FROM jobs
                WHERE state = 'running' AND lease_expires_at < now()
                ORDER BY lease_expires_at LIMIT $1
                FOR NO KEY UPDATE SKIP LOCKED
            ), {LOSE}"
        );
        Ok(sqlx::query_as(&sql).bind(i64::from(limit)).fetch_all(&self.pool).await?)
    }

    /// Makes up to `limit` retryable jobs whose time has come available again. Returns the jobs.
    ///
    /// # Errors
    /// When Postgres fails.
    pub async fn stage_if_due(&self, limit: u32) -> Result<Vec<JobId>, CatalogError> {
        let sql = "
            WITH due AS (
                SELECT job_id FROM jobs WHERE state = 'retryable' AND scheduled_at <= now()
                ORDER BY scheduled_at LIMIT $1
                FOR NO KEY UPDATE SKIP LOCKED
            ), staged AS (
                UPDATE jobs SET state = 'available', scheduled_at = NULL, published_at = NULL
                FROM due WHERE jobs.job_id = due.job_id AND jobs.state = 'retryable'
                RETURNING jobs.job_id
            ), woken AS (
                SELECT pg_notify('darkroom_jobs', '') FROM staged LIMIT 1
            )
            SELECT job_id FROM staged WHERE (SELECT count(*) FROM woken) >= 0";
        Ok(sqlx::query_scalar(sql).bind(i64::from(limit)).fetch_all(&self.pool).await?)
    }
}
