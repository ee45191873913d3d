//! Objects against rows: which objects a row names, which no row names, and what was found wrong.
//!
//! An object without a row is no reason to delete it: its job may be run again, find the object there, and record it.
//! Only a job that is final records nothing any more, so [`PgCatalog::hold_if_orphaned`] answers with objects of final
//! jobs alone, and holds those jobs' rows until the deletion is over, so that nobody can reopen one meanwhile.

use serde::Serialize;
use sqlx::{Postgres, Transaction};

use super::completion::StoredObject;
use super::connection::PgCatalog;
use super::error::CatalogError;
use crate::id::{BatchId, ImageId, JobId};
use crate::object_key::ObjectKey;
use crate::sha256::Sha256Digest;
use crate::words::word_enum;

word_enum! {
    /// How an object differs from what its image row says.
    ObjectFaultKind: "object_fault_kind", "kind of object fault" {
        /// There is none.
        Missing = "missing",
        /// It has another size.
        WrongSize = "wrong_size",
        /// It has another digest.
        WrongDigest = "wrong_digest",
    }
}

/// An object that an image row names.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct NamedObject {
    /// The image.
    pub image_id: ImageId,
    /// The job that it came out of.
    pub job_id: JobId,
    /// What has to be in the bucket.
    pub object: StoredObject,
}

/// What somebody found who looked at a [`NamedObject`].
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct ObjectFault {
    /// The image whose object it is.
    pub image_id: ImageId,
    /// How it differs.
    pub kind: ObjectFaultKind,
    /// What was there instead, for people; cut to 1,000 characters.
    pub found: String,
}

/// Objects that nobody names and nobody will, for as long as this lives. Dropping it lets their jobs go too.
#[derive(Debug)]
pub struct OrphanHold {
    keys: Vec<ObjectKey>,
    transaction: Transaction<'static, Postgres>,
}

impl OrphanHold {
    /// The objects that may be deleted now.
    pub fn keys(&self) -> &[ObjectKey] {
        &self.keys
    }

    /// Ends the hold.
    ///
    /// # Errors
    /// When Postgres fails; then it has ended the hold by itself.
    pub async fn end(self) -> Result<(), CatalogError> {
        Ok(self.transaction.rollback().await?)
    }
}

/// What the catalog knows of an object that was found in the bucket.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum KeyStanding {
    /// An image row names it.
    Named,
    /// No row does, and its job is final: none ever will.
    Orphaned,
    /// No row does yet. Its job may still be drawn and record it.
    Open,
    /// There is no such job here: the object belongs to somebody else who uses the bucket.
    Foreign,
}

#[derive(sqlx::FromRow)]
struct NamedRow {
    image_id: ImageId,
    job_id: JobId,
    bucket: String,
    object_key: ObjectKey,
    sha256: Sha256Digest,
    size_bytes: i64,
}

impl From<NamedRow> for NamedObject {
    fn from(row: NamedRow) -> Self {
        let NamedRow { image_id, job_id, bucket, object_key, sha256, size_bytes } = row;
        let size_bytes = size_bytes.unsigned_abs();
        Self { image_id, job_id, object: StoredObject { bucket, object_key, sha256, size_bytes } }
    }
}

impl PgCatalog {
    /// Up to `limit` objects that rows of batch `batch_id` name, in the order of their images, from the one after
    /// `after` on.
    ///
    /// # Errors
    /// When Postgres fails.
    pub async fn objects_of_batch(
        &self,
        batch_id: BatchId,
        after: Option<ImageId>,
        limit: u32,
    ) -> Result<Vec<NamedObject>, CatalogError> {
        let sql = "
            SELECT image_id, job_id, bucket, object_key, sha256, size_bytes FROM images
            WHERE batch_id = $1 AND object_key IS NOT NULL AND ($2::uuid IS NULL OR image_id > $2)
            ORDER BY image_id LIMIT $3";
        let query = sqlx::query_as::<_, NamedRow>(sql).bind(batch_id).bind(after).bind(i64::from(limit));
        Ok(query.fetch_all(&self.pool).await?.into_iter().map(Into::into).collect())
    }

    /// `limit` objects that rows name, by chance.
    ///
    /// # Errors
    /// When Postgres fails.
    pub async fn sample_of_objects(&self, limit: u32) -> Result<Vec<NamedObject>, CatalogError> {
        let sql = "
            SELECT image_id, job_id, bucket, object_key, sha256, size_bytes FROM images
            WHERE object_key IS NOT NULL ORDER BY random() LIMIT $1";
        let query = sqlx::query_as::<_, NamedRow>(sql).bind(i64::from(limit));
        Ok(query.fetch_all(&self.pool).await?.into_iter().map(Into::into).collect())
    }

    /// What is known of each of `keys`, in their order.
    ///
    /// # Errors
    /// When Postgres fails.
    pub async fn standing_of_keys(&self, keys: &[ObjectKey]) -> Result<Vec<KeyStanding>, CatalogError> {
        // Whatever bucket the row says: pictures may have been moved to another since.
        let sql = "
            SELECT EXISTS (SELECT FROM images WHERE images.object_key = given.object_key),
                   jobs.job_id IS NOT NULL,
                   coalesce(jobs.state IN ('completed', 'cancelled', 'discarded'), false)
            FROM unnest($1::text[], $2::uuid[]) WITH ORDINALITY AS given (object_key, job_id, place)
            LEFT JOIN jobs USING (job_id)
            ORDER BY place";
        let (texts, job_ids) = with_jobs(keys);
        let rows: Vec<(bool, bool, bool)> =
            sqlx::query_as(sql).bind(texts).bind(job_ids).fetch_all(&self.pool).await?;
        Ok(rows
            .into_iter()
            .map(|row| match row {
                (true, _, _) => KeyStanding::Named,
                (false, true, true) => KeyStanding::Orphaned,
                (false, true, false) => KeyStanding::Open,
                (false, false, _) => KeyStanding::Foreign,
            })
            .collect())
    }

    /// Holds those of `keys` that no row names and whose jobs are final: while the answer lives, their jobs cannot be
    /// reopened, so no row can come to name them. Delete them, then [`end`](OrphanHold::end) the hold.
    ///
    /// # Errors
    /// When Postgres fails.
    pub async fn hold_if_orphaned(&self, keys: &[ObjectKey]) -> Result<OrphanHold, CatalogError> {
        let mut transaction = self.pool.begin().await?;
        let (texts, job_ids) = with_jobs(keys);
        let lock = "SELECT job_id FROM jobs
                    WHERE job_id = ANY ($1) AND state IN ('completed', 'cancelled', 'discarded')
                    ORDER BY job_id FOR SHARE";
        let held: Vec<JobId> = sqlx::query_scalar(lock).bind(&job_ids).fetch_all(&mut *transaction).await?;
        // After the lock and in a statement of its own, so that it sees what was recorded before the job was final.
        let look = "SELECT object_key FROM unnest($1::text[], $2::uuid[]) AS given (object_key, job_id)
                    WHERE job_id = ANY ($3)
                      AND NOT EXISTS (SELECT FROM images WHERE images.object_key = given.object_key)";
        let keys: Vec<ObjectKey> = sqlx::query_scalar(look)
            .bind(texts)
            .bind(job_ids)
            .bind(held)
            .fetch_all(&mut *transaction)
            .await?;
        Ok(OrphanHold { keys, transaction })
    }

    /// Records what a look at the objects of `seen` brought: `faults` stand, and older faults of images that had none now
    /// are cleared.
    ///
    /// # Errors
    /// When Postgres fails; then nothing is recorded.
    pub async fn record_object_faults(
        &self,
        seen: &[ImageId],
        faults: &[ObjectFault],
    ) -> Result<(), CatalogError> {
        let sql = "
            WITH given AS (
                SELECT image_id, kind::object_fault_kind AS kind, found
                FROM unnest($2::uuid[], $3::text[], $4::text[]) AS given (image_id, kind, found)
            ), cleared AS (
                UPDATE object_faults SET cleared_at = now()
                WHERE image_id = ANY ($1) AND cleared_at IS NULL
                  AND NOT EXISTS (SELECT FROM given
                                  WHERE given.image_id = object_faults.image_id AND given.kind = object_faults.kind)
            )
            INSERT INTO object_faults (image_id, kind, found) SELECT image_id, kind, found FROM given
            ON CONFLICT (image_id, kind) DO UPDATE
            SET found = excluded.found, last_seen_at = now(), cleared_at = NULL";
        let image_ids: Vec<ImageId> = faults.iter().map(|fault| fault.image_id).collect();
        let kinds: Vec<&str> = faults.iter().map(|fault| fault.kind.as_str()).collect();
        let found: Vec<String> =
            faults.iter().map(|fault| fault.found.chars().take(1000).collect()).collect();
        sqlx::query(sql).bind(seen).bind(image_ids).bind(kinds).bind(found).execute(&self.pool).await?;
        Ok(())
    }
}

/// The keys as text, and the ids of the jobs that they were made for.
fn with_jobs(keys: &[ObjectKey]) -> (Vec<String>, Vec<JobId>) {
    keys.iter().map(|key| (key.to_string(), JobId::of(key.batch_id(), key.ordinal()))).unzip()
}
