//! What goes into the pipeline and comes out of it.

use std::fmt;

use tch::{Device, Kind, TchError, Tensor};

use super::super::clip_tokenizer::TokenizeError;
use super::super::device::ComputeDtype;
use super::super::rng::RngError;
use super::super::safety_checker::SafetyVerdict;
use super::super::schedulers::{SchedulerError, SchedulerKind};
use super::StableDiffusionPipeline;
use super::recipe::Recipe;

/// One picture of a microbatch.
#[derive(Debug, Clone, PartialEq)]
pub struct ImageRequest {
    /// Text to follow.
    pub prompt: String,
    /// Text to avoid; not looked at without guidance.
    pub negative_prompt: String,
    /// Seed of the picture's noise. As in PyTorch, only the low 32 bits count.
    pub seed: u64,
    /// Weight of classifier-free guidance.
    pub guidance_scale: f64,
}

impl ImageRequest {
    /// Whether the UNet predicts with and without the prompt: `guidance_scale > 1`, as in diffusers.
    pub fn do_classifier_free_guidance(&self) -> bool {
        self.guidance_scale > 1.0
    }
}

/// What the pictures of a microbatch share.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct GenerationParameters {
    /// Pixels in a row; a multiple of the VAE's scale factor.
    pub width: u32,
    /// Rows of pixels; a multiple of the VAE's scale factor.
    pub height: u32,
    /// Denoising steps asked for; PNDM takes one more.
    pub num_inference_steps: usize,
    /// The noise scheduler.
    pub scheduler: SchedulerKind,
    /// How the first noise is drawn; `None` is diffusers' way, in the compute dtype.
    pub noise: Option<NoiseKind>,
    /// What is left out for speed; by default nothing.
    pub recipe: Recipe,
}

/// The dtype in which PyTorch's CPU generator draws the first noise. For one seed they are unrelated pictures, so it is
/// part of what identifies a picture.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum NoiseKind {
    /// f32, as all user interfaces draw it, whatever they compute in.
    CpuF32,
    /// f16, as diffusers draws it for f16 weights.
    CpuF16,
    /// bf16, as diffusers draws it for bf16 weights.
    CpuBf16,
}

impl NoiseKind {
    /// The kind that diffusers draws for weights of `dtype`.
    pub fn of(dtype: ComputeDtype) -> Self {
        match dtype {
            ComputeDtype::F32 => Self::CpuF32,
            ComputeDtype::F16 => Self::CpuF16,
            ComputeDtype::Bf16 => Self::CpuBf16,
        }
    }

    /// libtorch's name for the dtype.
    pub(super) fn to_tch(self) -> Kind {
        match self {
            Self::CpuF32 => Kind::Float,
            Self::CpuF16 => Kind::Half,
            Self::CpuBf16 => Kind::BFloat16,
        }
    }
}

impl fmt::Display for NoiseKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::CpuF32 => "cpu-f32",
            Self::CpuF16 => "cpu-f16",
            Self::CpuBf16 => "cpu-bf16",
        })
    }
}

/// How far the denoising is.
#[derive(Debug, Clone, Copy)]
pub struct StepProgress<'a> {
    /// The step just done, from 0.
    pub step_index: usize,
    /// Steps in all.
    pub num_steps: usize,
    /// The requests, by index, whose pictures took the step.
    pub active: &'a [usize],
    /// Those pictures' latents, in the order of `active`.
    pub latents: &'a [&'a Tensor],
}

impl StepProgress<'_> {
    /// Each picture's latents in f32, row by row, for a caller that keeps them.
    pub fn latents_f32(&self) -> Result<Vec<Vec<f32>>, TchError> {
        let flat =
            |latents: &&Tensor| latents.f_to_kind(Kind::Float)?.f_to_device(Device::Cpu)?.f_flatten(0, -1);
        self.latents.iter().map(|latents| Vec::try_from(flat(latents)?)).collect()
    }
}

/// What to do after a denoising step.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum StepControl {
    /// Go on.
    Continue,
    /// Give up the whole call.
    Stop,
    /// Give up these requests, by index, and go on with the others.
    Drop(Vec<usize>),
}

/// The answer to one call.
#[derive(Debug)]
pub struct Generation {
    /// One result for each request, in their order.
    pub images: Vec<Result<GeneratedImage, ImageError>>,
    /// Where the time went.
    pub seconds: StageSeconds,
    /// Pictures that the UNet was given at once, made-up ones included.
    pub batch_size: usize,
    /// Pictures that the decoder was given at once, at most.
    pub decode_size: usize,
    /// Denoising steps that were replayed from a CUDA graph.
    pub replayed_steps: usize,
}

/// A picture and what is known about it.
#[derive(Debug, Clone, PartialEq)]
pub struct GeneratedImage {
    /// RGB, 8 bits each, row by row; all zero (black) if the picture has an unwanted concept.
    pub pixels: Vec<u8>,
    /// Pixels in a row.
    pub width: u32,
    /// Rows of pixels.
    pub height: u32,
    /// The request's seed.
    pub seed: u64,
    /// How its noise was drawn.
    pub noise: NoiseKind,
    /// The verdict and its scores; `None` if the checkpoint has no safety checker.
    pub safety: Option<SafetyVerdict>,
    /// The end of the prompt that the text encoder could not take.
    pub truncated_prompt: Option<String>,
    /// The same of the negative prompt.
    pub truncated_negative_prompt: Option<String>,
}

/// Seconds that a call spent in each stage, over all its pictures.
#[derive(Debug, Clone, Copy, Default, PartialEq, serde::Serialize)]
pub struct StageSeconds {
    /// Tokenizer and text encoder.
    pub text_encoder: f64,
    /// UNet and noise scheduler.
    pub denoise: f64,
    /// Latents to an image.
    pub vae_decode: f64,
    /// The image to bytes, and those to this side.
    pub to_host: f64,
    /// Feature extractor and safety checker.
    pub safety_checker: f64,
}

/// A part of the pipeline.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Stage {
    /// UNet and noise scheduler.
    Denoise,
    /// Latents to pixels.
    VaeDecode,
    /// Feature extractor and safety checker.
    SafetyChecker,
}

impl fmt::Display for Stage {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Denoise => "denoise",
            Self::VaeDecode => "vae_decode",
            Self::SafetyChecker => "safety_checker",
        })
    }
}

/// Why one picture of a call was not made; the others are not touched by it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum ImageError {
    /// NaN or infinity came out of a stage. Half precision overflows for some weights and prompts.
    #[error("{stage} gave numbers that are not finite")]
    NonFinite {
        /// Where it was seen first.
        stage: Stage,
    },
    /// `on_step` dropped it.
    #[error("dropped after denoising step {step_index}")]
    Dropped {
        /// The last step that it took, from 0.
        step_index: usize,
    },
}

/// A parameter that breaks a rule.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("`{parameter}` must be {rule} but is {value}")]
pub struct InputFault {
    /// The parameter's name.
    pub parameter: &'static str,
    /// What is accepted.
    pub rule: String,
    /// What was given.
    pub value: String,
}

/// Why a whole call failed.
#[derive(Debug, thiserror::Error)]
pub enum PipelineError {
    /// Inputs that break rules, all of them.
    #[error("{}", faults.iter().map(InputFault::to_string).collect::<Vec<_>>().join("\n"))]
    Inputs {
        /// Never empty.
        faults: Vec<InputFault>,
    },
    /// Requests with and without classifier-free guidance in one call.
    #[error("`guidance_scale` must be above 1 for all pictures of a microbatch, or for none")]
    MixedGuidance,
    /// `on_step` stopped the call.
    #[error("stopped after denoising step {step_index}")]
    Stopped {
        /// The last step taken, from 0.
        step_index: usize,
    },
    /// The noise scheduler cannot be built for these parameters, or failed.
    #[error(transparent)]
    Scheduler(#[from] SchedulerError),
    /// Noise could not be drawn.
    #[error(transparent)]
    Noise(#[from] RngError),
    /// A prompt could not be tokenized.
    #[error(transparent)]
    Tokenize(#[from] TokenizeError),
    /// libtorch refused an operation.
    #[error(transparent)]
    Tensor(#[from] TchError),
}

/// What is wrong with a picture's width and height; both are whole numbers of latent cells.
pub fn size_faults(width: u32, height: u32, vae_scale_factor: u32) -> Vec<InputFault> {
    let wrong = |size: u32| size == 0 || !size.is_multiple_of(vae_scale_factor);
    let rule = || format!("a positive multiple of {vae_scale_factor}");
    [("width", width), ("height", height)]
        .into_iter()
        .filter(|&(_, size)| wrong(size))
        .map(|(parameter, size)| InputFault { parameter, rule: rule(), value: size.to_string() })
        .collect()
}

impl StableDiffusionPipeline {
    /// Checks what [`StableDiffusionPipeline::generate`] is given against the checkpoint, naming every fault.
    pub fn check_inputs(
        &self,
        requests: &[ImageRequest],
        parameters: &GenerationParameters,
    ) -> Result<(), PipelineError> {
        let mut faults = size_faults(parameters.width, parameters.height, self.vae_scale_factor());
        faults.extend(parameters.recipe.faults());
        let mut refuse = |parameter, rule: String, value: String| {
            faults.push(InputFault { parameter, rule, value });
        };
        if parameters.num_inference_steps == 0 {
            refuse("num_inference_steps", "at least 1".to_owned(), "0".to_owned());
        } else {
            match parameters.scheduler.build(&self.scheduler_config, parameters.num_inference_steps) {
                Ok(_) => {}
                Err(SchedulerError::NumInferenceSteps { rule, num_inference_steps }) => {
                    refuse("num_inference_steps", rule, num_inference_steps.to_string());
                }
                Err(error) => return Err(error.into()),
            }
        }
        for request in requests.iter().filter(|request| !request.guidance_scale.is_finite()) {
            refuse("guidance_scale", "a finite number".to_owned(), request.guidance_scale.to_string());
        }
        if !faults.is_empty() {
            return Err(PipelineError::Inputs { faults });
        }
        let guided = requests.iter().filter(|request| request.do_classifier_free_guidance()).count();
        if guided != 0 && guided != requests.len() {
            return Err(PipelineError::MixedGuidance);
        }
        Ok(())
    }
}
