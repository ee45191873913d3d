//! The half of the autoencoder that turns latents into pixels (diffusers' `models/autoencoders/vae.py`).

use tch::{TchError, Tensor};

use super::super::kernels::FeatureMap;
use super::super::nn::{Conv2d, GroupNorm, MapConv2d};
use super::super::weights::Weights;
use super::autoencoder_kl::AutoencoderKLConfig;
use super::resnet::{ResnetBlock2D, ResnetConfig, Upsample2D};
use super::unet_2d_blocks::UNetMidBlock2D;

/// Epsilon of all GroupNorms in the VAE (`resnet_eps` in diffusers' `Decoder`).
const NORM_EPS: f64 = 1e-6;

/// Attention heads of the mid block (diffusers' `Decoder` makes a head as wide as the block).
const ATTENTION_HEADS: i64 = 1;

/// `Decoder`.
#[derive(Debug)]
pub struct Decoder {
    conv_in: MapConv2d,
    mid_block: UNetMidBlock2D,
    up_blocks: Vec<UpDecoderBlock2D>,
    conv_norm_out: GroupNorm,
    conv_out: Conv2d,
}

impl Decoder {
    /// Takes the tensors that `config` asks for.
    pub fn load(weights: &Weights<'_>, config: &AutoencoderKLConfig) -> Self {
        let resnet = ResnetConfig {
            temb_channels: None,
            groups: config.norm_num_groups,
            eps: NORM_EPS,
            output_scale_factor: 1.0,
        };
        let reversed: Vec<i64> = config.block_out_channels.iter().rev().copied().collect();
        let (first, last) = (reversed[0], reversed[reversed.len() - 1]);
        let up_blocks = weights / "up_blocks";
        let up_block = |i: usize| {
            let in_channels = reversed[i.saturating_sub(1)];
            let num_layers = config.layers_per_block + 1;
            let add_upsample = i + 1 < reversed.len();
            UpDecoderBlock2D::load(
                &(&up_blocks / i),
                in_channels,
                reversed[i],
                num_layers,
                add_upsample,
                &resnet,
            )
        };
        let conv_in = weights / "conv_in";
        let first_conv = Conv2d::load(&conv_in, config.latent_channels, first, 3);
        Self {
            conv_in: MapConv2d::new(first_conv, config.norm_num_groups),
            mid_block: UNetMidBlock2D::load(
                &(weights / "mid_block"),
                first,
                &resnet,
                config.mid_block_add_attention.then_some(ATTENTION_HEADS),
            ),
            up_blocks: (0..reversed.len()).map(up_block).collect(),
            conv_norm_out: GroupNorm::load(
                &(weights / "conv_norm_out"),
                config.norm_num_groups,
                last,
                NORM_EPS,
            ),
            conv_out: Conv2d::load(&(weights / "conv_out"), last, config.out_channels, 3),
        }
    }

    /// `(batch_size, latent_channels, height, width)` to `(batch_size, out_channels, height * f, width * f)`, where
    /// `f` is the VAE's scale factor.
    pub fn forward(&self, sample: &Tensor) -> Result<Tensor, TchError> {
        let mut hidden_states = self.mid_block.forward(&self.conv_in.forward(sample)?, &[])?;
        for block in &self.up_blocks {
            hidden_states = block.forward(&hidden_states)?;
        }
        self.conv_out.forward(&self.conv_norm_out.forward_silu(&hidden_states)?)
    }
}

/// `UpDecoderBlock2D` (diffusers' `models/unets/unet_2d_blocks.py`): ResNets without time embedding, then an upsampler.
#[derive(Debug)]
pub struct UpDecoderBlock2D {
    resnets: Vec<ResnetBlock2D>,
    upsampler: Option<Upsample2D>,
}

impl UpDecoderBlock2D {
    /// Takes the tensors of a block from `in_channels` to `out_channels`.
    pub fn load(
        weights: &Weights<'_>,
        in_channels: i64,
        out_channels: i64,
        num_layers: i64,
        add_upsample: bool,
        resnet: &ResnetConfig,
    ) -> Self {
        let resnets = weights / "resnets";
        let resnet_in_channels = |i| if i == 0 { in_channels } else { out_channels };
        Self {
            resnets: (0..num_layers)
                .map(|i| ResnetBlock2D::load(&(&resnets / i), resnet_in_channels(i), out_channels, resnet))
                .collect(),
            upsampler: add_upsample
                .then(|| Upsample2D::load(&(weights / "upsamplers" / 0), out_channels, resnet.groups)),
        }
    }

    /// `(batch_size, in_channels, height, width)` to `out_channels`, and to twice the size with an upsampler.
    pub fn forward(&self, hidden_states: &FeatureMap) -> Result<FeatureMap, TchError> {
        let mut hidden_states = hidden_states.shallow_clone();
        for resnet in &self.resnets {
            hidden_states = resnet.forward(&hidden_states, None)?;
        }
        match &self.upsampler {
            Some(upsampler) => upsampler.forward(hidden_states.tensor(), None),
            None => Ok(hidden_states),
        }
    }
}
