//! Submitting a batch: the batch and all its jobs, in one transaction, once for each idempotency key.
//!
//! It touches no broker. The relay learns of the new jobs by a notification that the commit sends, or by its timer.

mod job_rows;

use job_rows::copy_jobs;
use serde::Serialize;
use sha2::{Digest, Sha256};
use sqlx::types::Json;
use sqlx::{Postgres, Transaction};

use super::connection::PgCatalog;
use super::error::CatalogError;
use crate::failpoint;
use crate::id::{AcceptanceId, BatchId, LicenceId, ModelId};
use crate::job_spec::SpecDefaults;
use crate::job_spec::valid::ValidJobSpec;
use crate::model_name::ModelName;
use crate::sha256::Sha256Digest;
use crate::state::PriorityBand;

/// A batch to submit.
#[derive(Clone, Debug)]
pub struct NewBatch {
    /// What people call it.
    pub name: String,
    /// Who submits it and answers for the licence.
    pub principal: String,
    /// The model that draws it.
    pub model: ModelName,
    /// One key, one batch: submitting again with the same key and content changes nothing.
    pub idempotency_key: String,
    /// Where the prompts came from: a file name, or `-`.
    pub source_name: String,
    /// What its jobs got where their specs said nothing; kept for the record.
    pub defaults: SpecDefaults,
    /// How urgent it is.
    pub band: PriorityBand,
    /// How many attempts each job has, at least 1.
    pub max_attempts: u16,
    /// The W3C trace context to work under.
    pub traceparent: Option<String>,
}

/// One job of a batch to submit. Its place in the slice becomes its ordinal.
#[derive(Clone, Debug, PartialEq)]
pub struct NewJob {
    /// What to draw.
    pub spec: ValidJobSpec,
    /// The line of the source that it came from, from 1.
    pub source_line: Option<u32>,
}

/// A batch that is in the catalog.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub struct SubmittedBatch {
    /// Its id.
    pub batch_id: BatchId,
    /// How many jobs it has.
    pub job_count: u64,
    /// Whether an earlier call with this idempotency key had submitted it.
    pub replayed: bool,
}

/// Why a batch was not submitted. Nothing was written.
#[derive(Debug, thiserror::Error)]
pub enum SubmitError {
    /// No model has that name.
    #[error("no model is called `{model}`\nhint: `darkroom models list` shows those there are")]
    UnknownModel {
        /// The name.
        model: ModelName,
    },
    /// The principal has not accepted the model's licence, or no longer does.
    #[error(
        "`{principal}` has not accepted {licence_name}, the licence of model `{model}` (text {text_sha256})\n\
         hint: read it with `darkroom licence show {model}`, accept it with `darkroom licence accept {model}`"
    )]
    LicenceNotAccepted {
        /// Who has to accept.
        principal: String,
        /// The model.
        model: ModelName,
        /// Its licence.
        licence_id: LicenceId,
        /// What people call the licence.
        licence_name: String,
        /// The digest of its text.
        text_sha256: Sha256Digest,
    },
    /// The key belongs to a batch with other content.
    #[error(
        "idempotency key `{idempotency_key}` belongs to batch {batch_id}, which has other prompts or settings\n\
         hint: submit a changed batch under a new key"
    )]
    IdempotencyConflict {
        /// The key.
        idempotency_key: String,
        /// The batch that has it.
        batch_id: BatchId,
    },
    /// There is nothing to do.
    #[error("a batch has to have at least 1 job, but this one has none")]
    NoJobs,
    /// There is too much to do in one batch.
    #[error("a batch has to have at most {} jobs, but this one has {job_count}", i32::MAX)]
    TooManyJobs {
        /// How many there are.
        job_count: usize,
    },
    /// The catalog failed.
    #[error(transparent)]
    Catalog(#[from] CatalogError),
}

impl From<sqlx::Error> for SubmitError {
    fn from(error: sqlx::Error) -> Self {
        Self::Catalog(error.into())
    }
}

#[derive(sqlx::FromRow)]
struct ModelTerms {
    model_id: ModelId,
    licence_id: LicenceId,
    licence_name: String,
    text_sha256: Sha256Digest,
    acceptance_id: Option<AcceptanceId>,
}

#[derive(sqlx::FromRow)]
struct KnownBatch {
    batch_id: BatchId,
    request_sha256: Sha256Digest,
    job_count: i32,
}

impl ModelTerms {
    fn not_accepted(&self, new: &NewBatch) -> SubmitError {
        SubmitError::LicenceNotAccepted {
            principal: new.principal.clone(),
            model: new.model.clone(),
            licence_id: self.licence_id,
            licence_name: self.licence_name.clone(),
            text_sha256: self.text_sha256,
        }
    }
}

impl NewBatch {
    /// One digest for the whole request except its key: what "the same batch again" means. Seeds that were drawn
    /// are left out, since they differ each time the same file is read, and so is the batch's name, which by default is
    /// the file's: a script that writes its prompts to a fresh temporary file each time sends the same batch.
    fn request_sha256(&self, jobs: &[NewJob]) -> Sha256Digest {
        #[derive(Serialize)]
        struct Head<'a>(&'a ModelName, PriorityBand, u16);
        #[derive(Serialize)]
        struct Line<'a>(&'a ValidJobSpec, bool, Option<u32>);

        let mut hasher = JsonHasher(Sha256::new());
        hasher.write(&Head(&self.model, self.band, self.max_attempts));
        for job in jobs {
            let drawn = job.spec.seed_was_drawn();
            let spec = if drawn { &job.spec.without_drawn_seed() } else { &job.spec };
            hasher.write(&Line(spec, drawn, job.source_line));
        }
        let digest: [u8; 32] = hasher.0.finalize().into();
        digest.into()
    }
}

/// Digests values as JSON, one a line.
struct JsonHasher(Sha256);

impl JsonHasher {
    fn write(&mut self, value: &impl Serialize) {
        let line = serde_json::to_vec(value).expect("plain fields always serialize");
        self.0.update(line);
        self.0.update(b"\n");
    }
}

impl PgCatalog {
    /// Writes a batch and its jobs, all or nothing. The same idempotency key by the same principal again is answered
    /// with the batch that is there, also when both calls run at once, and also when the acceptance has been
    /// revoked since.
    ///
    /// # Errors
    /// When the model is unknown, its licence is not accepted by the principal, or the key belongs to other content; and
    /// when Postgres fails.
    pub async fn submit_batch(&self, new: &NewBatch, jobs: &[NewJob]) -> Result<SubmittedBatch, SubmitError> {
        if jobs.is_empty() {
            return Err(SubmitError::NoJobs);
        }
        let job_count =
            i32::try_from(jobs.len()).map_err(|_| SubmitError::TooManyJobs { job_count: jobs.len() })?;
        let request_sha256 = new.request_sha256(jobs);
        let mut transaction = self.pool.begin().await?;
        if let Some(known) = known_batch(&mut transaction, new).await? {
            return replay(new, known, request_sha256);
        }
        let terms = model_terms(&mut transaction, new).await?;
        let Some(acceptance_id) = terms.acceptance_id else {
            return Err(terms.not_accepted(new));
        };
        let batch_id = BatchId::generate();
        let sql = "
            INSERT INTO batches (batch_id, name, principal, model_id, licence_id, acceptance_id, idempotency_key,
                                 request_sha256, source_name, defaults, band, job_count, max_attempts)
            VALUES ($1, $2, $3, $4, $5, $6, $7, $8, $9, $10, $11, $12, $13)
            ON CONFLICT (principal, idempotency_key) DO NOTHING";
        let inserted = sqlx::query(sql)
            .bind(batch_id)
            .bind(&new.name)
            .bind(&new.principal)
            .bind(terms.model_id)
            .bind(terms.licence_id)
            .bind(acceptance_id)
            .bind(&new.idempotency_key)
            .bind(request_sha256)
            .bind(&new.source_name)
            .bind(Json(&new.defaults))
            .bind(new.band)
            .bind(job_count)
            .bind(max_attempts(new))
            .execute(&mut *transaction)
            .await
            .map_err(|error| match CatalogError::from(error) {
                // Revoked since we looked.
                CatalogError::Refused { rule, .. } if rule == "batches_acceptance_valid" => {
                    terms.not_accepted(new)
                }
                other => other.into(),
            })?;
        if inserted.rows_affected() == 0 {
            // Another call with this key committed while ours waited for it.
            let known = known_batch(&mut transaction, new).await?.ok_or(sqlx::Error::RowNotFound)?;
            return replay(new, known, request_sha256);
        }
        copy_jobs(&mut transaction, new, terms.model_id, batch_id, jobs).await?;
        sqlx::query("SELECT pg_notify('darkroom_jobs', $1)")
            .bind(batch_id.to_string())
            .execute(&mut *transaction)
            .await?;
        failpoint::reached("submit::before_commit");
        transaction.commit().await?;
        Ok(SubmittedBatch { batch_id, job_count: jobs.len() as u64, replayed: false })
    }
}

fn replay(
    new: &NewBatch,
    known: KnownBatch,
    request_sha256: Sha256Digest,
) -> Result<SubmittedBatch, SubmitError> {
    if known.request_sha256 == request_sha256 {
        let job_count = u64::from(known.job_count.unsigned_abs());
        Ok(SubmittedBatch { batch_id: known.batch_id, job_count, replayed: true })
    } else {
        Err(SubmitError::IdempotencyConflict {
            idempotency_key: new.idempotency_key.clone(),
            batch_id: known.batch_id,
        })
    }
}

async fn known_batch(
    transaction: &mut Transaction<'_, Postgres>,
    new: &NewBatch,
) -> Result<Option<KnownBatch>, sqlx::Error> {
    let sql = "SELECT batch_id, request_sha256, job_count FROM batches
               WHERE principal = $1 AND idempotency_key = $2";
    sqlx::query_as(sql)
        .bind(&new.principal)
        .bind(&new.idempotency_key)
        .fetch_optional(&mut **transaction)
        .await
}

async fn model_terms(
    transaction: &mut Transaction<'_, Postgres>,
    new: &NewBatch,
) -> Result<ModelTerms, SubmitError> {
    let sql = "
        SELECT models.model_id, licences.licence_id, licences.name AS licence_name, licences.text_sha256,
               acceptance.acceptance_id
        FROM models
        JOIN licences USING (licence_id)
        LEFT JOIN licence_acceptances AS acceptance
            ON acceptance.licence_id = licences.licence_id
           AND acceptance.principal = $2 AND acceptance.revoked_at IS NULL
           -- One that came while this transaction waited is later than its batch, which starts with it.
           AND acceptance.accepted_at <= now()
        WHERE models.name = $1";
    let terms =
        sqlx::query_as(sql).bind(&new.model).bind(&new.principal).fetch_optional(&mut **transaction).await?;
    terms.ok_or_else(|| SubmitError::UnknownModel { model: new.model.clone() })
}

/// The attempts of each job; more than the column holds are as good as that many.
fn max_attempts(new: &NewBatch) -> i16 {
    i16::try_from(new.max_attempts).unwrap_or(i16::MAX)
}
