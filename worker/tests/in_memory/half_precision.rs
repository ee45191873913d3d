//! What overflows in half precision is drawn once more in f32, and what is not finite in f32 either is no picture at all.

use std::path::Path;

use schema::{ErrorClass, JobState};
use serde_json::json;
use worker::diffusion::{
    ComputeDevice, ComputeDtype, GenerationParameters, ImageError, ImageRequest, KernelChoice, LoadOptions,
    NoiseKind, Recipe, SchedulerKind, Stage, StepControl,
};
use worker::stable_diffusion::StableDiffusionPipeline;

use crate::catalog::Row;
use crate::checkpoint::{Checkpoint, UNET, VAE};
use crate::worker_under_test::{Setup, WorkerUnderTest};

const F16: LoadOptions = LoadOptions { dtype: ComputeDtype::F16, ..F32 };
const F32: LoadOptions = LoadOptions {
    device: ComputeDevice::Cpu,
    dtype: ComputeDtype::F32,
    kernels: KernelChoice::Plain,
    convolutions: None,
};
/// Below the largest number of f16, 65504, so that the weights are finite in it and what they are multiplied to is not.
const OVERFLOWS_F16: f64 = 60_000.0;
/// The same for f32, whose largest number is 3.4e38.
const OVERFLOWS_F32: f64 = 3e38;

/// A checkpoint whose pictures are published whatever they show.
fn without_safety_checker() -> Checkpoint {
    let checkpoint = Checkpoint::new();
    checkpoint.edit_json("model_index.json", |json| json["safety_checker"] = json!([null, null]));
    checkpoint
}

/// The pixels of the job in `row` as the model code alone draws them, computing as `options` say, its noise drawn in f16.
fn drawn_alone(checkpoint: &Checkpoint, row: &Row, options: &LoadOptions) -> Result<Vec<u8>, ImageError> {
    let spec = &row.spec;
    let request = ImageRequest {
        prompt: spec.prompt().to_owned(),
        negative_prompt: spec.negative_prompt().to_owned(),
        seed: spec.seed().into(),
        guidance_scale: spec.guidance_scale().into(),
    };
    let parameters = GenerationParameters {
        width: spec.width(),
        height: spec.height(),
        num_inference_steps: spec.num_inference_steps() as usize,
        scheduler: SchedulerKind::Pndm,
        noise: Some(NoiseKind::CpuF16),
        recipe: Recipe::default(),
    };
    let pipeline = checkpoint.load_as(options).unwrap();
    let mut generation = pipeline.generate(&[request], &parameters, &mut |_| StepControl::Continue).unwrap();
    generation.images.pop().unwrap().map(|image| image.pixels)
}

/// A worker that computes in f16, after it has settled `jobs` jobs of one microbatch, and their rows.
async fn settled(folder: &Path, jobs: u32) -> (WorkerUnderTest, Vec<Row>) {
    let mut worker = WorkerUnderTest::new(Setup::full_microbatches(jobs as usize));
    let job_ids = worker.submit_many(0..jobs);
    let folder = folder.to_owned();
    worker.start(move || Box::new(StableDiffusionPipeline::load(&folder, F16).expect("it loads"))).await;
    worker.wait_for_acks(job_ids.len()).await;
    worker.drain().await.expect("a good end");
    let rows = job_ids.iter().map(|job_id| worker.row(*job_id)).collect();
    (worker, rows)
}

/// The stored picture's pixels and the dtype that its record names.
fn recorded(worker: &WorkerUnderTest, row: &Row) -> (Vec<u8>, String) {
    assert_eq!((row.state, row.attempt), (JobState::Completed, 1));
    let image = row.image.as_ref().expect("a record");
    assert_eq!(image.noise_dtype, "cpu-f16", "the seed's noise is that of the dtype that was asked for");
    let objects = worker.store.objects.lock().unwrap();
    let png = &objects[&image.object.as_ref().expect("an object").object_key];
    (image::load_from_memory(png).unwrap().to_rgb8().into_raw(), image.dtype.clone())
}

#[tokio::test]
async fn what_overflows_in_f16_is_drawn_again_in_f32_and_its_record_says_so() {
    for (file, key, stage) in
        [(UNET, "conv_in.weight", Stage::Denoise), (VAE, "decoder.conv_in.weight", Stage::VaeDecode)]
    {
        let checkpoint = without_safety_checker();
        checkpoint.scale_to(file, key, OVERFLOWS_F16);
        let (worker, rows) = settled(checkpoint.folder(), 2).await;
        let in_f16 = drawn_alone(&checkpoint, &rows[0], &F16);
        assert_eq!(in_f16, Err(ImageError::NonFinite { stage }), "{key}");
        let mut pictures = Vec::new();
        for row in &rows {
            let (pixels, dtype) = recorded(&worker, row);
            assert_eq!(dtype, "f32", "{key}");
            assert!(
                Ok(&pixels) == drawn_alone(&checkpoint, row, &F32).as_ref(),
                "{key}: it is the f32 picture"
            );
            pictures.push(pixels);
        }
        assert_ne!(pictures[0], pictures[1], "{key}: each seed its own picture");
        assert_eq!(worker.metrics.failed.get(), 0);
    }
}

#[tokio::test]
async fn what_f16_can_hold_stays_in_f16() {
    let checkpoint = without_safety_checker();
    let (worker, rows) = settled(checkpoint.folder(), 1).await;
    let (pixels, dtype) = recorded(&worker, &rows[0]);
    assert_eq!(dtype, "f16");
    assert!(Ok(pixels) == drawn_alone(&checkpoint, &rows[0], &F16));
}

#[tokio::test]
async fn what_overflows_in_f32_too_is_neither_safe_nor_flagged() {
    for (file, key) in [(UNET, "conv_in.weight"), (VAE, "decoder.conv_in.weight")] {
        let checkpoint = Checkpoint::new();
        checkpoint.scale_to(file, key, OVERFLOWS_F32);
        let (worker, rows) = settled(checkpoint.folder(), 1).await;
        let row = &rows[0];
        let failure = row.failure.as_ref().expect("a failure");
        assert_eq!((row.state, failure.class), (JobState::Retryable, ErrorClass::NonFinite), "{key}");
        assert!(row.image.is_none(), "{key}: no record, so no verdict");
        assert!(worker.store.objects.lock().unwrap().is_empty(), "{key}");
        assert_eq!((worker.metrics.completed.get(), worker.metrics.flagged.get()), (0, 0), "{key}");
    }
}
