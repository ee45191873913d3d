//! The transformer that CLIP's text and vision models share (transformers' `models/clip/modeling_clip.py`).

use tch::{TchError, Tensor};

use super::super::config::ConfigFile;
use super::super::nn::{LayerNorm, Linear};
use super::super::weights::Weights;

/// More layers than any CLIP model has; a guard against absurd configs.
const MAX_LAYERS: i64 = 256;
/// More channels than any CLIP model has.
pub(crate) const MAX_CLIP_SIZE: i64 = 1 << 20;

/// The activation between the two layers of the feed-forward network.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum HiddenAct {
    /// `x · sigmoid(1.702 x)`, OpenAI's CLIP and so Stable Diffusion v1.
    QuickGelu,
    /// The exact GELU, OpenCLIP's models.
    Gelu,
}

/// The slope in `quick_gelu` (transformers' `QuickGELUActivation`).
const QUICK_GELU_SLOPE: f64 = 1.702;

impl HiddenAct {
    /// The activation by its name in `hidden_act`.
    fn parse(name: &str) -> Option<Self> {
        match name {
            "quick_gelu" => Some(Self::QuickGelu),
            "gelu" => Some(Self::Gelu),
            _ => None,
        }
    }

    fn forward(self, input: &Tensor) -> Result<Tensor, TchError> {
        match self {
            Self::QuickGelu => input.f_mul_scalar(QUICK_GELU_SLOPE)?.f_sigmoid_()?.f_mul_(input),
            Self::Gelu => input.f_gelu("none"),
        }
    }
}

/// What the encoder is made from: fields that text and vision configs share.
#[derive(Debug, Clone, Copy)]
pub struct CLIPEncoderConfig {
    /// Channels.
    pub hidden_size: i64,
    /// Channels inside the feed-forward networks.
    pub intermediate_size: i64,
    /// Layers.
    pub num_hidden_layers: i64,
    /// Attention heads; divides `hidden_size`.
    pub num_attention_heads: i64,
    /// Activation of the feed-forward networks.
    pub hidden_act: HiddenAct,
    /// Epsilon of the LayerNorms.
    pub layer_norm_eps: f64,
}

impl CLIPEncoderConfig {
    /// Reads the fields; `defaults` are those of the config's class in transformers.
    pub fn read(config: &ConfigFile, defaults: Self) -> Self {
        let hidden_size = config.size("hidden_size", defaults.hidden_size, MAX_CLIP_SIZE);
        let num_attention_heads =
            config.size("num_attention_heads", defaults.num_attention_heads, MAX_CLIP_SIZE);
        if hidden_size % num_attention_heads != 0 {
            config.fault("num_attention_heads", format!("a divisor of `hidden_size` ({hidden_size})"));
        }
        Self {
            hidden_size,
            intermediate_size: config.size("intermediate_size", defaults.intermediate_size, MAX_CLIP_SIZE),
            num_hidden_layers: config.size("num_hidden_layers", defaults.num_hidden_layers, MAX_LAYERS),
            num_attention_heads,
            hidden_act: config.choice(
                "hidden_act",
                defaults.hidden_act,
                "\"quick_gelu\" or \"gelu\"",
                HiddenAct::parse,
            ),
            layer_norm_eps: config.positive("layer_norm_eps", defaults.layer_norm_eps),
        }
    }
}

/// `CLIPAttention`.
#[derive(Debug)]
struct CLIPAttention {
    q_proj: Linear,
    k_proj: Linear,
    v_proj: Linear,
    out_proj: Linear,
    num_heads: i64,
}

impl CLIPAttention {
    fn load(weights: &Weights<'_>, config: &CLIPEncoderConfig) -> Self {
        let projection = |name: &str| Linear::load(&(weights / name), config.hidden_size, config.hidden_size);
        Self {
            q_proj: projection("q_proj"),
            k_proj: projection("k_proj"),
            v_proj: projection("v_proj"),
            out_proj: projection("out_proj"),
            num_heads: config.num_attention_heads,
        }
    }

    fn forward(&self, hidden_states: &Tensor, is_causal: bool) -> Result<Tensor, TchError> {
        let (batch_size, length, channels) = hidden_states.size3()?;
        let split_heads = |projected: Tensor| {
            projected
                .f_view([batch_size, length, self.num_heads, channels / self.num_heads])?
                .f_transpose(1, 2)
        };
        let query = split_heads(self.q_proj.forward(hidden_states)?)?;
        let key = split_heads(self.k_proj.forward(hidden_states)?)?;
        let value = split_heads(self.v_proj.forward(hidden_states)?)?;
        let no_mask = None::<&Tensor>;
        let attended = Tensor::f_scaled_dot_product_attention(
            &query, &key, &value, no_mask, 0.0, is_causal, None, false,
        )?;
        self.out_proj.forward(&attended.f_transpose(1, 2)?.f_flatten(2, 3)?)
    }
}

/// `CLIPEncoderLayer`.
#[derive(Debug)]
struct CLIPEncoderLayer {
    self_attn: CLIPAttention,
    layer_norm1: LayerNorm,
    fc1: Linear,
    fc2: Linear,
    hidden_act: HiddenAct,
    layer_norm2: LayerNorm,
}

impl CLIPEncoderLayer {
    fn load(weights: &Weights<'_>, config: &CLIPEncoderConfig) -> Self {
        let CLIPEncoderConfig { hidden_size, intermediate_size, hidden_act, layer_norm_eps, .. } = *config;
        let mlp = weights / "mlp";
        Self {
            self_attn: CLIPAttention::load(&(weights / "self_attn"), config),
            layer_norm1: LayerNorm::load(&(weights / "layer_norm1"), hidden_size, layer_norm_eps),
            fc1: Linear::load(&(&mlp / "fc1"), hidden_size, intermediate_size),
            fc2: Linear::load(&(&mlp / "fc2"), intermediate_size, hidden_size),
            hidden_act,
            layer_norm2: LayerNorm::load(&(weights / "layer_norm2"), hidden_size, layer_norm_eps),
        }
    }

    fn forward(&self, hidden_states: &Tensor, is_causal: bool) -> Result<Tensor, TchError> {
        let attended = self
            .self_attn
            .forward(&self.layer_norm1.forward(hidden_states)?, is_causal)?
            .f_add_(hidden_states)?;
        let inner = self.fc1.forward(&self.layer_norm2.forward(&attended)?)?;
        self.fc2.forward(&self.hidden_act.forward(&inner)?)?.f_add_(&attended)
    }
}

/// `CLIPEncoder`: the layers, one after the other.
#[derive(Debug)]
pub struct CLIPEncoder {
    layers: Vec<CLIPEncoderLayer>,
    is_causal: bool,
}

impl CLIPEncoder {
    /// The layers below `weights / "layers"`; `is_causal` where a position sees only those before it.
    pub fn load(weights: &Weights<'_>, config: &CLIPEncoderConfig, is_causal: bool) -> Self {
        let layers = weights / "layers";
        let layers = (0..config.num_hidden_layers).map(|i| CLIPEncoderLayer::load(&(&layers / i), config));
        Self { layers: layers.collect(), is_causal }
    }

    /// `(batch_size, length, hidden_size)` to the same shape.
    pub fn forward(&self, inputs_embeds: &Tensor) -> Result<Tensor, TchError> {
        let mut hidden_states = inputs_embeds.shallow_clone();
        for layer in &self.layers {
            hidden_states = layer.forward(&hidden_states, self.is_causal)?;
        }
        Ok(hidden_states)
    }
}
