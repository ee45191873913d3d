//! Our own CUDA kernels without a GPU: the same source compiled for this CPU against libtorch's operations, the same
//! launches through whole networks against the golden files, and what is checked in against its sources.
#![allow(clippy::unwrap_used, reason = "clippy.toml allows it in test functions; this is for their helpers")]

#[path = "kernels/convolutions.rs"]
mod convolutions;
#[path = "kernels/feature_maps.rs"]
mod feature_maps;
#[path = "support/golden.rs"]
mod golden;
#[path = "kernels/on_host.rs"]
mod on_host;

use std::collections::BTreeSet;
use std::fs;
use std::path::Path;

use golden::{CHECKPOINTS, assert_close, config, max_difference, same_key, tensors, weights};
use on_host::HostKernels;
use sha2::{Digest as _, Sha256};
use tch::{Device, Kind, Tensor};
use worker::diffusion::kernels::{
    CUBINS, GroupNormParameters, Kernel, Kernels, LayerNormParameters, LinearStepTensors, MANIFEST,
    self_check,
};
use worker::diffusion::models::autoencoder_kl::{AutoencoderKL, AutoencoderKLConfig};
use worker::diffusion::models::unet_2d_condition::UNet2DConditionModel;
use worker::diffusion::models::unet_2d_config::UNet2DConditionConfig;
use worker::diffusion::rng::Generator;
use worker::diffusion::schedulers::SchedulerConfig;
use worker::diffusion::{
    BatchSize, Batching, ComputeDtype, GenerationParameters, ImageRequest, Recipe, SchedulerKind,
    StableDiffusionPipeline, StepControl,
};

/// Each dtype and how far its results may be from arithmetic in f64, of the largest value: its rounding, and some.
const KINDS: [(Kind, f64); 3] = [(Kind::Float, 1e-5), (Kind::Half, 1e-3), (Kind::BFloat16, 8e-3)];

/// Large enough to be missed where it is forgotten.
const EPS: f64 = 0.3;

fn randn(size: &[i64], seed: u64, kind: Kind) -> Tensor {
    Generator::new(seed).randn(size, Kind::Float).unwrap().to_kind(kind)
}

/// The same numbers where libtorch's arithmetic has digits to spare.
fn double(tensor: &Tensor) -> Tensor {
    tensor.to_kind(Kind::Double)
}

/// Feature maps as they lie by pixels.
fn by_pixels(map: &Tensor) -> Tensor {
    Kernels::plain(true).lay_out(map).unwrap()
}

/// What `compute` gives with the kernels, whatever the order of threads, is close to what libtorch gives in f64.
fn compare(name: &str, tolerance: f64, compute: impl Fn(&Kernels) -> Tensor, expected: &Tensor) {
    let orders = [false, true].map(|reversed| {
        let host = HostKernels::new(reversed);
        let output = compute(&host.kernels());
        assert!(host.launches() > 0, "{name}: no kernel took it");
        output
    });
    assert_eq!(orders[0].size(), expected.size(), "{name}");
    assert_eq!(max_difference(&orders[0], &orders[1]), 0.0, "{name}: a race between threads");
    let difference = max_difference(&orders[0], expected) / expected.abs().max().double_value(&[]);
    assert!(difference <= tolerance, "{name}: differs by {difference:e} of the largest value");
}

#[test]
fn group_norm_with_silu_and_addend_equals_libtorch() {
    // Batch size, channels, height, width, groups. Groups of 10, 20 and 30 channels do not end where 16 bytes do; 30 and
    // 6 channels are read one by one; 1×320×64×64 and 1×128×72×40 are cut into many chunks.
    let shapes = [
        [1, 320, 8, 8, 32],
        [2, 320, 9, 7, 32],
        [3, 640, 5, 3, 32],
        [1, 960, 4, 4, 32],
        [2, 1280, 3, 5, 32],
        [1, 1920, 2, 3, 32],
        [1, 2560, 4, 3, 32],
        [2, 32, 9, 13, 8],
        [3, 30, 5, 5, 3],
        [1, 6, 1, 1, 2],
        [1, 128, 72, 40, 32],
        [1, 320, 64, 64, 32],
    ];
    for (kind, tolerance) in KINDS {
        for [batch_size, channels, height, width, groups] in shapes {
            if height == 64 && kind != Kind::Half {
                continue; // Once is enough for the many threads of it.
            }
            let name = format!("{kind:?} {batch_size}x{channels}x{height}x{width}");
            // Far from zero, where sums of squares lose their digits.
            let offset = if kind == Kind::Float { 100.0 } else { 1.0 };
            let input = by_pixels(&(randn(&[batch_size, channels, height, width], 0, kind) + offset));
            let weight = randn(&[channels], 1, kind);
            let bias = randn(&[channels], 2, kind);
            for (silu, addend) in [
                (false, None),
                (true, Some(randn(&[channels], 3, kind))),
                (true, Some(randn(&[batch_size, channels], 4, kind))),
            ] {
                let parameters =
                    |weight, bias| GroupNormParameters { weight, bias, num_groups: groups, eps: EPS, silu };
                let (wide_weight, wide_bias) = (double(&weight), double(&bias));
                let wide_addend = addend.as_ref().map(double);
                let expected = Kernels::plain(true)
                    .group_norm(&double(&input), wide_addend.as_ref(), &parameters(&wide_weight, &wide_bias))
                    .unwrap();
                // At an offset of 100, f32 has that many digits less.
                let tolerance = if kind == Kind::Float { 5e-5 } else { tolerance };
                let compute = |kernels: &Kernels| {
                    kernels.group_norm(&input, addend.as_ref(), &parameters(&weight, &bias)).unwrap()
                };
                compare(&name, tolerance, compute, &expected);
            }
        }
    }
}

#[test]
fn a_samples_norm_does_not_depend_on_the_batch() {
    let kernels = HostKernels::new(false).kernels();
    let (weight, bias) = (randn(&[320], 1, Kind::Half), randn(&[320], 2, Kind::Half));
    let input = by_pixels(&randn(&[3, 320, 12, 10], 0, Kind::Half));
    let norm = GroupNormParameters { weight: &weight, bias: &bias, num_groups: 32, eps: 1e-5, silu: true };
    let together = kernels.group_norm(&input, None, &norm).unwrap();
    let rows = input.permute([0, 2, 3, 1]).flatten(1, 2);
    let layer = LayerNormParameters { weight: &weight, bias: &bias, eps: 1e-5 };
    let rows_together = kernels.layer_norm(&rows, None, &layer).unwrap();
    for i in 0..3 {
        let alone = kernels.group_norm(&input.narrow(0, i, 1), None, &norm).unwrap();
        assert_eq!(max_difference(&alone, &together.narrow(0, i, 1)), 0.0);
        let alone = kernels.layer_norm(&rows.narrow(0, i, 1), None, &layer).unwrap();
        assert_eq!(max_difference(&alone, &rows_together.narrow(0, i, 1)), 0.0);
    }
}

#[test]
fn layer_norm_with_pending_biases_equals_libtorch() {
    for (kind, tolerance) in KINDS {
        for [rows, channels] in [[1, 8], [13, 320], [9, 640], [17, 1280], [5, 768], [7, 77], [3, 36]] {
            let input = randn(&[rows, channels], 0, kind) * 3.0 + 5.0;
            let [weight, bias, pending] = [1, 2, 3].map(|seed| randn(&[channels], seed, kind));
            for pending in [None, Some(&pending)] {
                let parameters = |weight, bias| LayerNormParameters { weight, bias, eps: EPS };
                let (wide_weight, wide_bias) = (double(&weight), double(&bias));
                let wide_pending = pending.map(double);
                let expected = Kernels::plain(true)
                    .layer_norm(&double(&input), wide_pending.as_ref(), &parameters(&wide_weight, &wide_bias))
                    .unwrap();
                let compute = |kernels: &Kernels| {
                    kernels.layer_norm(&input, pending, &parameters(&weight, &bias)).unwrap()
                };
                compare(&format!("{kind:?} {rows}x{channels}"), tolerance, compute, &expected);
            }
        }
    }
}

#[test]
fn geglu_equals_libtorch() {
    for (kind, tolerance) in KINDS {
        for [rows, channels] in [[1, 8], [3, 5], [7, 1280], [2, 2560], [1, 5120], [65, 12]] {
            let input = randn(&[rows, 2 * channels], 0, kind) * 3.0;
            let bias = randn(&[2 * channels], 1, kind);
            for bias in [None, Some(&bias)] {
                let wide_bias = bias.map(double);
                let expected = Kernels::plain(true).geglu(&double(&input), wide_bias.as_ref()).unwrap();
                let compute = |kernels: &Kernels| kernels.geglu(&input, bias).unwrap();
                compare(&format!("{kind:?} {rows}x{channels}"), tolerance, compute, &expected);
            }
        }
    }
}

#[test]
fn what_a_model_checks_before_it_trusts_kernels_passes_here() {
    for dtype in [ComputeDtype::F32, ComputeDtype::F16, ComputeDtype::Bf16] {
        self_check(&HostKernels::new(false).kernels(), dtype).unwrap();
    }
}

/// The samples after each step of a noise scheduler and of the kernel, from the same predictions.
fn compare_steps(
    kernels: &Kernels,
    kind: SchedulerKind,
    config: &SchedulerConfig,
    dtype: Kind,
    is_guided: bool,
) {
    let mut scheduler = kind.build(config, 9).unwrap();
    let steps = scheduler.linear_steps().unwrap().unwrap();
    let mut expected = randn(&[2, 4, 3, 5], 0, Kind::Float) * scheduler.init_noise_sigma();
    let kept = Tensor::zeros([steps.num_rows as i64, 2, 4, 3, 5], (Kind::Float, Device::Cpu));
    kept.select(0, 0).copy_(&expected);
    let by_plain = kept.copy();
    let guidance = Tensor::from_slice(&[7.5f32, 3.0]).view([2, 1, 1, 1]);
    let guidance_scale = is_guided.then_some(&guidance);
    for (step_index, step) in steps.steps.iter().enumerate() {
        let name = format!("{kind} in {dtype:?}, guided: {is_guided}, step {step_index}");
        let noise_pred = randn(&[if is_guided { 4 } else { 2 }, 4, 3, 5], 1 + step_index as u64, dtype);
        let wide = noise_pred.to_kind(Kind::Float);
        let output = if is_guided {
            let (without, with) = (wide.narrow(0, 0, 2), wide.narrow(0, 2, 2));
            &without + (with - &without) * &guidance
        } else {
            wide
        };
        expected = scheduler.step(&output, step_index, &expected, &mut []).unwrap();
        let numbers: Vec<f32> =
            [step.input_scale].into_iter().chain(step.weights()).map(|number| number as f32).collect();
        let numbers = Tensor::from_slice(&numbers);
        let [sample, plain_sample] = [0, 1].map(|_| Tensor::zeros([2, 4, 3, 5], (dtype, Device::Cpu)));
        let tensors = |kept, sample| LinearStepTensors {
            noise_pred: &noise_pred,
            guidance_scale,
            numbers: &numbers,
            kept,
            sample,
        };
        kernels.linear_step(&tensors(&kept, &sample)).unwrap();
        Kernels::plain(false).linear_step(&tensors(&by_plain, &plain_sample)).unwrap();
        assert_eq!(max_difference(&kept, &by_plain), 0.0, "{name}: other bits than libtorch's");
        assert_eq!(max_difference(&sample, &plain_sample), 0.0, "{name}: other bits than libtorch's");
        assert_close(&name, &kept.select(0, 0), &expected);
        assert_eq!(max_difference(&sample, &kept.select(0, 0).to_kind(dtype)), 0.0, "{name}");
    }
}

#[test]
fn guided_steps_equal_the_schedulers() {
    let json = fs::read_to_string(golden::golden("small/scheduler/scheduler_config.json")).unwrap();
    let velocity = {
        let mut json: serde_json::Value = serde_json::from_str(&json).unwrap();
        json["prediction_type"] = "v_prediction".into();
        json.to_string()
    };
    let host = HostKernels::new(false);
    for json in [json, velocity] {
        let config = SchedulerConfig::from_json(&json).unwrap();
        for kind in
            [SchedulerKind::Pndm, SchedulerKind::Ddim, SchedulerKind::Euler, SchedulerKind::Dpmpp2mKarras]
        {
            for (dtype, is_guided) in
                [(Kind::Float, true), (Kind::Float, false), (Kind::Half, true), (Kind::BFloat16, true)]
            {
                compare_steps(&host.kernels(), kind, &config, dtype, is_guided);
            }
        }
    }
    assert!(host.launches() > 100);
}

/// The golden networks with feature maps by pixels, and with all operations that kernels take done by them.
#[test]
fn whole_networks_by_pixels_equal_diffusers() {
    let host = HostKernels::new(false);
    for (name, kernels) in [("plain", Kernels::plain(true)), ("fused", host.kernels())] {
        for checkpoint in CHECKPOINTS {
            let expected = tensors(&format!("{checkpoint}-stages/unet.safetensors"));
            let file = weights(checkpoint, "unet", "diffusion_pytorch_model", same_key);
            let file = file.with_kernels(kernels.clone());
            let unet_config = config(checkpoint, "unet/config.json", UNet2DConditionConfig::read);
            let unet = UNet2DConditionModel::load(&file.root(), &unet_config).unwrap();
            assert!(file.into_faults().is_empty());
            let _no_grad = tch::no_grad_guard();
            let states = &expected["encoder_hidden_states"];
            let timesteps = Vec::<f64>::try_from(expected["output_timesteps"].to_kind(Kind::Double)).unwrap();
            let time = &unet.embed_timesteps(&timesteps[..1], Kind::Float).unwrap()[0];
            let text = unet.project_text(states).unwrap();
            let launches = host.launches();
            let output = unet.forward(&expected["sample"], time, &text).unwrap();
            assert_close(&format!("{name} {checkpoint}"), &output, &expected["output.0"]);
            assert_eq!(output.stride()[1], 1, "{name} {checkpoint}: the output does not lie by pixels");
            if name == "fused" {
                // Of each ResNet four for its norms, and more.
                assert!(host.launches() - launches > 4 * 8, "{checkpoint}");
            }
            // At this size the up blocks grow to the size of their skip connections.
            let time = &unet.embed_timesteps(&[321.0], Kind::Float).unwrap()[0];
            let text = unet.project_text(&states.narrow(0, 0, 1)).unwrap();
            let output = unet.forward(&expected["sample_9x13"], time, &text).unwrap();
            assert_close(&format!("{name} {checkpoint} 9x13"), &output, &expected["output_9x13"]);
            // With guidance there are two texts for each sample.
            let text = unet.project_text(&states.narrow(0, 0, 2)).unwrap();
            let sample = &expected["sample_9x13"];
            let (once, deep_once) = unet.forward_and_keep(sample, time, &text).unwrap();
            let twice = Tensor::cat(&[sample, sample], 0);
            let (apart, deep_apart) = unet.forward_and_keep(&twice, time, &text).unwrap();
            assert_close(&format!("{name} {checkpoint}, two texts"), &once, &apart);
            assert_close(&format!("{name} {checkpoint}, two texts, inner layers"), &deep_once, &deep_apart);

            let expected = tensors(&format!("{checkpoint}-stages/vae.safetensors"));
            let vae_config = config(checkpoint, "vae/config.json", AutoencoderKLConfig::read);
            let file = weights(checkpoint, "vae", "diffusion_pytorch_model", AutoencoderKL::rename_key);
            let file = file.with_kernels(kernels.clone());
            let vae = AutoencoderKL::load(&file.root(), &vae_config);
            assert!(file.into_faults().is_empty());
            let latents = &expected["latents_5x7"] * vae_config.scaling_factor;
            let image = vae.decode(&latents).unwrap();
            assert_close(&format!("{name} {checkpoint}"), &image, &expected["image_5x7"]);
        }
    }
}

/// Whole pictures as a GPU makes them, batched, filled up, guided and by our own kernels, are those that the CPU makes one by one.
#[test]
fn pictures_by_the_kernels_in_a_batch_are_the_cpus() {
    let request = |seed: u64, prompt: &str| ImageRequest {
        prompt: prompt.to_owned(),
        negative_prompt: "blurry".to_owned(),
        seed,
        guidance_scale: 7.5,
    };
    let requests = [request(7, "a red circle"), request(8, "two stars")];
    let host = HostKernels::new(false);
    let alone = StableDiffusionPipeline::from_pretrained(&golden::golden("tiny"), &golden::F32).unwrap();
    let batched = StableDiffusionPipeline::from_pretrained_with_kernels(
        &golden::golden("tiny"),
        &golden::F32,
        host.kernels(),
    )
    .unwrap();
    batched.set_batching(Batching { size: BatchSize::Padded(3), decode_size: 2, graph: false });
    let saving = Recipe { guidance_interval: (0.2, 0.8), cache_interval: 2 };
    for (scheduler, recipe) in [
        (SchedulerKind::Pndm, Recipe::default()),
        (SchedulerKind::Dpmpp2m, saving),
        // Its step is not the kernel's.
        (SchedulerKind::EulerA, Recipe::default()),
    ] {
        let parameters = GenerationParameters {
            width: 40,
            height: 24,
            num_inference_steps: 5,
            scheduler,
            noise: None,
            recipe,
        };
        let draw = |pipeline: &StableDiffusionPipeline| {
            let mut latents = Vec::new();
            let generation = pipeline.generate(&requests, &parameters, &mut |progress| {
                latents = progress.latents_f32().unwrap();
                StepControl::Continue
            });
            (Tensor::from_slice2(&latents), generation.unwrap())
        };
        let launches = host.launches();
        let ((latents, by_kernels), (expected, by_cpu)) = (draw(&batched), draw(&alone));
        assert!(host.launches() - launches > 100, "{scheduler}: the kernels did not draw");
        assert_eq!(by_kernels.batch_size, 3);
        assert_close(&format!("{scheduler}"), &latents, &expected);
        for (ours, theirs) in by_kernels.images.iter().zip(&by_cpu.images) {
            let (ours, theirs) = (ours.as_ref().unwrap(), theirs.as_ref().unwrap());
            let is_close = |(a, b): (&u8, &u8)| a.abs_diff(*b) <= 1;
            assert!(ours.pixels.iter().zip(&theirs.pixels).all(is_close), "{scheduler}");
        }
    }
}

/// Fails when a source of a kernel was changed and `worker/kernels/compile.py` was not run.
#[test]
fn the_cubins_were_made_from_the_sources() {
    let manifest: serde_json::Value = serde_json::from_str(MANIFEST).unwrap();
    let digest = |bytes: &[u8]| hex::encode(Sha256::digest(bytes));
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("kernels");
    let mut sources = BTreeSet::new();
    for entry in fs::read_dir(&folder).unwrap() {
        let path = entry.unwrap().path();
        let is_source = path.extension().is_some_and(|extension| extension == "cu" || extension == "cuh");
        if is_source {
            let name = path.file_name().unwrap().to_string_lossy().into_owned();
            let bytes = fs::read(&path).unwrap();
            assert_eq!(manifest["sources"][&name], digest(&bytes), "{name}: run worker/kernels/compile.py");
            sources.insert(name);
        }
    }
    let recorded: BTreeSet<String> = manifest["sources"].as_object().unwrap().keys().cloned().collect();
    assert_eq!(recorded, sources);
    assert!(!sources.is_empty());
    for cubin in CUBINS {
        assert_eq!(manifest["cubins"][cubin.architecture], digest(cubin.bytes), "{}", cubin.architecture);
    }
    let size: usize = CUBINS.iter().map(|cubin| cubin.bytes.len()).sum();
    assert!(size < 2 << 20, "{size} bytes of kernels in the binary");
}

/// The global functions that an ELF file defines, by its symbol table.
fn functions(elf: &[u8]) -> BTreeSet<String> {
    let number = |at: usize, size: usize| {
        let bytes = elf[at..at + size].iter().rev();
        bytes.fold(0usize, |number, &byte| number << 8 | usize::from(byte))
    };
    assert_eq!(elf[..6], *b"\x7fELF\x02\x01", "64 bits, little endian");
    let (sections, section_size, num_sections) = (number(0x28, 8), number(0x3a, 2), number(0x3c, 2));
    let section = |i: usize| sections + i * section_size;
    let (offset, size) = (|at: usize| number(at + 0x18, 8), |at: usize| number(at + 0x20, 8));
    let mut names = BTreeSet::new();
    for table in (0..num_sections).map(section).filter(|&at| number(at + 4, 4) == 2) {
        let strings = offset(section(number(table + 0x28, 4)));
        for symbol in (offset(table)..offset(table) + size(table)).step_by(24) {
            // A global function that is defined in some section.
            if elf[symbol + 4] == 0x12 && number(symbol + 6, 2) != 0 {
                let name = &elf[strings + number(symbol, 4)..];
                let end = name.iter().position(|&byte| byte == 0).unwrap();
                names.insert(String::from_utf8(name[..end].to_vec()).unwrap());
            }
        }
    }
    names
}

#[test]
fn every_cubin_has_every_kernel_that_is_asked_for_and_no_other() {
    let asked_for: BTreeSet<String> = Kernel::all().iter().map(Kernel::to_string).collect();
    // Attention has two head sizes and two dtypes.
    assert_eq!(asked_for.len(), 6 * 3 * 2 + 3 + 2 * 2);
    for cubin in CUBINS {
        assert_eq!(functions(cubin.bytes), asked_for, "{}", cubin.architecture);
    }
}

#[test]
fn what_no_kernel_takes_is_left_to_libtorch() {
    let host = HostKernels::new(false);
    let kernels = host.kernels();
    // No kernel computes in 64 bits, holds such a row or has so many columns of threads.
    let vector = randn(&[8], 0, Kind::Double);
    let norm = LayerNormParameters { weight: &vector, bias: &vector, eps: 1e-5 };
    assert_eq!(kernels.layer_norm(&vector, None, &norm).unwrap().size(), [8]);
    let vector = randn(&[1288], 0, Kind::Half);
    let norm = LayerNormParameters { weight: &vector, bias: &vector, eps: 1e-5 };
    let _ = kernels.layer_norm(&vector, None, &norm).unwrap();
    let vector = randn(&[8200], 0, Kind::Float);
    let norm = GroupNormParameters { weight: &vector, bias: &vector, num_groups: 1, eps: 1e-5, silu: false };
    let _ = kernels.group_norm(&vector.view([1, 8200, 1, 1]), None, &norm).unwrap();
    let _ = kernels.geglu(&Tensor::zeros([0, 4], (Kind::Float, Device::Cpu)), None).unwrap();
    assert_eq!(host.launches(), 0);
}
