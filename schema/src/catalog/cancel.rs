//! Cancelling: a person no longer wants some jobs. What is final stays as it is.

use serde::Serialize;

use super::connection::PgCatalog;
use super::error::CatalogError;
use crate::id::{BatchId, JobId};

/// What a cancellation did.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub struct CancelCounts {
    /// Jobs that are cancelled by this call.
    pub cancelled: u64,
    /// Those among them that a worker was running; it stops before its next denoising step.
    pub of_them_running: u64,
    /// Jobs that were final already and stay as they are.
    pub already_final: u64,
}

/// Cancels the jobs that `scope` selects. A running job's lease ends here: its worker's number is outdated at once.
fn cancel_sql(scope: &str, notice: &str) -> String {
    format!(
        "WITH wanted AS (
            SELECT job_id, state FROM jobs
            WHERE {scope} AND state IN ('available', 'running', 'retryable')
            ORDER BY job_id FOR NO KEY UPDATE
        ), cancelled AS (
            UPDATE jobs SET
                state = 'cancelled', finalized_at = now(),
                leased_by = NULL, lease_expires_at = NULL, scheduled_at = NULL,
                lease_generation = jobs.lease_generation + CASE WHEN wanted.state = 'running' THEN 1 ELSE 0 END
            FROM wanted
            WHERE jobs.job_id = wanted.job_id AND jobs.state IN ('available', 'running', 'retryable')
            RETURNING wanted.state
        ), woken AS (
            SELECT pg_notify('darkroom_cancelled', '{notice}:' || $1) FROM cancelled LIMIT 1
        )
        SELECT count(*), count(*) FILTER (WHERE state = 'running'), (SELECT count(*) FROM woken) FROM cancelled"
    )
}

/// Ends the attempts of the jobs that `scope` selects and that are cancelled now. A statement of its own, since the one
/// before cannot see an attempt that a claim opened while it waited for the job's row.
fn close_sql(scope: &str) -> String {
    format!(
        "UPDATE attempts SET ended_at = clock_timestamp(), outcome = 'cancelled'
         FROM jobs
         WHERE attempts.ended_at IS NULL AND jobs.job_id = attempts.job_id
           AND jobs.{scope} AND jobs.state = 'cancelled'"
    )
}

impl PgCatalog {
    /// Cancels every job of a batch that is not final, and marks the batch. `None` when there is no such batch.
    ///
    /// # Errors
    /// When Postgres fails.
    pub async fn cancel_batch_if_not_final(
        &self,
        batch_id: BatchId,
    ) -> Result<Option<CancelCounts>, CatalogError> {
        let mut transaction = self.pool.begin().await?;
        let mark = "UPDATE batches SET cancelled_at = coalesce(cancelled_at, now()) WHERE batch_id = $1
                    RETURNING job_count";
        let Some(job_count): Option<i32> =
            sqlx::query_scalar(mark).bind(batch_id).fetch_optional(&mut *transaction).await?
        else {
            return Ok(None);
        };
        let sql = cancel_sql("batch_id = $1", "batch");
        let (cancelled, running, _): (i64, i64, i64) =
            sqlx::query_as(&sql).bind(batch_id).fetch_one(&mut *transaction).await?;
        sqlx::query(&close_sql("batch_id = $1")).bind(batch_id).execute(&mut *transaction).await?;
        transaction.commit().await?;
        Ok(Some(counts(i64::from(job_count), cancelled, running)))
    }

    /// Cancels one job if it is not final. `None` when there is no such job.
    ///
    /// # Errors
    /// When Postgres fails.
    pub async fn cancel_job_if_not_final(&self, job_id: JobId) -> Result<Option<CancelCounts>, CatalogError> {
        let mut transaction = self.pool.begin().await?;
        let sql = cancel_sql("job_id = $1", "job");
        let (cancelled, running, _): (i64, i64, i64) =
            sqlx::query_as(&sql).bind(job_id).fetch_one(&mut *transaction).await?;
        sqlx::query(&close_sql("job_id = $1")).bind(job_id).execute(&mut *transaction).await?;
        transaction.commit().await?;
        if cancelled == 0 {
            let exists: bool = sqlx::query_scalar("SELECT EXISTS (SELECT FROM jobs WHERE job_id = $1)")
                .bind(job_id)
                .fetch_one(&self.pool)
                .await?;
            return Ok(exists.then(|| counts(1, 0, 0)));
        }
        Ok(Some(counts(1, cancelled, running)))
    }
}

fn counts(job_count: i64, cancelled: i64, running: i64) -> CancelCounts {
    CancelCounts {
        cancelled: cancelled.unsigned_abs(),
        of_them_running: running.unsigned_abs(),
        already_final: (job_count - cancelled).unsigned_abs(),
    }
}
