//! Attention and the transformer block around it (diffusers' `models/attention.py` and `attention_processor.py`).

use tch::{TchError, Tensor};

use super::super::nn::{LayerNorm, Linear};
use super::super::weights::Weights;

/// Epsilon of the transformer blocks' LayerNorms (`norm_eps` of diffusers' `BasicTransformerBlock`).
const LAYER_NORM_EPS: f64 = 1e-5;
/// How much wider the feed-forward network is inside (`mult` of diffusers' `FeedForward`).
const FEED_FORWARD_MULT: i64 = 4;

/// Multi-head attention: `Attention` with `AttnProcessor2_0`.
#[derive(Debug)]
pub struct Attention {
    to_q: Linear,
    to_k: Linear,
    to_v: Linear,
    to_out: Linear,
    heads: i64,
}

impl Attention {
    /// Attention of the UNet: queries from `query_dim` channels, keys and values from `cross_attention_dim`; only the
    /// output projection has a bias. `heads` divides `query_dim`.
    pub fn load(weights: &Weights<'_>, query_dim: i64, cross_attention_dim: i64, heads: i64) -> Self {
        Self {
            to_q: Linear::without_bias(&(weights / "to_q"), query_dim, query_dim),
            to_k: Linear::without_bias(&(weights / "to_k"), cross_attention_dim, query_dim),
            to_v: Linear::without_bias(&(weights / "to_v"), cross_attention_dim, query_dim),
            to_out: Linear::load(&(weights / "to_out" / 0), query_dim, query_dim),
            heads,
        }
    }

    /// Attention of the VAE: from and to the same channels, biases everywhere. `heads` divides `channels`.
    pub fn load_with_bias(weights: &Weights<'_>, channels: i64, heads: i64) -> Self {
        Self {
            to_q: Linear::load(&(weights / "to_q"), channels, channels),
            to_k: Linear::load(&(weights / "to_k"), channels, channels),
            to_v: Linear::load(&(weights / "to_v"), channels, channels),
            to_out: Linear::load(&(weights / "to_out" / 0), channels, channels),
            heads,
        }
    }

    /// `(batch_size, sequence_length, query_dim)` to the same shape. Attends to `encoder_hidden_states` of shape
    /// `(batch_size, text_length, cross_attention_dim)`, or to itself without them.
    pub fn forward(
        &self,
        hidden_states: &Tensor,
        encoder_hidden_states: Option<&Tensor>,
    ) -> Result<Tensor, TchError> {
        let context = encoder_hidden_states.unwrap_or(hidden_states);
        let query = self.split_heads(&self.to_q.forward(hidden_states)?)?;
        let key = self.split_heads(&self.to_k.forward(context)?)?;
        let value = self.split_heads(&self.to_v.forward(context)?)?;
        let no_mask = None::<&Tensor>;
        let attended =
            Tensor::f_scaled_dot_product_attention(&query, &key, &value, no_mask, 0.0, false, None, false)?;
        self.to_out.forward(&attended.f_transpose(1, 2)?.f_flatten(2, 3)?)
    }

    /// `(batch_size, length, channels)` to `(batch_size, heads, length, channels / heads)`.
    fn split_heads(&self, tensor: &Tensor) -> Result<Tensor, TchError> {
        let (batch_size, length, channels) = tensor.size3()?;
        tensor.f_view([batch_size, length, self.heads, channels / self.heads])?.f_transpose(1, 2)
    }
}

/// `FeedForward` with `GEGLU`: one half of a projection gates the other.
#[derive(Debug)]
struct FeedForward {
    proj: Linear,
    out: Linear,
}

impl FeedForward {
    fn load(weights: &Weights<'_>, dim: i64) -> Self {
        let inner_dim = FEED_FORWARD_MULT * dim;
        Self {
            proj: Linear::load(&(weights / "net" / 0 / "proj"), dim, 2 * inner_dim),
            out: Linear::load(&(weights / "net" / 2), inner_dim, dim),
        }
    }

    fn forward(&self, hidden_states: &Tensor) -> Result<Tensor, TchError> {
        let projected = self.proj.forward(hidden_states)?;
        let inner_dim = projected.size().last().map_or(0, |size| size / 2);
        let gate = projected.f_narrow(-1, inner_dim, inner_dim)?;
        // The exact GELU, by erf: the tanh form differs visibly.
        self.out.forward(&gate.f_gelu("none")?.f_mul_(&projected.f_narrow(-1, 0, inner_dim)?)?)
    }
}

/// Self-attention, cross-attention and feed-forward, each after a LayerNorm and added to its input:
/// `BasicTransformerBlock`.
#[derive(Debug)]
pub struct BasicTransformerBlock {
    norm1: LayerNorm,
    attn1: Attention,
    norm2: LayerNorm,
    attn2: Attention,
    norm3: LayerNorm,
    ff: FeedForward,
}

impl BasicTransformerBlock {
    /// A block of `dim` channels; `heads` divides it.
    pub fn load(weights: &Weights<'_>, dim: i64, cross_attention_dim: i64, heads: i64) -> Self {
        Self {
            norm1: LayerNorm::load(&(weights / "norm1"), dim, LAYER_NORM_EPS),
            attn1: Attention::load(&(weights / "attn1"), dim, dim, heads),
            norm2: LayerNorm::load(&(weights / "norm2"), dim, LAYER_NORM_EPS),
            attn2: Attention::load(&(weights / "attn2"), dim, cross_attention_dim, heads),
            norm3: LayerNorm::load(&(weights / "norm3"), dim, LAYER_NORM_EPS),
            ff: FeedForward::load(&(weights / "ff"), dim),
        }
    }

    /// `(batch_size, sequence_length, dim)` to the same shape; `encoder_hidden_states` as for [`Attention::forward`].
    pub fn forward(
        &self,
        hidden_states: &Tensor,
        encoder_hidden_states: Option<&Tensor>,
    ) -> Result<Tensor, TchError> {
        let attended =
            self.attn1.forward(&self.norm1.forward(hidden_states)?, None)?.f_add_(hidden_states)?;
        let attended =
            self.attn2.forward(&self.norm2.forward(&attended)?, encoder_hidden_states)?.f_add_(&attended)?;
        self.ff.forward(&self.norm3.forward(&attended)?)?.f_add_(&attended)
    }
}
