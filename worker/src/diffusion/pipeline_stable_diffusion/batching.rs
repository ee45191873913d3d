//! How many pictures a model is given at once. A matter of speed and of last bits, never of which picture it is.

use super::super::device::ComputeDevice;

/// Pictures that the UNet is given at once.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum BatchSize {
    /// One, each on a thread of its own: the CPU's way.
    Alone,
    /// All of a call.
    AsGiven,
    /// So many, the missing ones made up, whatever the call: kernels are chosen by shape, so on one machine a picture's bits
    /// cannot depend on its company then. A call of more is as if [`BatchSize::AsGiven`].
    Padded(usize),
}

/// How the pictures of a call are computed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Batching {
    /// In the UNet.
    pub size: BatchSize,
    /// In the VAE's decoder, at most, or exactly with [`BatchSize::Padded`].
    pub decode_size: usize,
    /// Whether a denoising step is launched as one CUDA graph, on a GPU, where it can be.
    pub graph: bool,
}

/// Pictures that a GPU decodes at once. A decoder's pass over one 512×512 picture is about 150 kernels and 2.5 TFLOP: one alone
/// is over before the next kernel is launched, four are not, and four take 2 GiB in 16 bits where all of a batch of 33
/// would take 17.
const GPU_DECODE_SIZE: usize = 4;

impl Batching {
    /// What suits a device: nothing made up, no graphs.
    pub fn of(device: ComputeDevice) -> Self {
        match device {
            ComputeDevice::Cpu => Self { size: BatchSize::Alone, decode_size: 1, graph: false },
            ComputeDevice::Cuda(_) => {
                Self { size: BatchSize::AsGiven, decode_size: GPU_DECODE_SIZE, graph: false }
            }
        }
    }

    /// The UNet's batch for a call of so many pictures; `None` if each is computed alone.
    pub fn batch_size(self, num_pictures: usize) -> Option<usize> {
        match self.size {
            BatchSize::Alone => None,
            BatchSize::AsGiven => Some(num_pictures),
            BatchSize::Padded(size) => Some(size.max(num_pictures)),
        }
    }

    /// The decoder's batch for so many pictures.
    pub(super) fn decode_batch_size(self, num_pictures: usize) -> usize {
        match self.size {
            BatchSize::Padded(_) => self.decode_size.max(num_pictures),
            _ => num_pictures,
        }
    }
}
