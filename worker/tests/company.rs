//! P8 where pictures are computed together: a picture's bits do not depend on its company, as long as the batch has one size.
//! On the CPU, where each picture is computed alone, the same code is made to run; on a GPU the shipped command asks.
#![allow(clippy::unwrap_used, reason = "clippy.toml allows it in test functions; this is for their helpers")]

#[path = "support/golden.rs"]
mod golden;

use std::path::Path;
use std::process::Command;

use golden::{F32, pipeline};
use tch::{Kind, Tensor};
use worker::diffusion::{
    BatchSize, Batching, GenerationParameters, ImageError, ImageRequest, PipelineError, Recipe,
    SchedulerKind, StableDiffusionPipeline, StepControl, StepProgress,
};

const PLACES: usize = 4;
const PADDED: Batching = Batching { size: BatchSize::Padded(PLACES), decode_size: 2, graph: false };

fn parameters(scheduler: SchedulerKind, recipe: Recipe) -> GenerationParameters {
    // An odd number of cells, so that a picture does not end where a vector of numbers does.
    GenerationParameters { width: 40, height: 24, num_inference_steps: 5, scheduler, noise: None, recipe }
}

fn job() -> ImageRequest {
    let (prompt, negative_prompt) = ("a red circle".to_owned(), "blurry".to_owned());
    ImageRequest { prompt, negative_prompt, seed: 7, guidance_scale: 7.5 }
}

/// Other pictures, and other ones for each number.
fn neighbors(number: usize) -> Vec<ImageRequest> {
    let neighbor = |place: usize| ImageRequest {
        prompt: "star ".repeat(number + place),
        negative_prompt: String::new(),
        seed: (1000 * (number + 1) + place) as u64,
        guidance_scale: 2.0 + place as f64,
    };
    (0..PLACES).map(neighbor).collect()
}

/// The bits of one picture of a call: of its latents after each step, and its pixels.
fn bits_of(
    pipeline: &StableDiffusionPipeline,
    requests: &[ImageRequest],
    parameters: &GenerationParameters,
    place: usize,
) -> (Vec<Vec<u32>>, Vec<u8>) {
    let mut latents = Vec::new();
    let generation = pipeline.generate(requests, parameters, &mut |progress| {
        let numbers = progress.latents_f32().unwrap().swap_remove(place);
        latents.push(numbers.into_iter().map(f32::to_bits).collect());
        StepControl::Continue
    });
    let mut images = generation.unwrap().images;
    (latents, images.swap_remove(place).unwrap().pixels)
}

/// Which places of a batch give the job other bits than the first; the call of `place` has as many pictures as `sizes` says.
fn places_that_differ(
    checkpoint: &str,
    batching: Batching,
    parameters: &GenerationParameters,
    num_pictures: fn(usize) -> usize,
) -> Vec<usize> {
    let pipeline = pipeline(checkpoint, &F32);
    pipeline.set_batching(batching);
    let mut first = None;
    let differs = |place: &usize| {
        let mut requests = neighbors(*place);
        requests[*place] = job();
        requests.truncate(num_pictures(*place));
        let bits = bits_of(&pipeline, &requests, parameters, *place);
        *first.get_or_insert_with(|| bits.clone()) != bits
    };
    (0..PLACES).filter(differs).collect()
}

#[test]
fn in_every_place_of_a_batch_of_one_size_a_picture_has_the_same_bits() {
    let exact = Recipe::default();
    let turbo = Recipe { guidance_interval: (0.0, 0.7), cache_interval: 2 };
    let mut cases: Vec<_> = SchedulerKind::ALL.map(|kind| ("tiny", kind, exact)).to_vec();
    cases.extend([("tiny", SchedulerKind::Pndm, turbo), ("small", SchedulerKind::Pndm, exact)]);
    for (checkpoint, scheduler, recipe) in cases {
        let parameters = parameters(scheduler, recipe);
        // Full ones, and such that end with the job, the rest being made up.
        for num_pictures in [|_| PLACES, |place| place + 1] {
            let differ = places_that_differ(checkpoint, PADDED, &parameters, num_pictures);
            assert!(differ.is_empty(), "{checkpoint}, {scheduler}, {recipe:?}: other bits in {differ:?}");
        }
    }
}

/// What the test above is for: batches of as many pictures as there are give other bits. Should this fail, kernels have become
/// blind to a batch's size, and the test above has lost its teeth.
#[test]
fn without_one_size_the_company_shows() {
    let as_given = Batching { size: BatchSize::AsGiven, ..PADDED };
    let parameters = parameters(SchedulerKind::Pndm, Recipe::default());
    let differ = places_that_differ("small", as_given, &parameters, |place| place + 1);
    assert!(!differ.is_empty());
}

#[test]
fn what_a_batch_computed_on_leaves_nothing_to_the_next() {
    let pipeline = pipeline("tiny", &F32);
    pipeline.set_batching(PADDED);
    for scheduler in [SchedulerKind::Pndm, SchedulerKind::Dpmpp2m, SchedulerKind::Unipc] {
        let cached = Recipe { cache_interval: 3, ..Recipe::default() };
        let parameters = parameters(scheduler, cached);
        let fresh = bits_of(&pipeline, &[job()], &parameters, 0);
        bits_of(&pipeline, &neighbors(1), &parameters, 0);
        let stopped = pipeline.generate(&neighbors(2), &parameters, &mut |progress| {
            if progress.step_index == 2 { StepControl::Stop } else { StepControl::Continue }
        });
        assert!(matches!(stopped, Err(PipelineError::Stopped { step_index: 2 })));
        assert!(fresh == bits_of(&pipeline, &[job()], &parameters, 0), "{scheduler}");
    }
}

/// What a microbatch waits with between denoising and decoding is its own, though the next one is denoised on the same buffers, and
/// a finisher gives the same bits on another thread, meanwhile, twice, and without the pictures that are not wanted.
#[test]
fn what_waits_to_be_decoded_is_not_touched_by_the_next_call() {
    let pipeline = pipeline("tiny", &F32);
    pipeline.set_batching(PADDED);
    let parameters = parameters(SchedulerKind::Pndm, Recipe::default());
    let go_on = &mut |_: &StepProgress<'_>| StepControl::Continue;
    let whole = pipeline.generate(&neighbors(0), &parameters, go_on).unwrap().images;
    let waiting = pipeline.denoise(&neighbors(0), &parameters, go_on).unwrap();
    let finisher = pipeline.finisher();
    let finishing = std::thread::spawn(move || {
        let all = finisher.finish(&waiting, &[]).unwrap().images;
        (all, finisher.finish(&waiting, &[false, true, false, false]).unwrap().images, waiting)
    });
    pipeline.denoise(&neighbors(1), &parameters, go_on).unwrap();
    let (all, without, waiting) = finishing.join().unwrap();
    assert_eq!(all, whole);
    assert_eq!(pipeline.finisher().finish(&waiting, &[]).unwrap().images, whole, "after the next call");
    assert!(matches!(without[1], Err(ImageError::Dropped { .. })));
    for place in [0, 2, 3] {
        assert_eq!(without[place], whole[place]);
    }
}

#[test]
fn fewer_are_decoded_at_once_until_it_is_one() {
    let pipeline = pipeline("tiny", &F32);
    pipeline.set_batching(Batching { decode_size: 4, ..PADDED });
    let parameters = parameters(SchedulerKind::Pndm, Recipe::default());
    let denoised = pipeline.denoise(&neighbors(0), &parameters, &mut |_| StepControl::Continue).unwrap();
    let finisher = pipeline.finisher();
    let fewer: Vec<Option<usize>> = (0..3).map(|_| finisher.decode_fewer(&denoised)).collect();
    assert_eq!(fewer, [Some(2), Some(1), None]);
    assert!(finisher.finish(&denoised, &[]).unwrap().images.iter().all(Result::is_ok));
}

#[test]
fn dropped_pictures_keep_their_place_and_the_others_their_bits() {
    let pipeline = pipeline("tiny", &F32);
    pipeline.set_batching(PADDED);
    let parameters = parameters(SchedulerKind::EulerA, Recipe::default());
    let whole = pipeline.generate(&neighbors(0), &parameters, &mut |_| StepControl::Continue).unwrap();
    assert_eq!(whole.batch_size, PLACES);
    let mut active_at = Vec::new();
    let generation = pipeline.generate(&neighbors(0), &parameters, &mut |progress| {
        active_at.push(progress.active.to_vec());
        if progress.step_index == 1 { StepControl::Drop(vec![0, 2]) } else { StepControl::Continue }
    });
    let images = generation.unwrap().images;
    assert_eq!(active_at, [vec![0, 1, 2, 3], vec![0, 1, 2, 3], vec![1, 3], vec![1, 3], vec![1, 3]]);
    for place in [1, 3] {
        assert_eq!(images[place], whole.images[place]);
    }
    assert!(images[0].is_err() && images[2].is_err());
}

/// A noise scheduler that stays outside the step gets the numbers that it gets for a picture alone, so the bits are the same;
/// those within it are summed up ahead in f64, so theirs round a little differently.
#[test]
fn a_batch_of_one_is_a_picture_alone() {
    let pipeline = pipeline("tiny", &F32);
    let of_one = Batching { size: BatchSize::Padded(1), decode_size: 1, graph: false };
    for scheduler in SchedulerKind::ALL {
        let parameters = parameters(scheduler, Recipe::default());
        let [alone, batched] = [Batching::of(F32.device), of_one].map(|batching| {
            pipeline.set_batching(batching);
            bits_of(&pipeline, &[job()], &parameters, 0)
        });
        let is_outside =
            matches!(scheduler, SchedulerKind::EulerA | SchedulerKind::Unipc | SchedulerKind::Lms);
        if is_outside {
            assert!(alone == batched, "{scheduler}");
            continue;
        }
        let numbers = |bits: &[Vec<u32>]| {
            let numbers: Vec<f32> = bits.concat().into_iter().map(f32::from_bits).collect();
            Tensor::from_slice(&numbers).to_kind(Kind::Double)
        };
        let (alone, batched) = (numbers(&alone.0), numbers(&batched.0));
        let largest = |tensor: &Tensor| tensor.abs().max().double_value(&[]);
        let difference = largest(&(&alone - &batched)) / largest(&alone);
        assert!(difference < 1e-5, "{scheduler}: {difference:e}");
    }
}

#[test]
#[expect(clippy::print_stderr, reason = "a test that was not made has to say so")]
fn a_gpu_keeps_the_promise_with_graphs_and_without() {
    if !Path::new("/dev/nvidiactl").exists() {
        eprintln!("skipped: there is no GPU here");
        return;
    }
    let output = Command::new(env!("CARGO_BIN_EXE_darkroom-worker"))
        .args(["--log", "warn", "bench", "--check-company", "--device", "cuda", "--size", "small"])
        .args(["--dtypes", "f16", "--batch-sizes", "8", "--num-inference-steps", "6", "--graph", "off,on"])
        .output()
        .unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let last = String::from_utf8(output.stdout).unwrap().lines().last().unwrap().to_owned();
    let report: serde_json::Value = serde_json::from_str(&last).unwrap();
    assert!(report["replayed_steps"].as_u64().unwrap() > 0, "{report}");
}
