//! A picture as a PNG file that knows how it was made.
//!
//! Two text chunks travel with the pixels: `parameters`, which people's tools read (`infotext.rs`), and `darkroom`, a JSON
//! record for programs. The bytes are a function of job, weights, pixels and, on a GPU, of what computed them: no time, no
//! worker and no attempt is in them, so a job that runs twice on machines of a kind makes the same file and the same object
//! key.

use png::text_metadata::{ITXtChunk, TEXtChunk};
use schema::{
    AcceptanceId, BatchId, EngineFingerprint, JobId, ModelName, NoiseScheduler, Recipe, Sha256Digest,
    ValidJobSpec,
};
use serde::{Deserialize, Serialize};

use crate::infotext::infotext;
use crate::pipeline::GeneratedImage;

/// The version of [`PictureRecord`]; a field that changes its meaning raises it.
const RECORD_VERSION: u32 = 1;
/// Keyword of the chunk that other programs read.
pub const PARAMETERS: &str = "parameters";
/// Keyword of our own chunk.
const DARKROOM: &str = "darkroom";

/// Why a picture could not be written as PNG.
#[derive(Debug, thiserror::Error)]
pub enum PngError {
    /// The encoder refused.
    #[error("the picture of {width}x{height} pixels ({bytes} bytes) could not be encoded as PNG")]
    Encode {
        /// Pixels in a row.
        width: u32,
        /// Rows.
        height: u32,
        /// Length of the pixel data.
        bytes: usize,
        /// The encoder's words.
        source: png::EncodingError,
    },
    /// The encoder panicked.
    #[error("the PNG encoder panicked")]
    Panicked {
        /// What the panic said.
        source: Box<dyn std::error::Error + Send + Sync>,
    },
    /// The record could not be written as JSON.
    #[error("the picture's record could not be written as JSON")]
    Record(#[from] serde_json::Error),
}

/// Where a picture comes from, apart from its spec.
#[derive(Debug, Clone)]
pub struct Provenance<'a> {
    /// Its job.
    pub job_id: JobId,
    /// The job's batch.
    pub batch_id: BatchId,
    /// The job's place in the batch, from 0.
    pub ordinal: u32,
    /// The licence acceptance that the batch was submitted under.
    pub acceptance_id: AcceptanceId,
    /// The model's registered name.
    pub model: &'a ModelName,
    /// Digest over the model's component files.
    pub weights_sha256: &'a Sha256Digest,
    /// What the first noise was drawn in.
    pub noise_dtype: &'a str,
}

/// The JSON of the `darkroom` chunk. Fields are only ever added.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct PictureRecord {
    /// The record's own version, 1.
    pub version: u32,
    /// The job, whose only picture this is.
    pub job_id: JobId,
    /// The job's batch.
    pub batch_id: BatchId,
    /// The job's place in the batch, from 0.
    pub ordinal: u32,
    /// The text followed, exactly.
    pub prompt: String,
    /// The text avoided, exactly.
    pub negative_prompt: String,
    /// The seed of the noise.
    pub seed: u64,
    /// The model's registered name.
    pub model: ModelName,
    /// Digest over the model's component files.
    pub weights_sha256: Sha256Digest,
    /// The noise scheduler.
    pub scheduler: NoiseScheduler,
    /// Denoising steps.
    pub num_inference_steps: u32,
    /// Weight of classifier-free guidance.
    pub guidance_scale: f32,
    /// What was left out of the denoising: `guidance_start`, `guidance_stop` and `cache_interval`, or none of the three for the exact
    /// picture, whose file is what it was before there were recipes.
    #[serde(flatten, skip_serializing_if = "Recipe::is_exact")]
    pub recipe: Recipe,
    /// Pixels in a row.
    pub width: u32,
    /// Rows.
    pub height: u32,
    /// What the first noise was drawn in, on the CPU.
    pub noise_dtype: String,
    /// The prompt was longer than the text encoder reads.
    pub prompt_truncated: bool,
    /// The safety checker's verdict; `null` if the model has no checker.
    pub has_nsfw_concept: Option<bool>,
    /// The checker's score for each concept.
    pub concept_scores: Vec<f32>,
    /// The checker's score for each special-care concept.
    pub special_care_scores: Vec<f32>,
    /// The licence acceptance that the batch was submitted under.
    pub licence_acceptance_id: AcceptanceId,
    /// The program that made the picture.
    pub software: String,
    /// What computed it, if that was a GPU; on the CPU the same pixels come from every machine.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub engine: Option<Box<EngineFingerprint>>,
}

impl PictureRecord {
    /// The record of a picture.
    pub fn new(spec: &ValidJobSpec, image: &GeneratedImage, provenance: &Provenance<'_>) -> Self {
        Self {
            version: RECORD_VERSION,
            job_id: provenance.job_id,
            batch_id: provenance.batch_id,
            ordinal: provenance.ordinal,
            prompt: spec.prompt().to_owned(),
            negative_prompt: spec.negative_prompt().to_owned(),
            seed: spec.seed().into(),
            model: provenance.model.clone(),
            weights_sha256: *provenance.weights_sha256,
            scheduler: spec.noise_scheduler(),
            num_inference_steps: spec.num_inference_steps(),
            guidance_scale: spec.guidance_scale(),
            recipe: image.recipe,
            width: image.width,
            height: image.height,
            noise_dtype: provenance.noise_dtype.to_owned(),
            prompt_truncated: image.prompt_truncated,
            has_nsfw_concept: image.has_nsfw_concept,
            concept_scores: image.concept_scores.clone(),
            special_care_scores: image.special_care_scores.clone(),
            licence_acceptance_id: provenance.acceptance_id,
            software: concat!("darkroom ", env!("CARGO_PKG_VERSION")).to_owned(),
            engine: image.engine.clone(),
        }
    }
}

/// The PNG file of a job's picture, with both text chunks.
pub fn encode_picture(
    spec: &ValidJobSpec,
    image: &GeneratedImage,
    provenance: &Provenance<'_>,
) -> Result<Vec<u8>, PngError> {
    let parameters = infotext(spec, provenance.model.as_str(), provenance.weights_sha256);
    let record = serde_json::to_string(&PictureRecord::new(spec, image, provenance))?;
    encode(image, &[(PARAMETERS, &parameters), (DARKROOM, &record)])
}

/// An RGB PNG file with text chunks (keyword and text), in order, before the pixels.
pub fn encode(image: &GeneratedImage, texts: &[(&str, &str)]) -> Result<Vec<u8>, PngError> {
    let mut bytes = Vec::new();
    write(image, texts, &mut bytes).map_err(|source| PngError::Encode {
        width: image.width,
        height: image.height,
        bytes: image.rgb.len(),
        source,
    })?;
    Ok(bytes)
}

fn write(
    image: &GeneratedImage,
    texts: &[(&str, &str)],
    out: &mut Vec<u8>,
) -> Result<(), png::EncodingError> {
    let mut encoder = png::Encoder::new(out, image.width, image.height);
    encoder.set_color(png::ColorType::Rgb);
    encoder.set_depth(png::BitDepth::Eight);
    // A picture of a diffusion model hardly compresses: the fast compressor costs a tenth of the default's time.
    encoder.set_compression(png::Compression::Fast);
    let mut writer = encoder.write_header()?;
    for (keyword, text) in texts {
        // tEXt holds Latin-1 and every reader knows it; iTXt holds everything. Pillow chooses in the same way.
        if text.chars().all(|character| u8::try_from(u32::from(character)).is_ok()) {
            writer.write_text_chunk(&TEXtChunk::new(*keyword, *text))?;
        } else {
            writer.write_text_chunk(&ITXtChunk::new(*keyword, *text))?;
        }
    }
    writer.write_image_data(&image.rgb)?;
    writer.finish()
}
