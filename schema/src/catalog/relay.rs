//! What the relay asks: which jobs to publish next, and which of them the broker seems to have lost.
//!
//! Postgres holds the backlog and the broker a few minutes of it, so an unpublished job is one without
//! `published_at`. The relay publishes first and marks after; between the two a worker may already have claimed
//! the job, and then there is nothing left to mark.

use std::time::Duration;

use sqlx::{Postgres, Transaction};

use super::connection::PgCatalog;
use super::error::CatalogError;
use crate::id::{BatchId, JobId, ModelId};
use crate::message::JobMessage;
use crate::microbatch_key::MicrobatchKey;
use crate::recipe::Recipe;
use crate::state::{NoiseScheduler, PriorityBand};

/// A job to publish.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PublishableJob {
    /// The job.
    pub job_id: JobId,
    /// The batch it belongs to.
    pub batch_id: BatchId,
    /// What it may share a forward pass with.
    pub microbatch_key: MicrobatchKey,
    /// The W3C trace context it was submitted under.
    pub traceparent: Option<String>,
    /// As [`JobMessage::microbatch_limit`].
    pub microbatch_limit: Option<u32>,
}

impl PublishableJob {
    /// Its message.
    pub fn message(&self) -> JobMessage {
        let Self { job_id, microbatch_key, microbatch_limit, .. } = *self;
        JobMessage { job_id, microbatch_key, microbatch_limit }
    }
}

#[derive(sqlx::FromRow)]
struct PublishableRow {
    job_id: JobId,
    batch_id: BatchId,
    #[sqlx(try_from = "i32")]
    width: u32,
    #[sqlx(try_from = "i32")]
    height: u32,
    #[sqlx(try_from = "i32")]
    num_inference_steps: u32,
    noise_scheduler: NoiseScheduler,
    guidance_scale: f32,
    #[sqlx(flatten)]
    recipe: Recipe,
    traceparent: Option<String>,
    microbatch_limit: Option<i32>,
}

impl From<PublishableRow> for PublishableJob {
    fn from(row: PublishableRow) -> Self {
        Self {
            job_id: row.job_id,
            batch_id: row.batch_id,
            microbatch_key: MicrobatchKey {
                width: row.width,
                height: row.height,
                num_inference_steps: row.num_inference_steps,
                noise_scheduler: row.noise_scheduler,
                classifier_free_guidance: row.guidance_scale > 1.0,
                recipe: row.recipe,
            },
            traceparent: row.traceparent,
            microbatch_limit: row.microbatch_limit.map(|limit| u32::try_from(limit).unwrap_or(1)),
        }
    }
}

/// The turn to publish, which one relay has at a time. Dropping it, or losing the connection, ends the turn too.
#[derive(Debug)]
pub struct RelayTurn {
    transaction: Transaction<'static, Postgres>,
}

impl RelayTurn {
    /// Ends the turn.
    ///
    /// # Errors
    /// When Postgres fails; then it has ended the turn by itself.
    pub async fn end(self) -> Result<(), CatalogError> {
        Ok(self.transaction.rollback().await?)
    }
}

impl PgCatalog {
    /// Takes the turn to publish, unless another relay has it. It keeps two relays from publishing everything twice,
    /// which would be harmless but a waste; nothing else leans on it.
    ///
    /// # Errors
    /// When Postgres fails.
    pub async fn try_relay_turn(&self) -> Result<Option<RelayTurn>, CatalogError> {
        // The lock lives as long as a transaction that does nothing, so it works behind a pooler and never lingers.
        let mut transaction = self.pool.begin().await?;
        // A scheduler whose machine is gone without a word must not have the turn until TCP gives up.
        sqlx::query("SET LOCAL idle_in_transaction_session_timeout = '60s'")
            .execute(&mut *transaction)
            .await?;
        let taken: bool =
            sqlx::query_scalar("SELECT pg_try_advisory_xact_lock(hashtextextended('darkroom relay', 0))")
                .fetch_one(&mut *transaction)
                .await?;
        if taken {
            return Ok(Some(RelayTurn { transaction }));
        }
        transaction.rollback().await?;
        Ok(None)
    }

    /// Up to `limit` available, unpublished jobs, taking turns among the batches: the batch with the fewest
    /// jobs on the way (published or running) goes first, and within a batch the jobs keep their order. Locks nothing.
    ///
    /// # Errors
    /// When Postgres fails.
    pub async fn jobs_to_publish(
        &self,
        model_id: ModelId,
        band: PriorityBand,
        limit: u32,
    ) -> Result<Vec<PublishableJob>, CatalogError> {
        // `waiting` hops from batch to batch along the index `jobs_outbox`, however long each backlog is. Among
        // batches whose turn it is equally, chance decides: a fixed order would starve the last of them.
        let sql = "
            WITH RECURSIVE waiting (batch_id) AS (
                (SELECT batch_id FROM jobs
                 WHERE state = 'available' AND published_at IS NULL AND model_id = $1 AND band = $2
                 ORDER BY batch_id LIMIT 1)
                UNION ALL
                SELECT (SELECT jobs.batch_id FROM jobs
                        WHERE state = 'available' AND published_at IS NULL AND model_id = $1 AND band = $2
                          AND jobs.batch_id > waiting.batch_id
                        ORDER BY jobs.batch_id LIMIT 1)
                FROM waiting WHERE waiting.batch_id IS NOT NULL
            ), on_the_way AS (
                SELECT batch_id, count(*) AS job_count FROM (
                    SELECT batch_id FROM jobs
                    WHERE state = 'available' AND published_at IS NOT NULL AND model_id = $1 AND band = $2
                    UNION ALL
                    SELECT batch_id FROM jobs WHERE state = 'running' AND model_id = $1 AND band = $2
                ) AS published_or_running
                GROUP BY batch_id
            )
            SELECT next_jobs.*
            FROM waiting
            LEFT JOIN on_the_way USING (batch_id)
            CROSS JOIN LATERAL (
                SELECT job_id, jobs.batch_id, width, height, num_inference_steps, noise_scheduler, guidance_scale,
                       guidance_start, guidance_stop, cache_interval, traceparent, microbatch_limit,
                       coalesce(on_the_way.job_count, 0) + row_number() OVER (ORDER BY ordinal) AS turn
                FROM jobs
                WHERE state = 'available' AND published_at IS NULL AND model_id = $1 AND band = $2
                  AND jobs.batch_id = waiting.batch_id
                ORDER BY ordinal LIMIT $3
            ) AS next_jobs
            ORDER BY turn, random()
            LIMIT $3";
        let query = sqlx::query_as::<_, PublishableRow>(sql).bind(model_id).bind(band).bind(i64::from(limit));
        Ok(query.fetch_all(&self.pool).await?.into_iter().map(Into::into).collect())
    }

    /// Marks those of `job_ids` as published that are still available. Returns how many those were.
    ///
    /// # Errors
    /// When Postgres fails.
    pub async fn mark_published_if_available(&self, job_ids: &[JobId]) -> Result<u64, CatalogError> {
        let sql = "
            WITH published AS (
                SELECT job_id FROM jobs WHERE job_id = ANY ($1) AND state = 'available'
                ORDER BY job_id FOR NO KEY UPDATE
            )
            UPDATE jobs SET published_at = now()
            FROM published WHERE jobs.job_id = published.job_id AND jobs.state = 'available'";
        Ok(sqlx::query(sql).bind(job_ids).execute(&self.pool).await?.rows_affected())
    }

    /// How many jobs the model's workers take in one microbatch each: the sum of `max_microbatch` over those that run and were seen
    /// in the last two minutes, which is eight times as long as they take to say so again. Zero for those of builds that did not say.
    ///
    /// # Errors
    /// When Postgres fails.
    pub async fn microbatch_capacity(&self, model_id: ModelId) -> Result<u64, CatalogError> {
        let sql = "SELECT coalesce(sum(max_microbatch), 0) FROM workers
                   WHERE model_id = $1 AND stopped_at IS NULL AND last_seen_at > now() - interval '2 minutes'";
        let capacity: i64 = sqlx::query_scalar(sql).bind(model_id).fetch_one(&self.pool).await?;
        Ok(capacity.unsigned_abs())
    }

    /// How many jobs are published and not yet claimed: what the broker should hold.
    ///
    /// # Errors
    /// When Postgres fails.
    pub async fn published_unclaimed_count(
        &self,
        model_id: ModelId,
        band: PriorityBand,
    ) -> Result<u64, CatalogError> {
        let sql = "SELECT count(*) FROM jobs
                   WHERE state = 'available' AND published_at IS NOT NULL AND model_id = $1 AND band = $2";
        let count: i64 = sqlx::query_scalar(sql).bind(model_id).bind(band).fetch_one(&self.pool).await?;
        Ok(count.unsigned_abs())
    }

    /// Makes jobs that were published longer than `older_than` ago and never claimed unpublished again: the broker has
    /// lost their messages. If it has not, the second message is harmless. Returns how many those were.
    ///
    /// # Errors
    /// When Postgres fails.
    pub async fn republish_if_unclaimed_for(
        &self,
        model_id: ModelId,
        band: PriorityBand,
        older_than: Duration,
    ) -> Result<u64, CatalogError> {
        let sql = "
            WITH unclaimed AS (
                SELECT job_id FROM jobs
                WHERE state = 'available' AND model_id = $1 AND band = $2
                  AND published_at <= now() - make_interval(secs => $3)
                ORDER BY job_id FOR NO KEY UPDATE SKIP LOCKED
            )
            UPDATE jobs SET published_at = NULL
            FROM unclaimed WHERE jobs.job_id = unclaimed.job_id AND jobs.state = 'available'";
        let query = sqlx::query(sql).bind(model_id).bind(band).bind(older_than.as_secs_f64());
        Ok(query.execute(&self.pool).await?.rows_affected())
    }
}
