//! Residual blocks and the layers between resolutions (diffusers' `models/resnet.py`, `upsampling.py` and
//! `downsampling.py`).

use tch::{TchError, Tensor};

use super::super::kernels::{FeatureMap, Kernels};
use super::super::nn::{Conv2d, GroupNorm, Linear, MapConv2d, PointwiseConv};
use super::super::weights::Weights;

/// What a residual block is made from.
#[derive(Debug, Clone, Copy)]
pub struct ResnetConfig {
    /// Channels of the time embedding; `None` where the block gets none, as in the VAE.
    pub temb_channels: Option<i64>,
    /// Groups of the norms; divides every channel count.
    pub groups: i64,
    /// Epsilon of the norms: 1e-5 in v1's UNet, 1e-6 in its VAE.
    pub eps: f64,
    /// What the output is divided by.
    pub output_scale_factor: f64,
}

/// Norm, SiLU and convolution twice, with the time embedding added between, and a shortcut around: `ResnetBlock2D`.
#[derive(Debug)]
pub struct ResnetBlock2D {
    norm1: GroupNorm,
    conv1: Conv2d,
    time_emb_proj: Option<Linear>,
    norm2: GroupNorm,
    conv2: Conv2d,
    conv_shortcut: Option<PointwiseConv>,
    groups: i64,
    output_scale_factor: f64,
    kernels: Kernels,
}

impl ResnetBlock2D {
    /// A block from `in_channels` to `out_channels`.
    pub fn load(weights: &Weights<'_>, in_channels: i64, out_channels: i64, config: &ResnetConfig) -> Self {
        let ResnetConfig { temb_channels, groups, eps, output_scale_factor } = *config;
        Self {
            norm1: GroupNorm::load(&(weights / "norm1"), groups, in_channels, eps),
            conv1: Conv2d::load(&(weights / "conv1"), in_channels, out_channels, 3),
            time_emb_proj: temb_channels
                .map(|temb_channels| Linear::load(&(weights / "time_emb_proj"), temb_channels, out_channels)),
            norm2: GroupNorm::load(&(weights / "norm2"), groups, out_channels, eps),
            conv2: Conv2d::load(&(weights / "conv2"), out_channels, out_channels, 3),
            conv_shortcut: (in_channels != out_channels)
                .then(|| PointwiseConv::load(&(weights / "conv_shortcut"), in_channels, out_channels)),
            groups,
            output_scale_factor,
            kernels: weights.kernels().clone(),
        }
    }

    /// The bias of the first convolution with the time embedding in it: what is added to every pixel of a channel is a
    /// bias. `temb`, of shape `(num_steps, temb_channels)`, is the time embedding **after** SiLU, which diffusers applies
    /// in each block anew. One vector of `out_channels` for each step.
    pub fn time_biases(&self, temb: &Tensor) -> Result<Vec<Tensor>, TchError> {
        let (num_steps, _) = temb.size2()?;
        match &self.time_emb_proj {
            Some(time_emb_proj) => time_emb_proj.forward(temb)?.f_add_(self.conv1.bias())?.f_unbind(0),
            None => Ok((0..num_steps).map(|_| self.conv1.bias().shallow_clone()).collect()),
        }
    }

    /// The input of an up block's ResNet: the channels of `hidden_states` and then those of the skip connection `res_sample`.
    pub fn join(&self, hidden_states: &Tensor, res_sample: &Tensor) -> Result<FeatureMap, TchError> {
        self.kernels.cat_channels(hidden_states, res_sample, self.groups)
    }

    /// `(batch_size, in_channels, height, width)` to `(batch_size, out_channels, height, width)`. `time_bias` is
    /// one of [`Self::time_biases`]; `None` is without a time embedding.
    pub fn forward(&self, input: &FeatureMap, time_bias: Option<&Tensor>) -> Result<FeatureMap, TchError> {
        let time_bias = time_bias.unwrap_or_else(|| self.conv1.bias());
        let normalized = self.norm1.forward_silu(input)?;
        let normalized = if self.kernels.is_fused() {
            // The bias comes in where the next operation reads its input anyway.
            let hidden_states = self.conv1.forward_without_bias(&normalized)?;
            self.norm2.forward_silu_pending(&hidden_states, time_bias)?
        } else {
            let hidden_states = self.conv1.forward_with_bias(&normalized, time_bias)?;
            self.norm2.forward_silu(&hidden_states.into())?
        };
        let residual = match &self.conv_shortcut {
            Some(conv_shortcut) => conv_shortcut.forward(input.tensor())?,
            None => input.tensor().shallow_clone(),
        };
        let output = self.conv2.forward_map(&normalized, Some(&residual), self.groups)?;
        if self.output_scale_factor == 1.0 {
            return Ok(output);
        }
        output.into_tensor().f_div_scalar_(self.output_scale_factor).map(FeatureMap::from)
    }
}

/// Nearest-neighbour doubling, then a convolution: `Upsample2D`.
#[derive(Debug)]
pub struct Upsample2D {
    conv: MapConv2d,
}

impl Upsample2D {
    /// An upsampler that keeps the number of channels, before norms of `groups`.
    pub fn load(weights: &Weights<'_>, channels: i64, groups: i64) -> Self {
        let weights = weights / "conv";
        Self { conv: MapConv2d::new(Conv2d::load(&weights, channels, channels, 3), groups) }
    }

    /// `(batch_size, channels, height, width)` to twice the height and width, or to `output_size` (height, width).
    pub fn forward(
        &self,
        hidden_states: &Tensor,
        output_size: Option<[i64; 2]>,
    ) -> Result<FeatureMap, TchError> {
        let upsampled = match output_size {
            Some(output_size) => hidden_states.f_upsample_nearest2d(output_size, None, None)?,
            None => {
                let (_, _, height, width) = hidden_states.size4()?;
                hidden_states.f_upsample_nearest2d([2 * height, 2 * width], 2.0, 2.0)?
            }
        };
        self.conv.forward(&upsampled)
    }
}

/// A convolution of stride 2: `Downsample2D`.
#[derive(Debug)]
pub struct Downsample2D {
    conv: MapConv2d,
}

impl Downsample2D {
    /// A downsampler that keeps the number of channels, before norms of `groups`.
    pub fn load(weights: &Weights<'_>, channels: i64, groups: i64) -> Self {
        let weights = weights / "conv";
        Self { conv: MapConv2d::new(Conv2d::downsampling(&weights, channels), groups) }
    }

    /// `(batch_size, channels, height, width)` to half the height and width, rounded up.
    pub fn forward(&self, hidden_states: &Tensor) -> Result<FeatureMap, TchError> {
        self.conv.forward(hidden_states)
    }
}
