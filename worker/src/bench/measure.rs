//! One timed call of the pipeline.

use std::path::Path;
use std::time::Instant;

use anyhow::{Context as _, ensure};
use safetensors::SafeTensors;
use safetensors::tensor::{Dtype, TensorView};
use serde::Serialize;

use crate::diffusion::{
    Batching, ComputeDevice, ComputeDtype, Generation, GenerationParameters, ImageRequest, PipelineError,
    StableDiffusionPipeline, StageSeconds, StepControl,
};

/// A pipeline and what every call asks of it.
pub struct Bench<'p> {
    /// The model.
    pub pipeline: &'p StableDiffusionPipeline,
    /// The pictures of a call, at least one.
    pub requests: Vec<ImageRequest>,
    /// What they share.
    pub parameters: GenerationParameters,
    /// How they are computed.
    pub batching: Batching,
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
    /// Steps that were replayed from a CUDA graph; not known of a call that ended after its last step.
    pub replayed_steps: Option<usize>,
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
        self.pipeline.set_batching(self.batching);
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
        let (stages, images, replayed_steps) = match generation {
            Ok(Generation { images, seconds, replayed_steps, .. }) => (seconds, images, Some(replayed_steps)),
            Err(PipelineError::Stopped { .. }) => {
                (StageSeconds { denoise: denoised.0, ..StageSeconds::default() }, Vec::new(), None)
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
            replayed_steps,
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
    /// The bits of one picture: its final latents and its pixels.
    pub fn bits_of(&self, picture: usize) -> (Vec<u32>, Vec<u8>) {
        let Outputs { latents, pixels, latents_shape, .. } = &self.outputs;
        let part =
            |length: usize| length / latents_shape[0] * picture..length / latents_shape[0] * (picture + 1);
        (
            latents[part(latents.len())].iter().map(|number| number.to_bits()).collect(),
            pixels[part(pixels.len())].to_vec(),
        )
    }

    /// How far the final latents are from those that [`Self::write_outputs`] wrote: the largest difference by their largest
    /// value.
    pub fn difference_from(&self, path: &Path) -> anyhow::Result<f64> {
        let bytes = std::fs::read(path).with_context(|| format!("cannot read {}", path.display()))?;
        let tensors = SafeTensors::deserialize(&bytes)?;
        let reference = tensors.tensor("latents")?;
        let reference: Vec<f32> =
            reference.data().as_chunks().0.iter().map(|bytes| f32::from_le_bytes(*bytes)).collect();
        let latents = &self.outputs.latents;
        ensure!(reference.len() == latents.len(), "{} is of another size", path.display());
        let largest = reference.iter().fold(0.0, |largest: f64, number| largest.max(f64::from(number.abs())));
        let difference = |(ours, theirs): (&f32, &f32)| f64::from(ours - theirs).abs();
        // `max` would pass over what is not a number.
        Ok(latents
            .iter()
            .zip(&reference)
            .map(difference)
            .fold(0.0, |worst: f64, one| if one.is_nan() || one > worst { one } else { worst })
            / largest)
    }

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
