//! Looking at batches: what there is, how far it has come, and what came out.

use chrono::{DateTime, Utc};
use serde::Serialize;

use super::completion::{SafetyVerdict, StoredObject};
use super::connection::PgCatalog;
use super::error::CatalogError;
use super::rows::SpecColumns;
use crate::id::{BatchId, ImageId, JobId};
use crate::job_spec::valid::ValidJobSpec;
use crate::model_name::ModelName;
use crate::object_key::ObjectKey;
use crate::sha256::Sha256Digest;
use crate::state::{ErrorClass, JobState, PriorityBand};

/// One batch in a list.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, sqlx::FromRow)]
pub struct BatchSummary {
    /// Its id.
    pub batch_id: BatchId,
    /// What people call it.
    pub name: String,
    /// Who submitted it.
    pub principal: String,
    /// The model that draws it.
    pub model: ModelName,
    /// How urgent it is.
    pub band: PriorityBand,
    /// How many jobs it has.
    pub job_count: i64,
    /// How many of them are final.
    pub final_count: i64,
    /// When it was submitted.
    pub created_at: DateTime<Utc>,
    /// When it was cancelled, if it was.
    pub cancelled_at: Option<DateTime<Utc>>,
}

/// How far a batch has come.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, sqlx::FromRow)]
pub struct BatchProgress {
    /// Its id.
    pub batch_id: BatchId,
    /// What people call it.
    pub name: String,
    /// Who submitted it.
    pub principal: String,
    /// The model that draws it.
    pub model: ModelName,
    /// How urgent it is.
    pub band: PriorityBand,
    /// How many jobs it has.
    pub job_count: i64,
    /// Jobs that wait for a worker.
    pub available: i64,
    /// Jobs that a worker is drawing.
    pub running: i64,
    /// Jobs that will be tried again.
    pub retryable: i64,
    /// Jobs whose image is recorded, flagged ones included.
    pub completed: i64,
    /// Jobs that were cancelled.
    pub cancelled: i64,
    /// Jobs that were given up.
    pub discarded: i64,
    /// Completed jobs whose picture the safety checker flagged.
    pub flagged: i64,
    /// When it was submitted.
    pub created_at: DateTime<Utc>,
    /// When it was cancelled, if it was.
    pub cancelled_at: Option<DateTime<Utc>>,
    /// When its first job was claimed.
    pub first_started_at: Option<DateTime<Utc>>,
    /// When its first job became final.
    pub first_finalized_at: Option<DateTime<Utc>>,
    /// When its latest final job became final.
    pub last_finalized_at: Option<DateTime<Utc>>,
}

impl BatchProgress {
    /// How many jobs are final.
    pub fn final_count(&self) -> i64 {
        self.completed + self.cancelled + self.discarded
    }

    /// Whether all jobs are final.
    pub fn is_finished(&self) -> bool {
        self.final_count() == self.job_count
    }
}

/// An image row.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct ImageRecord {
    /// Its id.
    pub image_id: ImageId,
    /// Where its pixels are; `None` when the picture is flagged.
    pub object: Option<StoredObject>,
    /// What the safety checker said; `None` when the model has no checker.
    pub safety: Option<SafetyVerdict>,
    /// Whether the text encoder read only the beginning of the prompt.
    pub prompt_truncated: bool,
    /// The digest of the weights it was drawn with.
    pub weights_sha256: Sha256Digest,
    /// When it was recorded.
    pub created_at: DateTime<Utc>,
}

/// One job of a batch, and what came out of it.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct BatchResult {
    /// The job.
    pub job_id: JobId,
    /// Its place in the batch, from 0.
    pub ordinal: u32,
    /// The line of the source that it came from, from 1.
    pub source_line: Option<i32>,
    /// Where it stands.
    pub state: JobState,
    /// What it asks for.
    pub spec: ValidJobSpec,
    /// What kind of fault its latest failed attempt met.
    pub error_class: Option<ErrorClass>,
    /// What its latest failed attempt said.
    pub error_message: Option<String>,
    /// Its image, once it is completed.
    pub image: Option<ImageRecord>,
}

/// Why a text does not name one batch.
#[derive(Debug, thiserror::Error)]
pub enum ResolveBatchError {
    /// It names none.
    #[error(
        "no batch has the name `{text}` or an id that starts with it\nhint: `darkroom batches` shows those there are"
    )]
    NotFound {
        /// The text.
        text: String,
    },
    /// It names several.
    #[error(
        "`{text}` could be any of these batches: {}\nhint: give more digits of the id",
        candidates.iter().map(ToString::to_string).collect::<Vec<_>>().join(", ")
    )]
    Ambiguous {
        /// The text.
        text: String,
        /// Some of the batches it could be, latest first.
        candidates: Vec<BatchId>,
    },
    /// The catalog failed.
    #[error(transparent)]
    Catalog(#[from] CatalogError),
}

impl From<sqlx::Error> for ResolveBatchError {
    fn from(error: sqlx::Error) -> Self {
        Self::Catalog(error.into())
    }
}

/// How many candidates an ambiguous text is answered with.
const MAX_CANDIDATES: i64 = 5;

impl PgCatalog {
    /// The latest `limit` batches, latest first.
    ///
    /// # Errors
    /// When Postgres fails.
    pub async fn batches(&self, limit: u32) -> Result<Vec<BatchSummary>, CatalogError> {
        let sql = "
            SELECT batches.batch_id, batches.name, batches.principal, models.name AS model, batches.band,
                   batches.job_count::bigint, batches.created_at, batches.cancelled_at,
                   (SELECT count(*) FROM jobs WHERE jobs.batch_id = batches.batch_id
                      AND state IN ('completed', 'cancelled', 'discarded')) AS final_count
            FROM batches JOIN models USING (model_id)
            ORDER BY batches.created_at DESC, batch_id DESC LIMIT $1";
        Ok(sqlx::query_as(sql).bind(i64::from(limit)).fetch_all(&self.pool).await?)
    }

    /// How far a batch has come, if there is such a batch.
    ///
    /// # Errors
    /// When Postgres fails.
    pub async fn batch_progress(&self, batch_id: BatchId) -> Result<Option<BatchProgress>, CatalogError> {
        let sql = "SELECT * FROM v_batch_progress WHERE batch_id = $1";
        Ok(sqlx::query_as(sql).bind(batch_id).fetch_optional(&self.pool).await?)
    }

    /// The batch that a person means by `text`: its whole id or the beginning of it, or its name. `latest` is the latest
    /// batch.
    ///
    /// # Errors
    /// When it is none, or several, and when Postgres fails.
    pub async fn resolve_batch(&self, text: &str) -> Result<BatchId, ResolveBatchError> {
        let sql = "
            SELECT batch_id FROM batches
            WHERE name = $1 OR starts_with(batch_id::text, lower($1))
               OR ($1 = 'latest' AND batch_id = (SELECT batch_id FROM batches ORDER BY created_at DESC LIMIT 1))
            ORDER BY created_at DESC LIMIT $2";
        let mut found: Vec<BatchId> =
            sqlx::query_scalar(sql).bind(text).bind(MAX_CANDIDATES).fetch_all(&self.pool).await?;
        match found.len() {
            0 => Err(ResolveBatchError::NotFound { text: text.to_owned() }),
            1 => Ok(found.remove(0)),
            _ => Err(ResolveBatchError::Ambiguous { text: text.to_owned(), candidates: found }),
        }
    }

    /// Up to `limit` jobs of a batch in their order, from the one after `after_ordinal` on, each with its image if it has
    /// one.
    ///
    /// # Errors
    /// When Postgres fails.
    pub async fn batch_results(
        &self,
        batch_id: BatchId,
        after_ordinal: Option<u32>,
        limit: u32,
    ) -> Result<Vec<BatchResult>, CatalogError> {
        let sql = "
            SELECT jobs.*, images.bucket, images.object_key, images.sha256, images.size_bytes,
                   images.has_nsfw_concept, images.concept_scores, images.special_care_scores,
                   images.prompt_truncated, images.weights_sha256, images.created_at AS image_created_at
            FROM jobs LEFT JOIN images USING (image_id)
            WHERE jobs.batch_id = $1 AND jobs.ordinal > $2
            ORDER BY jobs.ordinal LIMIT $3";
        let after = after_ordinal.map_or(-1, |ordinal| i32::try_from(ordinal).unwrap_or(i32::MAX));
        let query = sqlx::query_as::<_, ResultRow>(sql).bind(batch_id).bind(after).bind(i64::from(limit));
        query.fetch_all(&self.pool).await?.into_iter().map(ResultRow::into_result).collect()
    }
}

#[derive(sqlx::FromRow)]
struct ResultRow {
    job_id: JobId,
    #[sqlx(try_from = "i32")]
    ordinal: u32,
    source_line: Option<i32>,
    state: JobState,
    #[sqlx(flatten)]
    spec: SpecColumns,
    error_class: Option<ErrorClass>,
    error_message: Option<String>,
    image_id: Option<ImageId>,
    #[sqlx(flatten)]
    image: ImageColumns,
}

/// The columns of an image, all null where there is none.
#[derive(sqlx::FromRow)]
struct ImageColumns {
    bucket: Option<String>,
    object_key: Option<ObjectKey>,
    sha256: Option<Sha256Digest>,
    size_bytes: Option<i64>,
    has_nsfw_concept: Option<bool>,
    concept_scores: Option<Vec<f32>>,
    special_care_scores: Option<Vec<f32>>,
    prompt_truncated: Option<bool>,
    weights_sha256: Option<Sha256Digest>,
    image_created_at: Option<DateTime<Utc>>,
}

impl ResultRow {
    fn into_result(self) -> Result<BatchResult, CatalogError> {
        Ok(BatchResult {
            spec: self.spec.into_spec(self.job_id)?,
            image: self.image_id.and_then(|image_id| self.image.into_record(image_id)),
            job_id: self.job_id,
            ordinal: self.ordinal,
            source_line: self.source_line,
            state: self.state,
            error_class: self.error_class,
            error_message: self.error_message,
        })
    }
}

impl ImageColumns {
    fn into_record(self, image_id: ImageId) -> Option<ImageRecord> {
        Some(ImageRecord {
            image_id,
            object: self.bucket.zip(self.object_key).zip(self.sha256).zip(self.size_bytes).map(
                |(((bucket, object_key), sha256), size_bytes)| StoredObject {
                    bucket,
                    object_key,
                    sha256,
                    size_bytes: size_bytes.unsigned_abs(),
                },
            ),
            safety: self.has_nsfw_concept.map(|has_nsfw_concept| SafetyVerdict {
                has_nsfw_concept,
                concept_scores: self.concept_scores.unwrap_or_default(),
                special_care_scores: self.special_care_scores.unwrap_or_default(),
            }),
            prompt_truncated: self.prompt_truncated?,
            weights_sha256: self.weights_sha256?,
            created_at: self.image_created_at?,
        })
    }
}
