//! The judge: whether a database and a bucket keep the promises P1 to P4 and P7, whatever happened before.
//!
//! It reads what is recorded and trusts no constraint: each rule is looked for by itself, so that a constraint that was
//! lost in a migration is found out by the data. Its SQL is its own and not `schema`'s `broken_promises`, which ships: a
//! mistake in one of the two is then seen by the other, while shared SQL would hide it from both.

use std::collections::{BTreeMap, HashMap};

use sqlx::{FromRow, PgExecutor, PgPool};

use crate::fleet::{Fleet, sha256_hex};

/// A promise that was broken.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, FromRow)]
pub struct Violation {
    /// Which promise.
    pub promise: String,
    /// How.
    pub what: String,
    /// By which job, batch or object.
    pub subject: String,
}

impl std::fmt::Display for Violation {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}: {}: {}", self.promise, self.what, self.subject)
    }
}

/// What came of everything that was attempted.
#[derive(Debug, Clone, PartialEq, FromRow)]
pub struct Account {
    /// Jobs that were enqueued.
    pub jobs: i64,
    /// Of them completed.
    pub completed: i64,
    /// Of them cancelled.
    pub cancelled: i64,
    /// Of them given up.
    pub discarded: i64,
    /// Image rows.
    pub images: i64,
    /// Attempts, of whatever end.
    pub attempts: i64,
    /// Seconds that workers spent on attempts.
    pub seconds: f64,
    /// Of them on attempts that gave no picture.
    pub wasted_seconds: f64,
}

const VIOLATIONS: &str = "
    SELECT 'P1' AS promise, 'the job is ' || state || ' and not final' AS what, job_id::text AS subject
    FROM jobs WHERE state NOT IN ('completed', 'cancelled', 'discarded')
    UNION ALL
    SELECT 'P1', 'the batch has ' || count(job_id) || ' of ' || job_count || ' jobs', batch_id::text
    FROM batches LEFT JOIN jobs USING (batch_id) GROUP BY batch_id, job_count HAVING count(job_id) <> job_count
    UNION ALL
    SELECT 'P1', 'the job is completed and has no image', job_id::text
    FROM jobs WHERE state = 'completed' AND NOT EXISTS (SELECT FROM images WHERE images.job_id = jobs.job_id)
    UNION ALL
    SELECT 'P1', 'the job is discarded without a reason', job_id::text
    FROM jobs WHERE state = 'discarded' AND error_class IS NULL
    UNION ALL
    SELECT 'P2', 'the job has ' || count(*) || ' images', job_id::text
    FROM images GROUP BY job_id HAVING count(*) > 1
    UNION ALL
    SELECT 'P2', count(*) || ' images name one object', object_key
    FROM images WHERE object_key IS NOT NULL GROUP BY object_key HAVING count(*) > 1
    UNION ALL
    SELECT 'P4', 'the job is discarded and has an image', job_id::text
    FROM jobs WHERE state = 'discarded' AND EXISTS (SELECT FROM images WHERE images.job_id = jobs.job_id)
    UNION ALL
    SELECT 'P4', 'the job names an image of another attempt than the one that went well', jobs.job_id::text
    FROM jobs JOIN images USING (image_id)
    WHERE NOT EXISTS (SELECT FROM attempts WHERE attempts.job_id = jobs.job_id AND outcome = 'ok'
                      AND attempts.lease_generation = images.lease_generation)
    UNION ALL
    SELECT 'P4', 'the job has ' || count(*) || ' attempts that went well', job_id::text
    FROM attempts WHERE outcome = 'ok' GROUP BY job_id HAVING count(*) > 1
    UNION ALL
    SELECT 'P4', 'an attempt is open although the job is final', job_id::text
    FROM attempts JOIN jobs USING (job_id) WHERE ended_at IS NULL AND finalized_at IS NOT NULL
    UNION ALL
    SELECT 'P4', 'an attempt began after the job was ' || state, job_id::text
    FROM attempts JOIN jobs USING (job_id)
    WHERE state IN ('completed', 'discarded')
      AND (attempts.started_at > finalized_at OR attempts.lease_generation > jobs.lease_generation)
    UNION ALL
    SELECT 'P7', 'the job is cancelled and has an image', job_id::text
    FROM jobs WHERE state = 'cancelled' AND EXISTS (SELECT FROM images WHERE images.job_id = jobs.job_id)
    UNION ALL
    -- A claim may commit while the cancellation waits for the row; then the cancellation ended that attempt.
    SELECT 'P7', 'an attempt began after the job was cancelled', job_id::text
    FROM attempts JOIN jobs USING (job_id)
    WHERE state = 'cancelled'
      AND ((attempts.started_at > finalized_at AND outcome IS DISTINCT FROM 'cancelled')
           OR attempts.lease_generation > jobs.lease_generation)
    UNION ALL
    SELECT 'P7', 'an attempt of a cancelled job went well', job_id::text
    FROM attempts JOIN jobs USING (job_id) WHERE state = 'cancelled' AND outcome = 'ok'
    ORDER BY 1, 2, 3";

const ACCOUNT: &str = "
    SELECT count(*) AS jobs,
           count(*) FILTER (WHERE state = 'completed') AS completed,
           count(*) FILTER (WHERE state = 'cancelled') AS cancelled,
           count(*) FILTER (WHERE state = 'discarded') AS discarded,
           (SELECT count(*) FROM images) AS images,
           (SELECT count(*) FROM attempts) AS attempts,
           (SELECT coalesce(sum(extract(epoch FROM ended_at - started_at)), 0)::float8 FROM attempts) AS seconds,
           (SELECT coalesce(sum(extract(epoch FROM ended_at - started_at)), 0)::float8
            FROM attempts WHERE outcome <> 'ok') AS wasted_seconds
    FROM jobs";

/// Every broken promise that the database shows by itself.
///
/// # Errors
/// When Postgres fails.
pub async fn violations<'e>(executor: impl PgExecutor<'e>) -> Result<Vec<Violation>, sqlx::Error> {
    sqlx::query_as(VIOLATIONS).fetch_all(executor).await
}

/// What came of everything.
///
/// # Errors
/// When Postgres fails.
pub async fn account(pool: &PgPool) -> Result<Account, sqlx::Error> {
    sqlx::query_as(ACCOUNT).fetch_one(pool).await
}

/// How the final jobs stood at some time: to be compared with a later time.
pub type FinalJobs = HashMap<uuid::Uuid, String>;

/// The jobs that are final now, with all that is recorded of each.
///
/// # Errors
/// When Postgres fails.
pub async fn final_jobs(pool: &PgPool) -> Result<FinalJobs, sqlx::Error> {
    let sql =
        "SELECT job_id, jobs::text || coalesce(images::text, '') FROM jobs LEFT JOIN images USING (job_id)
               WHERE finalized_at IS NOT NULL";
    let rows: Vec<(uuid::Uuid, String)> = sqlx::query_as(sql).fetch_all(pool).await?;
    Ok(rows.into_iter().collect())
}

/// P4: what was final before is the same now.
pub fn changed_since(before: &FinalJobs, now: &FinalJobs) -> Vec<Violation> {
    let changed = before.iter().filter(|(job_id, record)| now.get(job_id) != Some(record));
    let violation = |job_id: &uuid::Uuid| Violation {
        promise: "P4".to_owned(),
        what: "the job was final and has changed".to_owned(),
        subject: job_id.to_string(),
    };
    changed.map(|(job_id, _)| violation(job_id)).collect()
}

#[derive(FromRow)]
struct NamedObject {
    object_key: String,
    sha256: String,
    size_bytes: i64,
}

/// What the bucket shows.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Bucket {
    /// P3: rows whose object is missing or differs.
    pub violations: Vec<Violation>,
    /// Objects that rows name.
    pub named: usize,
    /// Objects that no row names: harmless, and waste.
    pub orphans: usize,
}

/// Reads every object of the fleet's batches and compares it with its row.
///
/// # Errors
/// When Postgres fails.
pub async fn check_bucket(fleet: &Fleet) -> Result<Bucket, sqlx::Error> {
    let sql =
        "SELECT object_key, sha256::text AS sha256, size_bytes FROM images WHERE object_key IS NOT NULL";
    let rows: Vec<NamedObject> = sqlx::query_as(sql).fetch_all(fleet.pool()).await?;
    let batches: Vec<String> =
        sqlx::query_scalar("SELECT batch_id::text FROM batches").fetch_all(fleet.pool()).await?;
    let mut found = BTreeMap::new();
    for batch in &batches {
        for key in fleet.objects(&format!("v1/{batch}/")).await {
            let bytes = fleet.object(&key).await;
            found.insert(key, (sha256_hex(&bytes), bytes.len() as i64));
        }
    }
    let mut bucket = Bucket { named: rows.len(), ..Bucket::default() };
    for row in rows {
        let what = match found.remove(&row.object_key) {
            None => "the object of an image is missing",
            Some((sha256, _)) if sha256 != row.sha256 => "the object of an image has other bytes",
            Some((_, size)) if size != row.size_bytes => "the object of an image has another size",
            Some(_) => continue,
        };
        let (promise, what) = ("P3".to_owned(), what.to_owned());
        bucket.violations.push(Violation { promise, what, subject: row.object_key });
    }
    bucket.orphans = found.len();
    Ok(bucket)
}
