//! Attention and the transformer block around it (diffusers' `models/attention.py` and `attention_processor.py`).

use tch::{Device, Kind, TchError, Tensor};

use super::super::kernels::Kernels;
use super::super::nn::{LayerNorm, Linear, sum};
use super::super::weights::Weights;

/// Epsilon of the transformer blocks' LayerNorms (`norm_eps` of diffusers' `BasicTransformerBlock`).
const LAYER_NORM_EPS: f64 = 1e-5;
/// How much wider the feed-forward network is inside (`mult` of diffusers' `FeedForward`).
const FEED_FORWARD_MULT: i64 = 4;

/// What a layer attends to: keys and values, split into heads, each of shape
/// `(batch_size, heads, length, channels / heads)`. Those of a text are the same at every denoising step, so they are
/// made once.
#[derive(Debug)]
pub struct KeyValue {
    key: Tensor,
    value: Tensor,
}

impl KeyValue {
    /// Some of the rows.
    pub fn narrow(&self, start: i64, length: i64) -> Result<Self, TchError> {
        let rows = |tensor: &Tensor| tensor.f_narrow(0, start, length);
        Ok(Self { key: rows(&self.key)?, value: rows(&self.value)? })
    }

    /// How many.
    pub fn num_rows(&self) -> i64 {
        self.key.size()[0]
    }

    /// Takes over the numbers of `other`, of the same shape, into the tensors that are here.
    pub fn copy_from(&mut self, other: &Self) -> Result<(), TchError> {
        self.key.f_copy_(&other.key)?;
        self.value.f_copy_(&other.value)
    }

    /// Those of several pictures as those of a batch.
    pub fn cat(parts: &[&Self]) -> Result<Self, TchError> {
        let cat = |part: fn(&Self) -> &Tensor| {
            Tensor::f_cat(&parts.iter().map(|key_value| part(key_value)).collect::<Vec<_>>(), 0)
        };
        Ok(Self { key: cat(|key_value| &key_value.key)?, value: cat(|key_value| &key_value.value)? })
    }
}

/// Multi-head attention to itself: `Attention` with `AttnProcessor2_0`, without a text.
#[derive(Debug)]
pub struct SelfAttention {
    /// Queries, keys and values from one product of matrices.
    to_qkv: Linear,
    to_out: Linear,
    heads: i64,
    kernels: Kernels,
}

impl SelfAttention {
    /// Attention of the UNet: only the output projection has a bias. `heads` divides `dim`.
    pub fn load(weights: &Weights<'_>, dim: i64, heads: i64) -> Self {
        Self {
            to_qkv: Linear::stacked_without_bias(weights, &QKV, dim, dim),
            to_out: Linear::load(&(weights / "to_out" / 0), dim, dim),
            heads,
            kernels: weights.kernels().clone(),
        }
    }

    /// Attention of the VAE: biases everywhere. `heads` divides `channels`.
    pub fn load_with_bias(weights: &Weights<'_>, channels: i64, heads: i64) -> Self {
        Self {
            to_qkv: Linear::stacked(weights, &QKV, channels, channels),
            to_out: Linear::load(&(weights / "to_out" / 0), channels, channels),
            heads,
            kernels: weights.kernels().clone(),
        }
    }

    /// `(batch_size, sequence_length, dim)` to the same shape.
    pub fn forward(&self, hidden_states: &Tensor) -> Result<Tensor, TchError> {
        self.to_out.forward(&self.attended(hidden_states)?)
    }

    /// As [`Self::forward`], before the output projection.
    fn attended(&self, hidden_states: &Tensor) -> Result<Tensor, TchError> {
        let (batch_size, length, channels) = hidden_states.size3()?;
        let qkv = self.to_qkv.forward(hidden_states)?;
        let qkv = qkv.f_view([batch_size, length, 3, self.heads, channels / self.heads])?;
        let qkv = rows_of_a_head_together(qkv.f_permute([2, 0, 3, 1, 4])?, &self.kernels)?;
        self.kernels.attention(&qkv.f_select(0, 0)?, &qkv.f_select(0, 1)?, &qkv.f_select(0, 2)?)
    }
}

/// The projections that self-attention has in one, by their names in the files.
const QKV: [&str; 3] = ["to_q", "to_k", "to_v"];

/// Multi-head attention to a text: `Attention` with `AttnProcessor2_0`.
#[derive(Debug)]
pub struct CrossAttention {
    to_q: Linear,
    to_k: Linear,
    to_v: Linear,
    to_out: Linear,
    heads: i64,
    kernels: Kernels,
}

impl CrossAttention {
    /// Queries from `query_dim` channels, keys and values from `cross_attention_dim`; only the output projection has a
    /// bias. `heads` divides `query_dim`.
    pub fn load(weights: &Weights<'_>, query_dim: i64, cross_attention_dim: i64, heads: i64) -> Self {
        Self {
            to_q: Linear::without_bias(&(weights / "to_q"), query_dim, query_dim),
            to_k: Linear::without_bias(&(weights / "to_k"), cross_attention_dim, query_dim),
            to_v: Linear::without_bias(&(weights / "to_v"), cross_attention_dim, query_dim),
            to_out: Linear::load(&(weights / "to_out" / 0), query_dim, query_dim),
            heads,
            kernels: weights.kernels().clone(),
        }
    }

    /// What the layer makes of `encoder_hidden_states` `(batch_size, text_length, cross_attention_dim)`. On the CPU
    /// the keys are scaled already, unless attention to them is by a kernel of our own.
    pub fn project(&self, encoder_hidden_states: &Tensor) -> Result<KeyValue, TchError> {
        let mut key = self.split_heads(&self.to_k.forward(encoder_hidden_states)?)?;
        if self.is_by_products(&key) {
            let (_, _, _, head_dim) = key.size4()?;
            key = key.f_mul_scalar((head_dim as f64).sqrt().recip())?;
        }
        Ok(KeyValue { key, value: self.split_heads(&self.to_v.forward(encoder_hidden_states)?)? })
    }

    /// `(batch_size, sequence_length, query_dim)` to the same shape, attending to `text`.
    pub fn forward(&self, hidden_states: &Tensor, text: &KeyValue) -> Result<Tensor, TchError> {
        self.to_out.forward(&self.attended(hidden_states, text)?)
    }

    /// As [`Self::forward`], before the output projection.
    fn attended(&self, hidden_states: &Tensor, text: &KeyValue) -> Result<Tensor, TchError> {
        let query = self.split_heads(&self.to_q.forward(hidden_states)?)?;
        if self.is_by_products(&query) {
            let weights = query.f_matmul(&text.key.f_transpose(2, 3)?)?.f_softmax(-1, None::<Kind>)?;
            return weights.f_matmul(&text.value)?.f_transpose(1, 2)?.f_flatten(2, 3);
        }
        self.kernels.attention(&query, &text.key, &text.value)
    }

    /// A text is short: on the CPU plain products take two thirds of the time that its kernel for long sequences does.
    fn is_by_products(&self, heads: &Tensor) -> bool {
        heads.device() == Device::Cpu && !has_own_kernel(heads, &self.kernels)
    }

    /// `(batch_size, length, channels)` to `(batch_size, heads, length, channels / heads)`.
    fn split_heads(&self, tensor: &Tensor) -> Result<Tensor, TchError> {
        let (batch_size, length, channels) = tensor.size3()?;
        let heads = tensor.f_view([batch_size, length, self.heads, channels / self.heads])?;
        rows_of_a_head_together(heads.f_transpose(1, 2)?, &self.kernels)
    }
}

/// On the CPU, each head's rows side by side in memory: its kernel reads them a sixth faster than with the other heads'
/// between. A GPU's kernels, and our own, take them as they are.
fn rows_of_a_head_together(heads: Tensor, kernels: &Kernels) -> Result<Tensor, TchError> {
    let are_taken_apart = heads.device() != Device::Cpu || has_own_kernel(&heads, kernels);
    if are_taken_apart { Ok(heads) } else { heads.f_contiguous() }
}

/// Whether attention of these heads `(…, head_dim)` is our own kernel's.
fn has_own_kernel(heads: &Tensor, kernels: &Kernels) -> bool {
    heads.size().last().is_some_and(|&head_dim| kernels.attends(heads.kind(), head_dim))
}

/// `tensor`, or, where it has half of `num_rows`, that twice: what is the same for two texts, for each of them.
pub fn with_rows(tensor: &Tensor, num_rows: Option<i64>) -> Result<Tensor, TchError> {
    if num_rows == Some(2 * tensor.size()[0]) {
        return Tensor::f_cat(&[tensor, tensor], 0);
    }
    Ok(tensor.shallow_clone())
}

/// `FeedForward` with `GEGLU`: one half of a projection gates the other.
#[derive(Debug)]
struct FeedForward {
    projection: GegluProjection,
    out: Linear,
}

/// How the two halves are made.
#[derive(Debug)]
enum GegluProjection {
    /// By products of their own, so that each lies in one piece and the gate can be overwritten.
    Halves { proj: Linear, gate: Linear },
    /// By one product, whose bias and gate are one kernel's.
    Fused { both: Linear, kernels: Kernels },
}

impl FeedForward {
    fn load(weights: &Weights<'_>, dim: i64) -> Self {
        let inner_dim = FEED_FORWARD_MULT * dim;
        let both = Linear::load(&(weights / "net" / 0 / "proj"), dim, 2 * inner_dim);
        let projection = if weights.kernels().is_fused() {
            GegluProjection::Fused { both, kernels: weights.kernels().clone() }
        } else {
            let [proj, gate] = both.halves();
            GegluProjection::Halves { proj, gate }
        };
        Self { projection, out: Linear::load(&(weights / "net" / 2), inner_dim, dim) }
    }

    fn forward(&self, hidden_states: &Tensor) -> Result<Tensor, TchError> {
        self.out.forward(&self.gated(hidden_states)?)
    }

    /// As [`Self::forward`], before the output projection.
    fn gated(&self, hidden_states: &Tensor) -> Result<Tensor, TchError> {
        match &self.projection {
            // The exact GELU, by erf: the tanh form differs visibly.
            GegluProjection::Halves { proj, gate } => {
                let mut gate = gate.forward(hidden_states)?.f_gelu_("none")?;
                gate.f_mul_(&proj.forward(hidden_states)?)
            }
            GegluProjection::Fused { both, kernels } => {
                kernels.geglu(&both.forward_without_bias(hidden_states)?, both.bias())
            }
        }
    }
}

/// Self-attention, cross-attention and feed-forward, each after a LayerNorm and added to its input:
/// `BasicTransformerBlock`.
#[derive(Debug)]
pub struct BasicTransformerBlock {
    norm1: LayerNorm,
    attn1: SelfAttention,
    norm2: LayerNorm,
    attn2: CrossAttention,
    norm3: LayerNorm,
    ff: FeedForward,
    pending: Pending,
}

/// The biases that [`BasicTransformerBlock::accumulate`] has not added yet, before each norm: sums over the layers since
/// the last one that did. Each is `(dim)`; none where there is nothing to add.
#[derive(Debug, Default)]
struct Pending {
    norm1: Option<Tensor>,
    norm2: Option<Tensor>,
    norm3: Option<Tensor>,
}

impl BasicTransformerBlock {
    /// A block of `dim` channels; `heads` divides it.
    pub fn load(weights: &Weights<'_>, dim: i64, cross_attention_dim: i64, heads: i64) -> Self {
        Self {
            norm1: LayerNorm::load(&(weights / "norm1"), dim, LAYER_NORM_EPS),
            attn1: SelfAttention::load(&(weights / "attn1"), dim, heads),
            norm2: LayerNorm::load(&(weights / "norm2"), dim, LAYER_NORM_EPS),
            attn2: CrossAttention::load(&(weights / "attn2"), dim, cross_attention_dim, heads),
            norm3: LayerNorm::load(&(weights / "norm3"), dim, LAYER_NORM_EPS),
            ff: FeedForward::load(&(weights / "ff"), dim),
            pending: Pending::default(),
        }
    }

    /// Prepares for [`Self::accumulate`] on an input that lacks `pending` `(dim)`; what its output will lack.
    pub fn leave_biases(&mut self, weights: &Weights<'_>, pending: Option<&Tensor>) -> Tensor {
        let after = |pending: Option<&Tensor>, layer: &Linear| {
            let vectors: Vec<&Tensor> = pending.into_iter().chain(layer.bias()).collect();
            weights.made("bias", sum(&vectors))
        };
        let norm2 = after(pending, &self.attn1.to_out);
        let norm3 = after(Some(&norm2), &self.attn2.to_out);
        let output = after(Some(&norm3), &self.ff.out);
        let norm1 = pending.map(Tensor::shallow_clone);
        self.pending = Pending { norm1, norm2: Some(norm2), norm3: Some(norm3) };
        output
    }

    /// What the block makes of a text; see [`CrossAttention::project`].
    pub fn project_text(&self, encoder_hidden_states: &Tensor) -> Result<KeyValue, TchError> {
        self.attn2.project(encoder_hidden_states)
    }

    /// `(batch_size, sequence_length, dim)` to the same shape. Attends to `text`, or to itself once more without one. Where
    /// `text` has twice the rows, its halves are two texts for the same samples, and so are those of what comes out.
    pub fn forward(&self, hidden_states: &Tensor, text: Option<&KeyValue>) -> Result<Tensor, TchError> {
        let attended = self.attn1.forward(&self.norm1.forward(hidden_states)?)?.f_add_(hidden_states)?;
        let attended = with_rows(&attended, text.map(KeyValue::num_rows))?;
        let normalized = self.norm2.forward(&attended)?;
        let attended = match text {
            Some(text) => self.attn2.forward(&normalized, text)?,
            None => self.attn2.forward(&normalized, &self.attn2.project(&normalized)?)?,
        }
        .f_add_(&attended)?;
        self.ff.forward(&self.norm3.forward(&attended)?)?.f_add_(&attended)
    }

    /// As [`Self::forward`], in place and without the output projections' biases, which [`Self::leave_biases`] has passed
    /// on: each sum is part of a product. `hidden_states` lies in one piece; for two texts it becomes one of twice the rows.
    pub fn accumulate(&self, hidden_states: &mut Tensor, text: Option<&KeyValue>) -> Result<(), TchError> {
        let Pending { norm1, norm2, norm3 } = &self.pending;
        let normalized = self.norm1.forward_pending(hidden_states, norm1.as_ref())?;
        self.attn1.to_out.add_without_bias(hidden_states, &self.attn1.attended(&normalized)?)?;
        *hidden_states = with_rows(hidden_states, text.map(KeyValue::num_rows))?;
        let normalized = self.norm2.forward_pending(hidden_states, norm2.as_ref())?;
        let attended = match text {
            Some(text) => self.attn2.attended(&normalized, text)?,
            None => self.attn2.attended(&normalized, &self.attn2.project(&normalized)?)?,
        };
        self.attn2.to_out.add_without_bias(hidden_states, &attended)?;
        let normalized = self.norm3.forward_pending(hidden_states, norm3.as_ref())?;
        self.ff.out.add_without_bias(hidden_states, &self.ff.gated(&normalized)?)
    }
}
