//! Denoising steps of all pictures of a call together, on buffers that stay where they are.
//!
//! What differs from step to step, the time embedding and the noise scheduler's numbers, is copied into buffers before it;
//! what differs from call to call, before the first. So each step is the same operations on the same addresses, and a CUDA
//! graph of one can be launched instead of its hundreds of kernels. Without a graph, and on the CPU, the very same code
//! runs as it is.

use std::mem;

use tch::{Kind, TchError, Tensor};
use tracing::warn;

use super::super::device::ComputeDevice;
use super::super::models::unet_2d_condition::{UNetText, UNetTime};
use super::super::rng::Generator;
use super::super::schedulers::{LinearSteps, Scheduler};
use super::StableDiffusionPipeline;
use super::denoising::{Picture, Step};
use super::generation::{GenerationParameters, PipelineError};
use super::static_buffers::{Contents, StaticBuffers};

/// The pictures of a call in one batch.
pub(super) struct Batch {
    buffers: StaticBuffers,
    /// Each step's time embedding, in the order of [`UNetTime::flatten`].
    times: Tensor,
    update: Update,
    /// Steps that were replayed from a graph.
    replayed_steps: usize,
}

/// How a step's sample is made from the UNet's prediction.
enum Update {
    /// By sums, as part of the step; the numbers of each step.
    Linear(Tensor),
    /// By the noise scheduler itself, after the step.
    Scheduler {
        scheduler: Box<dyn Scheduler + Send>,
        /// One for each row.
        generators: Vec<Generator>,
    },
}

impl Batch {
    /// Puts pictures, at least one, into a batch of `batch_size`, which is not less; copies of the first fill it up.
    pub(super) fn start(
        pipeline: &StableDiffusionPipeline,
        pictures: &mut [Picture],
        batch_size: usize,
        parameters: &GenerationParameters,
        times: &[UNetTime],
    ) -> Result<Self, PipelineError> {
        let scheduler =
            parameters.scheduler.build(&pipeline.scheduler_config, parameters.num_inference_steps)?;
        let linear = scheduler.linear_steps()?;
        let num_rows = linear.as_ref().map(|linear| linear.num_rows);
        let (device, float) = (pipeline.options.device.to_tch(), Kind::Float);
        let contents = contents(pictures, batch_size)?;
        let last = pipeline.buffers.take();
        let mut buffers = match last.filter(|buffers| buffers.fit(&contents, num_rows)) {
            Some(buffers) => buffers,
            None => StaticBuffers::new(&contents, num_rows, &times[0], &pipeline.kernels)?,
        };
        buffers.fill(contents)?;
        let flat = times.iter().map(UNetTime::flatten).collect::<Result<Vec<_>, _>>()?;
        let update = match linear {
            Some(linear) => Update::Linear(numbers(&linear)?.f_to_device(device)?.f_to_kind(float)?),
            None => {
                let of_picture =
                    |picture: &mut Picture| mem::replace(&mut picture.generator, Generator::new(0));
                let mut generators: Vec<Generator> = pictures.iter_mut().map(of_picture).collect();
                generators.resize_with(batch_size, || Generator::new(0));
                Update::Scheduler { scheduler, generators }
            }
        };
        if let Update::Scheduler { scheduler, .. } = &update {
            let (_, latents) = buffers.noise_pred_and_latents()?;
            buffers.set_model_input(&scheduler.scale_model_input(&latents, 0)?)?;
        }
        let times = Tensor::f_stack(&flat.iter().collect::<Vec<_>>(), 0)?;
        Ok(Self { buffers, times, update, replayed_steps: 0 })
    }

    /// Takes a step; gives each picture its latents.
    pub(super) fn step(
        &mut self,
        pipeline: &StableDiffusionPipeline,
        pictures: &mut [Picture],
        step: Step,
    ) -> Result<(), PipelineError> {
        let index = step.index as i64;
        self.buffers.set_time(&self.times.f_select(0, index)?)?;
        if let Update::Linear(numbers) = &self.update {
            self.buffers.set_numbers(&numbers.f_select(0, index)?)?;
        }
        let batching = pipeline.batching.get();
        let graph_device = match pipeline.options.device {
            ComputeDevice::Cuda(device) if batching.graph => Some(device),
            _ => None,
        };
        let stepped = self.buffers.step(&pipeline.unet, step, graph_device)?;
        self.replayed_steps += usize::from(stepped.is_replayed);
        if let Some(error) = stepped.graph_error {
            warn!(%error, "A denoising step could not be made a CUDA graph of; steps are launched kernel by kernel");
            pipeline.batching.set(super::Batching { graph: false, ..batching });
        }
        if let Update::Scheduler { scheduler, generators } = &mut self.update {
            // Copies, as a scheduler keeps what it is given and the buffers are written to again.
            let (noise_pred, latents) = self.buffers.noise_pred_and_latents()?;
            let next = scheduler.step(&noise_pred, step.index, &latents, generators)?;
            self.buffers.set_latents(&next)?;
            if step.index + 1 < scheduler.timesteps().len() {
                self.buffers.set_model_input(&scheduler.scale_model_input(&next, step.index + 1)?)?;
            }
        }
        for picture in pictures {
            picture.latents = self.buffers.latents_of(picture.slot)?;
        }
        Ok(())
    }

    /// Pictures in the batch, made-up ones included, and how many steps were replayed from a graph. The buffers are kept for
    /// the next call; they still hold the pictures' latents until then.
    pub(super) fn end(self, pipeline: &StableDiffusionPipeline) -> (usize, usize) {
        let batch_size = self.buffers.batch_size();
        pipeline.buffers.replace(Some(self.buffers));
        (batch_size, self.replayed_steps)
    }
}

/// What the pictures of a call bring, `batch_size` of everything.
fn contents(pictures: &[Picture], batch_size: usize) -> Result<Contents, TchError> {
    let in_slot = |slot: usize| pictures.get(slot).unwrap_or(&pictures[0]);
    let rows: Vec<&Picture> = (0..batch_size).map(in_slot).collect();
    let latents = Tensor::f_cat(&rows.iter().map(|row| &row.latents).collect::<Vec<_>>(), 0)?;
    let scales: Option<Vec<f64>> = rows.iter().map(|row| row.guidance_scale).collect();
    let part = |start: i64| rows.iter().map(|row| row.text.narrow(start, 1)).collect::<Result<Vec<_>, _>>();
    // With guidance the negative prompts of all come first, then the prompts of all.
    let texts = match scales {
        Some(_) => part(0)?.into_iter().chain(part(1)?).collect(),
        None => part(0)?,
    };
    let text = UNetText::cat(&texts.iter().collect::<Vec<_>>())?;
    let guidance_scale = match scales {
        Some(scales) => {
            let scales = Tensor::f_from_slice(&scales)?.f_to_kind(Kind::Float)?;
            Some(scales.f_view([-1, 1, 1, 1])?.f_to_device(latents.device())?)
        }
        None => None,
    };
    Ok(Contents { latents, text, guidance_scale })
}

/// For each step the scale of the input and the weights, as [`StaticBuffers::set_numbers`] wants them.
fn numbers(linear: &LinearSteps) -> Result<Tensor, TchError> {
    let numbers: Vec<f64> = linear
        .steps
        .iter()
        .flat_map(|step| std::iter::once(step.input_scale).chain(step.weights()))
        .collect();
    Tensor::f_from_slice(&numbers)?.f_view([linear.steps.len() as i64, -1])
}
