//! The denoising loop.
//!
//! Pictures take their steps in lockstep, so that after each step the caller can be asked about all of them.

use std::collections::HashMap;

use tch::{TchError, Tensor};

use super::super::device::{pictures_at_once, prepare_thread};
use super::super::models::unet_2d_condition::{UNet2DConditionModel, UNetText, UNetTime};
use super::super::rng::Generator;
use super::super::schedulers::Scheduler;
use super::batched::Batch;
use super::generation::{
    GenerationParameters, ImageError, ImageRequest, PipelineError, Stage, StepControl, StepProgress,
};
use super::recipe::Recipe;
use super::static_buffers::copy_of;
use super::{Encoded, StableDiffusionPipeline, is_finite};

/// One picture on its way from noise to latents.
pub(super) struct Picture {
    /// Its request's index.
    index: usize,
    /// Its row, if all are computed together.
    pub slot: usize,
    /// `(1, latent_channels, height, width)` in the compute dtype.
    pub latents: Tensor,
    pub generator: Generator,
    scheduler: Box<dyn Scheduler + Send>,
    /// What the UNet attends to: one row, or two with guidance, the negative prompt's first.
    pub text: UNetText,
    /// Its last row, for steps without guidance of a picture that has some.
    text_alone: Option<UNetText>,
    /// What the UNet's inner layers made at the last step that ran them all, if a later one will use it.
    deep: Option<Tensor>,
    /// `None` without guidance.
    pub guidance_scale: Option<f64>,
}

/// The pictures of a call that are being denoised, and what became of the others.
pub(super) struct Denoising<'p> {
    pipeline: &'p StableDiffusionPipeline,
    pictures: Vec<Picture>,
    /// What the UNet makes of each step, in the order of the steps.
    times: Vec<UNetTime>,
    /// All pictures together; `None` if each is computed alone.
    batch: Option<Batch>,
    recipe: Recipe,
    finished: Vec<Result<Tensor, ImageError>>,
}

/// What became of all pictures.
pub(super) struct AllDenoised {
    /// The latents of each request's picture, or why there are none.
    pub latents: Vec<Result<Tensor, ImageError>>,
    /// Pictures that the UNet was given at once, made-up ones included.
    pub batch_size: usize,
    /// Steps that were replayed from a CUDA graph.
    pub replayed_steps: usize,
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
        let batch = match pipeline.batching.get().batch_size(pictures.len()) {
            Some(batch_size) if !pictures.is_empty() => {
                Some(Batch::start(pipeline, &mut pictures, batch_size, parameters, &times)?)
            }
            _ => None,
        };
        Ok(Self {
            pipeline,
            times,
            batch,
            recipe: parameters.recipe,
            // What a picture dropped before its first step would be; each is overwritten below.
            finished: requests.iter().map(|_| Err(ImageError::Dropped { step_index: 0 })).collect(),
            pictures,
        })
    }

    /// Takes all steps.
    pub(super) fn run(
        mut self,
        on_step: &mut dyn FnMut(&StepProgress<'_>) -> StepControl,
    ) -> Result<AllDenoised, PipelineError> {
        let stopped_at = self.take_steps(on_step)?;
        let is_batched = self.batch.is_some();
        // After an error it is dropped: who knows in what state it is.
        let (batch_size, replayed_steps) = self.batch.map_or((1, 0), |batch| batch.end(self.pipeline));
        if let Some(step_index) = stopped_at {
            return Err(PipelineError::Stopped { step_index });
        }
        for picture in self.pictures {
            self.finished[picture.index] = if is_finite(&picture.latents)? {
                // Those of a batch lie in its buffers, which the next call writes to while these may not be decoded yet.
                Ok(if is_batched { copy_of(&picture.latents)? } else { picture.latents })
            } else {
                Err(ImageError::NonFinite { stage: Stage::Denoise })
            };
        }
        Ok(AllDenoised { latents: self.finished, batch_size, replayed_steps })
    }

    /// Takes all steps, or those until `on_step` says to stop: then it is that step's index.
    fn take_steps(
        &mut self,
        on_step: &mut dyn FnMut(&StepProgress<'_>) -> StepControl,
    ) -> Result<Option<usize>, PipelineError> {
        let num_steps = self.times.len();
        for step_index in 0..num_steps {
            let step = Step::of(&self.recipe, step_index, num_steps);
            match &mut self.batch {
                Some(batch) => batch.step(self.pipeline, &mut self.pictures, step)?,
                None => {
                    let time = &self.times[step_index];
                    step_side_by_side(&self.pipeline.unet, &mut self.pictures, step, time)?;
                }
            }
            let active: Vec<usize> = self.pictures.iter().map(|picture| picture.index).collect();
            let latents: Vec<&Tensor> = self.pictures.iter().map(|picture| &picture.latents).collect();
            match on_step(&StepProgress { step_index, num_steps, active: &active, latents: &latents }) {
                StepControl::Continue => {}
                StepControl::Stop => return Ok(Some(step_index)),
                StepControl::Drop(dropped) => self.drop_pictures(&dropped, step_index),
            }
            if self.pictures.is_empty() {
                break;
            }
        }
        Ok(None)
    }

    /// Gives up some pictures. Alone, nothing more is computed for them; in a batch their rows stay, as its shape does.
    fn drop_pictures(&mut self, dropped: &[usize], step_index: usize) {
        for picture in self.pictures.extract_if(.., |picture| dropped.contains(&picture.index)) {
            self.finished[picture.index] = Err(ImageError::Dropped { step_index });
        }
    }
}

/// What a step is, by its place in the schedule and the recipe.
#[derive(Debug, Clone, Copy)]
pub(super) struct Step {
    pub index: usize,
    /// Whether pictures that have guidance have it here.
    pub is_guided: bool,
    /// Whether only the UNet's outermost layer is run.
    pub is_cached: bool,
    /// Whether what the inner layers make is needed later.
    pub is_kept: bool,
}

impl Step {
    fn of(recipe: &Recipe, index: usize, num_steps: usize) -> Self {
        let is_cached = recipe.is_cached(index, num_steps);
        Self {
            index,
            is_guided: recipe.is_guided(index, num_steps),
            is_cached,
            is_kept: !is_cached && recipe.cache_interval > 1,
        }
    }

    /// The UNet's prediction; `deep` is what its inner layers make, read or written as the step is.
    pub(super) fn predict(
        self,
        unet: &UNet2DConditionModel,
        sample: &Tensor,
        time: &UNetTime,
        text: &UNetText,
        deep: &mut Option<Tensor>,
    ) -> Result<Tensor, TchError> {
        match deep {
            Some(deep) if self.is_cached => unet.forward_cached(sample, deep, time, text),
            deep if self.is_kept => {
                let (noise_pred, made) = unet.forward_and_keep(sample, time, text)?;
                *deep = Some(made);
                Ok(noise_pred)
            }
            _ => unet.forward(sample, time, text),
        }
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
        let is_always_guided = parameters.recipe.guidance_interval == Recipe::default().guidance_interval;
        let text_alone = match guidance_scale {
            Some(_) if !is_always_guided => Some(text.narrow(1, 1)?),
            _ => None,
        };
        let deep = None;
        Ok(Self { index, slot: index, latents, generator, scheduler, text, text_alone, deep, guidance_scale })
    }

    /// The weight of guidance, if the step has it.
    fn guidance_scale(&self, step: Step) -> Option<f64> {
        self.guidance_scale.filter(|_| step.is_guided)
    }

    /// What the UNet attends to; with guidance, two texts for one sample.
    fn text(&self, step: Step) -> &UNetText {
        self.text_alone.as_ref().filter(|_| !step.is_guided).unwrap_or(&self.text)
    }

    /// Applies the UNet's prediction, a row for each text.
    fn step(&mut self, noise_pred: &Tensor, step: Step) -> Result<(), PipelineError> {
        let guided = match self.guidance_scale(step) {
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
        self.latents = self.scheduler.step(&guided, step.index, &self.latents, generators)?;
        Ok(())
    }
}

/// One denoising step in which the UNet sees each picture by itself, on as many threads as there are cores for.
fn step_side_by_side(
    unet: &UNet2DConditionModel,
    pictures: &mut [Picture],
    step: Step,
    time: &UNetTime,
) -> Result<(), PipelineError> {
    let shared = ReadByMany((unet, time));
    for_each_side_by_side(pictures, pictures_at_once(), &|picture: &mut Picture| {
        let (unet, time) = shared.get();
        let input = picture.scheduler.scale_model_input(&picture.latents, step.index)?;
        let mut deep = picture.deep.take();
        let noise_pred = step.predict(unet, &input, time, picture.text(step), &mut deep)?;
        picture.deep = deep;
        picture.step(&noise_pred, step)
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
