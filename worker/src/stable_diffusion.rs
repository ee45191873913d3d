//! The model behind the [`Pipeline`] wall: job specs to the model code's requests, and its answers back.

mod finishing;

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use schema::{EngineFingerprint, NoiseScheduler, ValidJobSpec};
use tracing::warn;

use self::finishing::Finishing;
use crate::control::{Control, Verdict};
use crate::diffusion::cuda::{self, Gpu};
use crate::diffusion::device::TORCH_VERSION;
use crate::diffusion::pipeline_stable_diffusion::{NoiseKind, StageSeconds};
use crate::diffusion::rng::RngError;
use crate::diffusion::schedulers::SchedulerError;
use crate::diffusion::{
    self, BatchSize, Batching, ComputeDevice, GenerationParameters, ImageRequest, LoadOptions, Recipe,
    SchedulerKind, StepControl, StepProgress,
};
use crate::pipeline::{
    Denoised, Generated, PictureOutcome, Pipeline, PipelineError, PipelineIdentity, PrepareLane, StageTimes,
};

/// The pipeline's name in settings, rows and logs.
pub const NAME: &str = "stable-diffusion";

/// What libtorch says when memory is short: on a GPU, in cuBLAS or cuDNN, on the CPU.
const OUT_OF_MEMORY: [&str; 4] =
    ["out of memory", "STATUS_ALLOC_FAILED", "can't allocate memory", "not enough memory"];
/// What it says when a GPU or its driver failed; the process's CUDA context is lost then.
const DEVICE_FAILED: [&str; 3] = ["CUDA error", "STATUS_EXECUTION_FAILED", "STATUS_INTERNAL_ERROR"];

/// A Stable Diffusion v1 checkpoint, loaded.
#[derive(Debug)]
pub struct StableDiffusionPipeline {
    model: diffusion::StableDiffusionPipeline,
    identity: PipelineIdentity,
    folder: PathBuf,
    /// What computes, where bits depend on it; the sizes are each call's.
    fingerprint: Option<EngineFingerprint>,
    /// Set by whoever finishes a call when there was no memory to decode even one picture: the next call makes room.
    is_short: Arc<AtomicBool>,
}

impl StableDiffusionPipeline {
    /// Loads a checkpoint's folder. To be called before anything else uses libtorch, on the thread that will own it.
    pub fn load(folder: &Path, options: LoadOptions) -> Result<Self, PipelineError> {
        let batching = Batching::of(options.device);
        Self::load_batching(folder, options, batching)
    }

    /// As [`Self::load`], with a say in how pictures of a call are computed.
    pub fn load_batching(
        folder: &Path,
        options: LoadOptions,
        batching: Batching,
    ) -> Result<Self, PipelineError> {
        let LoadOptions { device, dtype, .. } = options;
        device.open().map_err(|error| PipelineError::Device { source: Arc::new(error) })?;
        let model = diffusion::StableDiffusionPipeline::from_pretrained(folder, &options)
            .map_err(|error| PipelineError::Input { source: Arc::new(error) })?;
        let identity = PipelineIdentity {
            name: NAME.to_owned(),
            device: device.to_string(),
            dtype: dtype.to_string(),
            noise_dtype: NoiseKind::of(dtype).to_string(),
        };
        model.set_batching(batching);
        let fingerprint = fingerprint(device, model.kernels());
        let is_short = Arc::default();
        Ok(Self { model, identity, folder: folder.to_owned(), fingerprint, is_short })
    }

    /// The first half of one call, in a smaller batch where made-up pictures were too much for the memory: they must not cost
    /// real ones their place. `None` if it was stopped.
    fn denoise_in_memory(
        &self,
        requests: &[ImageRequest],
        parameters: &GenerationParameters,
        control: &mut Control,
    ) -> Result<Option<diffusion::Denoised>, PipelineError> {
        if self.is_short.swap(false, Ordering::SeqCst) {
            self.fill_up_less(requests.len());
        }
        loop {
            let denoised = self.model.denoise(requests, parameters, &mut |progress| {
                step_control(progress, control.after_step(progress.step_index + 1, progress.num_steps))
            });
            let error = match denoised {
                Ok(denoised) => return Ok(Some(denoised)),
                Err(diffusion::PipelineError::Stopped { .. }) => return Ok(None),
                Err(error) => classify(error, requests.len()),
            };
            let is_short = matches!(error, PipelineError::OutOfMemory { .. });
            if !is_short || !self.fill_up_less(requests.len()) {
                return Err(error);
            }
        }
    }

    /// Halves the number that batches are filled up to, though not below `num_pictures`; false if nothing is made up.
    fn fill_up_less(&self, num_pictures: usize) -> bool {
        let batching = self.model.batching();
        let BatchSize::Padded(size) = batching.size else { return false };
        if size <= num_pictures {
            return false;
        }
        let size = (size / 2).max(num_pictures);
        warn!(batch.size = size, "Out of memory; from now on batches are filled up to {size} only");
        self.model.set_batching(Batching { size: BatchSize::Padded(size), ..batching });
        true
    }
}

impl Pipeline for StableDiffusionPipeline {
    fn identity(&self) -> &PipelineIdentity {
        &self.identity
    }

    fn denoise(&mut self, specs: &[&ValidJobSpec], control: &mut Control) -> Result<Denoised, PipelineError> {
        let requests: Vec<ImageRequest> = specs.iter().map(|spec| request(spec)).collect();
        let parameters = parameters(specs[0]);
        let Some(denoised) = self.denoise_in_memory(&requests, &parameters, control)? else {
            let finish = move |_: &mut Control| Ok(stopped(requests.len()));
            return Ok(Denoised { times: StageTimes::default(), finish: Box::new(finish) });
        };
        let times = times(denoised.seconds);
        let finishing = Finishing {
            finisher: self.model.finisher(),
            options: self.model.options().clone(),
            folder: self.folder.clone(),
            fingerprint: self.fingerprint.clone(),
            is_short: self.is_short.clone(),
            requests,
            parameters,
            denoised,
        };
        Ok(Denoised { times, finish: Box::new(move |control| finishing.run(control)) })
    }

    fn prepare_lane(&self) -> PrepareLane {
        let device = self.model.options().device;
        Box::new(move || {
            cuda::use_own_stream(device).map_err(|error| PipelineError::Device { source: Arc::new(error) })
        })
    }
}

/// The answer to a call that was stopped.
fn stopped(num_pictures: usize) -> Generated {
    let pictures = (0..num_pictures).map(|_| PictureOutcome::Dropped).collect();
    Generated { pictures, times: StageTimes::default() }
}

/// What computes on a GPU. On the CPU a picture has the same bits everywhere, so there is nothing to tell.
fn fingerprint(device: ComputeDevice, kernels: String) -> Option<EngineFingerprint> {
    let ComputeDevice::Cuda(index) = device else { return None };
    let unknown = || "unknown".to_owned();
    let (gpu, driver, cudnn) = match Gpu::describe(index) {
        Ok(Gpu { name, driver, cudnn }) => (name, driver, cudnn),
        Err(_) => (unknown(), unknown(), unknown()),
    };
    let torch = TORCH_VERSION.to_owned();
    Some(EngineFingerprint { gpu, driver, torch, cudnn, kernels, batch_size: 0, decode_size: 0 })
}

fn request(spec: &ValidJobSpec) -> ImageRequest {
    ImageRequest {
        prompt: spec.prompt().to_owned(),
        negative_prompt: spec.negative_prompt().to_owned(),
        seed: spec.seed().into(),
        guidance_scale: spec.guidance_scale().into(),
    }
}

fn parameters(spec: &ValidJobSpec) -> GenerationParameters {
    GenerationParameters {
        width: spec.width(),
        height: spec.height(),
        num_inference_steps: spec.num_inference_steps() as usize,
        scheduler: scheduler_kind(spec.noise_scheduler()),
        noise: None,
        recipe: spec.recipe().into(),
    }
}

/// What a job leaves out, in the model code's words.
impl From<schema::Recipe> for Recipe {
    fn from(recipe: schema::Recipe) -> Self {
        let schema::Recipe { guidance_start, guidance_stop, cache_interval } = recipe;
        Self { guidance_interval: (guidance_start, guidance_stop), cache_interval: cache_interval as usize }
    }
}

/// What was left out, in the catalog's words.
impl From<Recipe> for schema::Recipe {
    fn from(recipe: Recipe) -> Self {
        let Recipe { guidance_interval: (guidance_start, guidance_stop), cache_interval } = recipe;
        let cache_interval = u32::try_from(cache_interval).unwrap_or(u32::MAX);
        Self { guidance_start, guidance_stop, cache_interval }
    }
}

/// The catalog's word for a noise scheduler as the model code's.
fn scheduler_kind(noise_scheduler: NoiseScheduler) -> SchedulerKind {
    match noise_scheduler {
        NoiseScheduler::Pndm => SchedulerKind::Pndm,
        NoiseScheduler::Ddim => SchedulerKind::Ddim,
        NoiseScheduler::Euler => SchedulerKind::Euler,
        NoiseScheduler::EulerA => SchedulerKind::EulerA,
        NoiseScheduler::Dpmpp2m => SchedulerKind::Dpmpp2m,
        NoiseScheduler::Dpmpp2mKarras => SchedulerKind::Dpmpp2mKarras,
        NoiseScheduler::Unipc => SchedulerKind::Unipc,
        NoiseScheduler::Lms => SchedulerKind::Lms,
    }
}

/// The verdict in the model code's words: only pictures that still take steps can be dropped.
fn step_control(progress: &StepProgress<'_>, verdict: Verdict<'_>) -> StepControl {
    match verdict {
        Verdict::Stop => StepControl::Stop,
        Verdict::Continue { lost } => {
            let dropped: Vec<usize> = progress.active.iter().copied().filter(|index| lost[*index]).collect();
            if dropped.is_empty() { StepControl::Continue } else { StepControl::Drop(dropped) }
        }
    }
}

/// Sorts a failed call by what can be done about it.
fn classify(error: diffusion::PipelineError, batch_size: usize) -> PipelineError {
    use diffusion::PipelineError as E;
    let message = match &error {
        E::Inputs { .. } | E::Scheduler(SchedulerError::NumInferenceSteps { .. }) => {
            return PipelineError::Input { source: Arc::new(error) };
        }
        E::Tensor(error)
        | E::Scheduler(SchedulerError::Tensor(error))
        | E::Noise(RngError::Tensor(error)) => error.to_string(),
        _ => return PipelineError::Bug { source: Arc::new(error) },
    };
    // libtorch has types for these, but tch passes their texts alone.
    let says = |texts: &[&str]| texts.iter().any(|text| message.contains(text));
    if says(&OUT_OF_MEMORY) {
        PipelineError::OutOfMemory { batch_size, source: Arc::new(error) }
    } else if says(&DEVICE_FAILED) {
        PipelineError::Device { source: Arc::new(error) }
    } else {
        PipelineError::Bug { source: Arc::new(error) }
    }
}

fn times(seconds: StageSeconds) -> StageTimes {
    StageTimes {
        text_encoder: Duration::from_secs_f64(seconds.text_encoder),
        denoise: Duration::from_secs_f64(seconds.denoise),
        vae: Duration::from_secs_f64(seconds.vae_decode + seconds.to_host),
        safety: Duration::from_secs_f64(seconds.safety_checker),
        wait: Duration::ZERO,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use tch::TchError;

    fn class_of(message: &str) -> PipelineError {
        classify(TchError::Torch(message.to_owned()).into(), 8)
    }

    #[test]
    fn libtorch_texts_are_sorted_by_what_can_be_done() {
        let out_of_memory =
            "CUDA out of memory. Tried to allocate 2.00 GiB (GPU 0; 139.8 GiB total capacity)";
        assert!(matches!(class_of(out_of_memory), PipelineError::OutOfMemory { batch_size: 8, .. }));
        // The runtime's own text has both phrases, and memory is what can be helped.
        assert!(matches!(class_of("CUDA error: out of memory"), PipelineError::OutOfMemory { .. }));
        let cpu = "[enforce fail at alloc_cpu.cpp:121] err == 0. DefaultCPUAllocator: can't allocate memory: you tried";
        assert!(matches!(class_of(cpu), PipelineError::OutOfMemory { .. }));
        assert!(class_of("CUDA error: an illegal memory access was encountered").is_poisonous());
        assert!(matches!(class_of("mat1 and mat2 shapes cannot be multiplied"), PipelineError::Bug { .. }));
    }

    #[test]
    fn the_two_vocabularies_agree() {
        for &noise_scheduler in NoiseScheduler::ALL {
            assert_eq!(scheduler_kind(noise_scheduler).as_str(), noise_scheduler.as_str());
        }
    }

    #[test]
    fn a_recipe_is_the_same_in_both_vocabularies() {
        assert_eq!(Recipe::from(schema::Recipe::EXACT), Recipe::default());
        let recipe = schema::Recipe { guidance_start: 0.1, guidance_stop: 0.7, cache_interval: 3 };
        let ours = Recipe { guidance_interval: (0.1, 0.7), cache_interval: 3 };
        assert_eq!(Recipe::from(recipe), ours);
        assert_eq!(schema::Recipe::from(ours), recipe);
    }

    #[test]
    fn less_is_made_up_when_there_was_no_room_to_decode() {
        let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden/tiny");
        let kernels = diffusion::KernelChoice::Plain;
        let dtype = diffusion::ComputeDtype::F32;
        let options = LoadOptions { device: ComputeDevice::Cpu, dtype, kernels, convolutions: None };
        let batching = Batching { size: BatchSize::Padded(4), decode_size: 1, graph: false };
        let mut pipeline = StableDiffusionPipeline::load_batching(&folder, options, batching).unwrap();
        let defaults = schema::SpecDefaults::of_model(64, 64, NoiseScheduler::Ddim);
        let spec = schema::JobSpec {
            prompt: "a".to_owned(),
            num_inference_steps: Some(1),
            ..schema::JobSpec::default()
        };
        let spec = spec.validate(&defaults).unwrap();
        let mut sizes = Vec::new();
        for is_short in [false, true, false, true, true] {
            pipeline.is_short.store(is_short, Ordering::SeqCst);
            let job_id = schema::JobId::of(schema::BatchId::generate(), 0);
            let (_handle, mut control) = crate::control::control(vec![job_id], Default::default());
            pipeline.denoise(&[&spec], &mut control).unwrap();
            sizes.push(pipeline.model.batching().size);
        }
        assert_eq!(sizes, [4, 2, 2, 1, 1].map(BatchSize::Padded));
    }

    #[test]
    fn only_pictures_that_still_take_steps_are_dropped() {
        let progress = StepProgress { step_index: 0, num_steps: 2, active: &[0, 2], latents: &[] };
        let verdict = Verdict::Continue { lost: &[false, true, true] };
        assert_eq!(step_control(&progress, verdict), StepControl::Drop(vec![2]));
        let verdict = Verdict::Continue { lost: &[false, true, false] };
        assert_eq!(step_control(&progress, verdict), StepControl::Continue);
        assert_eq!(step_control(&progress, Verdict::Stop), StepControl::Stop);
    }
}
