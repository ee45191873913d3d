//! Our own attention without a GPU: the kernel compiled for this CPU, tensor cores by their documented layouts, against exact
//! arithmetic and within a whole network.
#![allow(clippy::unwrap_used, reason = "clippy.toml allows it in test functions; this is for their helpers")]

#[path = "support/golden.rs"]
mod golden;
#[path = "kernels/on_host.rs"]
mod on_host;

use std::fs;

use golden::max_difference;
use on_host::HostKernels;
use serde_json::{Map, Value, json};
use tch::{Device, Kind, Tensor};
use worker::diffusion::config::ConfigFile;
use worker::diffusion::kernels::{Kernels, self_check};
use worker::diffusion::models::unet_2d_condition::UNet2DConditionModel;
use worker::diffusion::models::unet_2d_config::UNet2DConditionConfig;
use worker::diffusion::rng::Generator;
use worker::diffusion::weights::WeightFile;
use worker::diffusion::{ComputeDtype, KernelChoice};

/// The dtypes, and how much of a number rounding to them may change: half a unit in the last place of 11 and of 8 bits.
const KINDS: [(Kind, f64); 2] = [(Kind::Half, 1.0 / 2048.0), (Kind::BFloat16, 1.0 / 256.0)];

/// Queries, keys and values, each `(batch_size, heads, length, head_dim)`.
type Parts = [Tensor; 3];

fn randn(size: &[i64], seed: u64) -> Tensor {
    Generator::new(seed).randn(size, Kind::Float).unwrap()
}

/// As the projection of self-attention gives them: one product, heads and parts side by side.
fn packed(kind: Kind, [batch_size, heads, length, head_dim]: [i64; 4]) -> Parts {
    let packed = randn(&[batch_size, length, 3, heads, head_dim], 1).to_kind(kind).permute([2, 0, 3, 1, 4]);
    [0, 1, 2].map(|part| packed.select(0, part))
}

/// As cross-attention has them: queries from a product of their own, keys and values kept, each head in one piece.
fn to_text(kind: Kind, [batch_size, heads, length, head_dim]: [i64; 4], key_length: i64) -> Parts {
    let query = randn(&[batch_size, length, heads, head_dim], 1).to_kind(kind).transpose(1, 2);
    let [key, value] =
        [2, 3].map(|seed| randn(&[batch_size, heads, key_length, head_dim], seed).to_kind(kind));
    [query, key, value]
}

/// `(batch_size, length, heads * head_dim)` from weights `(batch_size, heads, length, key_length)`.
fn weighted(weights: &Tensor, value: &Tensor) -> Tensor {
    weights.matmul(value).transpose(1, 2).flatten(2, 3)
}

/// What the kernel computes is that of f64 arithmetic on the same numbers but for the roundings that it has to do: of the weights,
/// of the result, and of scores in f32. In either order of threads it has the same bits.
fn compare(name: &str, unit: f64, [query, key, value]: &Parts) {
    let outputs = [false, true].map(|reversed| {
        let host = HostKernels::new(reversed);
        let output = host.kernels().with_attention().attention(query, key, value).unwrap();
        assert_eq!(host.launches(), 1, "{name}: the kernel did not take it");
        output
    });
    assert_eq!(max_difference(&outputs[0], &outputs[1]), 0.0, "{name}: a race between threads");
    let [wide_query, wide_key, wide_value] = [query, key, value].map(|part| part.to_kind(Kind::Double));
    let scale = (wide_query.size()[3] as f64).sqrt().recip();
    let scores = wide_query.matmul(&wide_key.transpose(2, 3)) * scale;
    let weights = scores.softmax(-1, None::<Kind>);
    let expected = weighted(&weights, &wide_value);
    // Each weight is off by `unit` of itself, or by a unit of f16's smallest numbers, so the result by as much of the mean of
    // absolute values; and then by `unit` of itself. An f32 score is off by some 2⁻²² of the sum of its absolute terms.
    let mean = weighted(&weights, &wide_value.abs());
    let terms = wide_query.abs().matmul(&wide_key.abs().transpose(2, 3)).max().double_value(&[]) * scale;
    let smallest = key.size()[2] as f64 * 2f64.powi(-25) * wide_value.abs().max().double_value(&[]);
    let bound = (expected.abs() + &mean) * (1.02 * unit) + mean * (2f64.powi(-20) * (1.0 + terms)) + smallest;
    assert_eq!(outputs[0].size(), expected.size(), "{name}");
    let excess = ((outputs[0].to_kind(Kind::Double) - expected).abs() / bound).max().double_value(&[]);
    assert!(excess <= 1.0, "{name}: {excess} of what rounding explains");
}

#[test]
fn attention_equals_exact_arithmetic() {
    for (kind, unit) in KINDS {
        // Batch size, heads, length and values of a head: whole tiles of 64 keys and of 128 or 64 queries, parts of one, one more.
        for size in [
            [2, 3, 64, 40],
            [1, 2, 128, 40],
            [1, 1, 256, 40],
            [1, 2, 1, 40],
            [1, 1, 63, 40],
            [1, 2, 129, 40],
            [1, 1, 193, 40],
            [2, 1, 64, 80],
            [1, 2, 7, 80],
            [1, 1, 150, 80],
        ] {
            compare(&format!("{kind:?} {size:?}"), unit, &packed(kind, size));
        }
        for (size, key_length) in
            [([2, 2, 130, 40], 77), ([1, 1, 5, 40], 77), ([1, 2, 65, 80], 77), ([1, 1, 3, 40], 200)]
        {
            let parts = to_text(kind, size, key_length);
            compare(&format!("{kind:?} {size:?} to {key_length}"), unit, &parts);
        }
    }
}

#[test]
fn attention_over_as_many_keys_as_a_picture_has() {
    let (kind, unit) = KINDS[0];
    compare("4096 keys", unit, &to_text(kind, [1, 1, 16, 40], 4096));
}

#[test]
fn large_scores_do_not_overflow() {
    for (kind, unit) in KINDS {
        let [query, key, value] = packed(kind, [1, 2, 150, 40]);
        // Scores of some thousands, far beyond where exp overflows; and such that grow from key to key and fall.
        compare("large", unit, &[&query * 30.0, &key * 30.0, value.shallow_clone()]);
        let slope = Tensor::arange(150, (Kind::Float, Device::Cpu)).view([150, 1]).to_kind(kind);
        for (name, slope) in [("growing", &slope * 0.25), ("falling", &slope * -0.25)] {
            let parts = [query.ones_like(), key.zeros_like() + slope, value.shallow_clone()];
            compare(name, unit, &parts);
        }
        // The first key only, whose score is the largest by far.
        let first = (key.zeros_like() + 1.0) * slope.eq(0.0).to_kind(kind) * 100.0;
        let kernels = HostKernels::new(false).kernels().with_attention();
        let output = kernels.attention(&(query.ones_like() * 10.0), &first, &value).unwrap();
        let expected = value.narrow(2, 0, 1).expand([1, 2, 150, 40], true).transpose(1, 2).flatten(2, 3);
        assert_eq!(max_difference(&output, &expected), 0.0);
    }
}

#[test]
fn a_samples_attention_does_not_depend_on_the_batch() {
    let kernels = HostKernels::new(false).kernels().with_attention();
    for head_dim in [40, 80] {
        let parts = packed(Kind::Half, [3, 2, 150, head_dim]);
        let attend = |parts: &Parts| kernels.attention(&parts[0], &parts[1], &parts[2]).unwrap();
        let together = attend(&parts);
        for i in 0..3 {
            let alone = attend(&parts.each_ref().map(|part| part.narrow(0, i, 1)));
            assert_eq!(max_difference(&alone, &together.narrow(0, i, 1)), 0.0);
        }
        let apart = attend(&parts.each_ref().map(Tensor::contiguous));
        assert_eq!(max_difference(&apart, &together), 0.0, "it depends on where the numbers lie");
    }
}

#[test]
fn what_lies_beyond_the_last_key_is_not_seen_and_what_is_not_a_number_stays_so() {
    let kernels = HostKernels::new(false).kernels().with_attention();
    let attend = |parts: &Parts| kernels.attention(&parts[0], &parts[1], &parts[2]).unwrap();
    let parts = packed(Kind::BFloat16, [2, 1, 70, 40]);
    let clean = attend(&parts);
    // Longer ones, with NaN behind.
    let longer = parts.each_ref().map(|part| {
        Tensor::cat(&[part.shallow_clone(), part.narrow(2, 0, 60) * f64::NAN], 2).narrow(2, 0, 70)
    });
    assert_eq!(max_difference(&attend(&longer), &clean), 0.0);
    // A pipeline draws a picture anew in f32 where numbers are not finite: it has to see them.
    for part in 0..3 {
        let broken = parts.each_ref().map(Tensor::copy);
        let _ = broken[part].narrow(0, 1, 1).narrow(2, 69, 1).fill_(f64::NAN);
        let output = attend(&broken);
        assert_eq!(max_difference(&output.narrow(0, 0, 1), &clean.narrow(0, 0, 1)), 0.0);
        let rows = output.select(0, 1).isnan().any_dim(-1, false);
        // A query that is broken is one row's matter, a key or value every row's.
        let num_broken = rows.sum(Kind::Int64).int64_value(&[]);
        assert_eq!(num_broken, if part == 0 { 1 } else { 70 });
    }
}

#[test]
fn what_the_kernel_does_not_take_is_left_to_libtorch() {
    let host = HostKernels::new(false);
    let kernels = host.kernels().with_attention();
    let check = |parts: &Parts| {
        let output = kernels.attention(&parts[0], &parts[1], &parts[2]).unwrap();
        let expected = Kernels::plain(false).attention(&parts[0], &parts[1], &parts[2]).unwrap();
        assert_eq!(max_difference(&output, &expected), 0.0);
    };
    check(&packed(Kind::Float, [1, 2, 10, 40]));
    check(&packed(Kind::Half, [1, 2, 10, 64]));
    // Rows that do not begin where 16 bytes can be loaded: they are 41 numbers apart, or begin at the second one.
    let parts = packed(Kind::Half, [1, 1, 10, 41]);
    check(&parts.each_ref().map(|part| part.narrow(3, 0, 40)));
    let parts = packed(Kind::Half, [1, 1, 10, 48]);
    check(&parts.each_ref().map(|part| part.narrow(3, 1, 40)));
    let parts = packed(Kind::Half, [1, 1, 40, 40]);
    check(&parts.each_ref().map(|part| part.transpose(2, 3)));
    assert_eq!(host.launches(), 0);
    // Without having been chosen it takes nothing.
    let [query, key, value] = packed(Kind::Half, [1, 2, 10, 40]);
    let _ = host.kernels().attention(&query, &key, &value).unwrap();
    assert_eq!(host.launches(), 0);
    assert_eq!(host.kernels().to_string(), "fused host");
    assert_eq!(kernels.to_string(), "attention host");
}

#[test]
fn a_choice_of_kernels_is_known_by_its_name() {
    for name in ["plain", "fused", "attention"] {
        assert_eq!(name.parse::<KernelChoice>().unwrap().to_string(), name);
    }
    assert_eq!(KernelChoice::default(), KernelChoice::Fused);
    assert!("flash".parse::<KernelChoice>().unwrap_err().to_string().contains("`attention`"));
}

#[test]
fn what_a_model_checks_before_it_trusts_kernels_passes_here() {
    for dtype in [ComputeDtype::F32, ComputeDtype::F16, ComputeDtype::Bf16] {
        let [without, with] = [false, true].map(|has_attention| {
            let host = HostKernels::new(false);
            let kernels = if has_attention { host.kernels().with_attention() } else { host.kernels() };
            self_check(&kernels, dtype).unwrap();
            host.launches()
        });
        assert_eq!(with - without, if dtype == ComputeDtype::F32 { 0 } else { 2 }, "{dtype}");
    }
}

/// The golden networks' heads have 1 to 6 values, which no kernel takes, so this one has those of v1's two outer resolutions, 40
/// and 80, and weights that are drawn. How far its output is from arithmetic in f32 must not depend on whose attention it is.
#[test]
fn a_whole_network_is_as_exact_with_it_as_with_libtorchs() {
    let json = fs::read_to_string(golden::golden("tiny/unet/config.json")).unwrap();
    let mut fields: Map<String, Value> = serde_json::from_str(&json).unwrap();
    let sizes = json!({
        "block_out_channels": [80, 160],
        "attention_head_dim": 2,
        "norm_num_groups": 8,
        "cross_attention_dim": 24,
        "down_block_types": ["CrossAttnDownBlock2D", "CrossAttnDownBlock2D"],
        "up_block_types": ["CrossAttnUpBlock2D", "CrossAttnUpBlock2D"],
    });
    fields.extend(sizes.as_object().unwrap().clone());
    let config = UNet2DConditionConfig::read(ConfigFile::from_fields("unet/config.json", fields)).unwrap();
    let _no_grad = tch::no_grad_guard();
    // Two texts for one sample, as guidance has them, of as many words as CLIP has.
    let (sample, states) = (randn(&[1, 4, 13, 9], 1), randn(&[2, 77, 24], 2));
    let draw = |kernels: Kernels, dtype: ComputeDtype| {
        let kind = dtype.to_tch();
        let file = WeightFile::drawn("unet", 3, dtype, Device::Cpu).with_kernels(kernels);
        let unet = UNet2DConditionModel::load(&file.root(), &config).unwrap();
        assert!(file.into_faults().is_empty());
        let time = &unet.embed_timesteps(&[321.0], kind).unwrap()[0];
        let text = unet.project_text(&states.to_kind(kind)).unwrap();
        unet.forward(&sample.to_kind(kind), time, &text).unwrap().to_kind(Kind::Double)
    };
    let exact = draw(Kernels::plain(true), ComputeDtype::F32);
    for (dtype, tolerance) in [(ComputeDtype::F16, 2e-3), (ComputeDtype::Bf16, 2e-2)] {
        let host = HostKernels::new(false);
        let off =
            |output: &Tensor| (output - &exact).norm().double_value(&[]) / exact.norm().double_value(&[]);
        let attended = || host.launches_of("attention_40") + host.launches_of("attention_80");
        let theirs = draw(host.kernels(), dtype);
        assert_eq!(attended(), 0, "{dtype}");
        let ours = draw(host.kernels().with_attention(), dtype);
        // Down, middle and up, one of each kind in each of 1 + 1 + 1 + 2 + 2 transformers.
        assert_eq!(attended(), 2 * 7, "{dtype}");
        assert!(
            off(&ours) <= tolerance && off(&ours) <= 1.2 * off(&theirs),
            "{dtype}: {} and {}",
            off(&ours),
            off(&theirs)
        );
    }
}
