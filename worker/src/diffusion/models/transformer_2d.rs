//! Transformer blocks over the pixels of a feature map (diffusers' `models/transformers/transformer_2d.py`).

use tch::{TchError, Tensor};

use super::super::kernels::{FeatureMap, Kernels};
use super::super::nn::{GroupNorm, Linear};
use super::super::weights::Weights;
use super::attention::{BasicTransformerBlock, KeyValue, with_rows};

/// Epsilon of the GroupNorm before the blocks, which is not the ResNets' (diffusers'
/// `_init_continuous_input`).
const GROUP_NORM_EPS: f64 = 1e-6;

/// What a transformer of the UNet is made from.
#[derive(Debug, Clone, Copy)]
pub struct Transformer2DConfig {
    /// Attention heads; divides the channels.
    pub heads: i64,
    /// Channels of the text embedding.
    pub cross_attention_dim: i64,
    /// Transformer blocks.
    pub num_layers: i64,
    /// Groups of the norm.
    pub norm_num_groups: i64,
    /// Whether the projections around the blocks are linear layers; v1 has 1×1 convolutions.
    pub use_linear_projection: bool,
}

/// `Transformer2DModel`.
#[derive(Debug)]
pub struct Transformer2DModel {
    norm: GroupNorm,
    proj_in: Linear,
    transformer_blocks: Vec<BasicTransformerBlock>,
    /// Where the blocks leave their biases to it, what it makes of them is in its own.
    proj_out: Linear,
    norm_num_groups: i64,
    kernels: Kernels,
}

impl Transformer2DModel {
    /// A transformer over feature maps of `channels`.
    pub fn load(weights: &Weights<'_>, channels: i64, config: &Transformer2DConfig) -> Self {
        let projection = |name: &str| {
            let weights = weights / name;
            // The same arithmetic on the same numbers, which the files hold in one of two shapes.
            if config.use_linear_projection {
                Linear::load(&weights, channels, channels)
            } else {
                Linear::from_pointwise_conv(&weights, channels, channels)
            }
        };
        let blocks = weights / "transformer_blocks";
        let mut transformer = Self {
            norm: GroupNorm::load(&(weights / "norm"), config.norm_num_groups, channels, GROUP_NORM_EPS),
            proj_in: projection("proj_in"),
            transformer_blocks: (0..config.num_layers)
                .map(|i| {
                    BasicTransformerBlock::load(
                        &(&blocks / i),
                        channels,
                        config.cross_attention_dim,
                        config.heads,
                    )
                })
                .collect(),
            proj_out: projection("proj_out"),
            norm_num_groups: config.norm_num_groups,
            kernels: weights.kernels().clone(),
        };
        if transformer.kernels.is_fused() {
            let mut pending = None;
            for (i, block) in transformer.transformer_blocks.iter_mut().enumerate() {
                pending = Some(block.leave_biases(&(&blocks / i), pending.as_ref()));
            }
            if let Some(pending) = pending {
                transformer.proj_out = transformer.proj_out.with_pending(&(weights / "proj_out"), &pending);
            }
        }
        transformer
    }

    /// What each block makes of `encoder_hidden_states` `(batch_size, text_length, cross_attention_dim)`.
    pub fn project_text(&self, encoder_hidden_states: &Tensor) -> Result<Vec<KeyValue>, TchError> {
        self.transformer_blocks.iter().map(|block| block.project_text(encoder_hidden_states)).collect()
    }

    /// `(batch_size, channels, height, width)` to the same shape. Attends to `text`, one for each block, or to itself
    /// where there is none. With twice the rows in `text`, the output has as many: see [`BasicTransformerBlock::forward`].
    /// May overwrite `hidden_states`.
    pub fn forward(&self, hidden_states: FeatureMap, text: &[KeyValue]) -> Result<FeatureMap, TchError> {
        let (batch_size, channels, height, width) = hidden_states.tensor().size4()?;
        let normalized = self.norm.forward(&hidden_states)?;
        let sequence =
            normalized.f_permute([0, 2, 3, 1])?.f_reshape([batch_size, height * width, channels])?;
        let mut sequence = self.proj_in.forward(&sequence)?;
        for (i, block) in self.transformer_blocks.iter().enumerate() {
            if self.kernels.is_fused() {
                block.accumulate(&mut sequence, text.get(i))?;
            } else {
                sequence = block.forward(&sequence, text.get(i))?;
            }
        }
        let projected = self.proj_out.forward(&sequence)?;
        let map = projected.f_view([-1, height, width, channels])?.f_permute([0, 3, 1, 2])?;
        let hidden_states = with_rows(hidden_states.tensor(), text.first().map(KeyValue::num_rows))?;
        self.kernels.add_bias_residual(hidden_states, None, Some(&map), self.norm_num_groups)
    }
}
