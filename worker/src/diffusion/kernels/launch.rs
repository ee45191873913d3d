//! The kernels by name, and what it takes to start one.

use std::ffi::c_void;
use std::fmt;

use tch::{Device, TchError};

use super::super::device::ComputeDtype;

/// What a kernel does; the names are those in `worker/kernels/kernels.cu`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Operation {
    GroupNormStats,
    GroupNormApply,
    LayerNorm,
    Geglu,
    AddBiasResidual,
    CatChannels,
    LinearStep,
    Attention40,
    Attention80,
}

/// Every operation, in the order of the enum.
const OPERATIONS: [(Operation, &str); 9] = [
    (Operation::GroupNormStats, "group_norm_stats"),
    (Operation::GroupNormApply, "group_norm_apply"),
    (Operation::LayerNorm, "layer_norm"),
    (Operation::Geglu, "geglu"),
    (Operation::AddBiasResidual, "add_bias_residual"),
    (Operation::CatChannels, "cat_channels"),
    (Operation::LinearStep, "linear_step"),
    (Operation::Attention40, "attention_40"),
    (Operation::Attention80, "attention_80"),
];

/// Every dtype, in the order of the enum.
const DTYPES: [ComputeDtype; 3] = [ComputeDtype::F32, ComputeDtype::F16, ComputeDtype::Bf16];

/// One kernel: an operation, for a dtype and a number of adjacent values that a thread loads at once.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Kernel {
    pub(super) operation: Operation,
    pub(super) dtype: ComputeDtype,
    /// Whether a thread loads 16 bytes at once, or one value.
    pub(super) is_wide: bool,
}

/// Values of a dtype in 16 bytes.
pub(super) fn wide(dtype: ComputeDtype) -> i64 {
    match dtype {
        ComputeDtype::F32 => 4,
        ComputeDtype::F16 | ComputeDtype::Bf16 => 8,
    }
}

impl Kernel {
    /// Every kernel that is ever asked for, in the order of `Self::index`; the scheduler's step is never wide, attention always
    /// and never in f32.
    pub fn all() -> Vec<Self> {
        let of_operation = |(operation, _): (Operation, &str)| {
            DTYPES
                .into_iter()
                .flat_map(move |dtype| [false, true].map(|is_wide| Self { operation, dtype, is_wide }))
        };
        let is_made = |kernel: &Self| match kernel.operation {
            Operation::LinearStep => !kernel.is_wide,
            Operation::Attention40 | Operation::Attention80 => {
                kernel.is_wide && kernel.dtype != ComputeDtype::F32
            }
            _ => true,
        };
        OPERATIONS.into_iter().flat_map(of_operation).filter(is_made).collect()
    }

    /// Its place among all kernels that there could be, below [`Self::COUNT`].
    pub(super) fn index(self) -> usize {
        (self.operation as usize * DTYPES.len() + self.dtype as usize) * 2 + usize::from(self.is_wide)
    }

    /// Bound of [`Self::index`].
    pub(super) const COUNT: usize = OPERATIONS.len() * DTYPES.len() * 2;

    /// Values that a thread loads at once.
    pub(super) fn width(self) -> i64 {
        if self.is_wide { wide(self.dtype) } else { 1 }
    }
}

impl fmt::Display for Kernel {
    /// The symbol's name: `group_norm_stats_f16_x8`.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (_, operation) = OPERATIONS[self.operation as usize];
        write!(f, "{operation}_{}_x{}", self.dtype, self.width())
    }
}

/// An argument of a kernel.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Argument {
    /// A pointer on the device; 0 is null.
    Address(u64),
    /// `int` or `unsigned`.
    Int(i32),
    /// `float`.
    Float(f32),
}

impl Argument {
    /// What is copied for a parameter: as many of the number's bytes as the parameter has, from the first, as this machine (little
    /// endian) keeps them.
    pub fn bits(self) -> u64 {
        match self {
            Self::Address(address) => address,
            Self::Int(value) => u64::from(value.cast_unsigned()),
            Self::Float(value) => u64::from(value.to_bits()),
        }
    }
}

/// A kernel with its grid and arguments.
#[derive(Debug, Clone)]
pub struct Call<'a> {
    /// What to start.
    pub kernel: Kernel,
    /// Blocks in x, y and z.
    pub grid: [u32; 3],
    /// Threads of a block.
    pub threads: u32,
    /// Bytes of memory that a block's threads share.
    pub shared_bytes: u32,
    /// In the order of the kernel's parameters.
    pub arguments: &'a [Argument],
}

/// A stream of CUDA; null is the default one.
pub type Stream = *mut c_void;

/// Starts kernels on a device, in the order of libtorch's own on the current stream.
pub trait Launch: fmt::Debug + Send + Sync {
    /// Where the tensors have to be.
    fn device(&self) -> Device;

    /// What the kernels were compiled for, such as `sm_90a`.
    fn architecture(&self) -> &str;

    /// Starts a kernel. Does not wait for it, so that what goes wrong in it is reported by a later operation.
    ///
    /// # Safety
    /// The arguments must be what the kernel's parameters are, and their addresses those of as many values as the kernel
    /// reads or writes, which live until libtorch's stream has passed the launch.
    unsafe fn launch(&self, call: &Call<'_>) -> Result<(), TchError>;

    /// Does `work` with the device current on this thread; it is given libtorch's current stream, for libraries that start work
    /// themselves.
    fn on_stream(&self, work: &mut dyn FnMut(Stream) -> Result<(), TchError>) -> Result<(), TchError>;
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn arguments_are_the_bytes_that_the_driver_copies() {
        let bytes = |argument: Argument| argument.bits().to_le_bytes();
        assert_eq!(bytes(Argument::Int(-2))[..4], (-2i32).to_le_bytes());
        assert_eq!(bytes(Argument::Float(1.5))[..4], 1.5f32.to_le_bytes());
        assert_eq!(bytes(Argument::Address(u64::MAX - 7)), (u64::MAX - 7).to_le_bytes());
    }
}
