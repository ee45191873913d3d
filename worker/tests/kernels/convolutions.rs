//! Convolutions by pinned engines, as far as they need no GPU: what a model asks of them, that bias and residual inside make the
//! same pictures, and how engines are chosen. Plans by the real cuDNN are in `worker/tests/cudnn.rs`.

use std::cell::Cell;
use std::collections::{BTreeMap, BTreeSet};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};

use tch::{Device, Kind, TchError, Tensor};
use worker::diffusion::convolution::{Adds, Convolution, Convolve, CudnnError, EngineChoice, Operands};
use worker::diffusion::kernels::Kernels;
use worker::diffusion::tuning::{Engines, Recorder, Tuned, Tuner};
use worker::diffusion::{
    BatchSize, Batching, ComputeDtype, GenerationParameters, ImageRequest, LoadOptions, Recipe,
    SchedulerKind, StableDiffusionPipeline, StepControl,
};

use super::golden::{F32, golden, max_difference};
use super::on_host::HostKernels;
use super::{by_pixels, randn};

/// Computes every convolution in f32 from what its description says, and rounds once, as an engine of cuDNN does.
#[derive(Debug, Default)]
struct InOne {
    calls: Mutex<BTreeMap<Convolution, usize>>,
}

fn in_one(convolution: &Convolution, operands: &Operands<'_>) -> Tensor {
    let Convolution { batch_size, in_channels, height, width, out_channels, kernel_size, .. } = *convolution;
    assert_eq!(operands.input.size(), [batch_size, in_channels, height, width]);
    assert_eq!(operands.weight.size(), [out_channels, in_channels, kernel_size, kernel_size]);
    let adds = match (operands.bias, operands.residual) {
        (None, None) => Adds::Nothing,
        (Some(_), None) => Adds::Bias,
        (Some(_), Some(_)) => Adds::BiasAndResidual,
        (None, Some(_)) => panic!("a residual alone"),
    };
    assert_eq!(convolution.adds, adds);
    let (stride, padding) = (convolution.stride, convolution.padding);
    let output = Operands { stride, padding, ..*operands }.convolve_in_f32().unwrap();
    assert_eq!(output.size(), convolution.output_size());
    by_pixels(&output.to_kind(operands.input.kind()))
}

impl Convolve for InOne {
    fn convolve(
        &self,
        convolution: &Convolution,
        operands: &Operands<'_>,
    ) -> Result<Option<Tensor>, TchError> {
        *self.calls.lock().unwrap().entry(*convolution).or_default() += 1;
        Ok(Some(in_one(convolution, operands)))
    }

    fn name(&self) -> &str {
        "in one"
    }
}

/// Two pictures in a batch of three in f16: final latents and pixels.
fn draw(kernels: Kernels) -> (Tensor, Vec<u8>, String) {
    let options = LoadOptions { dtype: ComputeDtype::F16, ..F32 };
    let pipeline =
        StableDiffusionPipeline::from_pretrained_with_kernels(&golden("tiny"), &options, kernels).unwrap();
    pipeline.set_batching(Batching { size: BatchSize::Padded(3), decode_size: 2, graph: false });
    let request = |seed| ImageRequest {
        prompt: "a red circle".to_owned(),
        negative_prompt: "blurry".to_owned(),
        seed,
        guidance_scale: 3.0,
    };
    let parameters = GenerationParameters {
        width: 40,
        height: 24,
        num_inference_steps: 2,
        scheduler: SchedulerKind::Ddim,
        noise: None,
        recipe: Recipe { guidance_interval: (0.0, 0.5), cache_interval: 1 },
    };
    let mut latents = Vec::new();
    let generation = pipeline
        .generate(&[request(7), request(8)], &parameters, &mut |progress| {
            latents = progress.latents_f32().unwrap();
            StepControl::Continue
        })
        .unwrap();
    let pixels = generation.images.into_iter().flat_map(|image| image.unwrap().pixels).collect();
    (Tensor::from_slice2(&latents), pixels, pipeline.kernels())
}

#[test]
fn pictures_with_bias_and_residual_inside_the_convolutions_are_the_same() {
    let (apart, inside) = (HostKernels::new(false), HostKernels::new(false));
    let convolver = Arc::new(InOne::default());
    let (expected, expected_pixels, _) = draw(apart.kernels());
    let (latents, pixels, name) = draw(inside.kernels().with_convolver(convolver.clone()));
    assert_eq!(name, "fused host, convolutions in one");
    // Roundings of 16 bits, some here and some there.
    let difference = max_difference(&latents, &expected) / expected.abs().max().double_value(&[]);
    assert!(difference > 0.0 && difference < 1e-2, "{difference:e}");
    let far =
        pixels.iter().zip(&expected_pixels).filter(|(ours, theirs)| ours.abs_diff(**theirs) > 4).count();
    assert!(far * 100 < pixels.len(), "{far} of {} values differ by more than 4", pixels.len());

    // What our own kernel added after a convolution is added inside now; it still does so after transformers and attention. To
    // the last convolutions of UNet and decoder and the one before the decoder libtorch had added a bias itself.
    let launches = |host: &HostKernels| host.launches_of("add_bias_residual");
    assert!(launches(&inside) < launches(&apart) / 2);
    let calls = convolver.calls.lock().unwrap();
    let count = |adds: &[Adds]| -> usize {
        calls.iter().filter(|(convolution, _)| adds.contains(&convolution.adds)).map(|(_, count)| count).sum()
    };
    let unet_calls = 2;
    let decoder_calls = 1;
    assert_eq!(
        count(&[Adds::Bias, Adds::BiasAndResidual]),
        launches(&apart) - launches(&inside) + unet_calls + 2 * decoder_calls
    );
    // A ResNet's first convolution leaves its bias to the norm.
    assert_eq!(count(&[Adds::Nothing]), count(&[Adds::BiasAndResidual]));
}

#[test]
fn a_models_convolutions_are_seen_with_addends_and_without() {
    let host = HostKernels::new(false);
    let recorder = Arc::new(Recorder::default());
    let (by_recorder, ..) = draw(host.kernels().with_convolver(recorder.clone()));
    let (alone, ..) = draw(HostKernels::new(false).kernels());
    assert_eq!(max_difference(&by_recorder, &alone), 0.0, "recording changes nothing");
    let seen = recorder.seen();
    let batch_sizes: BTreeSet<i64> = seen.iter().map(|convolution| convolution.batch_size).collect();
    // With guidance, without, and in the decoder.
    assert_eq!(batch_sizes, BTreeSet::from([6, 3, 2]));
    let without = |convolution: &Convolution| Convolution { adds: Adds::Nothing, ..*convolution };
    for convolution in seen.iter().filter(|convolution| convolution.adds == Adds::BiasAndResidual) {
        assert!(seen.contains(&without(convolution)), "{convolution}");
    }
    // The last ones, which no norm reads.
    let alone: Vec<i64> = seen
        .iter()
        .filter(|convolution| convolution.adds == Adds::Bias && !seen.contains(&without(convolution)))
        .map(|convolution| convolution.out_channels)
        .collect();
    assert!(alone.contains(&4) && alone.contains(&3), "{alone:?}");
}

#[test]
fn what_engines_are_not_made_for_stays_libtorchs() {
    let host = HostKernels::new(false);
    let convolver = Arc::new(InOne::default());
    let kernels = host.kernels().with_convolver(convolver.clone());
    let operands =
        |input, weight| Operands { input, weight, bias: None, residual: None, stride: 1, padding: 1 };
    let map = |kind| (by_pixels(&randn(&[2, 8, 5, 4], 0, kind)), by_pixels(&randn(&[6, 8, 3, 3], 1, kind)));
    let (input, weight) = map(Kind::Float);
    let output = kernels.convolve(&operands(&input, &weight)).unwrap();
    assert_eq!(max_difference(&output, &operands(&input, &weight).convolve().unwrap()), 0.0);
    assert!(convolver.calls.lock().unwrap().is_empty(), "f32 is not in 16 bits");
    let (input, weight) = map(Kind::Half);
    let by_channels = weight.contiguous();
    let _ = kernels.convolve(&operands(&input, &by_channels)).unwrap();
    assert!(convolver.calls.lock().unwrap().is_empty(), "weights by channels");
    let by_channels = input.contiguous();
    let _ = kernels.convolve(&operands(&by_channels, &weight)).unwrap();
    let calls = convolver.calls.lock().unwrap();
    let (convolution, _) = calls.first_key_value().expect("an input is laid out");
    assert_eq!(convolution.to_string(), "f16 2×8×5×4 → 6, 3×3, stride 1");
    assert_eq!(convolution.flops(), 2.0 * (2 * 6 * 5 * 4) as f64 * (8 * 9) as f64);
}

/// What an engine of the test does.
#[derive(Debug, Clone, Copy, PartialEq)]
enum Nature {
    Right,
    /// Another sum.
    Wrong,
    /// Right, and in the last place of a batch not to the last bit.
    ByPlace,
    /// Right, with other bits each time.
    Restless,
    /// Cannot be made.
    Missing,
}

/// An engine of the test, with the seconds that it takes less than libtorch by the test's clock.
#[derive(Debug)]
struct TestEngine {
    nature: Nature,
    saves: f64,
    runs: AtomicUsize,
}

thread_local! {
    static NOW: Cell<f64> = const { Cell::new(0.0) };
}

/// By this clock waiting for the device takes a second, libtorch takes no time, and engines save some.
fn pass(seconds: f64) {
    NOW.set(NOW.get() + seconds);
}

impl Convolve for TestEngine {
    fn convolve(
        &self,
        convolution: &Convolution,
        operands: &Operands<'_>,
    ) -> Result<Option<Tensor>, TchError> {
        pass(-self.saves);
        let output = in_one(convolution, operands);
        let one_bit = |at: i64| {
            let mut value = output.get(at).get(0).get(0).get(0);
            value.copy_(&(&value * 1.001));
        };
        let run = self.runs.fetch_add(1, Ordering::Relaxed);
        match self.nature {
            Nature::Wrong => {
                let _ = output.shallow_clone().g_mul_(&Tensor::from(1.1));
            }
            Nature::ByPlace => one_bit(convolution.batch_size - 1),
            Nature::Restless if run % 2 == 1 => (0..convolution.batch_size).for_each(one_bit),
            _ => {}
        }
        Ok(Some(output))
    }

    fn name(&self) -> &str {
        "a test's"
    }
}

/// The engines for each kind of addends, the number of each its place.
struct TestEngines(BTreeMap<Adds, Vec<(Nature, f64)>>);

impl Engines for TestEngines {
    fn candidates(&self, convolution: &Convolution) -> Result<Vec<EngineChoice>, CudnnError> {
        let count = self.0.get(&convolution.adds).map_or(0, Vec::len);
        Ok((0..count as i64).map(|engine| EngineChoice { engine, knobs: BTreeMap::new() }).collect())
    }

    fn convolver(
        &self,
        convolution: &Convolution,
        choice: &EngineChoice,
    ) -> Result<Arc<dyn Convolve>, CudnnError> {
        let (nature, saves) = self.0[&convolution.adds][choice.engine as usize];
        if nature == Nature::Missing {
            return Err(CudnnError::Library { reason: "it is missing".to_owned() });
        }
        Ok(Arc::new(TestEngine { nature, saves, runs: AtomicUsize::new(0) }))
    }
}

/// For each kind of addends that a convolution is asked for with, the engine that is pinned, and how many were tried and refused.
fn tune(engines: &[(Adds, &[(Nature, f64)])], asked_for: &[Adds]) -> Vec<(Option<i64>, usize, usize)> {
    let engines = TestEngines(engines.iter().map(|(adds, engines)| (*adds, engines.to_vec())).collect());
    let convolution = |&adds: &Adds| Convolution {
        dtype: ComputeDtype::F16,
        batch_size: 3,
        in_channels: 8,
        height: 5,
        width: 4,
        out_channels: 6,
        kernel_size: 3,
        stride: 1,
        padding: 1,
        adds,
    };
    let tuner = Tuner {
        kernels: HostKernels::new(false).kernels(),
        engines: &engines,
        device: Device::Cpu,
        wait: || {
            pass(1.0);
            Ok(())
        },
        clock: || NOW.get(),
    };
    let mut told = 0;
    let tuned = tuner.tune(&asked_for.iter().map(convolution).collect(), |_| told += 1).unwrap();
    assert_eq!(told, asked_for.len());
    let found = |tuned: &Tuned| {
        (tuned.pinned.as_ref().map(|pinned| pinned.choice.engine), tuned.tried, tuned.refused)
    };
    tuned.iter().map(found).collect()
}

#[test]
fn the_fastest_engine_that_is_right_everywhere_and_always_is_pinned() {
    use Nature::{ByPlace, Missing, Restless, Right, Wrong};
    let engines: &[_] = &[
        (Right, 0.1),
        (Wrong, 0.9),
        (ByPlace, 0.8),
        (Right, 0.3),
        (Restless, 0.7),
        (Missing, 0.95),
        (Right, 0.2),
    ];
    assert_eq!(tune(&[(Adds::Nothing, engines)], &[Adds::Nothing]), [(Some(3), 6, 3)]);
    // One that is slower than libtorch's way is not pinned, nor one that is wrong.
    assert_eq!(tune(&[(Adds::Nothing, &[(Right, -0.5)])], &[Adds::Nothing]), [(None, 1, 0)]);
    assert_eq!(tune(&[(Adds::Nothing, &[(Wrong, 0.5)])], &[Adds::Nothing]), [(None, 1, 1)]);
    assert_eq!(tune(&[], &[Adds::Bias]), [(None, 0, 0)]);
}

#[test]
fn addends_are_inside_only_where_that_is_faster_than_after() {
    use Nature::Right;
    let both = [Adds::Nothing, Adds::BiasAndResidual];
    let tuned = |alone: f64, inside: f64| {
        let pinned = tune(&[(both[0], &[(Right, alone)]), (both[1], &[(Right, inside)])], &both);
        pinned.into_iter().map(|(pinned, ..)| pinned.is_some()).collect::<Vec<_>>()
    };
    assert_eq!(tuned(0.2, 0.3), [true, true]);
    assert_eq!(tuned(0.3, 0.2), [true, false]);
    // Beside libtorch's way, if no engine alone was worth pinning.
    assert_eq!(tuned(-0.3, 0.1), [false, true]);
    assert_eq!(tuned(-0.3, -0.1), [false, false]);
    // Where no norm reads the output, libtorch adds the bias itself.
    assert_eq!(tune(&[(Adds::Bias, &[(Right, 0.1)])], &[Adds::Bias]), [(Some(0), 1, 0)]);
}
