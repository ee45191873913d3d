//! Our own kernels on a GPU, where there is one; else the test says that it was skipped. In a program of its own, since the
//! CUDA libraries have to be opened before any other use of libtorch.
#![allow(clippy::print_stderr, reason = "a skipped test says so")]

use std::collections::BTreeSet;
use std::sync::Arc;

use tch::{Kind, Tensor};
use worker::diffusion::convolution::{Adds, Convolution, ConvolutionEngines, Convolve as _, Operands};
use worker::diffusion::cuda::Gpu;
use worker::diffusion::kernels::{Kernels, PinnedConvolutions, self_check};
use worker::diffusion::tuning::{CudnnEngines, Tuner};
use worker::diffusion::{ComputeDevice, ComputeDtype, KernelChoice};

/// How far results of 16 bits may be from f32 arithmetic on the same numbers, of the largest value.
const TOLERANCE: f64 = 2e-3;

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

#[test]
fn pinned_engines_on_a_gpu_equal_libtorch() {
    let device = ComputeDevice::Cuda(0);
    if let Err(error) = device.open() {
        eprintln!("skipped: no engine of cuDNN was run, there is no GPU here ({error})");
        return;
    }
    let kernels = Kernels::open(KernelChoice::Fused, device, ComputeDtype::F16);
    let engines = CudnnEngines::open(&kernels).expect("cuDNN makes plans for this GPU");
    let convolution = |adds| Convolution {
        dtype: ComputeDtype::F16,
        batch_size: 6,
        in_channels: 64,
        height: 24,
        width: 16,
        out_channels: 96,
        kernel_size: 3,
        stride: 1,
        padding: 1,
        adds,
    };
    let all = BTreeSet::from([Adds::Nothing, Adds::Bias, Adds::BiasAndResidual].map(convolution));
    let tuned = Tuner::on_gpu(kernels.clone(), &engines).tune(&all, |_| {}).expect("engines can be tried");
    for tuned in &tuned {
        assert!(tuned.tried > 0 && tuned.refused < tuned.tried, "{tuned:?}");
    }
    // Whatever was fastest: every one of them is to be right.
    let Gpu { name: gpu, cudnn, .. } = Gpu::describe(0).expect("the GPU is known");
    let pinned = tuned.into_iter().filter_map(|tuned| tuned.pinned).collect();
    let file = ConvolutionEngines { gpu, cudnn, pinned };
    let launcher = kernels.launcher().expect("kernels of our own are open").clone();
    let pinned = Arc::new(PinnedConvolutions::open(launcher, &file).expect("plans are made again"));
    let drawn = |size: &[i64]| Tensor::randn(size, (Kind::Half, device.to_tch()));
    let map = |size: &[i64]| kernels.lay_out(&drawn(size)).expect("there is memory");
    let (input, weight, residual) =
        (map(&[6, 64, 24, 16]), map(&[96, 64, 3, 3]) / 24.0, map(&[6, 96, 24, 16]));
    let bias = drawn(&[96]);
    for engine in &file.pinned {
        let bias = (engine.convolution.adds != Adds::Nothing).then_some(&bias);
        let residual = (engine.convolution.adds == Adds::BiasAndResidual).then_some(&residual);
        let operands = Operands { input: &input, weight: &weight, bias, residual, stride: 1, padding: 1 };
        let output = pinned.convolve(&engine.convolution, &operands).expect("it runs").expect("it is pinned");
        let expected = operands.convolve_in_f32().expect("libtorch computes it");
        let off = (output.to_kind(Kind::Float) - &expected).abs().max().double_value(&[]);
        let difference = off / expected.abs().max().double_value(&[]);
        assert!(difference <= TOLERANCE, "{}: {difference:e}", engine.convolution);
    }
}
