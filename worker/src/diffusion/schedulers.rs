//! Noise schedulers: which training steps are visited, and how one denoising step is made from the UNet's output.
//!
//! # API (stable)
//! - `let config = SchedulerConfig::from_json(&text)?` reads `scheduler/scheduler_config.json`.
//! - `let kind: SchedulerKind = "pndm".parse()?`, or [`SchedulerConfig::kind`] for the class that the file names.
//! - `let mut scheduler = kind.build(&config, num_inference_steps)?`: a new one for each microbatch, it has state.
//! - The loop of a pipeline:
//!   ```text
//!   latents = noise * scheduler.init_noise_sigma()
//!   for (step_index, t) in scheduler.timesteps().to_vec().into_iter().enumerate() {
//!       model_input = scheduler.scale_model_input(&latents, step_index)?
//!       noise_pred  = unet(model_input, t, …), guided
//!       latents     = scheduler.step(&noise_pred, step_index, &latents, &mut generators)?
//!   }
//!   ```
//! - `timesteps().len()` is the number of UNet calls; for PNDM it is `num_inference_steps + 1`.
//!
//! One file per class of diffusers 0.42.1, named as there. Each is built as `Class.from_config(json)` handed to
//! `StableDiffusionPipeline(…)`: keys that the JSON lacks take the class's own defaults (so Euler visits `linspace`
//! and PNDM `leading` timesteps), and the constructor's patches hold (`steps_offset` 1, `clip_sample` false). What a
//! JSON asks for and no file here does is an error, never ignored.
//!
//! The arithmetic is diffusers' operation by operation, coefficients as 0-dimensional f32 tensors where it has such.
//! So samples agree with diffusers to the last bit in f32, f16 and bf16 (measured over 189 schedules on x86-64 with
//! AVX2), except f32 samples of LMS and of Euler with Karras sigmas (8.5e-7 and 2.2e-7 of the largest value). The
//! step is known by its index: at many steps Karras schedules visit one timestep twice, so that looking a step up by
//! its timestep goes wrong.

use tch::{TchError, Tensor};

use super::rng::{Generator, RngError};

mod config;
mod ddim;
mod dpmsolver_multistep;
mod euler_ancestral_discrete;
mod euler_discrete;
mod linear;
mod lms_discrete;
mod noise_schedule;
mod pndm;
mod scalar;
mod spacing;
mod unipc_multistep;

pub use config::SchedulerConfig;
pub use linear::{LinearStep, LinearSteps};

/// Why a noise scheduler could not be built or could not step.
#[derive(Debug, thiserror::Error)]
pub enum SchedulerError {
    /// A name that is no noise scheduler of ours.
    #[error("`scheduler` must be one of {} but is `{name}`", SchedulerKind::choices())]
    UnknownKind {
        /// What was asked for.
        name: String,
    },
    /// The checkpoint's scheduler JSON does not parse.
    #[error("scheduler_config.json does not parse")]
    Json(#[from] serde_json::Error),
    /// The checkpoint's scheduler JSON asks for something that this program does not do.
    #[error("`{key}` in scheduler_config.json must be {rule} but is {value}")]
    Config {
        /// The key of `scheduler_config.json`.
        key: &'static str,
        /// What is accepted.
        rule: String,
        /// What the file says.
        value: String,
    },
    /// So many (or few) steps are not possible with this scheduler.
    #[error("`num_inference_steps` must be {rule} but is {num_inference_steps}")]
    NumInferenceSteps {
        /// What is accepted, and why.
        rule: String,
        /// What was asked for.
        num_inference_steps: usize,
    },
    /// A step index beyond the schedule.
    #[error("`step_index` must be less than the {num_steps} steps of the schedule but is {step_index}")]
    StepIndex {
        /// The index given.
        step_index: usize,
        /// Steps in the schedule.
        num_steps: usize,
    },
    /// The noise of an ancestral step could not be drawn.
    #[error(transparent)]
    Noise(#[from] RngError),
    /// libtorch refused an operation.
    #[error(transparent)]
    Tensor(#[from] TchError),
}

/// A noise scheduler set up for a number of steps. `sample` is diffusers' word for the latents, of shape
/// `(batch_size, num_channels, height, width)`, f32, f16 or bf16, on any device.
pub trait Scheduler {
    /// The training steps to visit, descending, one for each UNet call; some schedulers visit fractions.
    fn timesteps(&self) -> &[f64];

    /// What the first noise is multiplied with.
    fn init_noise_sigma(&self) -> f64 {
        1.0
    }

    /// What the UNet is shown instead of `sample` at this step; same shape and dtype.
    fn scale_model_input(&self, sample: &Tensor, _step_index: usize) -> Result<Tensor, SchedulerError> {
        Ok(sample.shallow_clone())
    }

    /// The sample of the next step (diffusers' `prev_sample`) from the UNet's (guided) output at this one; same shape
    /// and dtype as `model_output`. Steps are taken in order, the first may be any. `generators` has one generator
    /// per picture; only ancestral schedulers draw from it, on the CPU, in the dtype of `model_output`.
    fn step(
        &mut self,
        model_output: &Tensor,
        step_index: usize,
        sample: &Tensor,
        generators: &mut [Generator],
    ) -> Result<Tensor, SchedulerError>;

    /// All steps as sums with numbers known ahead, for a scheduler that has taken none yet; `None` if they are not written so.
    fn linear_steps(&self) -> Result<Option<LinearSteps>, SchedulerError> {
        Ok(None)
    }

    /// `original_samples` with `noise` added as strong as at this step; all of one shape and dtype.
    fn add_noise(
        &self,
        original_samples: &Tensor,
        noise: &Tensor,
        step_index: usize,
    ) -> Result<Tensor, SchedulerError>;
}

/// The noise schedulers by the names that users type.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum SchedulerKind {
    /// `PNDMScheduler`, Stable Diffusion v1's own.
    Pndm,
    /// `DDIMScheduler` with `eta` 0.
    Ddim,
    /// `EulerDiscreteScheduler`.
    Euler,
    /// `EulerAncestralDiscreteScheduler`; draws noise at each step.
    EulerA,
    /// `DPMSolverMultistepScheduler` of order 2.
    Dpmpp2m,
    /// `DPMSolverMultistepScheduler` of order 2 with Karras sigmas.
    Dpmpp2mKarras,
    /// `UniPCMultistepScheduler` of order 2.
    Unipc,
    /// `LMSDiscreteScheduler` of order 4.
    Lms,
}

impl SchedulerKind {
    /// Every kind, in the order that help texts list them.
    pub const ALL: [Self; 8] = [
        Self::Pndm,
        Self::Ddim,
        Self::Euler,
        Self::EulerA,
        Self::Dpmpp2m,
        Self::Dpmpp2mKarras,
        Self::Unipc,
        Self::Lms,
    ];

    /// The name users type.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Pndm => "pndm",
            Self::Ddim => "ddim",
            Self::Euler => "euler",
            Self::EulerA => "euler_a",
            Self::Dpmpp2m => "dpmpp_2m",
            Self::Dpmpp2mKarras => "dpmpp_2m_karras",
            Self::Unipc => "unipc",
            Self::Lms => "lms",
        }
    }

    /// `pndm | ddim | …`, for error and help texts.
    fn choices() -> String {
        Self::ALL.map(Self::as_str).join(" | ")
    }

    /// The noise scheduler of this kind for a checkpoint's `scheduler_config.json`. `num_inference_steps` must be
    /// from 1 to one less than the model's `num_train_timesteps`; the error says what is wrong with it or with the
    /// JSON.
    pub fn build(
        &self,
        config: &SchedulerConfig,
        num_inference_steps: usize,
    ) -> Result<Box<dyn Scheduler + Send>, SchedulerError> {
        let n = num_inference_steps;
        Ok(match self {
            Self::Pndm => Box::new(pndm::PNDMScheduler::from_config(config, n)?),
            Self::Ddim => Box::new(ddim::DDIMScheduler::from_config(config, n)?),
            Self::Euler => Box::new(euler_discrete::EulerDiscreteScheduler::from_config(config, n)?),
            Self::EulerA => {
                Box::new(euler_ancestral_discrete::EulerAncestralDiscreteScheduler::from_config(config, n)?)
            }
            Self::Dpmpp2m => {
                Box::new(dpmsolver_multistep::DPMSolverMultistepScheduler::from_config(config, n)?)
            }
            Self::Dpmpp2mKarras => {
                let config = config.clone().with("use_karras_sigmas", true);
                Box::new(dpmsolver_multistep::DPMSolverMultistepScheduler::from_config(&config, n)?)
            }
            Self::Unipc => Box::new(unipc_multistep::UniPCMultistepScheduler::from_config(config, n)?),
            Self::Lms => Box::new(lms_discrete::LMSDiscreteScheduler::from_config(config, n)?),
        })
    }
}

impl std::fmt::Display for SchedulerKind {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(self.as_str())
    }
}

impl std::str::FromStr for SchedulerKind {
    type Err = SchedulerError;

    fn from_str(name: &str) -> Result<Self, Self::Err> {
        Self::ALL
            .into_iter()
            .find(|kind| kind.as_str() == name)
            .ok_or_else(|| SchedulerError::UnknownKind { name: name.to_owned() })
    }
}

/// Whether the UNet predicts the noise or, in `v_prediction` checkpoints, a mix of noise and picture.
#[derive(Debug, Clone, Copy)]
enum PredictionType {
    Epsilon,
    VPrediction,
}

/// An index that is checked against the schedule, so that the arithmetic behind it may index.
fn check_step_index(step_index: usize, timesteps: &[f64]) -> Result<(), SchedulerError> {
    if step_index < timesteps.len() {
        return Ok(());
    }
    Err(SchedulerError::StepIndex { step_index, num_steps: timesteps.len() })
}
