//! The denoising loop.
//!
//! Pictures take their steps in lockstep, so that after each step the caller can be asked about all of them.

use std::collections::HashMap;

use tch::{TchError, Tensor};

use super::super::device::{ComputeDevice, pictures_at_once, prepare_thread};
use super::super::models::unet_2d_condition::{UNet2DConditionModel, UNetText, UNetTime};
use super::super::rng::Generator;
use super::super::schedulers::Scheduler;
use super::generation::{
    GenerationParameters, ImageError, ImageRequest, PipelineError, Stage, StepControl, StepProgress,
};
use super::{Encoded, StableDiffusionPipeline, is_finite};

/// One picture on its way from noise to latents.
struct Picture {
    /// Its request's index.
    index: usize,
    /// `(1, latent_channels, height, width)` in the compute dtype.
    latents: Tensor,
    generator: Generator,
    scheduler: Box<dyn Scheduler + Send>,
    /// What the UNet attends to: one row, or two with guidance, the negative prompt's first.
    text: UNetText,
    /// `None` without guidance.
    guidance_scale: Option<f64>,
}

/// The pictures of a call that are being denoised, and what became of the others.
pub(super) struct Denoising<'p> {
    pipeline: &'p StableDiffusionPipeline,
    pictures: Vec<Picture>,
    /// What the UNet makes of each step, in the order of the steps.
    times: Vec<UNetTime>,
    /// On a GPU, the texts of all `pictures` in one.
    text_together: Option<UNetText>,
    finished: Vec<Result<Tensor, ImageError>>,
}

impl<'p> Denoising<'p> {
    /// Draws each picture's first noise.
    pub(super) fn start(
        pipeline: &'p StableDiffusionPipeline,
        requests: &[ImageRequest],
        parameters: &GenerationParameters,
        encoded: &HashMap<&str, Encoded>,
    ) -> Result<Self, PipelineError> {
        let mut pictures = Vec::with_capacity(requests.len());
        for (index, request) in requests.iter().enumerate() {
            pictures.push(Picture::start(pipeline, index, request, parameters, encoded)?);
        }
        let timesteps = pictures.first().map_or(&[][..], |picture| picture.scheduler.timesteps());
        let times = pipeline.unet.embed_timesteps(timesteps, pipeline.options.dtype.to_tch())?;
        Ok(Self {
            pipeline,
            times,
            text_together: None,
            // What a picture dropped before its first step would be; each is overwritten below.
            finished: requests.iter().map(|_| Err(ImageError::Dropped { step_index: 0 })).collect(),
            pictures,
        })
    }

    /// Takes all steps; the latents of each request's picture, or why there are none.
    pub(super) fn run(
        mut self,
        on_step: &mut dyn FnMut(&StepProgress<'_>) -> StepControl,
    ) -> Result<Vec<Result<Tensor, ImageError>>, PipelineError> {
        let num_steps = self.times.len();
        for (step_index, time) in std::mem::take(&mut self.times).iter().enumerate() {
            match self.pipeline.options.device {
                ComputeDevice::Cuda(_) => self.step_together(step_index, time)?,
                ComputeDevice::Cpu => {
                    step_side_by_side(&self.pipeline.unet, &mut self.pictures, step_index, time)?;
                }
            }
            let active: Vec<usize> = self.pictures.iter().map(|picture| picture.index).collect();
            let latents: Vec<&Tensor> = self.pictures.iter().map(|picture| &picture.latents).collect();
            match on_step(&StepProgress { step_index, num_steps, active: &active, latents: &latents }) {
                StepControl::Continue => {}
                StepControl::Stop => return Err(PipelineError::Stopped { step_index }),
                StepControl::Drop(dropped) => self.drop_pictures(&dropped, step_index),
            }
            if self.pictures.is_empty() {
                break;
            }
        }
        for picture in self.pictures {
            self.finished[picture.index] = if is_finite(&picture.latents)? {
                Ok(picture.latents)
            } else {
                Err(ImageError::NonFinite { stage: Stage::Denoise })
            };
        }
        Ok(self.finished)
    }

    /// Gives up some pictures; what they computed so far is freed at once.
    fn drop_pictures(&mut self, dropped: &[usize], step_index: usize) {
        for picture in self.pictures.extract_if(.., |picture| dropped.contains(&picture.index)) {
            self.finished[picture.index] = Err(ImageError::Dropped { step_index });
        }
        self.text_together = None;
    }

    /// One denoising step in which the UNet sees all pictures at once.
    fn step_together(&mut self, step_index: usize, time: &UNetTime) -> Result<(), PipelineError> {
        let inputs = self.pictures.iter().map(|picture| picture.model_input(step_index));
        let inputs = inputs.collect::<Result<Vec<_>, _>>()?;
        // All have guidance or none has, so all inputs have as many rows.
        let Some(rows) = inputs.first().and_then(|input| input.size().first().copied()) else {
            return Ok(());
        };
        let text = match self.text_together.take() {
            Some(text) => text,
            None => UNetText::cat(&self.pictures.iter().map(|picture| &picture.text).collect::<Vec<_>>())?,
        };
        let noise_pred = self.pipeline.unet.forward(&Tensor::f_cat(&inputs, 0)?, time, &text)?;
        for (picture, noise_pred) in self.pictures.iter_mut().zip(noise_pred.f_split(rows, 0)?) {
            picture.step(&noise_pred, step_index)?;
        }
        self.text_together = Some(text);
        Ok(())
    }
}

impl Picture {
    fn start(
        pipeline: &StableDiffusionPipeline,
        index: usize,
        request: &ImageRequest,
        parameters: &GenerationParameters,
        encoded: &HashMap<&str, Encoded>,
    ) -> Result<Self, PipelineError> {
        let scheduler =
            parameters.scheduler.build(&pipeline.scheduler_config, parameters.num_inference_steps)?;
        let (device, dtype) = (pipeline.options.device.to_tch(), pipeline.options.dtype.to_tch());
        let cells = |pixels: u32| i64::from(pixels) / pipeline.vae_scale_factor;
        let shape = [1, pipeline.latent_channels, cells(parameters.height), cells(parameters.width)];
        let mut generator = Generator::new(request.seed);
        let noise = generator.randn(&shape, pipeline.noise(parameters).to_tch())?;
        let latents =
            noise.f_to_device(device)?.f_to_kind(dtype)?.f_mul_scalar(scheduler.init_noise_sigma())?;

        let embeds_of = |prompt: &str| match encoded.get(prompt) {
            Some((embeds, _)) => Ok(embeds),
            None => Err(TchError::Shape("a prompt was not encoded".to_owned())),
        };
        let prompt_embeds = embeds_of(&request.prompt)?;
        let (prompt_embeds, guidance_scale) = if request.do_classifier_free_guidance() {
            let negative_prompt_embeds = embeds_of(&request.negative_prompt)?;
            (Tensor::f_cat(&[negative_prompt_embeds, prompt_embeds], 0)?, Some(request.guidance_scale))
        } else {
            (prompt_embeds.shallow_clone(), None)
        };
        let text = pipeline.unet.project_text(&prompt_embeds)?;
        Ok(Self { index, latents, generator, scheduler, text, guidance_scale })
    }

    /// What the UNet is shown, as many times as it has embeddings to predict with.
    fn model_input(&self, step_index: usize) -> Result<Tensor, PipelineError> {
        let scaled = self.scheduler.scale_model_input(&self.latents, step_index)?;
        match self.guidance_scale {
            Some(_) => Ok(Tensor::f_cat(&[&scaled, &scaled], 0)?),
            None => Ok(scaled),
        }
    }

    /// Applies the UNet's prediction, of the shape of [`Self::model_input`].
    fn step(&mut self, noise_pred: &Tensor, step_index: usize) -> Result<(), PipelineError> {
        let guided = match self.guidance_scale {
            Some(guidance_scale) => {
                let noise_pred_uncond = noise_pred.f_narrow(0, 0, 1)?;
                let noise_pred_text = noise_pred.f_narrow(0, 1, 1)?;
                noise_pred_text
                    .f_sub(&noise_pred_uncond)?
                    .f_mul_scalar_(guidance_scale)?
                    .f_add_(&noise_pred_uncond)?
            }
            None => noise_pred.shallow_clone(),
        };
        let generators = std::slice::from_mut(&mut self.generator);
        self.latents = self.scheduler.step(&guided, step_index, &self.latents, generators)?;
        Ok(())
    }
}

/// One denoising step in which the UNet sees each picture by itself, on as many threads as there are cores for.
fn step_side_by_side(
    unet: &UNet2DConditionModel,
    pictures: &mut [Picture],
    step_index: usize,
    time: &UNetTime,
) -> Result<(), PipelineError> {
    let shared = ReadByMany((unet, time));
    for_each_side_by_side(pictures, pictures_at_once(), &|picture: &mut Picture| {
        let (unet, time) = shared.get();
        let noise_pred = unet.forward(&picture.model_input(step_index)?, time, &picture.text)?;
        picture.step(&noise_pred, step_index)
    })
}

/// A UNet and a step's tensors, which several threads read.
struct ReadByMany<'m>((&'m UNet2DConditionModel, &'m UNetTime));

// SAFETY: `forward` only reads the weights and the step's tensors, none of its operations writes to them or changes what
// they point to, and libtorch's tensors may be read by many threads at once (their reference counts are atomic). tch
// leaves `Tensor` without `Sync` because its in-place operations could write through a shared one.
unsafe impl Sync for ReadByMany<'_> {}

impl<'m> ReadByMany<'m> {
    /// What is read; a method, so that closures capture the wrapper and not the references in it.
    fn get(&self) -> (&'m UNet2DConditionModel, &'m UNetTime) {
        self.0
    }
}

/// Does `work` on each item, on up to `threads` threads; the first error in the items' order is returned.
fn for_each_side_by_side<T: Send, E: Send>(
    items: &mut [T],
    threads: usize,
    work: &(dyn Fn(&mut T) -> Result<(), E> + Sync),
) -> Result<(), E> {
    let per_thread = items.len().div_ceil(threads).max(1);
    let work_on_all = |items: &mut [T]| items.iter_mut().try_for_each(work);
    let mut parts = items.chunks_mut(per_thread);
    let Some(own_part) = parts.next() else { return Ok(()) };
    std::thread::scope(|scope| {
        let others: Vec<_> = parts
            .map(|part| {
                scope.spawn(move || {
                    prepare_thread();
                    // Whether gradients are recorded is each thread's own setting.
                    let _no_grad = tch::no_grad_guard();
                    work_on_all(part)
                })
            })
            .collect();
        let own = work_on_all(own_part);
        let others = others
            .into_iter()
            .map(|other| other.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic)));
        std::iter::once(own).chain(others).collect::<Vec<_>>().into_iter().collect()
    })
}

#[cfg(test)]
mod tests {
    use super::for_each_side_by_side;

    #[test]
    fn every_item_is_worked_on_once_whatever_the_threads() {
        for threads in [1, 2, 3, 8] {
            for count in 0..9 {
                let mut items: Vec<i32> = (0..count).collect();
                let done: Result<(), ()> = for_each_side_by_side(&mut items, threads, &|item| {
                    *item += 100;
                    Ok(())
                });
                assert_eq!(done, Ok(()));
                assert_eq!(items, (100..100 + count).collect::<Vec<_>>(), "{threads} threads");
            }
        }
    }

    #[test]
    fn the_first_error_is_returned() {
        let mut items = [0, 1, 2, 3, 4, 5];
        let failed =
            for_each_side_by_side(&mut items, 3, &|item| if *item >= 3 { Err(*item) } else { Ok(()) });
        assert_eq!(failed, Err(3));
    }
}
