//! Jobs whose worker is gone, and failed jobs whose time has come: both become available again.

use super::connection::PgCatalog;
use super::error::CatalogError;
use crate::id::JobId;

impl PgCatalog {
    /// Makes up to `limit` running jobs with expired leases available again, unpublished and with the attempt given
    /// back: losing a worker is not the job's failure. Returns the jobs.
    ///
    /// # Errors
    /// When Postgres fails.
    pub async fn rescue_if_lease_expired(&self, limit: u32) -> Result<Vec<JobId>, CatalogError> {
        let sql = "
            WITH expired AS (
                SELECT job_id, lease_generation FROM jobs
                WHERE state = 'running' AND lease_expires_at < now()
                ORDER BY lease_expires_at LIMIT $1
                FOR NO KEY UPDATE SKIP LOCKED
            ), rescued AS (
                UPDATE jobs SET
                    state = 'available', attempt = attempt - 1,
                    leased_by = NULL, lease_expires_at = NULL, published_at = NULL
                FROM expired WHERE jobs.job_id = expired.job_id AND jobs.state = 'running'
                RETURNING jobs.job_id
            ), closed AS (
                UPDATE attempts SET ended_at = clock_timestamp(), outcome = 'lost'
                FROM expired
                WHERE attempts.job_id = expired.job_id AND attempts.lease_generation = expired.lease_generation
            ), woken AS (
                SELECT pg_notify('darkroom_jobs', '') FROM rescued LIMIT 1
            )
            SELECT job_id FROM rescued WHERE (SELECT count(*) FROM woken) >= 0";
        Ok(sqlx::query_scalar(sql).bind(i64::from(limit)).fetch_all(&self.pool).await?)
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
