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
use super::recipe::Recipe;
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
    /// Its last row, for steps without guidance of a picture that has some.
    text_alone: Option<UNetText>,
    /// What the UNet's inner layers made at the last step that ran them all, if a later one will use it.
    deep: Option<Tensor>,
    /// `None` without guidance.
    guidance_scale: Option<f64>,
}

/// The pictures of a call that are being denoised, and what became of the others.
pub(super) struct Denoising<'p> {
    pipeline: &'p StableDiffusionPipeline,
    pictures: Vec<Picture>,
    /// What the UNet makes of each step, in the order of the steps.
    times: Vec<UNetTime>,
    /// On a GPU, the texts of all `pictures` in one, and whether they are those of steps with guidance.
    text_together: Option<(bool, UNetText)>,
    recipe: Recipe,
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
            recipe: parameters.recipe,
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
            let step = Step::of(&self.recipe, step_index, num_steps);
            match self.pipeline.options.device {
                ComputeDevice::Cuda(_) => self.step_together(step, time)?,
                ComputeDevice::Cpu => {
                    step_side_by_side(&self.pipeline.unet, &mut self.pictures, step, time)?;
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
    fn step_together(&mut self, step: Step, time: &UNetTime) -> Result<(), PipelineError> {
        let inputs = self.pictures.iter().map(|picture| picture.model_input(step));
        let inputs = inputs.collect::<Result<Vec<_>, _>>()?;
        // All have guidance or none has, so all inputs have as many rows.
        let Some(rows) = inputs.first().and_then(|input| input.size().first().copied()) else {
            return Ok(());
        };
        let text = match self.text_together.take() {
            Some((is_guided, text)) if is_guided == step.is_guided => text,
            _ => UNetText::cat(&self.pictures.iter().map(|picture| picture.text(step)).collect::<Vec<_>>())?,
        };
        let deep: Vec<&Tensor> = self.pictures.iter().filter_map(|picture| picture.deep.as_ref()).collect();
        let mut deep = if step.is_cached { Some(Tensor::f_cat(&deep, 0)?) } else { None };
        let noise_pred =
            step.predict(&self.pipeline.unet, &Tensor::f_cat(&inputs, 0)?, time, &text, &mut deep)?;
        if let (false, Some(deep)) = (step.is_cached, deep) {
            for (picture, deep) in self.pictures.iter_mut().zip(deep.f_split(rows, 0)?) {
                picture.deep = Some(deep);
            }
        }
        for (picture, noise_pred) in self.pictures.iter_mut().zip(noise_pred.f_split(rows, 0)?) {
            picture.step(&noise_pred, step)?;
        }
        self.text_together = Some((step.is_guided, text));
        Ok(())
    }
}

/// What a step is, by its place in the schedule and the recipe.
#[derive(Debug, Clone, Copy)]
struct Step {
    index: usize,
    /// Whether pictures that have guidance have it here.
    is_guided: bool,
    /// Whether only the UNet's outermost layer is run.
    is_cached: bool,
    /// Whether what the inner layers make is needed later.
    is_kept: bool,
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
    fn predict(
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
        Ok(Self { index, latents, generator, scheduler, text, text_alone, deep: None, guidance_scale })
    }

    /// The weight of guidance, if the step has it.
    fn guidance_scale(&self, step: Step) -> Option<f64> {
        self.guidance_scale.filter(|_| step.is_guided)
    }

    /// What the UNet attends to, as many rows as [`Self::model_input`] has.
    fn text(&self, step: Step) -> &UNetText {
        self.text_alone.as_ref().filter(|_| !step.is_guided).unwrap_or(&self.text)
    }

    /// What the UNet is shown, as many times as it has embeddings to predict with.
    fn model_input(&self, step: Step) -> Result<Tensor, PipelineError> {
        let scaled = self.scheduler.scale_model_input(&self.latents, step.index)?;
        match self.guidance_scale(step) {
            Some(_) => Ok(Tensor::f_cat(&[&scaled, &scaled], 0)?),
            None => Ok(scaled),
        }
    }

    /// Applies the UNet's prediction, of the shape of [`Self::model_input`].
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
        let (input, mut deep) = (picture.model_input(step)?, picture.deep.take());
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
