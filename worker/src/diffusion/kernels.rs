//! The few operations that our own CUDA kernels (`worker/kernels`) do in one pass where libtorch takes several: the seam
//! between the layers and what computes for them.
//!
//! A layer asks [`Kernels`], which it got with its weights. With a launcher the operation is one or two launches; without
//! one, and where a kernel does not take a shape or dtype, it is composed of libtorch's operations (`kernels/plain.rs`). On the CPU
//! there is no launcher. [`Kernels`] also says how feature maps lie in memory, since the kernels read channels_last.

mod attention;
mod choice;
mod cubins;
mod cuda;
mod feature_map;
mod launch;
mod linear_step;
mod operations;
mod pinned;
mod plain;
mod self_check;

use std::fmt;
use std::sync::Arc;

use tch::{Kind, TchError, Tensor};

pub use self::choice::KernelChoice;
pub use self::cubins::{CUBINS, Cubin, MANIFEST};
pub use self::feature_map::FeatureMap;
use self::feature_map::Statistics;
pub use self::launch::{Argument, Call, Kernel, Launch, Stream};
pub use self::linear_step::{LinearStepTensors, guided};
pub use self::pinned::PinnedConvolutions;
pub(super) use self::self_check::tolerance;
pub use self::self_check::{SelfCheckError, self_check};
use super::convolution::{Convolution, ConvolutionEngines, Convolve, Operands};
use super::cuda::Gpu;
use super::device::{ComputeDevice, ComputeDtype};
use super::layout::{from_pixels, is_by_pixels, pixels};
use super::load_error::Fault;

/// A GroupNorm's parameters.
#[derive(Debug, Clone, Copy)]
pub struct GroupNormParameters<'t> {
    /// `(channels)`.
    pub weight: &'t Tensor,
    /// `(channels)`.
    pub bias: &'t Tensor,
    /// Divides the channels.
    pub num_groups: i64,
    /// Added to the variance.
    pub eps: f64,
    /// Whether SiLU follows.
    pub silu: bool,
}

/// A LayerNorm's parameters.
#[derive(Debug, Clone, Copy)]
pub struct LayerNormParameters<'t> {
    /// `(channels)`.
    pub weight: &'t Tensor,
    /// `(channels)`.
    pub bias: &'t Tensor,
    /// Added to the variance.
    pub eps: f64,
}

/// How layers compute, and how feature maps lie in memory. Cheap to clone; every layer has one.
#[derive(Debug, Clone)]
pub struct Kernels {
    launcher: Option<Arc<dyn Launch>>,
    convolver: Option<Arc<dyn Convolve>>,
    is_channels_last: bool,
    has_attention: bool,
}

impl Kernels {
    /// What a device computes with, for weights in `dtype`. Opens the kernels of a GPU and tries them out; where they
    /// cannot be had, the log says so once and libtorch's operations do the work. The device is open already.
    pub fn open(choice: KernelChoice, device: ComputeDevice, dtype: ComputeDtype) -> Self {
        let ComputeDevice::Cuda(index) = device else { return Self::plain(false) };
        if choice == KernelChoice::Plain {
            return Self::plain(true);
        }
        let launcher = match cuda::CudaKernels::open(index) {
            Ok(launcher) => launcher,
            Err(error) => {
                tracing::warn!(%device, %error, "Our own kernels cannot be used, libtorch's do their work");
                return Self::plain(true);
            }
        };
        let fused = Self::fused(launcher);
        let choices = match choice {
            KernelChoice::Attention => vec![fused.clone().with_attention(), fused],
            _ => vec![fused],
        };
        for kernels in choices {
            match self_check(&kernels, dtype) {
                Ok(()) => return kernels,
                Err(error) => {
                    tracing::error!(%device, %dtype, %kernels, %error, "Kernels of our own are not used");
                }
            }
        }
        Self::plain(true)
    }

    /// With the convolutions that `engines` are named for computed by them, on a GPU and in 16 bits. The faults say why they
    /// cannot be had: whoever names a file gets what is in it, or an error.
    pub fn with_engines(
        self,
        device: ComputeDevice,
        dtype: ComputeDtype,
        engines: Option<&ConvolutionEngines>,
    ) -> Result<Self, Vec<Fault>> {
        let (ComputeDevice::Cuda(index), Some(engines)) = (device, engines) else { return Ok(self) };
        if dtype == ComputeDtype::F32 {
            return Ok(self);
        }
        let fault = |reason: String| Fault::Convolutions { reason };
        let gpu = Gpu::describe(index).map_err(|error| vec![fault(error.to_string())])?;
        let faults = engines.faults_on(&gpu.name, &gpu.cudnn);
        if !faults.is_empty() {
            return Err(faults.into_iter().map(|wrong| fault(wrong.to_string())).collect());
        }
        let Some(launcher) = self.launcher.clone() else {
            return Err(vec![fault("they need kernels of our own, which are not used here".to_owned())]);
        };
        match PinnedConvolutions::open(launcher, engines) {
            Ok(convolver) => Ok(self.with_convolver(Arc::new(convolver))),
            Err(error) => Err(vec![fault(error.to_string())]),
        }
    }

    /// libtorch's operations alone.
    pub fn plain(is_channels_last: bool) -> Self {
        Self { launcher: None, convolver: None, is_channels_last, has_attention: false }
    }

    /// Our own kernels, where they take what a layer has.
    pub fn fused(launcher: Arc<dyn Launch>) -> Self {
        Self { launcher: Some(launcher), convolver: None, is_channels_last: true, has_attention: false }
    }

    /// With convolutions by `convolver`, where it takes them.
    pub fn with_convolver(self, convolver: Arc<dyn Convolve>) -> Self {
        Self { convolver: Some(convolver), ..self }
    }

    /// What starts our own kernels, if there are any.
    pub fn launcher(&self) -> Option<&Arc<dyn Launch>> {
        self.launcher.as_ref()
    }

    /// With attention of our own, too.
    pub fn with_attention(self) -> Self {
        Self { has_attention: self.launcher.is_some(), ..self }
    }

    /// Whether layers should leave to a later operation what the fused ones take along, such as a bias.
    pub fn is_fused(&self) -> bool {
        self.launcher.is_some()
    }

    /// Whether the channels of a pixel are side by side in feature maps and in the weights of convolutions.
    pub fn is_channels_last(&self) -> bool {
        self.is_channels_last
    }

    /// The tensor `(_, channels, height, width)` as it lies in memory here.
    pub fn lay_out(&self, tensor: &Tensor) -> Result<Tensor, TchError> {
        if !self.is_channels_last {
            return Ok(tensor.shallow_clone());
        }
        from_pixels(&pixels(tensor)?.f_contiguous()?)
    }

    /// The convolution of `operands`, with what they add.
    pub fn convolve(&self, operands: &Operands<'_>) -> Result<Tensor, TchError> {
        match self.convolve_pinned(operands)? {
            Some(output) => Ok(output),
            None => operands.convolve(),
        }
    }

    /// As [`Self::convolve`], if there is an engine for it.
    fn convolve_pinned(&self, operands: &Operands<'_>) -> Result<Option<Tensor>, TchError> {
        let Some(convolver) = &self.convolver else { return Ok(None) };
        // Latents, which a model's first convolution reads, lie by channels.
        let by_pixels = (!is_by_pixels(operands.input)).then(|| self.lay_out(operands.input)).transpose()?;
        let operands = Operands { input: by_pixels.as_ref().unwrap_or(operands.input), ..*operands };
        let Some(convolution) = Convolution::of(&operands) else { return Ok(None) };
        convolver.convolve(&convolution, &operands)
    }

    /// As [`Self::convolve`], to a feature map that a GroupNorm of `num_groups` reads. `operands` have a bias. Where our own
    /// kernels add bias and residual, the norm's statistics are taken on the way; inside a convolution they are not.
    pub fn convolve_map(&self, operands: &Operands<'_>, num_groups: i64) -> Result<FeatureMap, TchError> {
        if let Some(output) = self.convolve_pinned(operands)? {
            return Ok(FeatureMap::from(output));
        }
        let Operands { bias, residual, .. } = *operands;
        // libtorch adds a bias in a pass of its own on a GPU, and on a CPU inside.
        let (inside, after) = if self.is_fused() { (None, bias) } else { (bias, None) };
        let map = self.convolve(&Operands { bias: inside, residual: None, ..*operands })?;
        if after.is_none() && residual.is_none() {
            return Ok(FeatureMap::from(map));
        }
        self.add_bias_residual(map, after, residual, num_groups)
    }

    /// GroupNorm of `input` plus `addend` over `(batch_size, channels, …)`, to the same shape. `addend` is
    /// `(channels)` or `(batch_size, channels)` and the same for all pixels.
    pub fn group_norm(
        &self,
        input: &Tensor,
        addend: Option<&Tensor>,
        parameters: &GroupNormParameters<'_>,
    ) -> Result<Tensor, TchError> {
        self.normalize(input, None, addend, parameters)
    }

    /// GroupNorm of a feature map, with its statistics where they are known.
    pub fn group_norm_of_map(
        &self,
        map: &FeatureMap,
        parameters: &GroupNormParameters<'_>,
    ) -> Result<Tensor, TchError> {
        self.normalize(map.tensor(), map.statistics(), None, parameters)
    }

    /// GroupNorm of `input`, whose `statistics` may be known if it has no `addend`.
    fn normalize(
        &self,
        input: &Tensor,
        statistics: Option<&Statistics>,
        addend: Option<&Tensor>,
        parameters: &GroupNormParameters<'_>,
    ) -> Result<Tensor, TchError> {
        if let Some(launcher) = &self.launcher
            && let Some(output) =
                operations::group_norm(launcher.as_ref(), input, statistics, addend, parameters)?
        {
            return Ok(output);
        }
        plain::group_norm(input, addend, parameters)
    }

    /// LayerNorm of `input` plus `pending` over the last dimension of `(…, channels)`, to the same shape. `pending` is
    /// `(channels)`.
    pub fn layer_norm(
        &self,
        input: &Tensor,
        pending: Option<&Tensor>,
        parameters: &LayerNormParameters<'_>,
    ) -> Result<Tensor, TchError> {
        if let Some(launcher) = &self.launcher
            && let Some(output) = operations::layer_norm(launcher.as_ref(), input, pending, parameters)?
        {
            return Ok(output);
        }
        plain::layer_norm(input, pending, parameters)
    }

    /// GEGLU of `input` plus `bias`: `(…, 2 * channels)` to `(…, channels)`, the first half times the exact GELU of the
    /// second. `bias` is `(2 * channels)`.
    pub fn geglu(&self, input: &Tensor, bias: Option<&Tensor>) -> Result<Tensor, TchError> {
        if let Some(launcher) = &self.launcher
            && let Some(output) = operations::geglu(launcher.as_ref(), input, bias)?
        {
            return Ok(output);
        }
        plain::geglu(input, bias)
    }

    /// `map` plus `bias` `(channels)` plus `residual`, both feature maps `(batch_size, channels, height, width)`, with the
    /// statistics of a GroupNorm of `num_groups`. May overwrite `map`.
    pub fn add_bias_residual(
        &self,
        map: Tensor,
        bias: Option<&Tensor>,
        residual: Option<&Tensor>,
        num_groups: i64,
    ) -> Result<FeatureMap, TchError> {
        if let Some(launcher) = &self.launcher
            && let Some(output) =
                feature_map::add_bias_residual(launcher.as_ref(), &map, bias, residual, num_groups)?
        {
            return Ok(output);
        }
        plain::add_bias_residual(map, bias, residual).map(FeatureMap::from)
    }

    /// The channels of `first` and then those of `second`, feature maps of one height and width, with the statistics of a
    /// GroupNorm of `num_groups` over all of them.
    pub fn cat_channels(
        &self,
        first: &Tensor,
        second: &Tensor,
        num_groups: i64,
    ) -> Result<FeatureMap, TchError> {
        if let Some(launcher) = &self.launcher
            && let Some(output) = feature_map::cat_channels(launcher.as_ref(), first, second, num_groups)?
        {
            return Ok(output);
        }
        Tensor::f_cat(&[first, second], 1).map(FeatureMap::from)
    }

    /// Whether [`Self::attention`] of heads of `head_dim` values of a kind is our own kernel's, which reads them where they lie.
    pub fn attends(&self, kind: Kind, head_dim: i64) -> bool {
        self.has_attention && attention::takes(kind, head_dim)
    }

    /// Attention of each head by itself, scores scaled by 1/√head_dim: `query` `(batch_size, heads, length, head_dim)`, `key`
    /// and `value` `(batch_size, heads, key_length, head_dim)`, to `(batch_size, length, heads * head_dim)`.
    pub fn attention(&self, query: &Tensor, key: &Tensor, value: &Tensor) -> Result<Tensor, TchError> {
        if let Some(launcher) = self.launcher.as_ref().filter(|_| self.has_attention)
            && let Some(output) = attention::attention(launcher.as_ref(), query, key, value)?
        {
            return Ok(output);
        }
        plain::attention(query, key, value)
    }

    /// From the UNet's prediction to the next sample: guidance, and a noise scheduler's step. Overwrites what is kept and the
    /// sample.
    pub fn linear_step(&self, tensors: &LinearStepTensors<'_>) -> Result<(), TchError> {
        if let Some(launcher) = &self.launcher
            && linear_step::launch(launcher.as_ref(), tensors)?
        {
            return Ok(());
        }
        linear_step::compose(tensors)
    }
}

impl fmt::Display for Kernels {
    /// `plain`, or `fused` or `attention`, what the kernels were compiled for, and which engines are pinned:
    /// `fused sm_90a, convolutions 0123456789ab`.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.launcher {
            Some(launcher) => {
                let choice = if self.has_attention { KernelChoice::Attention } else { KernelChoice::Fused };
                write!(f, "{choice} {}", launcher.architecture())?;
            }
            None => KernelChoice::Plain.fmt(f)?,
        }
        match &self.convolver {
            Some(convolver) => write!(f, ", convolutions {}", convolver.name()),
            None => Ok(()),
        }
    }
}
