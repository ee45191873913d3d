//! The layers of `torch.nn` that the models are made of, with their weights. Shapes follow PyTorch.

use tch::{TchError, Tensor};

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
}

/// `torch.nn.Conv2d` with a square kernel and a bias.
#[derive(Debug)]
pub struct Conv2d {
    weight: Tensor,
    bias: Tensor,
    stride: i64,
    padding: i64,
}

impl Conv2d {
    /// A convolution of stride 1 that keeps height and width; `kernel_size` is odd.
    pub fn load(weights: &Weights<'_>, in_channels: i64, out_channels: i64, kernel_size: i64) -> Self {
        Self {
            weight: weights.tensor("weight", &[out_channels, in_channels, kernel_size, kernel_size]),
            bias: weights.tensor("bias", &[out_channels]),
            stride: 1,
            padding: kernel_size / 2,
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
        let (stride, padding) = ([self.stride; 2], [self.padding; 2]);
        input.f_conv2d(&self.weight, Some(bias), stride, padding, [1, 1], 1)
    }

    /// The layer's bias `(out_channels)`.
    pub fn bias(&self) -> &Tensor {
        &self.bias
    }
}

/// `torch.nn.GroupNorm`.
#[derive(Debug)]
pub struct GroupNorm {
    weight: Tensor,
    bias: Tensor,
    num_groups: i64,
    eps: f64,
}

impl GroupNorm {
    /// `num_groups` divides `num_channels`; the configs are checked for it.
    pub fn load(weights: &Weights<'_>, num_groups: i64, num_channels: i64, eps: f64) -> Self {
        let (weight, bias) =
            (weights.tensor("weight", &[num_channels]), weights.tensor("bias", &[num_channels]));
        Self { weight, bias, num_groups, eps }
    }

    /// `(batch_size, num_channels, …)` to the same shape.
    pub fn forward(&self, input: &Tensor) -> Result<Tensor, TchError> {
        input.f_group_norm(self.num_groups, Some(&self.weight), Some(&self.bias), self.eps, true)
    }
}

/// `torch.nn.LayerNorm` over the last dimension.
#[derive(Debug)]
pub struct LayerNorm {
    weight: Tensor,
    bias: Tensor,
    size: i64,
    eps: f64,
}

impl LayerNorm {
    /// A norm over vectors of `size`.
    pub fn load(weights: &Weights<'_>, size: i64, eps: f64) -> Self {
        Self { weight: weights.tensor("weight", &[size]), bias: weights.tensor("bias", &[size]), size, eps }
    }

    /// `(…, size)` to the same shape.
    pub fn forward(&self, input: &Tensor) -> Result<Tensor, TchError> {
        input.f_layer_norm([self.size], Some(&self.weight), Some(&self.bias), self.eps, true)
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
