//! Recording images: the row that makes a picture count.
//!
//! One transaction for all of a microbatch's pictures. The object is stored before its row is written, so a row
//! implies the object; the fencing token decides between twins, so a job has at most one row.

use std::collections::HashMap;

use serde::Serialize;
use sqlx::types::Json;

use super::connection::PgCatalog;
use super::error::CatalogError;
use crate::engine::EngineFingerprint;
use crate::id::{ImageId, JobId, WorkerId};
use crate::object_key::ObjectKey;
use crate::recipe::Recipe;
use crate::sha256::Sha256Digest;
use crate::state::{Lease, LeaseLost};

/// An object that is in the bucket.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct StoredObject {
    /// The bucket.
    pub bucket: String,
    /// Its key.
    pub object_key: ObjectKey,
    /// The digest of its bytes.
    pub sha256: Sha256Digest,
    /// Its size in bytes.
    pub size_bytes: u64,
}

/// What the safety checker said about one picture.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct SafetyVerdict {
    /// Whether a concept was found. A picture with one is not published.
    pub has_nsfw_concept: bool,
    /// One score a concept; above zero is a find.
    pub concept_scores: Vec<f32>,
    /// One score a special-care concept.
    pub special_care_scores: Vec<f32>,
}

/// Milliseconds that one picture spent in each stage; for stages that a microbatch shares, the whole microbatch's.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize)]
pub struct StageTimings {
    /// Encoding the prompts.
    pub text_encoder_ms: f32,
    /// The denoising loop.
    pub denoise_ms: f32,
    /// Decoding latents to pixels.
    pub vae_ms: f32,
    /// The safety checker.
    pub safety_ms: f32,
    /// Encoding the PNG.
    pub encode_ms: f32,
    /// Storing the object.
    pub upload_ms: f32,
}

/// A picture that was drawn and, unless flagged, stored.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct CompletedJob {
    /// The job and its fencing token.
    #[serde(flatten)]
    pub lease: Lease,
    /// The worker that drew it.
    pub worker_id: WorkerId,
    /// Where its pixels are; `None` exactly when the picture is flagged.
    pub object: Option<StoredObject>,
    /// What the safety checker said; `None` when the model has no checker.
    pub safety: Option<SafetyVerdict>,
    /// Whether the text encoder read only the beginning of the prompt.
    pub prompt_truncated: bool,
    /// The digest of the weights it was drawn with.
    pub weights_sha256: Sha256Digest,
    /// The device: `cpu`, `cuda:0`.
    pub device: String,
    /// The dtype of the computation: `f32`.
    pub dtype: String,
    /// The dtype that the noise was drawn in.
    pub noise_dtype: String,
    /// What was left out of its denoising. Another recipe than the job's is refused.
    pub recipe: Recipe,
    /// What it was computed on, where its last bits depend on that.
    pub engine: Option<EngineFingerprint>,
    /// Where the time went.
    pub timings: StageTimings,
}

/// One row of the statement's input: a completed job, flattened, with the image id to use.
#[derive(Serialize)]
struct InputRow<'a> {
    image_id: ImageId,
    job_id: JobId,
    lease_generation: i64,
    worker_id: WorkerId,
    bucket: Option<&'a str>,
    object_key: Option<&'a ObjectKey>,
    sha256: Option<&'a Sha256Digest>,
    size_bytes: Option<u64>,
    has_nsfw_concept: Option<bool>,
    concept_scores: Option<&'a [f32]>,
    special_care_scores: Option<&'a [f32]>,
    prompt_truncated: bool,
    weights_sha256: &'a Sha256Digest,
    device: &'a str,
    dtype: &'a str,
    noise_dtype: &'a str,
    #[serde(flatten)]
    recipe: Recipe,
    engine: Option<&'a EngineFingerprint>,
    #[serde(flatten)]
    timings: StageTimings,
}

impl<'a> From<&'a CompletedJob> for InputRow<'a> {
    fn from(job: &'a CompletedJob) -> Self {
        let object = job.object.as_ref();
        let safety = job.safety.as_ref();
        Self {
            image_id: ImageId::generate(),
            job_id: job.lease.job_id,
            lease_generation: job.lease.lease_generation,
            worker_id: job.worker_id,
            bucket: object.map(|object| object.bucket.as_str()),
            object_key: object.map(|object| &object.object_key),
            sha256: object.map(|object| &object.sha256),
            size_bytes: object.map(|object| object.size_bytes),
            has_nsfw_concept: safety.map(|safety| safety.has_nsfw_concept),
            concept_scores: safety.map(|safety| safety.concept_scores.as_slice()),
            special_care_scores: safety.map(|safety| safety.special_care_scores.as_slice()),
            prompt_truncated: job.prompt_truncated,
            weights_sha256: &job.weights_sha256,
            device: &job.device,
            dtype: &job.dtype,
            noise_dtype: &job.noise_dtype,
            recipe: job.recipe,
            engine: job.engine.as_ref(),
            timings: job.timings,
        }
    }
}

/// It finds its jobs by their ids alone, whatever the planner believes about how many run; see `HELD` in `claims.rs`.
const COMPLETE: &str = "
    WITH given AS (
        SELECT * FROM jsonb_to_recordset($1) AS given (
            image_id uuid, job_id uuid, lease_generation bigint, worker_id uuid,
            bucket text, object_key text, sha256 text, size_bytes bigint,
            has_nsfw_concept boolean, concept_scores real[], special_care_scores real[],
            prompt_truncated boolean, weights_sha256 text, device text, dtype text, noise_dtype text,
            guidance_start double precision, guidance_stop double precision, cache_interval integer, engine jsonb,
            text_encoder_ms real, denoise_ms real, vae_ms real, safety_ms real, encode_ms real, upload_ms real)
    ), held AS (
        SELECT jobs.job_id, jobs.batch_id, jobs.width, jobs.height, jobs.seed
        FROM jobs JOIN given USING (job_id, lease_generation)
        WHERE jobs.job_id = ANY (ARRAY(SELECT job_id FROM given)) AND (jobs.state = 'running') IS TRUE
        ORDER BY jobs.job_id FOR NO KEY UPDATE OF jobs
    ), recorded AS (
        INSERT INTO images (
            image_id, job_id, batch_id, acceptance_id, lease_generation, worker_id,
            bucket, object_key, sha256, size_bytes, width, height, seed,
            has_nsfw_concept, concept_scores, special_care_scores, prompt_truncated,
            weights_sha256, device, dtype, noise_dtype, guidance_start, guidance_stop, cache_interval,
            engine_gpu, engine_driver, engine_torch, engine_cudnn, engine_kernels, engine_batch_size,
            engine_decode_size,
            text_encoder_ms, denoise_ms, vae_ms, safety_ms, encode_ms, upload_ms)
        SELECT image_id, job_id, batch_id, acceptance_id, lease_generation, worker_id,
               bucket, object_key, sha256, size_bytes, width, height, seed,
               has_nsfw_concept, concept_scores, special_care_scores, prompt_truncated,
               weights_sha256, device, dtype, noise_dtype, guidance_start, guidance_stop, cache_interval,
               engine ->> 'gpu', engine ->> 'driver', engine ->> 'torch', engine ->> 'cudnn', engine ->> 'kernels',
               (engine ->> 'batch_size')::integer, (engine ->> 'decode_size')::integer,
               text_encoder_ms, denoise_ms, vae_ms, safety_ms, encode_ms, upload_ms
        FROM held JOIN given USING (job_id) JOIN batches USING (batch_id)
        RETURNING job_id, lease_generation, image_id
    ), closed AS (
        UPDATE attempts SET ended_at = clock_timestamp(), outcome = 'ok'
        FROM recorded
        WHERE attempts.job_id = recorded.job_id AND attempts.lease_generation = recorded.lease_generation
    ), completed AS (
        UPDATE jobs SET
            state = 'completed', image_id = recorded.image_id, finalized_at = now(),
            leased_by = NULL, lease_expires_at = NULL
        FROM recorded
        WHERE jobs.job_id = recorded.job_id AND jobs.job_id = ANY (ARRAY(SELECT job_id FROM recorded))
          AND (jobs.state = 'running') IS TRUE
        RETURNING jobs.job_id, jobs.image_id
    )
    SELECT job_id, image_id FROM completed";

/// What this lease has recorded before: the same worker asks again because the answer to its commit was lost. A
/// statement of its own, since [`COMPLETE`] cannot see what was committed while it waited for a row.
const RECORDED: &str = "
    SELECT images.job_id, images.image_id
    FROM images JOIN jsonb_to_recordset($1) AS given (
        job_id uuid, lease_generation bigint, worker_id uuid, object_key text) USING (job_id, lease_generation)
    WHERE images.worker_id = given.worker_id AND images.object_key IS NOT DISTINCT FROM given.object_key";

impl PgCatalog {
    /// Records the images of `completed` and completes their jobs, all in one transaction. The answers have the order
    /// of `completed`. Calling again after an unknown outcome is safe: an image that this very lease recorded is
    /// answered with its id.
    ///
    /// # Errors
    /// The inner [`LeaseLost`] for a job whose lease is no longer held; the outer error when Postgres fails or refuses
    /// a row, in which case nothing was recorded.
    pub async fn complete_if_leased(
        &self,
        completed: &[CompletedJob],
    ) -> Result<Vec<Result<ImageId, LeaseLost>>, CatalogError> {
        let input: Vec<InputRow> = completed.iter().map(InputRow::from).collect();
        let input = Json(input);
        let rows: Vec<(JobId, ImageId)> = sqlx::query_as(COMPLETE).bind(&input).fetch_all(&self.pool).await?;
        let mut recorded: HashMap<JobId, ImageId> = rows.into_iter().collect();
        if recorded.len() < completed.len() {
            let before: Vec<(JobId, ImageId)> =
                sqlx::query_as(RECORDED).bind(&input).fetch_all(&self.pool).await?;
            recorded.extend(before);
        }
        let answer =
            |job: &CompletedJob| recorded.get(&job.lease.job_id).copied().ok_or(LeaseLost(job.lease));
        Ok(completed.iter().map(answer).collect())
    }
}
