//! One timed call of the pipeline.

use std::path::Path;
use std::time::Instant;

use anyhow::Context as _;
use safetensors::tensor::{Dtype, TensorView};
use serde::Serialize;

use crate::diffusion::{
    ComputeDevice, ComputeDtype, GenerationParameters, ImageRequest, PipelineError, StableDiffusionPipeline,
    StageSeconds, StepControl,
};

/// A pipeline and what every call asks of it.
pub struct Bench<'p> {
    /// The model.
    pub pipeline: &'p StableDiffusionPipeline,
    /// The pictures of a call, at least one.
    pub requests: Vec<ImageRequest>,
    /// What they share.
    pub parameters: GenerationParameters,
    /// Whether a call ends after its last denoising step.
    pub denoise_only: bool,
}

/// Prompts and seeds are the picture's number, so that another program can ask for the same.
pub fn requests(batch_size: usize, guidance_scale: f64) -> Vec<ImageRequest> {
    let request = |index: usize| ImageRequest {
        prompt: format!("benchmark picture number {index}"),
        negative_prompt: String::new(),
        seed: index as u64,
        guidance_scale,
    };
    (0..batch_size).map(request).collect()
}

/// What one call took and gave.
#[derive(Debug, Serialize)]
pub struct Call {
    /// Wall clock.
    pub seconds: f64,
    /// Time that all threads of the process spent on processors: what counts on a machine that others use too.
    pub cpu_seconds: f64,
    /// Until the first denoising step was done.
    pub first_step_seconds: f64,
    /// Until the last denoising step was done, by the wall clock.
    pub denoised_seconds: f64,
    /// The same in processor time.
    pub denoised_cpu_seconds: f64,
    /// Where the wall clock's time went.
    pub stages: StageSeconds,
    /// Steps taken, which are calls of the UNet.
    pub num_steps: usize,
    #[serde(skip)]
    outputs: Outputs,
}

/// What a call gave, picture after picture.
#[derive(Debug, Default)]
struct Outputs {
    /// Final latents in f32.
    latents: Vec<f32>,
    /// RGB bytes.
    pixels: Vec<u8>,
    /// `(batch_size, latent_channels, height, width)`.
    latents_shape: Vec<usize>,
    /// `(batch_size, height, width, 3)`.
    pixels_shape: Vec<usize>,
}

impl Bench<'_> {
    /// Pictures in a call.
    pub fn batch_size(&self) -> usize {
        self.requests.len()
    }

    /// The precision computed in.
    pub fn dtype(&self) -> ComputeDtype {
        self.pipeline.options().dtype
    }

    /// Where it is computed.
    pub fn device(&self) -> ComputeDevice {
        self.pipeline.options().device
    }

    /// Whether each picture takes two samples a step.
    pub fn is_guided(&self) -> bool {
        self.requests.iter().all(ImageRequest::do_classifier_free_guidance)
    }

    /// Makes the pictures once.
    pub fn call(&self) -> anyhow::Result<Call> {
        let (start, cpu_start) = (Instant::now(), cpu_seconds());
        let elapsed = || (start.elapsed().as_secs_f64(), cpu_seconds() - cpu_start);
        let (mut first_step_seconds, mut denoised) = (None, (0.0, 0.0));
        let mut num_steps = 0;
        let mut latents = Ok(Vec::new());
        let generation = self.pipeline.generate(&self.requests, &self.parameters, &mut |progress| {
            first_step_seconds.get_or_insert_with(|| elapsed().0);
            num_steps = progress.num_steps;
            if progress.step_index + 1 == progress.num_steps {
                latents = progress.latents_f32();
                denoised = elapsed();
                if self.denoise_only {
                    return StepControl::Stop;
                }
            }
            StepControl::Continue
        });
        let (seconds, cpu_seconds) = elapsed();
        let (stages, images) = match generation {
            Ok(generation) => (generation.seconds, generation.images),
            Err(PipelineError::Stopped { .. }) => {
                (StageSeconds { denoise: denoised.0, ..StageSeconds::default() }, Vec::new())
            }
            Err(error) => return Err(error.into()),
        };
        let pixels = images.into_iter().map(|image| image.map(|image| image.pixels));
        let pixels = pixels.collect::<Result<Vec<_>, _>>().context("a picture could not be made")?;
        Ok(Call {
            seconds,
            cpu_seconds,
            first_step_seconds: first_step_seconds.unwrap_or(seconds),
            denoised_seconds: denoised.0,
            denoised_cpu_seconds: denoised.1,
            stages,
            num_steps,
            outputs: self.outputs(&latents?, &pixels),
        })
    }

    fn outputs(&self, latents: &[Vec<f32>], pixels: &[Vec<u8>]) -> Outputs {
        let scale = self.pipeline.vae_scale_factor() as usize;
        let (height, width) = (self.parameters.height as usize, self.parameters.width as usize);
        let (rows, columns) = (height / scale, width / scale);
        let latents = latents.concat();
        let batch_size = self.batch_size();
        Outputs {
            latents_shape: vec![batch_size, latents.len() / (batch_size * rows * columns), rows, columns],
            pixels_shape: vec![pixels.len(), height, width, 3],
            latents,
            pixels: pixels.concat(),
        }
    }
}

impl Call {
    /// Writes the final latents and the pixels for another program to compare its own with.
    pub fn write_outputs(&self, path: &Path) -> anyhow::Result<()> {
        let Outputs { latents, pixels, latents_shape, pixels_shape } = &self.outputs;
        let latents: Vec<u8> = latents.iter().flat_map(|number| number.to_le_bytes()).collect();
        let tensors = [
            ("latents", TensorView::new(Dtype::F32, latents_shape.clone(), &latents)?),
            ("pixels", TensorView::new(Dtype::U8, pixels_shape.clone(), pixels)?),
        ];
        safetensors::serialize_to_file(tensors, None, path)
            .with_context(|| format!("cannot write {}", path.display()))
    }
}

/// Processor time of the process so far.
fn cpu_seconds() -> f64 {
    let mut time = nix::libc::timespec { tv_sec: 0, tv_nsec: 0 };
    // SAFETY: the pointer is to a timespec of ours; the clock exists on every Linux.
    unsafe { nix::libc::clock_gettime(nix::libc::CLOCK_PROCESS_CPUTIME_ID, &raw mut time) };
    time.tv_sec as f64 + time.tv_nsec as f64 * 1e-9
}
