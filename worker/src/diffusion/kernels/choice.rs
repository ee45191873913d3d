//! The choice of kernels by name.

use std::fmt;
use std::str::FromStr;

use super::super::device::DeviceError;

/// Which operations a GPU computes with: parsed from `plain`, `fused` or `attention`. Without a meaning on the CPU.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum KernelChoice {
    /// libtorch's alone.
    Plain,
    /// Our own kernels for what they take, where the GPU is of a kind that they were compiled for and they agree with
    /// libtorch's operations on it.
    #[default]
    Fused,
    /// As [`Self::Fused`], with attention of our own for heads of 40 or 80 values in 16 bits. Not the default before it has
    /// been measured beside libtorch's.
    Attention,
}

impl fmt::Display for KernelChoice {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Plain => "plain",
            Self::Fused => "fused",
            Self::Attention => "attention",
        })
    }
}

impl FromStr for KernelChoice {
    type Err = DeviceError;

    fn from_str(name: &str) -> Result<Self, Self::Err> {
        match name {
            "plain" => Ok(Self::Plain),
            "fused" => Ok(Self::Fused),
            "attention" => Ok(Self::Attention),
            _ => Err(DeviceError::UnknownKernels { name: name.to_owned() }),
        }
    }
}
