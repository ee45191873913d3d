//! Where and in which precision the models compute, and how the CUDA libraries come into the process.
//!
//! The binary is linked to the CPU half of libtorch only, so that one build serves machines with and without a GPU.
//! A worker that is given a GPU opens `libtorch_cuda.so` itself, **before any other use of libtorch**: an earlier CPU
//! convolution, `manual_seed`, `pin_memory` or question about CUDA fixes libtorch's CUDA hooks on "there is none" for
//! the rest of the process. So [`ComputeDevice::open`] belongs at the top of `main`.

use std::fmt;
use std::num::NonZeroUsize;
use std::str::FromStr;
use std::sync::OnceLock;

use libloading::os::unix::{Library, RTLD_GLOBAL, RTLD_NOW};
use serde::{Deserialize, Serialize};

use super::cuda;

/// The library that registers libtorch's CUDA kernels when it is opened.
const CUDA_LIBRARY: &str = "libtorch_cuda.so";

/// Why a device cannot be used.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum DeviceError {
    /// Not a device's name.
    #[error("`device` must be `cpu`, `cuda` or `cuda:N` but is `{name}`")]
    UnknownDevice {
        /// What was asked for.
        name: String,
    },
    /// Not a precision's name.
    #[error("`dtype` must be `f32`, `f16` or `bf16` but is `{name}`")]
    UnknownDtype {
        /// What was asked for.
        name: String,
    },
    /// Not a choice of kernels.
    #[error("`kernels` must be `plain`, `fused` or `attention` but is `{name}`")]
    UnknownKernels {
        /// What was asked for.
        name: String,
    },
    /// libtorch's CUDA half, or a library it needs, is not installed.
    #[error(
        "{library} cannot be opened: {reason}\n  \
         hint: a GPU worker needs the libraries of PyPI's torch=={version} wheel; install it and put its `torch/lib` \
         folder on LD_LIBRARY_PATH, or use `--device cpu`",
        version = TORCH_VERSION
    )]
    CudaLibraries {
        /// The library that was opened.
        library: &'static str,
        /// The dynamic linker's answer.
        reason: String,
    },
    /// The libraries are there, a GPU or its driver is not.
    #[error(
        "libtorch sees no usable GPU\n  \
         hint: `nvidia-smi` must list one in this container; libtorch must not be used before the device is opened"
    )]
    NoGpu,
    /// A GPU with this number is not there.
    #[error("`device` must be below cuda:{device_count} on this machine but is cuda:{index}")]
    NoSuchGpu {
        /// The number asked for.
        index: usize,
        /// GPUs that libtorch sees.
        device_count: usize,
    },
}

/// The libtorch that tch 0.24 is made for (its own documentation).
pub const TORCH_VERSION: &str = "2.11.0";

/// The device that the models compute on. Parsed from `cpu`, `cuda` (the first GPU) or `cuda:N`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum ComputeDevice {
    /// The processor.
    Cpu,
    /// The GPU with this number.
    Cuda(usize),
}

impl ComputeDevice {
    /// Makes the device usable: opens the CUDA libraries for a GPU and checks that it is there. Must come before any
    /// other use of libtorch in the process; calling it again is free.
    ///
    /// On the CPU, [`set_threads_per_picture`] takes effect here, with one thread, unless it was called before.
    pub fn open(self) -> Result<(), DeviceError> {
        let Self::Cuda(index) = self else {
            threads_per_picture();
            return Ok(());
        };
        open_cuda_libraries()?;
        if !tch::Cuda::is_available() {
            return Err(DeviceError::NoGpu);
        }
        let device_count = usize::try_from(tch::Cuda::device_count()).unwrap_or(0);
        if index >= device_count {
            return Err(DeviceError::NoSuchGpu { index, device_count });
        }
        cuda::prepare(index);
        Ok(())
    }

    /// Whether this is a GPU.
    pub fn is_cuda(self) -> bool {
        matches!(self, Self::Cuda(_))
    }

    /// libtorch's name for it.
    pub fn to_tch(self) -> tch::Device {
        match self {
            Self::Cpu => tch::Device::Cpu,
            Self::Cuda(index) => tch::Device::Cuda(index),
        }
    }
}

/// Threads that compute one picture on the CPU, once it is decided.
static THREADS_PER_PICTURE: OnceLock<NonZeroUsize> = OnceLock::new();

/// Lets this many threads of the CPU work on one picture; call it before [`ComputeDevice::open`], it counts once.
///
/// Without it, it is one: then a picture's last bits do not depend on how many cores a machine has, and several pictures
/// are drawn side by side, which is faster than sharing the small operations of one among threads. More threads make a
/// single picture faster on an idle machine, and much slower on a busy one, as they wait for each other by spinning.
pub fn set_threads_per_picture(threads: NonZeroUsize) {
    THREADS_PER_PICTURE.get_or_init(|| {
        limit_threads(threads);
        threads
    });
}

/// Threads that work on one picture on the CPU.
fn threads_per_picture() -> NonZeroUsize {
    set_threads_per_picture(NonZeroUsize::MIN);
    *THREADS_PER_PICTURE.get_or_init(|| NonZeroUsize::MIN)
}

/// Applies [`set_threads_per_picture`] to a thread of ours that is about to compute. libtorch's limit is the process's, but
/// OpenMP, below it, keeps one for each thread.
pub(crate) fn prepare_thread() {
    limit_threads(threads_per_picture());
}

/// How many pictures are drawn side by side on the CPU.
pub(crate) fn pictures_at_once() -> usize {
    let cores = std::thread::available_parallelism().map_or(1, NonZeroUsize::get);
    (cores / threads_per_picture()).max(1)
}

fn limit_threads(threads: NonZeroUsize) {
    tch::set_num_threads(i32::try_from(threads.get()).unwrap_or(i32::MAX));
}

/// The CUDA runtime that [`CUDA_LIBRARY`] brings along.
const CUDA_RUNTIME: &str = "libcudart.so.13";

/// Bytes in use on the current GPU, by all processes: libtorch keeps what it took, so after some calls this is their
/// peak, if nothing else uses the GPU. `None` where the CUDA runtime is not open or does not answer.
pub fn device_memory_in_use() -> Option<u64> {
    type MemGetInfo = unsafe extern "C" fn(free: *mut usize, total: *mut usize) -> i32;
    let (mut free, mut total) = (0, 0);
    let runtime = open_for_good(CUDA_RUNTIME).ok()?;
    // SAFETY: the signature is the CUDA runtime's own, and both pointers are to numbers of ours.
    let status = unsafe {
        let mem_get_info = runtime.get::<MemGetInfo>(b"cudaMemGetInfo\0").ok()?;
        mem_get_info(&raw mut free, &raw mut total)
    };
    (status == 0).then(|| (total - free) as u64)
}

/// Opens libtorch's CUDA half once in the process and never closes it: closing would unmap kernels that libtorch's
/// registry still points to.
pub fn open_cuda_libraries() -> Result<(), DeviceError> {
    static OPENED: OnceLock<Result<(), DeviceError>> = OnceLock::new();
    OPENED.get_or_init(|| open_for_cuda(CUDA_LIBRARY)).clone()
}

/// Opens libtorch's CUDA half, or a library that stands for it.
fn open_for_cuda(library: &'static str) -> Result<(), DeviceError> {
    let opened = open_for_good(library);
    opened.map(|_| ()).map_err(|reason| DeviceError::CudaLibraries { library, reason })
}

/// Opens a library with its symbols visible to libraries opened later, and keeps it for the life of the process; or what the
/// dynamic linker says.
pub(super) fn open_for_good(library: &'static str) -> Result<&'static Library, String> {
    // SAFETY: the initializers are those of libtorch and of CUDA's own libraries, made to run when they are opened; nothing is
    // ever closed, so nothing that they registered can dangle.
    match unsafe { Library::open(Some(library), RTLD_NOW | RTLD_GLOBAL) } {
        Ok(opened) => Ok(Box::leak(Box::new(opened))),
        Err(error) => Err(linkers_words(&error)),
    }
}

/// The dynamic linker's words: the error itself only says that something failed, its cause says what.
pub(super) fn linkers_words(error: &libloading::Error) -> String {
    std::error::Error::source(error).map_or_else(|| error.to_string(), ToString::to_string)
}

impl fmt::Display for ComputeDevice {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Cpu => f.write_str("cpu"),
            Self::Cuda(index) => write!(f, "cuda:{index}"),
        }
    }
}

impl FromStr for ComputeDevice {
    type Err = DeviceError;

    fn from_str(name: &str) -> Result<Self, Self::Err> {
        let index = match name {
            "cpu" => return Ok(Self::Cpu),
            "cuda" => Some(0),
            _ => name
                .strip_prefix("cuda:")
                .filter(|digits| digits.bytes().all(|byte| byte.is_ascii_digit()))
                .and_then(|digits| digits.parse().ok()),
        };
        index.map(Self::Cuda).ok_or_else(|| DeviceError::UnknownDevice { name: name.to_owned() })
    }
}

/// The precision that weights are held and computed in.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum ComputeDtype {
    /// 32 bits.
    F32,
    /// IEEE half precision.
    F16,
    /// bfloat16.
    Bf16,
}

impl ComputeDtype {
    /// libtorch's name for it.
    pub fn to_tch(self) -> tch::Kind {
        match self {
            Self::F32 => tch::Kind::Float,
            Self::F16 => tch::Kind::Half,
            Self::Bf16 => tch::Kind::BFloat16,
        }
    }
}

impl fmt::Display for ComputeDtype {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::F32 => "f32",
            Self::F16 => "f16",
            Self::Bf16 => "bf16",
        })
    }
}

impl FromStr for ComputeDtype {
    type Err = DeviceError;

    fn from_str(name: &str) -> Result<Self, Self::Err> {
        match name {
            "f32" => Ok(Self::F32),
            "f16" => Ok(Self::F16),
            "bf16" => Ok(Self::Bf16),
            _ => Err(DeviceError::UnknownDtype { name: name.to_owned() }),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn devices_parse_and_print() {
        for name in ["cpu", "cuda:0", "cuda:7"] {
            assert_eq!(name.parse::<ComputeDevice>().unwrap().to_string(), name);
        }
        assert_eq!("cuda".parse(), Ok(ComputeDevice::Cuda(0)));
        for name in ["", "gpu", "cuda:", "cuda:-1", "cuda:+1", "cuda:x", "CPU", "cuda:99999999999999999999"] {
            let error = name.parse::<ComputeDevice>().unwrap_err();
            assert_eq!(error, DeviceError::UnknownDevice { name: name.to_owned() });
        }
    }

    #[test]
    fn dtypes_parse_and_print() {
        for name in ["f32", "f16", "bf16"] {
            assert_eq!(name.parse::<ComputeDtype>().unwrap().to_string(), name);
        }
        assert!("fp16".parse::<ComputeDtype>().is_err());
    }

    #[test]
    fn a_missing_library_is_an_error_with_a_hint() {
        let error = open_for_cuda("libdarkroom_no_such_library.so").unwrap_err().to_string();
        assert!(error.starts_with("libdarkroom_no_such_library.so cannot be opened: "), "{error}");
        assert!(error.contains("No such file or directory"), "{error}");
        assert!(error.contains("hint: a GPU worker needs"), "{error}");
    }
}
