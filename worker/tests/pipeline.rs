//! The whole pipeline against diffusers' `StableDiffusionPipeline`, and the promises about microbatches.
#![allow(clippy::unwrap_used, reason = "clippy.toml allows it in test functions; this is for their helpers")]

#[path = "support/golden.rs"]
mod golden;

use std::collections::BTreeMap;

use golden::{CHECKPOINTS, F32, assert_close, golden as golden_path, max_difference, pipeline, tensors};
use serde::Deserialize;
use tch::{Kind, Tensor};
use worker::diffusion::{
    BatchSize, Batching, ComputeDtype, GeneratedImage, Generation, GenerationParameters, ImageError,
    ImageRequest, LoadOptions, NoiseKind, PipelineError, Recipe, SchedulerKind, StableDiffusionPipeline,
    StepControl, StepProgress,
};

/// A run of diffusers, in `<checkpoint>-stages/pipeline.json`.
#[derive(Deserialize)]
struct Run {
    name: String,
    scheduler: String,
    prompts: Vec<String>,
    negative_prompts: Vec<String>,
    seeds: Vec<u64>,
    num_inference_steps: usize,
    guidance_scale: f64,
    height: u32,
    width: u32,
    dtype: String,
    /// Only in `recipes.json`.
    guidance_interval: Option<(f64, f64)>,
    cache_interval: Option<usize>,
}

impl Run {
    fn recipe(&self) -> Recipe {
        let exact = Recipe::default();
        Recipe {
            guidance_interval: self.guidance_interval.unwrap_or(exact.guidance_interval),
            cache_interval: self.cache_interval.unwrap_or(exact.cache_interval),
        }
    }

    fn requests(&self) -> Vec<ImageRequest> {
        let prompts = self.prompts.iter().zip(&self.negative_prompts).zip(&self.seeds);
        prompts
            .map(|((prompt, negative_prompt), &seed)| ImageRequest {
                prompt: prompt.clone(),
                negative_prompt: negative_prompt.clone(),
                seed,
                guidance_scale: self.guidance_scale,
            })
            .collect()
    }

    fn parameters(&self) -> GenerationParameters {
        GenerationParameters {
            width: self.width,
            height: self.height,
            num_inference_steps: self.num_inference_steps,
            scheduler: self.scheduler.parse().unwrap(),
            noise: None,
            recipe: self.recipe(),
        }
    }
}

fn runs(checkpoint: &str) -> Vec<Run> {
    let path = golden_path(&format!("{checkpoint}-stages/pipeline.json"));
    serde_json::from_str(&std::fs::read_to_string(path).unwrap()).unwrap()
}

/// What a generation gave, with the latents `(batch_size, …)` after each step.
fn generate(
    pipeline: &StableDiffusionPipeline,
    requests: &[ImageRequest],
    parameters: &GenerationParameters,
) -> (Generation, Vec<Tensor>) {
    let mut latents = Vec::new();
    let generation = pipeline.generate(requests, parameters, &mut |progress: &StepProgress<'_>| {
        latents.push(Tensor::cat(progress.latents, 0));
        StepControl::Continue
    });
    (generation.unwrap(), latents)
}

fn images(generation: Generation) -> Vec<GeneratedImage> {
    generation.images.into_iter().map(Result::unwrap).collect()
}

fn pixels(image: &GeneratedImage) -> Tensor {
    let shape = [i64::from(image.height), i64::from(image.width), 3];
    Tensor::from_slice(&image.pixels).view(shape)
}

/// The two ways to compute: each picture alone; and all together, filled up to three, on buffers that stay where they are.
fn ways() -> [Batching; 2] {
    [Batching::of(F32.device), Batching { size: BatchSize::Padded(3), decode_size: 2, graph: false }]
}

/// The pictures of a run, compared with diffusers'.
fn compare(
    checkpoint: &str,
    run: &Run,
    pipeline: &StableDiffusionPipeline,
    expected: &BTreeMap<String, Tensor>,
) {
    let (generation, latents) = generate(pipeline, &run.requests(), &run.parameters());
    let golden = |key: &str| expected.get(&format!("{}.{key}", run.name));
    let timesteps = golden("timesteps").unwrap().size1().unwrap();
    assert_eq!(latents.len() as i64, timesteps, "{checkpoint} {}", run.name);
    let mut compared = 0;
    for (step, latents) in latents.iter().enumerate() {
        if let Some(expected) = golden(&format!("latents.{step}")) {
            assert_close(&format!("{checkpoint} {} step {step}", run.name), latents, expected);
            compared += 1;
        }
    }
    assert!(compared > 0);
    for (i, image) in images(generation).iter().enumerate() {
        let row = |key: &str| golden(key).unwrap().get(i as i64);
        let name = format!("{checkpoint} {} picture {i}", run.name);
        let difference = max_difference(&pixels(image), &row("checked_pixels"));
        assert!(difference <= 1.0, "{name}: pixels differ by {difference}");
        let verdict = image.safety.as_ref().unwrap();
        assert_eq!(verdict.has_nsfw_concept, row("has_nsfw_concept").int64_value(&[]) != 0, "{name}");
        let scores = [
            (&verdict.concept_scores, row("concept_scores")),
            (&verdict.special_care_scores, row("special_care_scores")),
        ];
        for (scores, expected) in scores {
            // A checker of random weights makes much of a picture that differs by 1 of 255 in a few places.
            let difference = max_difference(&Tensor::from_slice(scores), &expected);
            assert!(difference < 0.01, "{name}: scores differ by {difference}");
        }
    }
}

#[test]
fn pictures_equal_diffusers_for_every_noise_scheduler() {
    for checkpoint in CHECKPOINTS {
        let pipeline = pipeline(checkpoint, &F32);
        let expected = tensors(&format!("{checkpoint}-stages/pipeline.safetensors"));
        let runs = runs(checkpoint);
        let in_f32 = || runs.iter().filter(|run| run.dtype == "f32");
        for kind in SchedulerKind::ALL {
            assert!(in_f32().any(|run| run.scheduler == kind.as_str()), "{kind} has no golden run");
        }
        for batching in ways() {
            pipeline.set_batching(batching);
            for run in in_f32() {
                compare(checkpoint, run, &pipeline, &expected);
            }
        }
    }
}

/// What the recipes leave out, against loops written down over diffusers' own blocks (`golden/recipes.py`).
#[test]
fn recipes_leave_out_what_they_say() {
    for checkpoint in CHECKPOINTS {
        let pipeline = pipeline(checkpoint, &F32);
        let expected = tensors(&format!("{checkpoint}-stages/recipes.safetensors"));
        let path = golden_path(&format!("{checkpoint}-stages/recipes.json"));
        let runs: Vec<Run> = serde_json::from_str(&std::fs::read_to_string(path).unwrap()).unwrap();
        assert_eq!(runs.len(), 4);
        for run in &runs {
            assert_ne!(run.recipe(), Recipe::default());
            let (_, latents) = generate(&pipeline, &run.requests(), &run.parameters());
            let exact = GenerationParameters { recipe: Recipe::default(), ..run.parameters() };
            let (_, exact) = generate(&pipeline, &run.requests(), &exact);
            let last = latents.len() - 1;
            for batching in ways() {
                pipeline.set_batching(batching);
                let (_, latents) = generate(&pipeline, &run.requests(), &run.parameters());
                for (step, latents) in latents.iter().enumerate() {
                    let name = format!("{}.latents.{step}", run.name);
                    assert_close(&format!("{checkpoint} {name} {batching:?}"), latents, &expected[&name]);
                }
            }
            assert!(max_difference(&latents[last], &exact[last]) > 1e-3, "{checkpoint} {}", run.name);
        }
    }
}

/// In half precision libtorch's kernels may round in another order than diffusers' Python did, and eight steps of
/// guidance amplify it; the pictures must still be recognizably the same, and the noise is exactly the same.
#[test]
fn half_precision_stays_near_diffusers() {
    for checkpoint in CHECKPOINTS {
        let expected = tensors(&format!("{checkpoint}-stages/pipeline.safetensors"));
        for run in runs(checkpoint).iter().filter(|run| run.dtype != "f32") {
            let dtype: ComputeDtype = run.dtype.parse().unwrap();
            let pipeline = pipeline(checkpoint, &LoadOptions { dtype, ..F32 });
            for batching in ways() {
                pipeline.set_batching(batching);
                let (generation, latents) = generate(&pipeline, &run.requests(), &run.parameters());
                let last = latents.len() - 1;
                let reference = &expected[&format!("{}.latents.{last}", run.name)];
                assert_eq!(latents[last].kind(), dtype.to_tch());
                let difference =
                    (latents[last].to_kind(Kind::Double) - reference.to_kind(Kind::Double)).abs();
                let relative = difference.mean(Kind::Double).double_value(&[])
                    / reference.to_kind(Kind::Double).abs().mean(Kind::Double).double_value(&[]);
                let name = format!("{checkpoint} {} {batching:?}", run.name);
                assert!(relative < 0.1, "{name}: latents differ by {relative} on average");
                assert_eq!(images(generation)[0].noise, NoiseKind::of(dtype));
            }
        }
    }
}

#[test]
fn default_size_and_scheduler_are_the_checkpoints() {
    for checkpoint in CHECKPOINTS {
        let pipeline = pipeline(checkpoint, &F32);
        let run = runs(checkpoint).into_iter().find(|run| run.name == "default_size").unwrap();
        assert_eq!(pipeline.default_size(), (run.width, run.height), "{checkpoint}");
        assert_eq!(pipeline.default_scheduler(), Some(SchedulerKind::Pndm));
        assert!(pipeline.has_safety_checker());
    }
}

fn request(prompt: &str, seed: u64, guidance_scale: f64) -> ImageRequest {
    let negative_prompt = if seed.is_multiple_of(2) { "blurry".to_owned() } else { String::new() };
    ImageRequest { prompt: prompt.to_owned(), negative_prompt, seed, guidance_scale }
}

fn three_requests() -> [ImageRequest; 3] {
    [
        request("a red circle", 1, 7.5),
        request("two yellow triangles beside a purple star", 2, 3.0),
        request("", 3, 12.25),
    ]
}

fn parameters(checkpoint: &str, scheduler: SchedulerKind) -> GenerationParameters {
    // Latents with an odd number of cells: the last noise of each picture would differ if they were drawn together.
    let (width, height) = if checkpoint == "tiny" { (26, 34) } else { (72, 56) };
    GenerationParameters {
        width,
        height,
        num_inference_steps: 5,
        scheduler,
        noise: None,
        recipe: Recipe::default(),
    }
}

/// Every number as its bits.
fn bits(tensor: &Tensor) -> Vec<i32> {
    Vec::try_from(tensor.view_dtype(Kind::Int).flatten(0, -1)).unwrap()
}

/// P8: same spec, same picture, whatever microbatch it rode in, bit for bit on the CPU.
#[test]
fn a_microbatch_equals_single_calls_bit_for_bit() {
    for checkpoint in CHECKPOINTS {
        let pipeline = pipeline(checkpoint, &F32);
        // What the noise schedulers add, `tiny` shows for all of them; `small` adds the layers that `tiny` lacks.
        let schedulers =
            if checkpoint == "tiny" { &SchedulerKind::ALL[..] } else { &[SchedulerKind::EulerA] };
        for &scheduler in schedulers {
            let parameters = parameters(checkpoint, scheduler);
            let (together, latents_together) = generate(&pipeline, &three_requests(), &parameters);
            for (i, image) in images(together).iter().enumerate() {
                let (alone, latents_alone) = generate(&pipeline, &three_requests()[i..=i], &parameters);
                assert_eq!(latents_together.len(), latents_alone.len());
                for (step, (together, alone)) in latents_together.iter().zip(&latents_alone).enumerate() {
                    let together = together.narrow(0, i as i64, 1).contiguous();
                    let name = format!("{checkpoint} {scheduler} picture {i} step {step}");
                    assert!(bits(&together) == bits(alone), "{name}");
                }
                assert_eq!(*image, images(alone)[0], "{checkpoint} {scheduler} picture {i}");
            }
        }
    }
}

#[test]
fn dropped_pictures_stop_and_the_others_stay_the_same() {
    let pipeline = pipeline("tiny", &F32);
    let parameters = parameters("tiny", SchedulerKind::EulerA);
    let (whole, _) = generate(&pipeline, &three_requests(), &parameters);
    let mut active_at = Vec::new();
    let generation = pipeline.generate(&three_requests(), &parameters, &mut |progress| {
        active_at.push(progress.active.to_vec());
        match progress.step_index {
            1 => StepControl::Drop(vec![1]),
            // A second time, and one that is not there: both are harmless.
            2 => StepControl::Drop(vec![1, 7]),
            _ => StepControl::Continue,
        }
    });
    let images = generation.unwrap().images;
    assert_eq!(active_at, [vec![0, 1, 2], vec![0, 1, 2], vec![0, 2], vec![0, 2], vec![0, 2]]);
    assert_eq!(images[1], Err(ImageError::Dropped { step_index: 1 }));
    for i in [0, 2] {
        assert_eq!(images[i], whole.images[i]);
    }
}

#[test]
fn dropping_all_or_stopping_takes_no_further_step() {
    let pipeline = pipeline("tiny", &F32);
    let parameters = parameters("tiny", SchedulerKind::Pndm);
    let mut calls = 0;
    let generation = pipeline.generate(&three_requests(), &parameters, &mut |_| {
        calls += 1;
        StepControl::Drop(vec![0, 1, 2])
    });
    assert_eq!(calls, 1);
    assert_eq!(generation.unwrap().images, vec![Err(ImageError::Dropped { step_index: 0 }); 3]);
    let stopped = pipeline.generate(&three_requests(), &parameters, &mut |progress| {
        if progress.step_index == 2 { StepControl::Stop } else { StepControl::Continue }
    });
    assert!(matches!(stopped, Err(PipelineError::Stopped { step_index: 2 })));
}

#[test]
fn all_faults_of_the_inputs_are_named() {
    let pipeline = pipeline("small", &F32);
    let parameters = GenerationParameters {
        width: 100,
        height: 0,
        num_inference_steps: 0,
        scheduler: SchedulerKind::Pndm,
        noise: None,
        recipe: Recipe::default(),
    };
    let requests = [request("", 1, f64::NAN)];
    let error = pipeline.generate(&requests, &parameters, &mut |_| StepControl::Continue).unwrap_err();
    assert_eq!(
        error.to_string(),
        "`width` must be a positive multiple of 8 but is 100\n\
         `height` must be a positive multiple of 8 but is 0\n\
         `num_inference_steps` must be at least 1 but is 0\n\
         `guidance_scale` must be a finite number but is NaN"
    );
    let parameters = GenerationParameters { width: 64, height: 64, num_inference_steps: 5000, ..parameters };
    let error = pipeline.check_inputs(&[], &parameters).unwrap_err();
    assert!(error.to_string().starts_with("`num_inference_steps` must be "), "{error}");
}

#[test]
fn guidance_is_on_for_all_or_for_none() {
    let pipeline = pipeline("tiny", &F32);
    let parameters = parameters("tiny", SchedulerKind::Ddim);
    let requests = [request("a", 1, 7.5), request("b", 2, 1.0)];
    let mixed = pipeline.generate(&requests, &parameters, &mut |_| StepControl::Continue);
    assert!(matches!(mixed, Err(PipelineError::MixedGuidance)));
}

/// Without guidance the negative prompt does not count, as in diffusers.
#[test]
fn without_guidance_the_negative_prompt_is_ignored() {
    let pipeline = pipeline("tiny", &F32);
    let parameters = parameters("tiny", SchedulerKind::Ddim);
    let with = request("a red circle", 2, 1.0);
    let without = ImageRequest { negative_prompt: String::new(), ..with.clone() };
    let (with, _) = generate(&pipeline, &[with], &parameters);
    let (without, _) = generate(&pipeline, &[without], &parameters);
    assert_eq!(images(with), images(without));
}

#[test]
fn noise_drawn_in_another_dtype_is_another_picture() {
    let pipeline = pipeline("tiny", &F32);
    let parameters = parameters("tiny", SchedulerKind::Ddim);
    let half = GenerationParameters { noise: Some(NoiseKind::CpuF16), ..parameters };
    let explicit = GenerationParameters { noise: Some(NoiseKind::CpuF32), ..parameters };
    let requests = [request("a red circle", 1, 7.5)];
    let of = |parameters| images(generate(&pipeline, &requests, parameters).0);
    assert_eq!(of(&parameters), of(&explicit));
    assert_ne!(of(&parameters)[0].pixels, of(&half)[0].pixels);
    assert_eq!(of(&half)[0].noise, NoiseKind::CpuF16);
}

#[test]
fn the_cut_end_of_a_long_prompt_is_reported() {
    let pipeline = pipeline("tiny", &F32);
    let parameters = parameters("tiny", SchedulerKind::Ddim);
    let long = ImageRequest { negative_prompt: "@ ".repeat(76), ..request(&"@ ".repeat(77), 2, 7.5) };
    let image = &images(generate(&pipeline, &[long, request("short", 1, 7.5)], &parameters).0);
    assert_eq!(image[0].truncated_prompt.as_deref(), Some("@ @"));
    assert_eq!(image[0].truncated_negative_prompt.as_deref(), Some("@"));
    assert_eq!(image[1].truncated_prompt, None);
}
