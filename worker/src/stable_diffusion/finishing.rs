//! The second half of a call: its pictures decoded and checked, fewer at once where memory is short, and those drawn once more
//! in f32 whose numbers were not finite.

use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use schema::EngineFingerprint;
use tracing::warn;

use super::{classify, times};
use crate::control::{Control, Verdict};
use crate::diffusion::{
    self, ComputeDtype, Denoised, Finisher, GenerationParameters, ImageError, ImageRequest, LoadOptions,
    NoiseKind, Recipe, StepControl,
};
use crate::pipeline::{Generated, GeneratedImage, PictureOutcome, PipelineError};

/// All that is needed for it, whatever the pipeline does meanwhile.
pub(super) struct Finishing {
    pub finisher: Arc<Finisher>,
    pub options: LoadOptions,
    /// The checkpoint's.
    pub folder: PathBuf,
    /// What computes, where bits depend on it.
    pub fingerprint: Option<EngineFingerprint>,
    /// Tells the pipeline that there was no memory to decode even one picture.
    pub is_short: Arc<AtomicBool>,
    pub requests: Vec<ImageRequest>,
    pub parameters: GenerationParameters,
    pub denoised: Denoised,
}

impl Finishing {
    /// Makes the pictures that are still wanted.
    pub(super) fn run(self, control: &mut Control) -> Result<Generated, PipelineError> {
        let lost = match control.verdict() {
            Verdict::Continue { lost } => lost.to_vec(),
            Verdict::Stop => vec![true; self.requests.len()],
        };
        let generation = self.finish_in_memory(&lost)?;
        let engine = || self.computed_at_once(generation.batch_size, generation.decode_size);
        let images = generation.images.into_iter();
        let mut pictures: Vec<_> = images
            .map(|image| outcome(image, self.options.dtype, self.parameters.recipe, engine()))
            .collect();
        self.retry_in_f32(&mut pictures, control);
        Ok(Generated { pictures, times: times(generation.seconds) })
    }

    /// Decodes fewer pictures at once where memory is short; the latents are there, so nothing is denoised again.
    fn finish_in_memory(&self, lost: &[bool]) -> Result<diffusion::Generation, PipelineError> {
        loop {
            let error = match self.finisher.finish(&self.denoised, lost) {
                Ok(generation) => return Ok(generation),
                Err(error) => classify(error, self.requests.len()),
            };
            let fewer = match &error {
                PipelineError::OutOfMemory { .. } => self.finisher.decode_fewer(&self.denoised),
                _ => None,
            };
            let Some(fewer) = fewer else {
                let is_short = matches!(error, PipelineError::OutOfMemory { .. });
                self.is_short.fetch_or(is_short, Ordering::SeqCst);
                return Err(error);
            };
            warn!(
                batch.size = fewer,
                "Out of memory; from now on at most {fewer} pictures are decoded at once"
            );
        }
    }

    /// What computed pictures that were denoised and decoded so many at once, if their bits depend on it.
    fn computed_at_once(&self, batch_size: usize, decode_size: usize) -> Option<Box<EngineFingerprint>> {
        let engine = self.fingerprint.clone()?;
        Some(Box::new(EngineFingerprint { batch_size, decode_size, ..engine }))
    }

    /// Draws once more, in f32, what gave numbers that are not finite in half precision: its range is the usual reason. The
    /// first noise stays that of the dtype asked for. The weights are read for it and dropped after it: it is rare, and
    /// memory is better spent on microbatches.
    fn retry_in_f32(&self, pictures: &mut [PictureOutcome], control: &mut Control) {
        let options = &self.options;
        let is_not_finite = |picture: &PictureOutcome| {
            matches!(picture, PictureOutcome::Failed(PipelineError::NonFinite { .. }))
        };
        if options.dtype == ComputeDtype::F32 || !pictures.iter().any(is_not_finite) {
            return;
        }
        let options = LoadOptions { dtype: ComputeDtype::F32, ..options.clone() };
        let model = match diffusion::StableDiffusionPipeline::from_pretrained(&self.folder, &options) {
            Ok(model) => model,
            Err(error) => {
                let error = format!("{:#}", anyhow::Error::new(error));
                return warn!(error, "Values that are not finite could not be tried again in f32");
            }
        };
        for (index, picture) in pictures.iter_mut().enumerate().filter(|(_, picture)| is_not_finite(picture))
        {
            warn!(
                "A picture had values that are not finite in {}; drawing it again in f32",
                self.options.dtype
            );
            let noise = Some(NoiseKind::of(self.options.dtype));
            let parameters = GenerationParameters { noise, ..self.parameters };
            let generation =
                model.generate(std::slice::from_ref(&self.requests[index]), &parameters, &mut |progress| {
                    match control.after_step(progress.step_index + 1, progress.num_steps) {
                        Verdict::Stop => StepControl::Stop,
                        Verdict::Continue { lost } if lost[index] => StepControl::Stop,
                        Verdict::Continue { .. } => StepControl::Continue,
                    }
                });
            *picture = match generation {
                Ok(mut generation) => match generation.images.pop() {
                    Some(image) => {
                        outcome(image, ComputeDtype::F32, parameters.recipe, self.computed_at_once(1, 1))
                    }
                    None => continue,
                },
                Err(diffusion::PipelineError::Stopped { .. }) => PictureOutcome::Dropped,
                Err(error) => PictureOutcome::Failed(classify(error, 1)),
            };
        }
    }
}

fn outcome(
    image: Result<diffusion::GeneratedImage, ImageError>,
    dtype: ComputeDtype,
    recipe: Recipe,
    engine: Option<Box<EngineFingerprint>>,
) -> PictureOutcome {
    match image {
        Ok(image) => {
            let safety = image.safety;
            PictureOutcome::Finished(GeneratedImage {
                width: image.width,
                height: image.height,
                rgb: image.pixels,
                has_nsfw_concept: safety.as_ref().map(|verdict| verdict.has_nsfw_concept),
                concept_scores: safety
                    .as_ref()
                    .map(|verdict| verdict.concept_scores.clone())
                    .unwrap_or_default(),
                special_care_scores: safety.map(|verdict| verdict.special_care_scores).unwrap_or_default(),
                prompt_truncated: image.truncated_prompt.is_some(),
                dtype: dtype.to_string(),
                recipe: recipe.into(),
                engine,
            })
        }
        Err(ImageError::Dropped { .. }) => PictureOutcome::Dropped,
        Err(ImageError::NonFinite { stage }) => {
            PictureOutcome::Failed(PipelineError::NonFinite { tensor: stage.to_string() })
        }
    }
}
