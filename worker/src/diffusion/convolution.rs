//! Convolutions of 16 bits on a GPU by engines of cuDNN that are pinned one by one, with the bias and the residual added
//! inside.
//!
//! libtorch asks cuDNN's heuristics for an engine and adds a bias in a pass of its own. Here a file names the engine for each
//! convolution of a model ([`ConvolutionEngines`], written by `darkroom-worker tune` on the GPU that it is for), so that all
//! workers with the file compute the same bits with what was fastest. A convolution that the file does not have is
//! libtorch's as before.
//!
//! Everything up to an execution plan is made from a description of the GPU, as cuDNN allows since 9.8; so it is tested with the
//! real library on machines without one (`worker/tests/cudnn.rs`). **Nothing has been executed on a GPU yet.**

mod backend;
mod engines;
mod plan;

use std::fmt;

use serde::{Deserialize, Serialize};
use tch::{Kind, TchError, Tensor};

pub use self::backend::{Cudnn, CudnnError, CudnnHandle};
pub use self::engines::{ConvolutionEngines, EngineChoice, EnginesFault, EnginesFileError, PinnedEngine};
pub use self::plan::{DeviceProperties, Plan, candidates};
use super::device::ComputeDtype;
use super::layout::is_by_pixels;

/// What is added to a convolution's output, in f32 before it is rounded.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Adds {
    /// Nothing.
    Nothing,
    /// A number for each channel.
    Bias,
    /// A number for each channel, and a feature map. (cuDNN has precompiled engines for this pair and for a bias; a residual alone
    /// would be compiled at run time.)
    BiasAndResidual,
}

/// A convolution with square kernels on feature maps whose channels are side by side, as far as the choice of an engine
/// depends on it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Convolution {
    /// Of inputs, weights and outputs; sums are taken in f32.
    pub dtype: ComputeDtype,
    /// Samples.
    pub batch_size: i64,
    /// Channels of the input.
    pub in_channels: i64,
    /// Rows of the input.
    pub height: i64,
    /// Columns of the input.
    pub width: i64,
    /// Channels of the output.
    pub out_channels: i64,
    /// Rows and columns of a kernel.
    pub kernel_size: i64,
    /// In both directions.
    pub stride: i64,
    /// Zeros on each side.
    pub padding: i64,
    /// What is added.
    pub adds: Adds,
}

impl Convolution {
    /// That of these tensors: `input` `(batch_size, in_channels, height, width)`, `weight` `(out_channels, in_channels, kernel_size,
    /// kernel_size)`. `None` if it is not one that engines are pinned for: not in 16 bits, or not of maps by pixels.
    pub fn of(operands: &Operands<'_>) -> Option<Self> {
        let Operands { input, weight, stride, padding, .. } = *operands;
        let dtype = match input.kind() {
            Kind::Half => ComputeDtype::F16,
            Kind::BFloat16 => ComputeDtype::Bf16,
            _ => return None,
        };
        let ([batch_size, in_channels, height, width], [out_channels, _, kernel_size, _]) =
            (input.size().try_into().ok()?, weight.size().try_into().ok()?);
        let expected = [out_channels, in_channels, kernel_size, kernel_size];
        let adds = match (operands.bias, operands.residual) {
            (None, None) => Adds::Nothing,
            (Some(_), None) => Adds::Bias,
            (Some(_), Some(_)) => Adds::BiasAndResidual,
            (None, Some(_)) => return None,
        };
        let convolution = Self {
            dtype,
            batch_size,
            in_channels,
            height,
            width,
            out_channels,
            kernel_size,
            stride,
            padding,
            adds,
        };
        let fits = |tensor: &Tensor, size: &[i64]| tensor.kind() == input.kind() && tensor.size() == size;
        let is_map = |tensor: &Tensor| tensor.device() == input.device() && is_by_pixels(tensor);
        let is_taken = fits(weight, &expected)
            && is_map(input)
            && is_map(weight)
            && operands.bias.is_none_or(|bias| fits(bias, &[out_channels]) && bias.is_contiguous())
            && operands.residual.is_none_or(|map| fits(map, &convolution.output_size()) && is_map(map));
        is_taken.then_some(convolution)
    }

    /// `(batch_size, out_channels, height, width)` of the output.
    pub fn output_size(&self) -> [i64; 4] {
        let output = |size: i64| (size + 2 * self.padding - self.kernel_size) / self.stride + 1;
        [self.batch_size, self.out_channels, output(self.height), output(self.width)]
    }

    /// Its floating point operations: a multiplication and an addition for each weight and place.
    pub fn flops(&self) -> f64 {
        let outputs: i64 = self.output_size().iter().product();
        2.0 * (outputs * self.in_channels * self.kernel_size * self.kernel_size) as f64
    }
}

impl fmt::Display for Convolution {
    /// `f16 66×320×64×64 → 320, 3×3, stride 1, bias and residual`.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { dtype, batch_size, in_channels, height, width, out_channels, kernel_size, stride, .. } =
            *self;
        let adds = match self.adds {
            Adds::Nothing => "",
            Adds::Bias => ", bias",
            Adds::BiasAndResidual => ", bias and residual",
        };
        write!(
            f,
            "{dtype} {batch_size}×{in_channels}×{height}×{width} → {out_channels}, {kernel_size}×{kernel_size}, \
             stride {stride}{adds}"
        )
    }
}

/// The tensors of a convolution.
#[derive(Debug, Clone, Copy)]
pub struct Operands<'t> {
    /// `(batch_size, in_channels, height, width)`.
    pub input: &'t Tensor,
    /// `(out_channels, in_channels, kernel_size, kernel_size)`.
    pub weight: &'t Tensor,
    /// `(out_channels)`.
    pub bias: Option<&'t Tensor>,
    /// Of the output's shape.
    pub residual: Option<&'t Tensor>,
    /// In both directions.
    pub stride: i64,
    /// Zeros on each side.
    pub padding: i64,
}

impl Operands<'_> {
    /// By libtorch.
    pub fn convolve(&self) -> Result<Tensor, TchError> {
        let (stride, padding) = ([self.stride; 2], [self.padding; 2]);
        let map = self.input.f_conv2d(self.weight, self.bias, stride, padding, [1, 1], 1)?;
        match self.residual {
            Some(residual) => map.f_add(residual),
            None => Ok(map),
        }
    }

    /// By libtorch, of the same numbers in f32: what engines are measured against.
    pub fn convolve_in_f32(&self) -> Result<Tensor, TchError> {
        let float = |tensor: &Tensor| tensor.f_to_kind(Kind::Float);
        let (input, weight) = (float(self.input)?, float(self.weight)?);
        let (bias, residual) = (self.bias.map(float).transpose()?, self.residual.map(float).transpose()?);
        let (bias, residual) = (bias.as_ref(), residual.as_ref());
        Operands { input: &input, weight: &weight, bias, residual, ..*self }.convolve()
    }
}

/// Computes convolutions that it has an engine for.
pub trait Convolve: fmt::Debug + Send + Sync {
    /// `convolution` of its operands, by pixels; `None` if it has no engine for it.
    fn convolve(
        &self,
        convolution: &Convolution,
        operands: &Operands<'_>,
    ) -> Result<Option<Tensor>, TchError>;

    /// Which engines it has, in few characters: what a picture's last bits depend on.
    fn name(&self) -> &str;
}

/// Bytes that the tensors' addresses have to be multiples of: as many are loaded at once.
pub const ALIGNMENT: usize = 16;
