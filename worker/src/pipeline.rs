//! The wall towards the model: job specs in, pictures out, nothing async and nothing shared.
//!
//! Two real implementations stand behind it: `stable_diffusion.rs` and `solid_color.rs`. One OS thread owns the
//! pipeline (`engine.rs`); nothing else ever sees it. What it leaves of a call, [`Denoised`], can be finished elsewhere.

use std::fmt;
use std::sync::Arc;
use std::time::Duration;

use schema::{EngineFingerprint, Recipe, ValidJobSpec};

use crate::control::Control;

/// Whatever lies below a pipeline's error; shared, since one failed call is every picture's failure.
pub type Source = Arc<dyn std::error::Error + Send + Sync>;

/// What a pipeline is, as far as its pictures depend on it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PipelineIdentity {
    /// `stable-diffusion` or `solid-color`.
    pub name: String,
    /// `cpu` or `cuda:N`.
    pub device: String,
    /// What the model computes in: `f32`, `f16` or `bf16`.
    pub dtype: String,
    /// What the first noise is drawn in; a seed's picture depends on it.
    pub noise_dtype: String,
}

/// One picture as the pipeline made it.
#[derive(Debug, Clone, PartialEq)]
pub struct GeneratedImage {
    /// Pixels in a row.
    pub width: u32,
    /// Rows.
    pub height: u32,
    /// `width * height` pixels of red, green and blue, row by row from the top. Black if flagged.
    pub rgb: Vec<u8>,
    /// The safety checker's verdict; `None` if the model has no checker.
    pub has_nsfw_concept: Option<bool>,
    /// The checker's score for each of its concepts; above 0 is a hit. Empty without a checker.
    pub concept_scores: Vec<f32>,
    /// As `concept_scores`, for the concepts that only make the checker stricter.
    pub special_care_scores: Vec<f32>,
    /// The prompt was longer than the text encoder reads.
    pub prompt_truncated: bool,
    /// What it was computed in: the pipeline's dtype, or `f32` where that gave numbers that are not finite.
    pub dtype: String,
    /// What was left out of its denoising.
    pub recipe: Recipe,
    /// What it was computed on, where its last bits depend on that.
    pub engine: Option<Box<EngineFingerprint>>,
}

/// What became of one picture of a call.
#[derive(Debug)]
pub enum PictureOutcome {
    /// Here it is.
    Finished(GeneratedImage),
    /// Its job was lost or all were stopped, as [`Control`] says.
    Dropped,
    /// It alone failed; its neighbors did not.
    Failed(PipelineError),
}

/// Where the time of one call went.
#[derive(Debug, Clone, Copy, Default)]
pub struct StageTimes {
    /// Tokenizing and embedding the prompts.
    pub text_encoder: Duration,
    /// All denoising steps.
    pub denoise: Duration,
    /// Decoding the latents.
    pub vae: Duration,
    /// The safety checker.
    pub safety: Duration,
    /// Between the last denoising step and the decoding, if another call had to be finished first.
    pub wait: Duration,
}

/// What one call gives back.
#[derive(Debug)]
pub struct Generated {
    /// One outcome for each spec, in order.
    pub pictures: Vec<PictureOutcome>,
    /// The call's stages.
    pub times: StageTimes,
}

/// Why a picture, or a whole call, failed.
#[derive(Debug, Clone, thiserror::Error)]
pub enum PipelineError {
    /// The spec cannot be run by this model: no other worker can either.
    #[error("the model cannot run this job")]
    Input {
        /// The model's words.
        source: Source,
    },
    /// The device's memory does not hold this call.
    #[error("the device has no memory for a microbatch of {batch_size}")]
    OutOfMemory {
        /// Pictures in the call.
        batch_size: usize,
        /// The library's words.
        source: Source,
    },
    /// NaN or infinity where numbers belong.
    #[error("`{tensor}` has values that are not finite")]
    NonFinite {
        /// Which tensor.
        tensor: String,
    },
    /// The device or its driver failed; this process cannot trust it any more.
    #[error("the device failed")]
    Device {
        /// The library's words.
        source: Source,
    },
    /// A mistake in this program or in the model's files.
    #[error("the pipeline failed")]
    Bug {
        /// The library's words.
        source: Source,
    },
    /// The pipeline panicked: a mistake, and its state cannot be trusted any more.
    #[error("the pipeline panicked: {message}")]
    Panicked {
        /// What the panic said.
        message: String,
    },
}

impl PipelineError {
    /// Whether the pipeline must not be used again.
    pub fn is_poisonous(&self) -> bool {
        matches!(self, Self::Device { .. } | Self::Panicked { .. })
    }
}

/// What the first half of a call leaves to the second: small, so that one may wait while another is finished.
pub struct Denoised {
    /// The stages so far.
    pub times: StageTimes,
    /// The second half: decodes, checks and brings the pictures to this side, one outcome for each spec in order. Its `times` are
    /// the whole call's. It may ask the [`Control`] which pictures are not wanted any more.
    pub finish: Finish,
}

/// The second half of a call, on whichever thread it is run.
pub type Finish = Box<dyn FnOnce(&mut Control) -> Result<Generated, PipelineError> + Send>;

impl fmt::Debug for Denoised {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Denoised").field("times", &self.times).finish_non_exhaustive()
    }
}

/// What a thread other than the pipeline's own does once, before it finishes anything.
pub type PrepareLane = Box<dyn FnOnce() -> Result<(), PipelineError> + Send>;

/// A model, loaded. It makes one picture for each spec of a call, in two halves, of which another thread may do the second
/// while the first half of the next call runs.
pub trait Pipeline {
    /// What its pictures depend on besides spec and weights.
    fn identity(&self) -> &PipelineIdentity;

    /// The first half of a call: prompts to latents. All specs share one microbatch key and there is at least one.
    ///
    /// After each denoising step the pipeline calls [`Control::after_step`] and obeys the verdict. Each picture depends
    /// on its spec and the weights alone, not on the other specs of the call, nor on which thread finishes it.
    fn denoise(&mut self, specs: &[&ValidJobSpec], control: &mut Control) -> Result<Denoised, PipelineError>;

    /// What another thread has to do before it finishes calls; an error if none can.
    fn prepare_lane(&self) -> PrepareLane {
        Box::new(|| Ok(()))
    }
}

/// Makes the pipeline on the thread that will own it.
pub type PipelineLoader = Box<dyn FnOnce() -> Result<Box<dyn Pipeline>, PipelineError> + Send>;
