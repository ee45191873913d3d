//! The promises as one query: whatever it returns is a promise that was broken.
//!
//! Constraints and triggers refuse most of these rows, and the order of a worker's steps keeps the rest away. This query
//! leans on none of them: it looks at the rows alone, so it also finds what a restored backup, a dropped constraint or a
//! mistake of ours left behind. What only the bucket can tell is not here (`darkroom verify` asks the bucket).

use serde::Serialize;

use super::connection::PgCatalog;
use super::error::CatalogError;
use crate::id::{BatchId, JobId};
use crate::state::JobState;

/// A promise that was broken.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, sqlx::FromRow)]
pub struct BrokenPromise {
    /// Which promise: `P1` to `P8`, as README numbers them.
    pub promise: String,
    /// The batch in which it was broken.
    pub batch_id: BatchId,
    /// The job, if it is one job's.
    pub job_id: Option<JobId>,
    /// What is wrong.
    pub what: String,
}

/// Every job of a batch, counted once.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, sqlx::FromRow)]
pub struct BatchAccount {
    /// What was enqueued.
    pub enqueued: i64,
    /// Jobs with an image.
    pub completed: i64,
    /// Those of them whose picture is withheld.
    pub withheld: i64,
    /// Jobs that a person cancelled.
    pub cancelled: i64,
    /// Jobs that were given up.
    pub discarded: i64,
    /// Jobs that are not final yet.
    pub unfinished: i64,
    /// Attempts of all jobs.
    pub attempts: i64,
    /// Image rows of all jobs.
    pub images: i64,
}

impl BatchAccount {
    /// Enqueued jobs that are in no state at all.
    pub fn lost(&self) -> i64 {
        self.enqueued - self.completed - self.cancelled - self.discarded - self.unfinished
    }
}

/// `$1` is a batch, or null for all of them.
const BROKEN_PROMISES: &str = "
    WITH looked_at AS MATERIALIZED (
        SELECT * FROM batches WHERE $1::uuid IS NULL OR batch_id = $1
    ), job AS (
        SELECT jobs.*, state IN ('completed', 'cancelled', 'discarded') AS is_final
        FROM jobs WHERE $1::uuid IS NULL OR batch_id = $1
    ), image AS (
        SELECT * FROM images WHERE $1::uuid IS NULL OR batch_id = $1 OR job_id IN (SELECT job_id FROM job)
    ), attempt AS (
        SELECT * FROM attempts WHERE $1::uuid IS NULL OR job_id IN (SELECT job_id FROM job)
    ), ended_well AS (
        SELECT job_id, count(*) AS ok_count, max(lease_generation) AS lease_generation
        FROM attempt WHERE outcome = 'ok' GROUP BY job_id
    ), broken (promise, batch_id, job_id, what) AS (
        -- P1: what was enqueued is there, and on its way to an end.
        SELECT 'P1', batch_id, NULL::uuid,
               format('%s jobs were enqueued, but %s are there', job_count,
                      (SELECT count(*) FROM job WHERE job.batch_id = looked_at.batch_id))
        FROM looked_at
        WHERE job_count <> (SELECT count(*) FROM job WHERE job.batch_id = looked_at.batch_id)
        UNION ALL
        SELECT 'P1', batch_id, job_id, 'its state is ' || state || ', which nothing moves on'
        FROM job
        WHERE (state = 'running' AND (lease_expires_at IS NULL OR leased_by IS NULL))
           OR (state = 'retryable' AND scheduled_at IS NULL)
        UNION ALL
        SELECT 'P1', batch_id, job_id, 'it is running without an open attempt of its lease'
        FROM job
        WHERE state = 'running' AND NOT EXISTS (
            SELECT FROM attempt WHERE attempt.job_id = job.job_id AND ended_at IS NULL
              AND attempt.lease_generation = job.lease_generation)
        UNION ALL
        SELECT 'P1', batch_id, job_id, format('it is %s with an open attempt (generation %s)', state, attempt.lease_generation)
        FROM job JOIN attempt USING (job_id)
        WHERE NOT is_final AND ended_at IS NULL
          AND (state <> 'running' OR attempt.lease_generation <> job.lease_generation)

        -- P2: one image a job.
        UNION ALL
        SELECT 'P2', batch_id, job_id, 'it is completed without an image row'
        FROM job WHERE state = 'completed' AND NOT EXISTS (SELECT FROM image WHERE image.job_id = job.job_id)
        UNION ALL
        SELECT 'P2', job.batch_id, job_id, format('it has %s image rows', count(*))
        FROM image JOIN job USING (job_id) GROUP BY job.batch_id, job_id HAVING count(*) > 1
        UNION ALL
        SELECT 'P2', job.batch_id, job_id, format('it is %s and has an image row that does not count', state)
        FROM image JOIN job USING (job_id)
        WHERE job.state <> 'completed' OR job.image_id IS DISTINCT FROM image.image_id
        UNION ALL
        SELECT 'P2', image.batch_id, job_id, 'an image row names a job that is not there'
        FROM image LEFT JOIN jobs USING (job_id) WHERE jobs.job_id IS NULL
        UNION ALL
        SELECT 'P2', batch_id, job_id, format('it has %s attempts that ended well', ok_count)
        FROM ended_well JOIN job USING (job_id) WHERE ok_count > 1
        UNION ALL
        SELECT 'P2', batch_id, job_id, format('it is %s, but an attempt ended well', state)
        FROM ended_well JOIN job USING (job_id) WHERE state <> 'completed'
        UNION ALL
        SELECT 'P2', batch_id, job_id, 'it is completed, but no attempt ended well'
        FROM job LEFT JOIN ended_well USING (job_id) WHERE state = 'completed' AND ended_well.job_id IS NULL
        UNION ALL
        SELECT 'P2', job.batch_id, job_id, 'its image is of another attempt than the one that ended well'
        FROM image JOIN job USING (job_id) JOIN ended_well USING (job_id)
        WHERE image.lease_generation <> ended_well.lease_generation

        -- P3: a row implies its object; here, that it names one that can be its own.
        UNION ALL
        SELECT 'P3', job.batch_id, job_id,
               CASE WHEN image.has_nsfw_concept IS TRUE THEN 'its picture is withheld, but the image row names an object'
                    ELSE 'the image row names no object' END
        FROM image JOIN job USING (job_id)
        WHERE (image.has_nsfw_concept IS TRUE) = (object_key IS NOT NULL)
        UNION ALL
        SELECT 'P3', job.batch_id, job_id, 'the image row names an object without its bucket, digest or size'
        FROM image JOIN job USING (job_id)
        WHERE object_key IS NOT NULL AND (bucket IS NULL OR sha256 IS NULL OR size_bytes IS NULL)
        UNION ALL
        SELECT 'P3', job.batch_id, job_id, format('the object key %s is not this job''s and picture''s', object_key)
        FROM image JOIN job USING (job_id)
        WHERE split_part(object_key, '/', 2) <> job.batch_id::text
           OR split_part(object_key, '/', 3) <> concat(
                  lpad(job.ordinal::text, greatest(8, length(job.ordinal::text)), '0'), '-', left(sha256, 16), '.png')
        UNION ALL
        SELECT 'P3', (array_agg(image.batch_id))[1], (array_agg(job_id))[1],
               format('its object %s is named by %s image rows', object_key, count(*))
        FROM image WHERE object_key IS NOT NULL GROUP BY object_key HAVING count(*) > 1

        -- P4: nothing happens to a job that is final.
        UNION ALL
        SELECT 'P4', batch_id, job_id, format('it is %s with an open attempt (generation %s)', state, attempt.lease_generation)
        FROM job JOIN attempt USING (job_id) WHERE is_final AND ended_at IS NULL
        UNION ALL
        SELECT 'P4', batch_id, job_id, format('it is %s and held by a worker', state)
        FROM job WHERE is_final AND (leased_by IS NOT NULL OR lease_expires_at IS NOT NULL)
        UNION ALL
        SELECT 'P4', batch_id, job_id, format('it is %s without a time at which it became so', state)
        FROM job WHERE is_final AND finalized_at IS NULL
        UNION ALL
        SELECT 'P4', batch_id, job_id, format('an attempt (generation %s) began after it was %s', attempt.lease_generation, state)
        FROM job JOIN attempt USING (job_id)
        -- A cancellation may begin before a claim and wait for it, so its own time says nothing here.
        WHERE state IN ('completed', 'discarded') AND attempt.started_at > finalized_at
        UNION ALL
        SELECT 'P4', batch_id, job_id,
               format('an attempt has generation %s, but the job only %s', attempt.lease_generation, job.lease_generation)
        FROM job JOIN attempt USING (job_id) WHERE attempt.lease_generation > job.lease_generation

        -- P5: nothing without an accepted licence.
        UNION ALL
        SELECT 'P5', batch_id, NULL::uuid,
               CASE WHEN acceptance.acceptance_id IS NULL THEN 'it names no licence acceptance'
                    WHEN acceptance.principal <> looked_at.principal THEN 'the licence was accepted by another principal'
                    WHEN acceptance.licence_id <> models.licence_id THEN 'the accepted licence is not its model''s'
                    WHEN acceptance.accepted_at > looked_at.created_at THEN 'it was enqueued before the licence was accepted'
                    ELSE 'it was enqueued after the acceptance was revoked' END
        FROM looked_at
        LEFT JOIN models USING (model_id)
        LEFT JOIN licence_acceptances AS acceptance ON acceptance.acceptance_id = looked_at.acceptance_id
        WHERE acceptance.acceptance_id IS NULL
           OR acceptance.principal <> looked_at.principal
           OR acceptance.licence_id IS DISTINCT FROM models.licence_id
           OR acceptance.accepted_at > looked_at.created_at
           OR acceptance.revoked_at < looked_at.created_at
        UNION ALL
        SELECT 'P5', image.batch_id, job_id, 'its image names another licence acceptance than its batch'
        FROM image JOIN job USING (job_id) JOIN batches ON batches.batch_id = job.batch_id
        WHERE image.acceptance_id IS DISTINCT FROM batches.acceptance_id

        -- P8: a picture is its spec's; here, that nothing was left out of it that its job does not say, and the reverse.
        UNION ALL
        SELECT 'P8', job.batch_id, job_id,
               format('it asks for guidance %s to %s and cache interval %s, but its picture has guidance %s to %s and cache interval %s',
                      job.guidance_start, job.guidance_stop, job.cache_interval,
                      image.guidance_start, image.guidance_stop, image.cache_interval)
        FROM image JOIN job USING (job_id)
        WHERE (image.guidance_start, image.guidance_stop, image.cache_interval)
            IS DISTINCT FROM (job.guidance_start, job.guidance_stop, job.cache_interval)
    )
    SELECT promise, batch_id, job_id, what FROM broken ORDER BY promise, batch_id, job_id, what";

impl PgCatalog {
    /// Every promise that was broken in batch `batch_id`, or in any batch; empty when all were kept. The fleet may be at
    /// work meanwhile: one statement sees one moment.
    ///
    /// # Errors
    /// When Postgres fails.
    pub async fn broken_promises(
        &self,
        batch_id: Option<BatchId>,
    ) -> Result<Vec<BrokenPromise>, CatalogError> {
        Ok(sqlx::query_as(BROKEN_PROMISES).bind(batch_id).fetch_all(&self.pool).await?)
    }

    /// Counts the jobs of a batch, if there is such a batch.
    ///
    /// # Errors
    /// When Postgres fails.
    pub async fn batch_account(&self, batch_id: BatchId) -> Result<Option<BatchAccount>, CatalogError> {
        let sql = "
            SELECT batches.job_count::bigint AS enqueued, job.*,
                   (SELECT count(*) FROM images JOIN jobs USING (job_id)
                    WHERE jobs.batch_id = batches.batch_id AND has_nsfw_concept) AS withheld,
                   (SELECT count(*) FROM attempts JOIN jobs USING (job_id)
                    WHERE jobs.batch_id = batches.batch_id) AS attempts,
                   (SELECT count(*) FROM images JOIN jobs USING (job_id)
                    WHERE jobs.batch_id = batches.batch_id) AS images
            FROM batches
            CROSS JOIN LATERAL (
                SELECT count(*) FILTER (WHERE state = 'completed') AS completed,
                       count(*) FILTER (WHERE state = 'cancelled') AS cancelled,
                       count(*) FILTER (WHERE state = 'discarded') AS discarded,
                       count(*) FILTER (WHERE state NOT IN ('completed', 'cancelled', 'discarded')) AS unfinished
                FROM jobs WHERE jobs.batch_id = batches.batch_id
            ) AS job
            WHERE batches.batch_id = $1";
        Ok(sqlx::query_as(sql).bind(batch_id).fetch_optional(&self.pool).await?)
    }

    /// The first `limit` jobs of a batch that are not final, in their order: ordinal and state.
    ///
    /// # Errors
    /// When Postgres fails.
    pub async fn unfinished_jobs(
        &self,
        batch_id: BatchId,
        limit: u32,
    ) -> Result<Vec<(u32, JobState)>, CatalogError> {
        let sql = "
            SELECT ordinal, state FROM jobs
            WHERE batch_id = $1 AND state NOT IN ('completed', 'cancelled', 'discarded')
            ORDER BY ordinal LIMIT $2";
        let rows: Vec<(i32, JobState)> =
            sqlx::query_as(sql).bind(batch_id).bind(i64::from(limit)).fetch_all(&self.pool).await?;
        Ok(rows.into_iter().map(|(ordinal, state)| (ordinal.unsigned_abs(), state)).collect())
    }
}
