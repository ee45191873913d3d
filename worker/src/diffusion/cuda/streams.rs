//! Two threads on one GPU, each with a stream of its own, and what one hands to the other.
//!
//! Work on different streams runs side by side where there is room. Who reads what another stream computes has to wait for
//! it ([`Mark`]), and has to keep its memory from being given out again too early ([`keep_for_current_stream`]). The guarantees
//! behind each are named in `worker/cuda/shim.cpp`. Not yet run on a GPU.

use std::ffi::c_int;
use std::ptr;

use tch::Tensor;

use super::super::device::ComputeDevice;
use super::{CudaError, heard, shim};

/// A `StreamMark` of the shim.
#[repr(C)]
pub(super) struct StreamMark {
    _private: [u8; 0],
}

/// An `at::Tensor`.
#[repr(C)]
pub(super) struct AtTensor {
    _private: [u8; 0],
}

fn number(device: usize) -> c_int {
    c_int::try_from(device).unwrap_or(c_int::MAX)
}

/// From now on this thread computes on a stream of its own of this GPU, which shares its place with no CUDA graph's. A CPU has no
/// streams, and any thread computes on it.
pub fn use_own_stream(device: ComputeDevice) -> Result<(), CudaError> {
    let ComputeDevice::Cuda(index) = device else { return Ok(()) };
    // SAFETY: the signature is shim.cpp's.
    heard(unsafe { (shim()?.use_own_stream)(number(index)) })
}

/// A place in a stream's work: behind all that its thread had launched when the mark was made.
#[derive(Debug)]
pub struct Mark(*mut StreamMark);

// SAFETY: an event of CUDA, which any thread may wait for and destroy; the shim does nothing else with it.
unsafe impl Send for Mark {}
// SAFETY: as above; waiting does not change it.
unsafe impl Sync for Mark {}

impl Mark {
    /// Marks what this thread has launched on the GPU with this number. `None` where the program has no shim: then all threads
    /// share one stream, and nothing need be waited for.
    pub fn record(device: usize) -> Result<Option<Self>, CudaError> {
        let Ok(shim) = shim() else { return Ok(None) };
        let mut mark = ptr::null_mut();
        // SAFETY: the signature is shim.cpp's; it writes the pointer.
        heard(unsafe { (shim.mark_new)(number(device), &raw mut mark) })?;
        Ok(Some(Self(mark)))
    }

    /// What this thread launches from now on starts when all before the mark is done. Does not wait itself.
    pub fn wait(&self) -> Result<(), CudaError> {
        // SAFETY: the pointer came from `mark_new` and is freed by `drop` alone.
        heard(unsafe { (shim()?.mark_wait)(self.0) })
    }
}

impl Drop for Mark {
    fn drop(&mut self) {
        if let Ok(shim) = shim() {
            // SAFETY: as above; it is not used after this.
            unsafe { (shim.mark_free)(self.0) };
        }
    }
}

/// Keeps the memory of `tensor`, which is on a GPU, from being given out again before what this thread launches on it is
/// done, also when the tensor is dropped earlier.
pub fn keep_for_current_stream(tensor: &Tensor) -> Result<(), CudaError> {
    // SAFETY: the signature is shim.cpp's; tch's tensor is a pointer to an `at::Tensor`, which outlives the call.
    heard(unsafe { (shim()?.keep_for_current_stream)(tensor.as_ptr().cast()) })
}
