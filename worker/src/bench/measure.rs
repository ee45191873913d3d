//! One timed call of the pipeline.

use std::path::Path;
use std::time::Instant;

use anyhow::{Context as _, ensure};
use safetensors::SafeTensors;
use safetensors::tensor::{Dtype, TensorView};
use serde::Serialize;

use super::decode_lane::DecodeLane;
use crate::diffusion::{
    Batching, ComputeDevice, ComputeDtype, Denoised, Finisher, GenerationParameters, ImageRequest,
    PipelineError, StableDiffusionPipeline, StageSeconds, StepControl,
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
    /// What finishes a call while the next is denoised; `None` if one comes after the other.
    pub lane: Option<&'p DecodeLane>,
    /// Calls that are measured as one, at least one.
    pub in_a_row: usize,
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

    /// Makes the pictures, several times if calls are measured in a row: then times are one call's mean.
    pub fn call(&self) -> anyhow::Result<Call> {
        let (start, cpu_start) = (Instant::now(), cpu_seconds());
        let mut calls = Vec::with_capacity(self.in_a_row);
        self.row(&vec![self.requests.clone(); self.in_a_row], |call| calls.push(call))?;
        let (seconds, cpu_seconds) = (start.elapsed().as_secs_f64(), cpu_seconds() - cpu_start);
        let count = calls.len() as f64;
        let mean = |value: fn(&Call) -> f64| calls.iter().map(value).sum::<f64>() / count;
        let times = Call {
            seconds: seconds / count,
            cpu_seconds: cpu_seconds / count,
            first_step_seconds: calls[0].first_step_seconds,
            denoised_seconds: mean(|call| call.denoised_seconds),
            denoised_cpu_seconds: mean(|call| call.denoised_cpu_seconds),
            stages: StageSeconds {
                text_encoder: mean(|call| call.stages.text_encoder),
                denoise: mean(|call| call.stages.denoise),
                vae_decode: mean(|call| call.stages.vae_decode),
                to_host: mean(|call| call.stages.to_host),
                safety_checker: mean(|call| call.stages.safety_checker),
            },
            num_steps: calls[0].num_steps,
            replayed_steps: calls[calls.len() - 1].replayed_steps,
            outputs: Outputs::default(),
        };
        Ok(Call { outputs: calls.swap_remove(0).outputs, ..times })
    }

    /// Makes the pictures of several microbatches, each finished while the next is denoised if there is a lane for it. `each` is
    /// given the calls in order.
    pub fn row(&self, microbatches: &[Vec<ImageRequest>], mut each: impl FnMut(Call)) -> anyhow::Result<()> {
        let Some(lane) = self.lane else {
            for requests in microbatches {
                each(self.begin(requests)?.finish(&self.pipeline.finisher())?);
            }
            return Ok(());
        };
        let mut there = 0;
        for requests in microbatches {
            let begun = self.begin(requests);
            if let Ok(begun) = begun {
                lane.hand_over(self.pipeline.finisher(), begun)?;
                there += 1;
            } else {
                // What is under way ends first: the lane may be used again.
                (0..there).try_for_each(|_| lane.receive().map(drop))?;
                return begun.map(drop);
            }
            while let Some(call) = lane.try_receive() {
                there -= 1;
                each(call?);
            }
        }
        (0..there).try_for_each(|_| lane.receive().map(&mut each))
    }

    /// The first half of a call.
    fn begin(&self, requests: &[ImageRequest]) -> anyhow::Result<Begun> {
        let (start, cpu_start) = (Instant::now(), cpu_seconds());
        let elapsed = || (start.elapsed().as_secs_f64(), cpu_seconds() - cpu_start);
        let (mut first_step_seconds, mut denoised_at) = (None, (0.0, 0.0));
        let mut num_steps = 0;
        let mut latents = Ok(Vec::new());
        self.pipeline.set_batching(self.batching);
        let denoised = self.pipeline.denoise(requests, &self.parameters, &mut |progress| {
            first_step_seconds.get_or_insert_with(|| elapsed().0);
            num_steps = progress.num_steps;
            if progress.step_index + 1 == progress.num_steps {
                latents = progress.latents_f32();
                denoised_at = elapsed();
                if self.denoise_only {
                    return StepControl::Stop;
                }
            }
            StepControl::Continue
        });
        let denoised = match denoised {
            Ok(denoised) => Some(denoised),
            Err(PipelineError::Stopped { .. }) => None,
            Err(error) => return Err(error.into()),
        };
        Ok(Begun {
            start,
            cpu_start,
            first_step_seconds: first_step_seconds.unwrap_or(denoised_at.0),
            denoised_seconds: denoised_at.0,
            denoised_cpu_seconds: denoised_at.1,
            num_steps,
            outputs: self.outputs(&latents?, requests.len()),
            denoised,
        })
    }

    fn outputs(&self, latents: &[Vec<f32>], batch_size: usize) -> Outputs {
        let scale = self.pipeline.vae_scale_factor() as usize;
        let (height, width) = (self.parameters.height as usize, self.parameters.width as usize);
        let (rows, columns) = (height / scale, width / scale);
        let latents = latents.concat();
        Outputs {
            latents_shape: vec![batch_size, latents.len() / (batch_size * rows * columns), rows, columns],
            pixels_shape: vec![0, height, width, 3],
            latents,
            pixels: Vec::new(),
        }
    }
}

/// A call whose first half is done.
pub(super) struct Begun {
    start: Instant,
    cpu_start: f64,
    first_step_seconds: f64,
    denoised_seconds: f64,
    denoised_cpu_seconds: f64,
    num_steps: usize,
    /// Without pixels.
    outputs: Outputs,
    /// `None` if the call ends here.
    denoised: Option<Denoised>,
}

impl Begun {
    /// The second half.
    pub(super) fn finish(self, finisher: &Finisher) -> anyhow::Result<Call> {
        let mut outputs = self.outputs;
        let denoise = StageSeconds { denoise: self.denoised_seconds, ..StageSeconds::default() };
        let (mut stages, mut replayed_steps) = (denoise, None);
        if let Some(denoised) = self.denoised {
            let generation = finisher.finish(&denoised, &[])?;
            (stages, replayed_steps) = (generation.seconds, Some(generation.replayed_steps));
            let pixels = generation.images.into_iter().map(|image| image.map(|image| image.pixels));
            let pixels = pixels.collect::<Result<Vec<_>, _>>().context("a picture could not be made")?;
            outputs.pixels_shape[0] = pixels.len();
            outputs.pixels = pixels.concat();
        }
        Ok(Call {
            seconds: self.start.elapsed().as_secs_f64(),
            cpu_seconds: cpu_seconds() - self.cpu_start,
            first_step_seconds: self.first_step_seconds,
            denoised_seconds: self.denoised_seconds,
            denoised_cpu_seconds: self.denoised_cpu_seconds,
            stages,
            num_steps: self.num_steps,
            replayed_steps,
            outputs,
        })
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
