//! A pipeline without a model: one plain color per seed, at a settable speed.
//!
//! It is a real choice (`--pipeline solid-color`): fleet tests and load tests run the shipped binary with it, and an
//! operator can try a queue, a bucket and a catalog without weights or a GPU. It takes as many denoising steps as its
//! jobs ask for, spreads its time over them, and obeys every verdict as a model does.

#[cfg(feature = "failpoints")]
mod injected;

use std::time::{Duration, Instant};

use schema::{Sha256Digest, ValidJobSpec};

use crate::control::{Control, Verdict};
use crate::pipeline::{
    Denoised, Generated, GeneratedImage, PictureOutcome, Pipeline, PipelineError, PipelineIdentity,
    StageTimes,
};

/// The pipeline's name in settings, rows and logs.
pub const NAME: &str = "solid-color";

/// See the module.
#[derive(Debug)]
pub struct SolidColorPipeline {
    identity: PipelineIdentity,
    time_per_picture: Duration,
}

impl SolidColorPipeline {
    /// A pipeline that takes this long for each picture of a call.
    pub fn new(time_per_picture: Duration) -> Self {
        let identity = PipelineIdentity {
            name: NAME.to_owned(),
            device: "cpu".to_owned(),
            dtype: "f32".to_owned(),
            noise_dtype: "f32".to_owned(),
        };
        Self { identity, time_per_picture }
    }
}

impl Pipeline for SolidColorPipeline {
    fn identity(&self) -> &PipelineIdentity {
        &self.identity
    }

    fn denoise(&mut self, specs: &[&ValidJobSpec], control: &mut Control) -> Result<Denoised, PipelineError> {
        let started = Instant::now();
        let num_steps = specs.iter().map(|spec| spec.num_inference_steps()).max().unwrap_or(1);
        let batch_size = u32::try_from(specs.len()).unwrap_or(u32::MAX);
        let step = self.time_per_picture * batch_size / num_steps;
        let mut lost = vec![false; specs.len()];
        for steps_done in 1..=num_steps {
            #[cfg(feature = "failpoints")]
            if steps_done == 1 {
                injected::fault(specs)?;
            }
            control.wait(step);
            match control.after_step(steps_done as usize, num_steps as usize) {
                Verdict::Continue { lost: now_lost } => lost.copy_from_slice(now_lost),
                Verdict::Stop => {
                    lost.fill(true);
                    break;
                }
            }
        }
        let times = StageTimes { denoise: started.elapsed(), ..StageTimes::default() };
        let specs: Vec<ValidJobSpec> = specs.iter().map(|&spec| spec.clone()).collect();
        let finish = move |_: &mut Control| {
            let pictures = specs.iter().zip(lost).map(|(spec, lost)| {
                let picture =
                    if lost { PictureOutcome::Dropped } else { PictureOutcome::Finished(plain(spec)) };
                #[cfg(feature = "failpoints")]
                let picture = if lost { picture } else { injected::spoil(picture, spec) };
                picture
            });
            Ok(Generated { pictures: pictures.collect(), times })
        };
        Ok(Denoised { times, finish: Box::new(finish) })
    }
}

/// The plain picture of a spec. Its color is a digest of the seed, so that neighboring seeds look different.
fn plain(spec: &ValidJobSpec) -> GeneratedImage {
    let digest = Sha256Digest::of(&spec.seed().to_be_bytes());
    let [red, green, blue, ..] = *digest.as_bytes();
    let pixels = spec.width() as usize * spec.height() as usize;
    GeneratedImage {
        width: spec.width(),
        height: spec.height(),
        rgb: [red, green, blue].repeat(pixels),
        has_nsfw_concept: None,
        concept_scores: Vec::new(),
        special_care_scores: Vec::new(),
        prompt_truncated: false,
        dtype: "f32".to_owned(),
        // Its color is its seed's, whatever else is asked for.
        recipe: spec.recipe(),
        engine: None,
    }
}
