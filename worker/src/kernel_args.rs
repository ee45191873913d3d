//! Settings of what a GPU computes with.

use std::path::PathBuf;
use std::sync::Arc;

use crate::diffusion::convolution::{ConvolutionEngines, EnginesFileError};
use crate::diffusion::{ComputeDevice, ComputeDtype, KernelChoice, LoadOptions};

/// What a GPU computes with. Without a meaning on the CPU.
#[derive(Clone, Debug, clap::Args)]
pub struct KernelArgs {
    /// What a GPU computes with: fused (our own kernels where they fit), plain (libtorch's alone) or attention (fused, and
    /// attention of our own for heads of 40 or 80 values in 16 bits). Without a meaning on the CPU.
    #[arg(long, env = "DARKROOM_KERNELS", default_value_t = KernelChoice::default(), value_name = "plain|fused|attention")]
    pub kernels: KernelChoice,
    /// Compute the convolutions that this file of `darkroom-worker tune` names by the engines of cuDNN that it pins. It is for
    /// one kind of GPU and for the batch sizes that it was made with; all workers with the same file make the same bits.
    #[arg(long, env = "DARKROOM_CONVOLUTIONS", value_name = "FILE")]
    pub convolutions: Option<PathBuf>,
}

impl KernelArgs {
    /// How a model is loaded with these; reads the file.
    ///
    /// # Errors
    /// Everything that is wrong with the file.
    pub fn load_options(
        &self,
        device: ComputeDevice,
        dtype: ComputeDtype,
    ) -> Result<LoadOptions, EnginesFileError> {
        let convolutions = self.convolutions.as_deref().map(ConvolutionEngines::read).transpose()?;
        Ok(LoadOptions { device, dtype, kernels: self.kernels, convolutions: convolutions.map(Arc::new) })
    }
}
