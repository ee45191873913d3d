//! The kernels that write a feature map and take the statistics of the GroupNorm after it on the way: against libtorch, against
//! the norm's own first pass, and counted through whole networks.

use tch::{Kind, Tensor};
use worker::diffusion::kernels::{FeatureMap, GroupNormParameters, Kernels};
use worker::diffusion::models::autoencoder_kl::{AutoencoderKL, AutoencoderKLConfig};
use worker::diffusion::models::unet_2d_condition::UNet2DConditionModel;
use worker::diffusion::models::unet_2d_config::{BlockType, UNet2DConditionConfig};

use super::golden::{CHECKPOINTS, config, max_difference, same_key, tensors, weights};
use super::on_host::HostKernels;
use super::{KINDS, by_pixels, compare, double, randn};

/// The norm after a map of `channels`.
fn norm_of<'t>(weight: &'t Tensor, bias: &'t Tensor, num_groups: i64) -> GroupNormParameters<'t> {
    GroupNormParameters { weight, bias, num_groups, eps: 1e-5, silu: true }
}

/// Whether the norm of a map that `write` makes needs a first pass of its own. Either way it is, to the last bit and in any order
/// of threads, the norm of a tensor of which nothing is known.
fn reads_twice(name: &str, num_groups: i64, write: impl Fn(&Kernels) -> FeatureMap) -> bool {
    let orders = [false, true].map(|reversed| {
        let host = HostKernels::new(reversed);
        let map = write(&host.kernels());
        let channels = map.tensor().size()[1];
        let [weight, bias] = [8, 9].map(|seed| randn(&[channels], seed, map.tensor().kind()));
        let norm = norm_of(&weight, &bias, num_groups);
        let before = host.launches_of("group_norm_stats");
        let normalized = host.kernels().group_norm_of_map(&map, &norm).unwrap();
        let first_passes = host.launches_of("group_norm_stats") - before;
        let by_two_passes = host.kernels().group_norm(map.tensor(), None, &norm).unwrap();
        assert_eq!(host.launches_of("group_norm_stats") - before, first_passes + 1, "{name}");
        assert!(normalized.isfinite().all().int64_value(&[]) == 1, "{name}");
        assert_eq!(max_difference(&normalized, &by_two_passes), 0.0, "{name}: other bits than by two passes");
        first_passes == 1
    });
    assert_eq!(orders[0], orders[1], "{name}");
    orders[0]
}

/// Batch size, channels, height, width, groups: chunks that are full, cut short and several, groups that do not end where 16 bytes
/// do, channels that are read one by one.
const SHAPES: [[i64; 5]; 5] =
    [[1, 320, 8, 8, 32], [2, 320, 9, 7, 32], [1, 1280, 3, 5, 32], [1, 128, 24, 18, 32], [3, 30, 5, 5, 3]];

#[test]
fn sums_of_bias_and_residual_equal_libtorch_and_come_with_statistics() {
    for (kind, tolerance) in KINDS {
        for [batch_size, channels, height, width, groups] in SHAPES {
            let size = [batch_size, channels, height, width];
            // Far from zero, where sums of squares lose their digits.
            let map = by_pixels(&(randn(&size, 0, kind) + 20.0));
            let (bias, residual) = (randn(&[channels], 1, kind), by_pixels(&randn(&size, 2, kind)));
            let before = [&map, &residual].map(Tensor::copy);
            for (bias, residual) in
                [(Some(&bias), Some(&residual)), (None, Some(&residual)), (Some(&bias), None)]
            {
                let name = format!("{kind:?} {size:?} {} {}", bias.is_some(), residual.is_some());
                let write = |kernels: &Kernels| {
                    kernels.add_bias_residual(map.shallow_clone(), bias, residual, groups).unwrap()
                };
                let (wide_bias, wide_residual) = (bias.map(double), residual.map(double));
                let expected = Kernels::plain(true)
                    .add_bias_residual(double(&map), wide_bias.as_ref(), wide_residual.as_ref(), groups)
                    .unwrap()
                    .into_tensor();
                compare(&name, tolerance, |kernels| write(kernels).into_tensor(), &expected);
                assert!(!reads_twice(&name, groups, write), "{name}");
            }
            for (tensor, before) in [&map, &residual].into_iter().zip(&before) {
                assert_eq!(max_difference(tensor, before), 0.0, "{kind:?} {size:?}: an input was changed");
            }
        }
    }
}

#[test]
fn concatenations_equal_libtorch_and_come_with_statistics() {
    // Batch size, channels of both, height, width, groups, of which some have channels of both; 15 channels are read one by one.
    let shapes = [
        [2, 320, 320, 4, 5, 32],
        [1, 1280, 640, 3, 3, 32],
        [2, 640, 320, 5, 3, 32],
        [1, 128, 64, 24, 18, 32],
        [3, 5, 10, 3, 5, 5],
    ];
    for (kind, _) in KINDS {
        for [batch_size, first_channels, second_channels, height, width, groups] in shapes {
            let name = format!("{kind:?} {batch_size}x{first_channels}+{second_channels}x{height}x{width}");
            let part = |channels, seed| {
                by_pixels(&(randn(&[batch_size, channels, height, width], seed, kind) + 20.0))
            };
            let (first, second) = (part(first_channels, 0), part(second_channels, 1));
            let write = |kernels: &Kernels| kernels.cat_channels(&first, &second, groups).unwrap();
            let expected = Tensor::cat(&[&first, &second], 1);
            compare(&name, 0.0, |kernels| write(kernels).into_tensor(), &expected);
            assert!(!reads_twice(&name, groups, write), "{name}");
        }
    }
}

#[test]
fn statistics_that_are_cut_otherwise_are_not_used() {
    let host = HostKernels::new(false);
    // 12 of 16 bit are not whole loads, all 32 are.
    let [first, second] =
        [(12, 0), (20, 1)].map(|(channels, seed)| by_pixels(&randn(&[2, channels, 9, 7], seed, Kind::Half)));
    assert!(reads_twice("12 + 20", 4, |kernels| kernels.cat_channels(&first, &second, 4).unwrap()));
    let of_two_groups = |kernels: &Kernels| {
        kernels.add_bias_residual(second.shallow_clone(), None, Some(&second), 2).unwrap()
    };
    assert!(reads_twice("of 2 groups", 4, of_two_groups));
    // What no kernel takes has none: 64 bits, and groups that do not divide the channels.
    let wide = double(&second);
    let map = host.kernels().add_bias_residual(wide.copy(), None, Some(&wide), 4).unwrap();
    assert_eq!(max_difference(map.tensor(), &(&wide + &wide)), 0.0);
    let map = host.kernels().cat_channels(&wide, &wide, 4).unwrap();
    assert_eq!(map.tensor().size(), [2, 40, 9, 7]);
    assert_eq!(host.launches(), 0);
}

#[test]
fn a_samples_map_and_statistics_do_not_depend_on_the_batch() {
    let kernels = HostKernels::new(false).kernels();
    let [map, residual] = [0, 1].map(|seed| by_pixels(&randn(&[3, 320, 12, 10], seed, Kind::Half)));
    let [bias, weight, norm_bias] = [2, 3, 4].map(|seed| randn(&[320], seed, Kind::Half));
    let norm = norm_of(&weight, &norm_bias, 32);
    let [twice_weight, twice_bias] = [5, 6].map(|seed| randn(&[640], seed, Kind::Half));
    let norm_of_both = norm_of(&twice_weight, &twice_bias, 32);
    let draw = |map: &Tensor, residual: &Tensor| {
        let sum = kernels.add_bias_residual(map.shallow_clone(), Some(&bias), Some(residual), 32).unwrap();
        let both = kernels.cat_channels(map, residual, 32).unwrap();
        let norms = [(&sum, &norm), (&both, &norm_of_both)];
        norms.map(|(map, norm)| kernels.group_norm_of_map(map, norm).unwrap())
    };
    let together = draw(&map, &residual);
    for i in 0..3 {
        let alone = draw(&map.narrow(0, i, 1), &residual.narrow(0, i, 1));
        for (alone, together) in alone.iter().zip(&together) {
            assert_eq!(max_difference(alone, &together.narrow(0, i, 1)), 0.0);
        }
    }
}

/// Launches of each kernel here while `run` runs: first passes, norms, sums and concatenations.
fn launches(host: &HostKernels, run: impl FnOnce()) -> [usize; 4] {
    let count = || {
        ["group_norm_stats", "group_norm_apply", "add_bias_residual", "cat_channels"]
            .map(|operation| host.launches_of(operation))
    };
    let before = count();
    run();
    let after = count();
    [0, 1, 2, 3].map(|i| after[i] - before[i])
}

/// In whole networks the only norms that read their input twice are those between the two convolutions of a ResNet.
#[test]
fn all_norms_but_the_second_of_a_resnet_read_their_input_once() {
    let _no_grad = tch::no_grad_guard();
    let host = HostKernels::new(false);
    for checkpoint in CHECKPOINTS {
        let expected = tensors(&format!("{checkpoint}-stages/unet.safetensors"));
        let file = weights(checkpoint, "unet", "diffusion_pytorch_model", same_key);
        let file = file.with_kernels(host.kernels());
        let unet_config = config(checkpoint, "unet/config.json", UNet2DConditionConfig::read);
        let unet = UNet2DConditionModel::load(&file.root(), &unet_config).unwrap();
        assert!(file.into_faults().is_empty());
        let blocks = unet_config.block_out_channels.len();
        let down: usize = unet_config.layers_per_block.iter().map(|&layers| layers as usize).sum();
        let up = down + blocks;
        let with_attention = |types: &[BlockType], layers: &dyn Fn(usize) -> i64| -> usize {
            let is_with = |i: &usize| matches!(types[*i], BlockType::CrossAttn);
            (0..blocks).filter(is_with).map(|i| layers(i) as usize).sum()
        };
        let layers = &unet_config.layers_per_block;
        let transformers = with_attention(&unet_config.down_block_types, &|i| layers[i])
            + 1
            + with_attention(&unet_config.up_block_types, &|i| layers[blocks - 1 - i] + 1);
        let resnets = down + 2 + up;
        let counted = launches(&host, || {
            let time = &unet.embed_timesteps(&[321.0], Kind::Float).unwrap()[0];
            let text = unet.project_text(&expected["encoder_hidden_states"].narrow(0, 0, 2)).unwrap();
            // Two texts for one sample.
            let _ = unet.forward(&expected["sample_9x13"], time, &text).unwrap();
        });
        // One sum for each of ResNets and transformers, and the biases of the other convolutions before a norm.
        let sums = resnets + transformers + 1 + 2 * (blocks - 1);
        let norms = 2 * resnets + transformers + 1;
        assert_eq!(counted, [resnets, norms, sums, up], "{checkpoint}");

        let expected = tensors(&format!("{checkpoint}-stages/vae.safetensors"));
        let vae_config = config(checkpoint, "vae/config.json", AutoencoderKLConfig::read);
        let file = weights(checkpoint, "vae", "diffusion_pytorch_model", AutoencoderKL::rename_key);
        let file = file.with_kernels(host.kernels());
        let vae = AutoencoderKL::load(&file.root(), &vae_config);
        assert!(file.into_faults().is_empty());
        let blocks = vae_config.block_out_channels.len();
        let attentions = usize::from(vae_config.mid_block_add_attention);
        let resnets = 2 + blocks * (vae_config.layers_per_block as usize + 1);
        let counted = launches(&host, || {
            let _ = vae.decode(&expected["latents_5x7"]).unwrap();
        });
        let sums = resnets + attentions + 1 + (blocks - 1);
        let norms = 2 * resnets + attentions + 1;
        assert_eq!(counted, [resnets, norms, sums, 0], "{checkpoint}");
    }
}
