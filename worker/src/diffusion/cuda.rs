//! What a GPU needs that tch has no word for: kernels that repeat their bits, graphs of launched work, and what hard- and
//! software it is. All of it is in `worker/cuda/shim.cpp`, which the program carries as a shared object.
//!
//! It can be missing, from a program that was built without CUDA's headers. Then a GPU still draws, kernel by kernel and
//! without the promise that a picture's last bits do not depend on its company; the log says so.

mod streams;

use std::ffi::{CStr, c_char, c_int};
use std::fs::File;
use std::io::Write as _;
use std::os::fd::{AsRawFd as _, FromRawFd as _};
use std::str::FromStr;
use std::sync::OnceLock;

use libloading::os::unix::{Library, RTLD_LOCAL, RTLD_NOW};
use nix::libc;
use tch::TchError;
use tracing::{info, warn};

use self::streams::{AtTensor, StreamMark};
pub use self::streams::{Mark, keep_for_current_stream, use_own_stream};
use super::device::linkers_words;

/// The compiled `worker/cuda/shim.cpp`; empty if it could not be compiled.
const SHIM: &[u8] = include_bytes!(concat!(env!("OUT_DIR"), "/cuda_shim.so"));

/// What NVIDIA's kernel module tells its version in.
const DRIVER_VERSION: &str = "/sys/module/nvidia/version";

/// Why the GPU cannot be asked for more than tch can.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum CudaError {
    /// The program was built without the shim.
    #[error("this program was built without CUDA's headers, which `make deps` fetches")]
    NotBuilt,
    /// The shim is there and cannot be opened.
    #[error("what the program carries for CUDA cannot be opened: {reason}")]
    Open {
        /// The dynamic linker's words, or the kernel's.
        reason: String,
    },
    /// libtorch or CUDA refused.
    #[error("{reason}")]
    Refused {
        /// Their words.
        reason: String,
    },
}

/// A GPU, and what computes on it: what the last bits of its pictures depend on besides spec, weights and dtype.
#[derive(Debug, Clone, PartialEq, Eq, serde::Serialize)]
pub struct Gpu {
    /// The model's name.
    pub name: String,
    /// The driver's version, or the CUDA version that it is for.
    pub driver: String,
    /// cuDNN's version, of the library that was really opened: another one on LD_LIBRARY_PATH can shadow libtorch's.
    pub cudnn: String,
}

/// The kernels of attention by the numbers of `at::SDPBackend`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum AttentionKernel {
    /// Written out; takes everything.
    Math = 0,
    /// FlashAttention 2.
    Flash = 1,
    /// Of xFormers.
    Efficient = 2,
    /// cuDNN's.
    Cudnn = 3,
}

impl FromStr for AttentionKernel {
    type Err = String;

    fn from_str(name: &str) -> Result<Self, Self::Err> {
        match name {
            "math" => Ok(Self::Math),
            "flash" => Ok(Self::Flash),
            "efficient" => Ok(Self::Efficient),
            "cudnn" => Ok(Self::Cudnn),
            _ => Err(format!("`attention` must be `cudnn`, `flash`, `efficient` or `math` but is `{name}`")),
        }
    }
}

type Said = *const c_char;

/// A `StepGraph` of the shim.
#[repr(C)]
struct StepGraph {
    _private: [u8; 0],
}

/// The shim's functions.
struct Shim {
    set_flags: unsafe extern "C" fn(bool, bool) -> Said,
    set_attention_order: unsafe extern "C" fn(*const i64, usize) -> Said,
    describe: unsafe extern "C" fn(c_int, *mut i64, *mut c_int, *mut c_char, usize) -> Said,
    synchronize: unsafe extern "C" fn() -> Said,
    graph_new: unsafe extern "C" fn(c_int, *mut *mut StepGraph) -> Said,
    graph_enter: unsafe extern "C" fn(*mut StepGraph) -> Said,
    graph_leave: unsafe extern "C" fn(*mut StepGraph) -> Said,
    graph_begin: unsafe extern "C" fn(*mut StepGraph) -> Said,
    graph_end: unsafe extern "C" fn(*mut StepGraph) -> Said,
    graph_replay: unsafe extern "C" fn(*mut StepGraph) -> Said,
    graph_free: unsafe extern "C" fn(*mut StepGraph),
    use_own_stream: unsafe extern "C" fn(c_int) -> Said,
    mark_new: unsafe extern "C" fn(c_int, *mut *mut StreamMark) -> Said,
    mark_wait: unsafe extern "C" fn(*mut StreamMark) -> Said,
    mark_free: unsafe extern "C" fn(*mut StreamMark),
    keep_for_current_stream: unsafe extern "C" fn(*const AtTensor) -> Said,
}

/// The shim, opened once in the process and never closed. libtorch's CUDA half has to be open already.
fn shim() -> Result<&'static Shim, CudaError> {
    static OPENED: OnceLock<Result<Shim, CudaError>> = OnceLock::new();
    OPENED.get_or_init(Shim::open).as_ref().map_err(Clone::clone)
}

impl Shim {
    fn open() -> Result<Self, CudaError> {
        if SHIM.is_empty() {
            return Err(CudaError::NotBuilt);
        }
        let failed = |reason: String| CudaError::Open { reason };
        // A file in memory: the program may run where nothing can be written.
        // SAFETY: the name is a C string; the descriptor that comes back is nobody else's.
        let mut file = unsafe {
            let descriptor = libc::memfd_create(c"darkroom_cuda_shim".as_ptr(), libc::MFD_CLOEXEC);
            if descriptor < 0 {
                return Err(failed(std::io::Error::last_os_error().to_string()));
            }
            File::from_raw_fd(descriptor)
        };
        file.write_all(SHIM).map_err(|error| failed(error.to_string()))?;
        let path = format!("/proc/self/fd/{}", file.as_raw_fd());
        let words = |error: libloading::Error| failed(linkers_words(&error));
        // SAFETY: it runs nothing when it is opened, the signatures are those of shim.cpp, and it is never closed.
        unsafe {
            let library =
                std::mem::ManuallyDrop::new(Library::open(Some(path), RTLD_NOW | RTLD_LOCAL).map_err(words)?);
            macro_rules! function {
                ($name:literal) => {
                    *library.get(concat!("darkroom_", $name, "\0").as_bytes()).map_err(words)?
                };
            }
            Ok(Self {
                set_flags: function!("set_flags"),
                set_attention_order: function!("set_attention_order"),
                describe: function!("describe"),
                synchronize: function!("synchronize"),
                graph_new: function!("graph_new"),
                graph_enter: function!("graph_enter"),
                graph_leave: function!("graph_leave"),
                graph_begin: function!("graph_begin"),
                graph_end: function!("graph_end"),
                graph_replay: function!("graph_replay"),
                graph_free: function!("graph_free"),
                use_own_stream: function!("use_own_stream"),
                mark_new: function!("mark_new"),
                mark_wait: function!("mark_wait"),
                mark_free: function!("mark_free"),
                keep_for_current_stream: function!("keep_for_current_stream"),
            })
        }
    }
}

/// What a function of the shim said: nothing if all went well.
fn heard(said: Said) -> Result<(), CudaError> {
    if said.is_null() {
        return Ok(());
    }
    // SAFETY: the shim gives back a C string, valid until this thread's next call.
    let reason = unsafe { CStr::from_ptr(said) }.to_string_lossy().into_owned();
    Err(CudaError::Refused { reason })
}

/// The error as one of libtorch's: a GPU that refuses these fails at everything.
pub(super) fn refused(error: CudaError) -> TchError {
    TchError::Torch(error.to_string())
}

/// Variables that CUDA's libraries read when they are opened: cuBLAS repeats its bits on several streams only with
/// workspaces of a fixed size. What is set already stays. To be called while the process has one thread.
pub fn set_environment() {
    // SAFETY: both are C strings, and no other thread reads the environment meanwhile.
    unsafe { libc::setenv(c"CUBLAS_WORKSPACE_CONFIG".as_ptr(), c":4096:8".as_ptr(), 0) };
}

/// Makes kernels repeat their bits, once in the process, and says in the log on what it computes.
pub(super) fn prepare(index: usize) {
    static PREPARED: OnceLock<()> = OnceLock::new();
    PREPARED.get_or_init(|| {
        // SAFETY: the signature is shim.cpp's. f32 stays f32: no TF32.
        let flags = shim().and_then(|shim| heard(unsafe { (shim.set_flags)(true, false) }));
        match flags.and_then(|()| Gpu::describe(index)) {
            Ok(Gpu { name, driver, cudnn }) => info!(gpu = name, driver, cudnn, "Computing on a GPU"),
            Err(error) => warn!(
                %error,
                "A picture's last bits may depend on its company, and steps are not made graphs of"
            ),
        }
    });
}

/// Which kernels of attention are tried first; by default libtorch decides.
pub fn set_attention_order(order: &[AttentionKernel]) -> Result<(), CudaError> {
    let mut numbers: Vec<i64> = order.iter().map(|&kernel| kernel as i64).collect();
    // libtorch wants all that it has in an order of its own; the last is for other devices.
    let others: Vec<i64> = [1, 2, 0, 3, 4].into_iter().filter(|number| !numbers.contains(number)).collect();
    numbers.extend(others);
    // SAFETY: the signature is shim.cpp's; the numbers are read during the call only.
    heard(unsafe { (shim()?.set_attention_order)(numbers.as_ptr(), numbers.len()) })
}

/// Waits until the GPU has done all that it was given.
pub fn synchronize() -> Result<(), CudaError> {
    // SAFETY: the signature is shim.cpp's.
    heard(unsafe { (shim()?.synchronize)() })
}

impl Gpu {
    /// Of the GPU with this number.
    pub fn describe(index: usize) -> Result<Self, CudaError> {
        let (mut cudnn, mut driver_cuda, mut name) = (0, 0, [0 as c_char; 256]);
        let device = c_int::try_from(index).unwrap_or(c_int::MAX);
        // SAFETY: the signature is shim.cpp's; at most all but the last byte of the name is written, so it ends in 0.
        let name = unsafe {
            let room = name.len() - 1;
            heard((shim()?.describe)(device, &raw mut cudnn, &raw mut driver_cuda, name.as_mut_ptr(), room))?;
            CStr::from_ptr(name.as_ptr()).to_string_lossy().into_owned()
        };
        let driver = std::fs::read_to_string(DRIVER_VERSION).map_or_else(
            |_| format!("CUDA {}", dotted(driver_cuda.into(), 1000, 10)),
            |text| text.trim().to_owned(),
        );
        Ok(Self { name, driver, cudnn: dotted(cudnn, 10_000, 100) })
    }
}

/// CUDA's and cuDNN's versions are one number each: 13000 is 13.0, 91900 is 9.19.0.
pub(super) fn dotted(version: i64, major: i64, minor: i64) -> String {
    let (front, rest) = (version / major, version % major);
    if minor == 100 {
        format!("{front}.{}.{}", rest / minor, rest % minor)
    } else {
        format!("{front}.{}", rest / minor)
    }
}

/// Work that was launched once and can be launched again as a whole.
#[derive(Debug)]
pub struct CudaGraph {
    shim: *mut StepGraph,
    /// Whether there is something to replay.
    is_captured: bool,
}

// SAFETY: the graph is used by the thread that owns it; CUDA lets it be handed to another one.
unsafe impl Send for CudaGraph {}

impl CudaGraph {
    /// An empty one, with a stream of its own.
    pub fn new(device: usize) -> Result<Self, CudaError> {
        let mut graph = std::ptr::null_mut();
        // SAFETY: the signature is shim.cpp's.
        heard(unsafe { (shim()?.graph_new)(c_int::try_from(device).unwrap_or(0), &raw mut graph) })?;
        Ok(Self { shim: graph, is_captured: false })
    }

    /// Whether [`Self::replay`] can be called.
    pub fn is_captured(&self) -> bool {
        self.is_captured
    }

    fn call(
        &self,
        function: fn(&Shim) -> unsafe extern "C" fn(*mut StepGraph) -> Said,
    ) -> Result<(), CudaError> {
        // SAFETY: the pointer came from `graph_new` and is freed by `drop` alone.
        heard(unsafe { function(shim()?)(self.shim) })
    }

    /// Does `work` on the graph's own stream, after all work before it and before all after it: libraries make their plans
    /// and take their memory for that stream, which must not happen during a capture.
    pub fn warm_up<T>(&self, work: impl FnOnce() -> T) -> Result<T, CudaError> {
        self.call(|shim| shim.graph_enter)?;
        let done = work();
        self.call(|shim| shim.graph_leave)?;
        Ok(done)
    }

    /// Writes down what `work` launches, which is not done yet. Tensors that it reads and that outlive it must stay where
    /// they are; it must not wait for the GPU. After an error there is nothing to replay.
    pub fn capture<E>(&mut self, work: impl FnOnce() -> Result<(), E>) -> Result<Result<(), E>, CudaError> {
        self.call(|shim| shim.graph_enter)?;
        let captured = self.call(|shim| shim.graph_begin).and_then(|()| {
            let written = work();
            self.call(|shim| shim.graph_end).map(|()| written)
        });
        self.call(|shim| shim.graph_leave)?;
        let written = captured?;
        self.is_captured = written.is_ok();
        Ok(written)
    }

    /// Launches what was captured, on the current stream.
    pub fn replay(&self) -> Result<(), CudaError> {
        self.call(|shim| shim.graph_replay)
    }
}

impl Drop for CudaGraph {
    fn drop(&mut self) {
        // A graph that is still running must not be freed; there is nobody to tell if waiting fails.
        let _ = synchronize();
        if let Ok(shim) = shim() {
            // SAFETY: as above; it is not used after this.
            unsafe { (shim.graph_free)(self.shim) };
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::device::{ComputeDevice, open_cuda_libraries};
    use super::*;

    #[test]
    fn versions_are_written_with_dots() {
        assert_eq!(dotted(91_900, 10_000, 100), "9.19.0");
        assert_eq!(dotted(13_020, 1000, 10), "13.2");
    }

    /// Whatever is installed here and whatever this was built with, there is an answer and no crash. With the libraries of the
    /// torch wheel on LD_LIBRARY_PATH this tries whether the shim fits them, GPU or not.
    #[test]
    fn the_shim_opens_where_its_libraries_are() {
        let libraries = open_cuda_libraries();
        match (libraries, CudaGraph::new(0)) {
            (_, Err(CudaError::NotBuilt)) => assert!(SHIM.is_empty()),
            (Err(_), Err(CudaError::Open { reason })) => {
                assert!(reason.contains("undefined symbol"), "{reason}");
            }
            // Without a driver libtorch refuses, in its own words.
            (Ok(()), Err(CudaError::Refused { reason })) => assert!(reason.contains("driver"), "{reason}"),
            (Ok(()), Ok(_)) => {}
            (libraries, graph) => panic!("{libraries:?}, {graph:?}"),
        }
    }

    /// As above: without a driver libtorch refuses a stream, with one it gives it.
    #[test]
    fn a_stream_of_its_own_is_given_or_refused_in_words() {
        let libraries = open_cuda_libraries();
        let own =
            std::thread::spawn(|| use_own_stream(ComputeDevice::Cuda(0))).join().expect("it does not panic");
        match (libraries, own) {
            (_, Err(CudaError::NotBuilt)) => assert!(SHIM.is_empty()),
            (Err(_), Err(CudaError::Open { reason })) => {
                assert!(reason.contains("undefined symbol"), "{reason}");
            }
            (Ok(()), Err(CudaError::Refused { reason })) => assert!(!reason.is_empty()),
            (Ok(()), Ok(())) => {}
            (libraries, own) => panic!("{libraries:?}, {own:?}"),
        }
    }
}
