//! Stable Diffusion v1 on libtorch, after Hugging Face's diffusers: same tree, same names, same numbers.
//!
//! A leaf: nothing in here knows of queues, databases, object stores or async code, and tch and tokenizers are used
//! nowhere else. Every size comes from the checkpoint's own JSON. What diffusers computes from the same weights and
//! seed is correct; `worker/tests/golden` holds its answers.
//!
//! # API for the fleet's pipeline adapter and for `darkroom-worker generate`
//! ```text
//! // First of all, before any other use of libtorch in the process (see `device`):
//! let device: ComputeDevice = "cpu".parse()?;            // or "cuda:0"
//! device.open()?;                                        // opens the CUDA libraries, or limits threads on the CPU
//!
//! let options = LoadOptions { device, dtype: ComputeDtype::F32, kernels: KernelChoice::Fused, convolutions: None };
//! let pipeline = StableDiffusionPipeline::from_pretrained(directory, &options)?;   // LoadError lists every fault
//! pipeline.default_size()       -> (width, height)       // unet.sample_size × vae_scale_factor
//! pipeline.default_scheduler()  -> Option<SchedulerKind> // the checkpoint's own class, if it is one of ours
//! pipeline.has_safety_checker() -> bool
//!
//! let requests = [ImageRequest { prompt, negative_prompt, seed, guidance_scale }, …];  // one microbatch
//! let parameters = GenerationParameters { width, height, num_inference_steps, scheduler, noise: None, recipe: Recipe::default() };
//! pipeline.check_inputs(&requests, &parameters)?;        // every fault at once; `generate` repeats it
//! let generation = pipeline.generate(&requests, &parameters, &mut |progress: &StepProgress| {
//!     // Called after each denoising step of the microbatch:
//!     // progress.step_index, progress.num_steps, progress.active (indices into `requests` still being denoised),
//!     // progress.latents (theirs)
//!     StepControl::Continue                              // | Stop | Drop(vec![index, …])
//! })?;                                                   // PipelineError: the whole call failed, or `Stopped`
//! for image in generation.images { … }                   // Result<GeneratedImage, ImageError>, in request order
//! generation.seconds                                     // StageSeconds of the call
//! ```
//! - All requests of a call must have classifier-free guidance on (`guidance_scale > 1`) or all off; the caller groups
//!   by [`ImageRequest::do_classifier_free_guidance`], a mixture is [`PipelineError::MixedGuidance`].
//! - [`ImageError::Dropped`] answers `StepControl::Drop`, [`ImageError::NonFinite`] a NaN or infinity; the other
//!   pictures of the call are not touched by either.
//! - [`GeneratedImage::pixels`] is RGB, 8 bits, row by row; black where `safety` says `has_nsfw_concept`.
//! - The pipeline is `Send` and not `Sync`: one thread owns it. `generate` is `denoise`, then [`Finisher::finish`]; the finisher
//!   is shared, so that another thread can finish one call while the pipeline denoises the next.
//!
//! # Same spec, same picture
//! On the CPU each picture of a microbatch has its own passes through every model, by one thread
//! ([`device::set_threads_per_picture`]), so it is bit for bit the picture that a call of its own gives, on any number
//! of cores; a microbatch of as many pictures as there are cores uses them all. A GPU gets the microbatch at once; with
//! [`BatchSize::Padded`] always as many pictures, and kernels that repeat their bits ([`cuda`]), so that a picture's bits
//! depend on the GPU, its driver, the libraries and that number.

pub mod clip_image_processor;
pub mod clip_tokenizer;
pub mod config;
pub mod convolution;
pub mod cuda;
pub mod device;
pub mod drawn_weights;
pub mod flops;
pub mod kernels;
pub mod layout;
pub mod load_error;
pub mod models;
pub mod nn;
pub mod pipeline_stable_diffusion;
pub mod rng;
pub mod safety_checker;
pub mod schedulers;
pub mod tuning;
pub mod weights;

pub use device::{ComputeDevice, ComputeDtype, DeviceError};
pub use kernels::KernelChoice;
pub use load_error::LoadError;
pub use pipeline_stable_diffusion::{
    BatchSize, Batching, Denoised, Finisher, GeneratedImage, Generation, GenerationParameters, ImageError,
    ImageRequest, LoadOptions, NoiseKind, PipelineError, Recipe, StableDiffusionPipeline, Stage,
    StageSeconds, StepControl, StepProgress,
};
pub use safety_checker::SafetyVerdict;
pub use schedulers::SchedulerKind;
