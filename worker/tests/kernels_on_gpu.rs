//! Our own kernels on a GPU, where there is one; else the test says that it was skipped. In a program of its own, since the
//! CUDA libraries have to be opened before any other use of libtorch.
#![allow(clippy::print_stderr, reason = "a skipped test says so")]

use worker::diffusion::kernels::{Kernels, self_check};
use worker::diffusion::{ComputeDevice, ComputeDtype, KernelChoice};

#[test]
fn kernels_on_a_gpu_equal_libtorch() {
    let device = ComputeDevice::Cuda(0);
    if let Err(error) = device.open() {
        eprintln!("skipped: our kernels were not run, there is no GPU here ({error})");
        return;
    }
    for dtype in [ComputeDtype::F32, ComputeDtype::F16, ComputeDtype::Bf16] {
        // Opening does the check too, and falls back; here a difference is to be seen.
        let kernels = Kernels::open(KernelChoice::Attention, device, dtype);
        assert!(kernels.is_fused(), "{dtype}: this GPU has no kernels, or they failed: the log says why");
        let takes_attention = kernels.attends(dtype.to_tch(), 40);
        assert_eq!(
            takes_attention,
            dtype != ComputeDtype::F32,
            "{dtype}: attention failed: the log says why"
        );
        self_check(&kernels, dtype).expect("the kernels compute what libtorch does");
    }
}
