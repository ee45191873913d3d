//! The second half of a call: latents to pixels, pixels to verdict.
//!
//! It shares nothing with the first half but weights, which nobody writes to, and what [`Denoised`] hands over. So another
//! thread can do it while the pipeline denoises the next microbatch; on a GPU on a stream of its own
//! ([`super::super::cuda::use_own_stream`]), else the two would still queue up.

use std::sync::atomic::{AtomicUsize, Ordering};

use tch::{Device, Kind, TchError, Tensor};

use super::super::clip_image_processor::{CLIPImageProcessor, RgbPixels};
use super::super::cuda::{Mark, keep_for_current_stream, refused};
use super::super::device::{ComputeDevice, prepare_thread};
use super::super::models::autoencoder_kl::AutoencoderKL;
use super::super::safety_checker::{SafetyCheckError, SafetyVerdict, StableDiffusionSafetyChecker};
use super::generation::{
    GeneratedImage, Generation, GenerationParameters, ImageError, NoiseKind, PipelineError, Stage,
    StageSeconds,
};
use super::{Batching, LoadOptions, timed};

/// What the first half of a call leaves to the second. Its tensors are its own: nobody writes to them any more.
#[derive(Debug)]
pub struct Denoised {
    pub(super) pictures: Vec<DenoisedPicture>,
    pub(super) parameters: GenerationParameters,
    pub(super) noise: NoiseKind,
    /// How the call was computed, and is to be decoded.
    pub(super) batching: Batching,
    /// Where the time went so far.
    pub seconds: StageSeconds,
    /// Pictures that the UNet was given at once, made-up ones included.
    pub batch_size: usize,
    /// Denoising steps that were replayed from a CUDA graph.
    pub replayed_steps: usize,
    /// On a GPU, where in its stream's work the latents are done.
    pub(super) done: Option<Mark>,
}

/// One picture of it.
#[derive(Debug)]
pub(super) struct DenoisedPicture {
    /// `(1, latent_channels, height, width)` in the compute dtype, or why there are none.
    pub latents: Result<Tensor, ImageError>,
    pub seed: u64,
    pub truncated_prompt: Option<String>,
    pub truncated_negative_prompt: Option<String>,
}

/// The models of the second half. Several threads may use it at once.
#[derive(Debug)]
pub struct Finisher {
    vae: AutoencoderKL,
    pub(super) safety: Option<(CLIPImageProcessor, StableDiffusionSafetyChecker)>,
    options: LoadOptions,
    /// The most pictures that are decoded at once, where more were too much for the memory. Written and read by whoever
    /// finishes.
    decode_limit: AtomicUsize,
}

// SAFETY: finishing only reads the weights, and libtorch's tensors may be read by many threads at once (their reference counts
// are atomic). tch leaves `Tensor` without `Sync` because its in-place operations could write through a shared one;
// `forward` of the VAE and of the safety checker has none on weights. The layers' kernels are `Sync` themselves.
unsafe impl Sync for Finisher {}

impl Finisher {
    pub(super) fn new(
        vae: AutoencoderKL,
        safety: Option<(CLIPImageProcessor, StableDiffusionSafetyChecker)>,
        options: LoadOptions,
    ) -> Self {
        Self { vae, safety, options, decode_limit: AtomicUsize::new(usize::MAX) }
    }

    /// Decodes and checks, on the calling thread and, on a GPU, on its current stream. Pictures with a true in `lost`, in the
    /// order of the requests, are left out; an empty `lost` leaves out none.
    ///
    /// Fails as a whole if libtorch refuses an operation; what concerns one picture is that picture's error. May be called
    /// again for the same latents.
    pub fn finish(&self, denoised: &Denoised, lost: &[bool]) -> Result<Generation, PipelineError> {
        let _no_grad = tch::no_grad_guard();
        if self.options.device == ComputeDevice::Cpu {
            prepare_thread();
        }
        let Denoised { pictures, parameters, noise, batching, done, .. } = denoised;
        if let Some(done) = done {
            done.wait().map_err(refused)?;
        }
        let last_step = (parameters.num_inference_steps).saturating_sub(1);
        let mut seconds = denoised.seconds;
        let mut images: Vec<Option<Result<GeneratedImage, ImageError>>> =
            pictures.iter().map(|_| None).collect();
        let mut to_decode = Vec::new();
        for (index, picture) in pictures.iter().enumerate() {
            match &picture.latents {
                Ok(_) if lost.get(index) == Some(&true) => {
                    images[index] = Some(Err(ImageError::Dropped { step_index: last_step }));
                }
                Ok(latents) => to_decode.push((index, latents)),
                Err(error) => images[index] = Some(Err(*error)),
            }
        }
        if done.is_some() {
            to_decode
                .iter()
                .try_for_each(|(_, latents)| keep_for_current_stream(latents))
                .map_err(refused)?;
        }
        let decode_size = batching.decode_size.min(self.decode_limit.load(Ordering::Relaxed)).max(1);
        for group in to_decode.chunks(decode_size) {
            let latents: Vec<&Tensor> = group.iter().map(|(_, latents)| *latents).collect();
            let batch_size = Batching { decode_size, ..*batching }.decode_batch_size(latents.len());
            let pixels = self.decode(&latents, batch_size, &mut seconds)?;
            for (&(index, _), pixels) in group.iter().zip(pixels) {
                images[index] = Some(match pixels {
                    Some(pixels) => self.check(&pictures[index], parameters, *noise, pixels, &mut seconds)?,
                    None => Err(ImageError::NonFinite { stage: Stage::VaeDecode }),
                });
            }
        }
        let images = images.into_iter().flatten().collect();
        let Denoised { batch_size, replayed_steps, .. } = *denoised;
        Ok(Generation { images, seconds, batch_size, decode_size, replayed_steps })
    }

    /// After [`Self::finish`] ran out of memory: lets fewer of these be decoded at once from now on. `None` if it was one
    /// already.
    pub fn decode_fewer(&self, denoised: &Denoised) -> Option<usize> {
        let limit = self.decode_limit.load(Ordering::Relaxed).min(denoised.batching.decode_size);
        let fewer = (limit > 1).then_some(limit / 2)?;
        self.decode_limit.store(fewer, Ordering::Relaxed);
        Some(fewer)
    }

    /// Each picture's latents to RGB bytes, `batch_size` at once, which is not less; `None` where the numbers are not
    /// finite.
    fn decode(
        &self,
        latents: &[&Tensor],
        batch_size: usize,
        seconds: &mut StageSeconds,
    ) -> Result<Vec<Option<Vec<u8>>>, PipelineError> {
        let (image, are_finite) = timed(&mut seconds.vae_decode, || -> Result<_, TchError> {
            let rows: Vec<&Tensor> =
                (0..batch_size).map(|i| *latents.get(i).unwrap_or(&latents[0])).collect();
            let image = self.vae.decode(&Tensor::f_cat(&rows, 0)?)?;
            let are_finite = image.f_isfinite()?.f_flatten(1, -1)?.f_all_dim(1, false)?;
            Ok((image, Vec::<bool>::try_from(are_finite.f_to_device(Device::Cpu)?)?))
        })?;
        let bytes = timed(&mut seconds.to_host, || to_pixels(&image))?;
        let per_picture = bytes.len() / batch_size;
        let pictures = bytes.chunks_exact(per_picture).zip(are_finite).take(latents.len());
        Ok(pictures.map(|(bytes, is_finite)| is_finite.then(|| bytes.to_vec())).collect())
    }

    /// RGB bytes to a checked picture.
    fn check(
        &self,
        picture: &DenoisedPicture,
        parameters: &GenerationParameters,
        noise: NoiseKind,
        mut pixels: Vec<u8>,
        seconds: &mut StageSeconds,
    ) -> Result<Result<GeneratedImage, ImageError>, PipelineError> {
        let safety = match timed(&mut seconds.safety_checker, || self.run_safety_checker(&pixels, parameters))
        {
            Ok(verdict) => verdict,
            Err(SafetyCheckError::NonFinite) => {
                return Ok(Err(ImageError::NonFinite { stage: Stage::SafetyChecker }));
            }
            Err(SafetyCheckError::Tensor(error)) => return Err(error.into()),
        };
        if safety.as_ref().is_some_and(|verdict| verdict.has_nsfw_concept) {
            pixels.fill(0);
        }
        Ok(Ok(GeneratedImage {
            pixels,
            width: parameters.width,
            height: parameters.height,
            seed: picture.seed,
            noise,
            safety,
            truncated_prompt: picture.truncated_prompt.clone(),
            truncated_negative_prompt: picture.truncated_negative_prompt.clone(),
        }))
    }

    /// The verdict on 8-bit pixels, which are what the world will see; `None` without a checker.
    fn run_safety_checker(
        &self,
        pixels: &[u8],
        parameters: &GenerationParameters,
    ) -> Result<Option<SafetyVerdict>, SafetyCheckError> {
        let Some((feature_extractor, safety_checker)) = &self.safety else { return Ok(None) };
        let (width, height) = (parameters.width as usize, parameters.height as usize);
        let clip_input = feature_extractor
            .preprocess(RgbPixels { bytes: pixels, width, height })?
            .f_to_device(self.options.device.to_tch())?
            .f_to_kind(self.options.dtype.to_tch())?;
        let mut verdicts = safety_checker.forward(&clip_input)?;
        verdicts.pop().map_or_else(
            || Err(TchError::Shape("the safety checker gave no verdict".to_owned()).into()),
            |verdict| verdict.map(Some),
        )
    }
}

/// The VAE's output `(batch_size, 3, height, width)` in -1..1 to RGB bytes, picture by picture, row by row, rounded as diffusers rounds
/// (`VaeImageProcessor.postprocess`); others truncate. The bytes are made where the image is: a GPU hands over a quarter
/// of what the image in f32 would be.
fn to_pixels(image: &Tensor) -> Result<Vec<u8>, TchError> {
    let bytes = image
        .f_mul_scalar(0.5)?
        .f_add_scalar(0.5)?
        .f_clamp(0.0, 1.0)?
        .f_permute([0, 2, 3, 1])?
        .f_to_kind(Kind::Float)?
        .f_mul_scalar(255.0)?
        .f_round()?
        .f_to_kind(Kind::Uint8)?
        .f_contiguous()?
        .f_to_device(Device::Cpu)?;
    Vec::try_from(bytes.f_flatten(0, -1)?)
}
