//! The layers of `torch.nn` that the models are made of, with their weights. Shapes follow PyTorch.

use tch::{Kind, TchError, Tensor};

use super::convolution::Operands;
use super::kernels::{FeatureMap, GroupNormParameters, Kernels, LayerNormParameters};
use super::layout::{from_pixels, pixels};
use super::weights::Weights;

/// `torch.nn.Linear`.
#[derive(Debug)]
pub struct Linear {
    weight: Tensor,
    bias: Option<Tensor>,
}

impl Linear {
    /// A layer with a bias.
    pub fn load(weights: &Weights<'_>, in_features: i64, out_features: i64) -> Self {
        Self {
            bias: Some(weights.tensor("bias", &[out_features])),
            ..Self::without_bias(weights, in_features, out_features)
        }
    }

    /// A 1×1 convolution as the layer that it is over the channels of each pixel.
    pub fn from_pointwise_conv(weights: &Weights<'_>, in_channels: i64, out_channels: i64) -> Self {
        let shape = [out_channels, in_channels];
        Self {
            weight: weights.reshaped_tensor("weight", &[out_channels, in_channels, 1, 1], &shape),
            bias: Some(weights.tensor("bias", &[out_channels])),
        }
    }

    /// A layer without a bias.
    pub fn without_bias(weights: &Weights<'_>, in_features: i64, out_features: i64) -> Self {
        Self { weight: weights.tensor("weight", &[out_features, in_features]), bias: None }
    }

    /// Layers of the same input and without biases as one layer, whose outputs follow each other.
    pub fn stacked_without_bias(
        weights: &Weights<'_>,
        names: &[&str],
        in_features: i64,
        out_features: i64,
    ) -> Self {
        Self { weight: weights.stacked(names, "weight", &[out_features, in_features]), bias: None }
    }

    /// As [`Self::stacked_without_bias`], with biases.
    pub fn stacked(weights: &Weights<'_>, names: &[&str], in_features: i64, out_features: i64) -> Self {
        Self {
            bias: Some(weights.stacked(names, "bias", &[out_features])),
            ..Self::stacked_without_bias(weights, names, in_features, out_features)
        }
    }

    /// The layers that make the first and the second half of the outputs, which are an even number.
    pub fn halves(self) -> [Self; 2] {
        let half = |tensor: &Tensor, index: i64| {
            // An empty tensor stands for a fault that is recorded already.
            if tensor.defined() { tensor.chunk(2, 0).swap_remove(index as usize) } else { Tensor::new() }
        };
        [0, 1].map(|index| Self {
            weight: half(&self.weight, index),
            bias: self.bias.as_ref().map(|bias| half(bias, index)),
        })
    }

    /// `(…, in_features)` to `(…, out_features)`.
    pub fn forward(&self, input: &Tensor) -> Result<Tensor, TchError> {
        input.f_linear(&self.weight, self.bias.as_ref())
    }

    /// As [`Self::forward`], without the bias, which the caller sees to.
    pub fn forward_without_bias(&self, input: &Tensor) -> Result<Tensor, TchError> {
        input.f_linear(&self.weight, None::<&Tensor>)
    }

    /// Adds [`Self::forward_without_bias`] to `sum` `(…, out_features)`, which lies in one piece, as part of the product.
    pub fn add_without_bias(&self, sum: &mut Tensor, input: &Tensor) -> Result<(), TchError> {
        let rows = |tensor: &Tensor, features: i64| tensor.f_view([-1, features]);
        let (out_features, in_features) = self.weight.size2()?;
        let input = input.f_reshape([-1, in_features])?;
        let _ = rows(sum, out_features)?.f_addmm_(&input, &self.weight.f_transpose(0, 1)?)?;
        Ok(())
    }

    /// The layer's bias `(out_features)`; `None` in a layer without one.
    pub fn bias(&self) -> Option<&Tensor> {
        self.bias.as_ref()
    }

    /// The layer, loaded from `weights`, with `addend` `(out_features)` in its bias.
    pub fn with_more_bias(mut self, weights: &Weights<'_>, addend: &Tensor) -> Self {
        self.bias = self.bias.map(|bias| weights.made("bias", sum(&[&bias, addend])));
        self
    }

    /// The layer, loaded from `weights`, with what it makes of `pending` `(in_features)` in its bias: `pending` is what
    /// its input lacks everywhere.
    pub fn with_pending(self, weights: &Weights<'_>, pending: &Tensor) -> Self {
        if !(self.weight.defined() && pending.defined()) {
            return self;
        }
        let float = |tensor: &Tensor| tensor.f_to_kind(Kind::Float);
        let product = float(&self.weight).and_then(|weight| weight.f_mv(&float(pending)?));
        let product = weights.made("bias", product);
        self.with_more_bias(weights, &product)
    }
}

/// The sum of vectors, in f32 and then rounded to the first one's dtype. An empty tensor, which stands for a fault that is
/// recorded already, gives an empty sum.
pub fn sum(vectors: &[&Tensor]) -> Result<Tensor, TchError> {
    let [first, ..] = vectors else { return Ok(Tensor::new()) };
    if vectors.iter().any(|vector| !vector.defined()) {
        return Ok(Tensor::new());
    }
    let mut sum = first.f_to_device_(first.device(), Kind::Float, false, true)?;
    for vector in &vectors[1..] {
        sum = sum.f_add_(&vector.f_to_kind(Kind::Float)?)?;
    }
    sum.f_to_kind(first.kind())
}

/// A 1×1 convolution: by libtorch's convolution, or, where the channels of a pixel are side by side, by the product of
/// matrices that it is.
#[derive(Debug)]
pub enum PointwiseConv {
    /// Channels first.
    Conv(Conv2d),
    /// Channels last.
    Product(Linear),
}

impl PointwiseConv {
    /// A convolution of each pixel by itself.
    pub fn load(weights: &Weights<'_>, in_channels: i64, out_channels: i64) -> Self {
        if weights.kernels().is_channels_last() {
            Self::Product(Linear::from_pointwise_conv(weights, in_channels, out_channels))
        } else {
            Self::Conv(Conv2d::load(weights, in_channels, out_channels, 1))
        }
    }

    /// `(batch_size, in_channels, height, width)` to `(batch_size, out_channels, height, width)`.
    pub fn forward(&self, input: &Tensor) -> Result<Tensor, TchError> {
        match self {
            Self::Conv(conv) => conv.forward(input),
            Self::Product(linear) => from_pixels(&linear.forward(&pixels(input)?)?),
        }
    }
}

/// `torch.nn.Conv2d` with a square kernel and a bias.
#[derive(Debug)]
pub struct Conv2d {
    weight: Tensor,
    bias: Tensor,
    stride: i64,
    padding: i64,
    kernels: Kernels,
}

impl Conv2d {
    /// A convolution of stride 1 that keeps height and width; `kernel_size` is odd.
    pub fn load(weights: &Weights<'_>, in_channels: i64, out_channels: i64, kernel_size: i64) -> Self {
        Self {
            weight: weights.kernel_tensor("weight", &[out_channels, in_channels, kernel_size, kernel_size]),
            bias: weights.tensor("bias", &[out_channels]),
            stride: 1,
            padding: kernel_size / 2,
            kernels: weights.kernels().clone(),
        }
    }

    /// A 3×3 convolution of stride 2, which halves height and width (rounded up).
    pub fn downsampling(weights: &Weights<'_>, channels: i64) -> Self {
        Self { stride: 2, ..Self::load(weights, channels, channels, 3) }
    }

    /// `(batch_size, in_channels, height, width)` to `(batch_size, out_channels, height, width)`.
    pub fn forward(&self, input: &Tensor) -> Result<Tensor, TchError> {
        self.forward_with_bias(input, &self.bias)
    }

    /// As [`Self::forward`], with another bias `(out_channels)` than the layer's own.
    pub fn forward_with_bias(&self, input: &Tensor, bias: &Tensor) -> Result<Tensor, TchError> {
        self.kernels.convolve(&self.operands(input, Some(bias), None))
    }

    /// As [`Self::forward`], without the bias, which the caller sees to: on a GPU it may be a pass of its own.
    pub fn forward_without_bias(&self, input: &Tensor) -> Result<Tensor, TchError> {
        self.kernels.convolve(&self.operands(input, None, None))
    }

    /// As [`Self::forward`], plus `residual` of the output's shape, to a map that a GroupNorm of `num_groups` reads.
    pub fn forward_map(
        &self,
        input: &Tensor,
        residual: Option<&Tensor>,
        num_groups: i64,
    ) -> Result<FeatureMap, TchError> {
        self.kernels.convolve_map(&self.operands(input, Some(&self.bias), residual), num_groups)
    }

    fn operands<'t>(
        &'t self,
        input: &'t Tensor,
        bias: Option<&'t Tensor>,
        residual: Option<&'t Tensor>,
    ) -> Operands<'t> {
        let Self { weight, stride, padding, .. } = self;
        Operands { input, weight, bias, residual, stride: *stride, padding: *padding }
    }

    /// The layer's bias `(out_channels)`.
    pub fn bias(&self) -> &Tensor {
        &self.bias
    }
}

/// A [`Conv2d`] whose output a GroupNorm reads.
#[derive(Debug)]
pub struct MapConv2d {
    conv: Conv2d,
    num_groups: i64,
}

impl MapConv2d {
    /// The convolution before a GroupNorm of `num_groups`.
    pub fn new(conv: Conv2d, num_groups: i64) -> Self {
        Self { conv, num_groups }
    }

    /// As [`Conv2d::forward`].
    pub fn forward(&self, input: &Tensor) -> Result<FeatureMap, TchError> {
        self.conv.forward_map(input, None, self.num_groups)
    }
}

/// `torch.nn.GroupNorm`.
#[derive(Debug)]
pub struct GroupNorm {
    weight: Tensor,
    bias: Tensor,
    num_groups: i64,
    eps: f64,
    kernels: Kernels,
}

impl GroupNorm {
    /// `num_groups` divides `num_channels`; the configs are checked for it.
    pub fn load(weights: &Weights<'_>, num_groups: i64, num_channels: i64, eps: f64) -> Self {
        let (weight, bias) =
            (weights.tensor("weight", &[num_channels]), weights.tensor("bias", &[num_channels]));
        Self { weight, bias, num_groups, eps, kernels: weights.kernels().clone() }
    }

    /// `(batch_size, num_channels, height, width)` to the same shape.
    pub fn forward(&self, input: &FeatureMap) -> Result<Tensor, TchError> {
        self.kernels.group_norm_of_map(input, &self.parameters(false))
    }

    /// As [`Self::forward`], followed by SiLU.
    pub fn forward_silu(&self, input: &FeatureMap) -> Result<Tensor, TchError> {
        self.kernels.group_norm_of_map(input, &self.parameters(true))
    }

    /// As [`Self::forward_silu`], of `input` plus `addend` `(num_channels)`.
    pub fn forward_silu_pending(&self, input: &Tensor, addend: &Tensor) -> Result<Tensor, TchError> {
        self.kernels.group_norm(input, Some(addend), &self.parameters(true))
    }

    fn parameters(&self, silu: bool) -> GroupNormParameters<'_> {
        let Self { weight, bias, num_groups, eps, .. } = self;
        GroupNormParameters { weight, bias, num_groups: *num_groups, eps: *eps, silu }
    }
}

/// `torch.nn.LayerNorm` over the last dimension.
#[derive(Debug)]
pub struct LayerNorm {
    weight: Tensor,
    bias: Tensor,
    eps: f64,
    kernels: Kernels,
}

impl LayerNorm {
    /// A norm over vectors of `size`.
    pub fn load(weights: &Weights<'_>, size: i64, eps: f64) -> Self {
        let (weight, bias) = (weights.tensor("weight", &[size]), weights.tensor("bias", &[size]));
        Self { weight, bias, eps, kernels: weights.kernels().clone() }
    }

    /// `(…, size)` to the same shape.
    pub fn forward(&self, input: &Tensor) -> Result<Tensor, TchError> {
        self.forward_pending(input, None)
    }

    /// As [`Self::forward`], of `input` plus `pending` `(size)`, what its input lacks everywhere.
    pub fn forward_pending(&self, input: &Tensor, pending: Option<&Tensor>) -> Result<Tensor, TchError> {
        let Self { weight, bias, eps, .. } = self;
        self.kernels.layer_norm(input, pending, &LayerNormParameters { weight, bias, eps: *eps })
    }
}

/// `torch.nn.Embedding`.
#[derive(Debug)]
pub struct Embedding {
    /// `(num_embeddings, embedding_dim)`.
    pub weight: Tensor,
}

impl Embedding {
    /// A table of `num_embeddings` vectors.
    pub fn load(weights: &Weights<'_>, num_embeddings: i64, embedding_dim: i64) -> Self {
        Self { weight: weights.tensor("weight", &[num_embeddings, embedding_dim]) }
    }

    /// `(…)` of indices to `(…, embedding_dim)`.
    pub fn forward(&self, indices: &Tensor) -> Result<Tensor, TchError> {
        Tensor::f_embedding(&self.weight, indices, -1, false, false)
    }
}
