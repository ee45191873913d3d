//! Text to image: prompt to embedding, noise to latents, latents to pixels, pixels to verdict (diffusers'
//! `pipelines/stable_diffusion/pipeline_stable_diffusion.py`).
//!
//! A picture depends on its request, the parameters, the weights and the kind of device, and on nothing else. So each
//! picture has its own generator and its own latents; prompts are encoded and pictures checked one by one. Only the UNet and
//! the VAE see several pictures at once, and only on a GPU: kernels choose their order of summation by the batch's shape,
//! on the CPU also by the number of threads, and a picture's last bits would depend on its neighbours and on the
//! machine. So on the CPU pictures are denoised side by side, one thread each, and a GPU can be given batches of one shape
//! always ([`BatchSize::Padded`]).

mod batched;
mod batching;
mod denoising;
mod finishing;
mod generation;
mod loading;
mod recipe;
mod static_buffers;

use std::cell::{Cell, RefCell};
use std::collections::HashMap;
use std::sync::Arc;
use std::time::Instant;

use tch::{TchError, Tensor};

pub use self::batching::{BatchSize, Batching};
use self::denoising::Denoising;
use self::finishing::DenoisedPicture;
pub use self::finishing::{Denoised, Finisher};
pub use self::generation::{
    GeneratedImage, Generation, GenerationParameters, ImageError, ImageRequest, InputFault, NoiseKind,
    PipelineError, Stage, StageSeconds, StepControl, StepProgress, size_faults,
};
pub use self::loading::LoadOptions;
pub use self::recipe::Recipe;
use self::static_buffers::StaticBuffers;
use super::clip_tokenizer::CLIPTokenizer;
use super::cuda::{Mark, refused};
use super::device::{ComputeDevice, prepare_thread};
use super::kernels::Kernels;
use super::models::clip_text_model::CLIPTextModel;
use super::models::unet_2d_condition::UNet2DConditionModel;
use super::schedulers::{SchedulerConfig, SchedulerKind};

/// `StableDiffusionPipeline`.
#[derive(Debug)]
pub struct StableDiffusionPipeline {
    tokenizer: CLIPTokenizer,
    text_encoder: CLIPTextModel,
    unet: UNet2DConditionModel,
    /// The models of the second half.
    finisher: Arc<Finisher>,
    /// The negative prompt that was encoded last: most pictures of a process share one, the empty one. Written and read
    /// by [`StableDiffusionPipeline::encode_prompts`] alone.
    last_negative: RefCell<Option<(String, Encoded)>>,
    batching: Cell<Batching>,
    /// What the last batched call computed on, for the next.
    buffers: RefCell<Option<StaticBuffers>>,
    scheduler_config: SchedulerConfig,
    /// Default height and width of the latents.
    sample_size: (i64, i64),
    latent_channels: i64,
    vae_scale_factor: i64,
    options: LoadOptions,
    kernels: Kernels,
}

/// A prompt's embedding `(1, model_max_length, hidden_size)` and what of the prompt did not fit.
type Encoded = (Tensor, Option<String>);

impl StableDiffusionPipeline {
    /// Width and height in pixels that the checkpoint was made for: `unet.sample_size` × `vae_scale_factor`.
    pub fn default_size(&self) -> (u32, u32) {
        let (height, width) = self.sample_size;
        let pixels = |size: i64| u32::try_from(size * self.vae_scale_factor).unwrap_or(u32::MAX);
        (pixels(width), pixels(height))
    }

    /// The noise scheduler that the checkpoint names, if it is one of ours.
    pub fn default_scheduler(&self) -> Option<SchedulerKind> {
        self.scheduler_config.kind()
    }

    /// Pixels per latent cell in each direction; widths and heights are multiples of it.
    pub fn vae_scale_factor(&self) -> u32 {
        u32::try_from(self.vae_scale_factor).unwrap_or(u32::MAX)
    }

    /// Whether pictures get a verdict. Without a safety checker none does.
    pub fn has_safety_checker(&self) -> bool {
        self.finisher.safety.is_some()
    }

    /// Where and in which precision the models compute.
    pub fn options(&self) -> &LoadOptions {
        &self.options
    }

    /// What the models compute with: `plain`, or `fused` or `attention` and what our own kernels were compiled for; and which
    /// engines are pinned for convolutions, if any.
    pub fn kernels(&self) -> String {
        self.kernels.to_string()
    }

    /// How the pictures of a call are computed; without a graph if one could not be made.
    pub fn batching(&self) -> Batching {
        self.batching.get()
    }

    /// Says how the pictures of the next calls are computed.
    pub fn set_batching(&self, batching: Batching) {
        self.batching.set(batching);
    }

    /// Makes the pictures of one microbatch: [`Self::denoise`], then [`Finisher::finish`]. `on_step` is called after each
    /// denoising step and can stop the call or drop pictures from it.
    ///
    /// Fails as a whole if the inputs break a rule, `on_step` stops it or libtorch refuses an operation (a GPU out of
    /// memory, for example); what concerns one picture is that picture's error.
    pub fn generate(
        &self,
        requests: &[ImageRequest],
        parameters: &GenerationParameters,
        on_step: &mut dyn FnMut(&StepProgress<'_>) -> StepControl,
    ) -> Result<Generation, PipelineError> {
        self.finisher.finish(&self.denoise(requests, parameters, on_step)?, &[])
    }

    /// The first half of [`Self::generate`], from prompts to latents. What it gives is its own: the next call changes nothing
    /// in it.
    pub fn denoise(
        &self,
        requests: &[ImageRequest],
        parameters: &GenerationParameters,
        on_step: &mut dyn FnMut(&StepProgress<'_>) -> StepControl,
    ) -> Result<Denoised, PipelineError> {
        self.check_inputs(requests, parameters)?;
        let _no_grad = tch::no_grad_guard();
        if self.options.device == ComputeDevice::Cpu {
            prepare_thread();
        }
        let mut seconds = StageSeconds::default();
        let encoded = timed(&mut seconds.text_encoder, || self.encode_prompts(requests))?;
        let of_all = timed(&mut seconds.denoise, || {
            Denoising::start(self, requests, parameters, &encoded)?.run(on_step)
        })?;
        let truncated = |prompt: &str| encoded.get(prompt).and_then(|(_, rest)| rest.clone());
        let pictures = requests.iter().zip(of_all.latents).map(|(request, latents)| DenoisedPicture {
            latents,
            seed: request.seed,
            truncated_prompt: truncated(&request.prompt),
            truncated_negative_prompt: request
                .do_classifier_free_guidance()
                .then(|| truncated(&request.negative_prompt))
                .flatten(),
        });
        Ok(Denoised {
            pictures: pictures.collect(),
            parameters: *parameters,
            noise: self.noise(parameters),
            batching: self.batching.get(),
            seconds,
            batch_size: of_all.batch_size,
            replayed_steps: of_all.replayed_steps,
            done: match self.options.device {
                ComputeDevice::Cpu => None,
                ComputeDevice::Cuda(index) => Mark::record(index).map_err(refused)?,
            },
        })
    }

    /// What finishes this pipeline's calls, on any thread: also while the pipeline denoises the next.
    pub fn finisher(&self) -> Arc<Finisher> {
        self.finisher.clone()
    }

    /// The embedding of each different prompt and, with guidance, negative prompt of the requests.
    fn encode_prompts<'r>(
        &self,
        requests: &'r [ImageRequest],
    ) -> Result<HashMap<&'r str, Encoded>, PipelineError> {
        let mut encoded = HashMap::new();
        for request in requests.iter().filter(|request| request.do_classifier_free_guidance()) {
            let negative_prompt = request.negative_prompt.as_str();
            if !encoded.contains_key(negative_prompt) {
                encoded.insert(negative_prompt, self.encode_negative_prompt(negative_prompt)?);
            }
        }
        for request in requests {
            let prompt = request.prompt.as_str();
            if !encoded.contains_key(prompt) {
                encoded.insert(prompt, self.encode_prompt(prompt)?);
            }
        }
        Ok(encoded)
    }

    /// As [`Self::encode_prompt`], from memory where it is the one encoded last.
    fn encode_negative_prompt(&self, prompt: &str) -> Result<Encoded, PipelineError> {
        let same = |(tensor, truncated): &Encoded| (tensor.shallow_clone(), truncated.clone());
        let last = self.last_negative.borrow();
        if let Some((_, encoded)) = last.as_ref().filter(|(last, _)| last == prompt) {
            return Ok(same(encoded));
        }
        drop(last);
        let encoded = self.encode_prompt(prompt)?;
        self.last_negative.replace(Some((prompt.to_owned(), same(&encoded))));
        Ok(encoded)
    }

    fn encode_prompt(&self, prompt: &str) -> Result<Encoded, PipelineError> {
        let tokenized = self.tokenizer.tokenize(prompt)?;
        let input_ids = Tensor::f_from_slice(&tokenized.ids)?.f_unsqueeze(0)?;
        let input_ids = input_ids.f_to_device(self.options.device.to_tch())?;
        Ok((self.text_encoder.forward(&input_ids)?, tokenized.truncated))
    }

    /// The dtype that noise is drawn in: as asked for, or the compute dtype, as diffusers does.
    fn noise(&self, parameters: &GenerationParameters) -> NoiseKind {
        parameters.noise.unwrap_or_else(|| NoiseKind::of(self.options.dtype))
    }
}

/// Runs `work` and adds the time it took to `seconds`. The stages end by reading a result on this side, so a GPU has
/// finished its part.
fn timed<T>(seconds: &mut f64, work: impl FnOnce() -> T) -> T {
    let start = Instant::now();
    let result = work();
    *seconds += start.elapsed().as_secs_f64();
    result
}

/// Whether no value is NaN or infinite.
fn is_finite(tensor: &Tensor) -> Result<bool, TchError> {
    Ok(tensor.f_isfinite()?.f_all()?.f_int64_value(&[])? != 0)
}
