//! Execution plans by the real cuDNN for GPUs that are not here: cuDNN makes them from a GPU's properties. So what is left for a
//! GPU to show is that they execute.
//!
//! `make deps` fetches the library (of the version that libtorch's wheel pins) into `.deps/cudnn`; without it the test says that it
//! was skipped. In a program of its own, since the library is opened by name here, and by libtorch elsewhere.
#![allow(clippy::print_stderr, reason = "a skipped test says so")]
#![allow(clippy::unwrap_used, reason = "clippy.toml allows it in test functions; this is for their helpers")]

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::{Arc, OnceLock};

use libloading::os::unix::{Library, RTLD_GLOBAL, RTLD_NOW};
use serde_json::json;
use tch::{Device, Kind, TchError, Tensor};
use worker::diffusion::ComputeDtype;
use worker::diffusion::convolution::{
    Adds, Convolution, Convolve as _, Cudnn, DeviceProperties, EngineChoice, Operands, Plan, candidates,
};
use worker::diffusion::kernels::{Call, Kernels, Launch, PinnedConvolutions, Stream};

/// The version that PyPI's torch 2.11.0 wheel asks for.
const VERSION: usize = 91_900;

/// cuDNN, if `make deps` has fetched it.
fn cudnn() -> Option<&'static Cudnn> {
    static OPENED: OnceLock<Option<&'static Cudnn>> = OnceLock::new();
    *OPENED.get_or_init(|| {
        let file = Path::new(env!("CARGO_MANIFEST_DIR")).join("../.deps/cudnn/lib/libcudnn.so.9");
        if !file.exists() {
            eprintln!("skipped: no plans were made, there is no {}", file.display());
            return None;
        }
        for file in [cublas_lt(), file] {
            // Known by its name from now on.
            // SAFETY: its initializers are made to run when it is opened, and it is never closed.
            let library = unsafe { Library::open(Some(&file), RTLD_NOW | RTLD_GLOBAL) }.unwrap();
            std::mem::forget(library);
        }
        let cudnn = Cudnn::open().unwrap();
        assert_eq!(cudnn.version(), VERSION);
        Some(cudnn)
    })
}

/// cuDNN asks cuBLAS for its version before it makes a plan, and for a handle, which cuBLAS refuses where there is no GPU. So
/// this is enough of its half gigabyte here.
fn cublas_lt() -> PathBuf {
    let (name, version) = ("libcublasLt.so.13", 130_100);
    let library = Path::new(env!("CARGO_TARGET_TMPDIR")).join(name);
    let source = library.with_extension("c");
    // 1 is CUBLAS_STATUS_NOT_INITIALIZED.
    let functions = format!(
        "unsigned long cublasLtGetVersion(void) {{ return {version}; }}\n\
         int cublasLtCreate(void **handle) {{ *handle = 0; return 1; }}\n\
         int cublasLtDestroy(void *handle) {{ return 0; }}\n"
    );
    fs::write(&source, functions).unwrap();
    let soname = format!("-Wl,-soname,{name}");
    let output =
        Command::new("cc").args(["-shared", "-fPIC", &soname, "-o"]).arg(&library).arg(&source).output();
    let output = output.expect("cc can be started");
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    library
}

/// The properties of a GPU by its data sheet, in the form that cuDNN writes them.
fn properties(name: &str, capability: u32, multiprocessors: u32, memory_gib: u64, shared_kib: u32) -> String {
    json!({
        "maxGridSize": [2_147_483_647, 65_535, 65_535], "maxBlockSize": [1024, 1024, 64],
        "regsPerBlock": 65_536, "multiProcessorCount": multiprocessors, "warpSize": 32,
        "maxSharedMemoryPerBlock": 49_152, "maxSharedMemoryPerBlockOptin": (shared_kib - 1) * 1024,
        "reservedSharedMemoryPerBlock": 1024, "maxRegistersPerSM": 65_536, "maxCtasPerSM": 24,
        "maxThreadsPerBlock": 1024, "maxThreadsPerSM": if capability == 890 { 1536 } else { 2048 },
        "pciDeviceId": 0, "isTccDriver": 0, "supportCoopLaunch": 1, "totalGlobalMem": memory_gib << 30,
        "smClockRateKHz": 1_700_000, "memClockRateKHz": 2_600_000, "l2CacheSize": 50 << 20, "cudaDeviceId": 0,
        "deviceVer": capability, "driverVer": 13_000, "deviceName": name
    })
    .to_string()
}

/// One of each kind that our own kernels were compiled for.
fn gpus() -> [String; 3] {
    [
        properties("NVIDIA A100-SXM4-80GB", 800, 108, 80, 164),
        properties("NVIDIA L4", 890, 58, 24, 100),
        properties("NVIDIA H200", 900, 132, 140, 228),
    ]
}

/// Input channels, rows and columns, output channels and stride of the 3×3 convolutions of Stable Diffusion v1's UNet at 512×512.
const UNET: [(i64, i64, i64, i64); 19] = [
    (320, 64, 320, 1),
    (320, 64, 320, 2),
    (320, 32, 640, 1),
    (640, 32, 640, 1),
    (640, 32, 640, 2),
    (640, 16, 1280, 1),
    (1280, 16, 1280, 1),
    (1280, 16, 1280, 2),
    (1280, 8, 1280, 1),
    (2560, 8, 1280, 1),
    (2560, 16, 1280, 1),
    (1920, 16, 1280, 1),
    (1280, 32, 1280, 1),
    (1920, 32, 640, 1),
    (1280, 32, 640, 1),
    (960, 32, 640, 1),
    (640, 64, 640, 1),
    (960, 64, 320, 1),
    (320, 64, 4, 1),
];

/// The same of its VAE's decoder.
const VAE: [(i64, i64, i64, i64); 9] = [
    (512, 64, 512, 1),
    (512, 128, 512, 1),
    (512, 256, 512, 1),
    (512, 256, 256, 1),
    (256, 256, 256, 1),
    (256, 512, 256, 1),
    (256, 512, 128, 1),
    (128, 512, 128, 1),
    (128, 512, 3, 1),
];

fn convolution(
    batch_size: i64,
    (in_channels, size, out_channels, stride): (i64, i64, i64, i64),
    dtype: ComputeDtype,
    adds: Adds,
) -> Convolution {
    let (height, width, kernel_size, padding) = (size, size, 3, 1);
    Convolution {
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
    }
}

#[test]
fn every_convolution_of_v1_has_engines_on_every_kind_of_gpu_and_each_makes_a_plan() {
    let Some(cudnn) = cudnn() else { return };
    for json in gpus() {
        let device = DeviceProperties::from_json(cudnn, &json).unwrap();
        let sizes = UNET.map(|size| (66, size)).into_iter().chain(VAE.map(|size| (4, size)));
        for (index, (batch_size, size)) in sizes.enumerate() {
            for adds in [Adds::Nothing, Adds::Bias, Adds::BiasAndResidual] {
                // Both dtypes, and not all of everything: the heuristics take half a second for ten.
                let dtype = if index % 2 == 0 { ComputeDtype::F16 } else { ComputeDtype::Bf16 };
                let convolution = convolution(batch_size, size, dtype, adds);
                let engines = candidates(cudnn, &convolution, &device).unwrap();
                assert!(engines.len() >= 3, "{convolution} has {} engines on {json}", engines.len());
                for choice in engines.iter().take(4) {
                    let plan = Plan::new(cudnn, &convolution, choice, &device);
                    let plan = plan.unwrap_or_else(|error| panic!("{convolution} by {choice:?}: {error}"));
                    assert!((0..1 << 33).contains(&plan.workspace_bytes()), "{convolution} by {choice:?}");
                }
                let is_new = |at: usize| !engines[..at].contains(&engines[at]);
                assert!((0..engines.len()).all(is_new), "{convolution}: an engine is named twice");
            }
        }
    }
}

#[test]
fn other_shapes_and_settings_are_refused_in_cudnns_words() {
    let Some(cudnn) = cudnn() else { return };
    let device = DeviceProperties::from_json(cudnn, &gpus()[2]).unwrap();
    let convolution = convolution(8, (320, 64, 320, 1), ComputeDtype::F16, Adds::BiasAndResidual);
    let engine = candidates(cudnn, &convolution, &device).unwrap().swap_remove(0);
    let refused = |convolution: &Convolution, choice: &EngineChoice| {
        Plan::new(cudnn, convolution, choice, &device).unwrap_err().to_string()
    };
    let none = EngineChoice { engine: 9999, knobs: BTreeMap::new() };
    assert!(refused(&convolution, &none).starts_with("cuDNN refuses "), "{}", refused(&convolution, &none));
    let mut far = engine.clone();
    far.knobs.values_mut().for_each(|value| *value = 1 << 40);
    assert!(refused(&convolution, &far).starts_with("cuDNN refuses "));
    let empty = Convolution { batch_size: 0, ..convolution };
    assert!(refused(&empty, &engine).starts_with("cuDNN refuses "), "{}", refused(&empty, &engine));
    let error = DeviceProperties::from_json(cudnn, "{}").unwrap_err().to_string();
    assert!(error.contains("maxGridSize"), "{error}");
}

#[test]
fn an_engines_settings_decide_the_plan() {
    let Some(cudnn) = cudnn() else { return };
    let device = DeviceProperties::from_json(cudnn, &gpus()[2]).unwrap();
    let convolution = convolution(66, (320, 64, 320, 1), ComputeDtype::F16, Adds::Nothing);
    let engines = candidates(cudnn, &convolution, &device).unwrap();
    let workspace = |choice| Plan::new(cudnn, &convolution, choice, &device).unwrap().workspace_bytes();
    let mut needs: Vec<i64> = engines.iter().map(workspace).collect();
    needs.sort_unstable();
    needs.dedup();
    assert!(needs.len() > 1, "all {} plans are alike: the settings are not passed on", engines.len());
}

/// Says that it is a GPU's stream, and is none.
#[derive(Debug)]
struct Nowhere;

impl Launch for Nowhere {
    fn device(&self) -> Device {
        Device::Cpu
    }

    fn architecture(&self) -> &str {
        "nowhere"
    }

    unsafe fn launch(&self, call: &Call<'_>) -> Result<(), TchError> {
        Err(TchError::Torch(format!("{} is not started here", call.kernel)))
    }

    fn on_stream(&self, work: &mut dyn FnMut(Stream) -> Result<(), TchError>) -> Result<(), TchError> {
        work(std::ptr::null_mut())
    }
}

/// Up to the last call: cuDNN takes the tensors, and has no GPU to execute on.
#[test]
fn all_but_the_execution_is_done_without_a_gpu() {
    let Some(cudnn) = cudnn() else { return };
    if DeviceProperties::of_gpu(cudnn, 0).is_ok() {
        return eprintln!("skipped: there is a GPU, on which this would compute with memory of the CPU");
    }
    let device = DeviceProperties::from_json(cudnn, &gpus()[2]).unwrap();
    let convolution = convolution(2, (16, 8, 24, 1), ComputeDtype::F16, Adds::BiasAndResidual);
    let choice = candidates(cudnn, &convolution, &device).unwrap().swap_remove(0);
    let plan = Plan::new(cudnn, &convolution, &choice, &device).unwrap();
    let map = |size: [i64; 4]| {
        let map = Tensor::zeros(size, (Kind::Half, Device::Cpu));
        Kernels::plain(true).lay_out(&map).unwrap()
    };
    let (input, weight, residual) = (map([2, 16, 8, 8]), map([24, 16, 3, 3]), map([2, 24, 8, 8]));
    let bias = Tensor::zeros([24], (Kind::Half, Device::Cpu));
    let (bias, residual) = (Some(&bias), Some(&residual));
    let operands = Operands { input: &input, weight: &weight, bias, residual, stride: 1, padding: 1 };
    assert_eq!(Convolution::of(&operands), Some(convolution));
    let pinned = PinnedConvolutions::of_one(cudnn, Arc::new(Nowhere), convolution, plan);
    let error = pinned.convolve(&convolution, &operands).unwrap_err().to_string();
    assert!(error.contains("cuDNN refuses a handle"), "{error}");
    let other = Convolution { adds: Adds::Nothing, ..convolution };
    assert!(pinned.convolve(&other, &operands).unwrap().is_none(), "no plan of it");
}

#[test]
fn a_gpu_that_is_not_here_has_no_properties() {
    let Some(cudnn) = cudnn() else { return };
    // Whatever this machine has: the question is put as cuDNN wants it.
    if let Err(error) = DeviceProperties::of_gpu(cudnn, 0) {
        let error = error.to_string();
        eprintln!("{error}");
        assert!(error.starts_with("cuDNN refuses the GPU's properties"), "{error}");
    }
}
