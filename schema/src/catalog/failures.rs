//! Failed attempts: another try later, or giving up. Only these spend a job's retry budget.

use chrono::{DateTime, Utc};

use super::connection::PgCatalog;
use super::error::CatalogError;
use crate::state::{ErrorClass, JobState, Lease, LeaseLost};

/// The longest error message kept, in characters.
const MAX_MESSAGE_CHARS: usize = 4_000;

/// Why an attempt failed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Failure {
    /// What kind of fault it was.
    pub class: ErrorClass,
    /// The whole chain of causes, for people. Cut to 4,000 characters.
    pub message: String,
    /// Whether another attempt may go better.
    pub can_retry_help: bool,
}

/// What became of a failed job.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FailDisposition {
    /// It will be tried again.
    Retryable {
        /// Not before this time, by the database's clock.
        scheduled_at: DateTime<Utc>,
    },
    /// It was given up.
    Discarded,
}

impl PgCatalog {
    /// Ends the attempt with an error. The job becomes retryable, after a delay that grows with each attempt, or
    /// discarded when retrying cannot help or no attempt is left.
    ///
    /// # Errors
    /// The inner [`LeaseLost`] when the lease is no longer held; the outer error when Postgres fails.
    pub async fn fail_if_leased(
        &self,
        lease: Lease,
        failure: &Failure,
    ) -> Result<Result<FailDisposition, LeaseLost>, CatalogError> {
        let sql = "
            WITH held AS (
                SELECT job_id, lease_generation, $5 AND attempt < max_attempts AS again,
                       now() + retry_delay(attempt) AS due
                FROM jobs WHERE job_id = $1 AND lease_generation = $2 AND state = 'running'
                FOR NO KEY UPDATE
            ), failed AS (
                UPDATE jobs SET
                    state = CASE WHEN again THEN 'retryable' ELSE 'discarded' END::job_state,
                    scheduled_at = CASE WHEN again THEN due END,
                    finalized_at = CASE WHEN again THEN NULL ELSE now() END,
                    error_class = $3,
                    error_message = $4,
                    can_retry_help = $5,
                    leased_by = NULL,
                    lease_expires_at = NULL,
                    published_at = NULL
                FROM held WHERE jobs.job_id = held.job_id AND jobs.state = 'running'
                RETURNING jobs.state, jobs.scheduled_at
            ), closed AS (
                UPDATE attempts SET
                    ended_at = clock_timestamp(), outcome = 'error',
                    error_class = $3, error_message = $4, can_retry_help = $5
                FROM held
                WHERE attempts.job_id = held.job_id AND attempts.lease_generation = held.lease_generation
            )
            SELECT state, scheduled_at FROM failed";
        let message: String = failure.message.replace('\0', "").chars().take(MAX_MESSAGE_CHARS).collect();
        let row: Option<(JobState, Option<DateTime<Utc>>)> = sqlx::query_as(sql)
            .bind(lease.job_id)
            .bind(lease.lease_generation)
            .bind(failure.class)
            .bind(message)
            .bind(failure.can_retry_help)
            .fetch_optional(&self.pool)
            .await?;
        Ok(match row {
            Some((JobState::Retryable, Some(scheduled_at))) => {
                Ok(FailDisposition::Retryable { scheduled_at })
            }
            Some(_) => Ok(FailDisposition::Discarded),
            None => Err(LeaseLost(lease)),
        })
    }
}
