//! The kernels compiled for this CPU (`on_host.h`), behind the launcher's wall: geometry and arguments are the same code
//! that a GPU gets.

use std::collections::BTreeMap;
use std::ffi::{CStr, CString, c_char, c_int, c_uint, c_void};
use std::path::Path;
use std::process::Command;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, OnceLock, PoisonError};

use tch::{Device, TchError};
use worker::diffusion::kernels::{Argument, Call, Kernels, Launch, Stream};

/// `run_kernel` of `on_host.h`: name, grid, threads, shared bytes, reversed, kinds, arguments, message and its size.
type RunKernel = unsafe extern "C" fn(
    *const c_char,
    *const c_uint,
    c_uint,
    c_uint,
    c_int,
    *const c_char,
    *mut *mut c_void,
    *mut c_char,
    usize,
);

/// Starts the kernels of one compilation.
#[derive(Debug)]
pub struct HostKernels {
    run: RunKernel,
    /// The order in which a block's threads take turns.
    reversed: bool,
    launches: AtomicUsize,
    /// By what the kernel does.
    by_operation: Mutex<BTreeMap<String, usize>>,
}

/// There is one set of fibers in the process.
static TURN: Mutex<()> = Mutex::new(());

impl HostKernels {
    /// The kernels as they are checked in; compiled once.
    pub fn new(reversed: bool) -> Arc<Self> {
        static RUN: OnceLock<RunKernel> = OnceLock::new();
        let sources = Path::new(env!("CARGO_MANIFEST_DIR")).join("kernels");
        let run = *RUN.get_or_init(|| compile(&sources, concat!(env!("CARGO_CRATE_NAME"), "_on_host.so")));
        Arc::new(Self { run, reversed, launches: AtomicUsize::new(0), by_operation: Mutex::default() })
    }

    /// What layers compute with.
    pub fn kernels(self: &Arc<Self>) -> Kernels {
        Kernels::fused(self.clone())
    }

    /// Kernels started so far.
    pub fn launches(&self) -> usize {
        self.launches.load(Ordering::Relaxed)
    }

    /// Of those, the kernels that do this, in whatever dtype and width.
    pub fn launches_of(&self, operation: &str) -> usize {
        let by_operation = self.by_operation.lock().unwrap_or_else(PoisonError::into_inner);
        by_operation.get(operation).copied().unwrap_or(0)
    }
}

/// Compiles the kernels in a folder and opens them for good.
fn compile(sources: &Path, library: &str) -> RunKernel {
    let library = Path::new(env!("CARGO_TARGET_TMPDIR")).join(library);
    let header = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/kernels/on_host.h");
    let output = Command::new("c++")
        .args([
            "-std=c++17",
            "-O1",
            // What a kernel rounds one by one stays so.
            "-ffp-contract=off",
            "-Wall",
            "-Werror",
            "-Wno-unknown-pragmas",
            "-shared",
            "-fPIC",
            "-x",
            "c++",
        ])
        .arg("-include")
        .arg(header)
        .arg(sources.join("kernels.cu"))
        .arg("-o")
        .arg(&library)
        .output()
        .expect("c++ can be started");
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    // SAFETY: the library was made above; the function has this type in `on_host.h`, and the library is never closed.
    unsafe {
        let library = Box::leak(Box::new(libloading::Library::new(&library).unwrap()));
        *library.get::<RunKernel>(b"run_kernel\0").unwrap()
    }
}

impl Launch for HostKernels {
    fn device(&self) -> Device {
        Device::Cpu
    }

    fn architecture(&self) -> &str {
        "host"
    }

    unsafe fn launch(&self, call: &Call<'_>) -> Result<(), TchError> {
        let name = CString::new(call.kernel.to_string())?;
        let letter = |argument: &Argument| match argument {
            Argument::Address(_) => b'p',
            Argument::Int(_) => b'i',
            Argument::Float(_) => b'f',
        };
        let kinds = CString::new(call.arguments.iter().map(letter).collect::<Vec<_>>())?;
        let mut values: Vec<u64> = call.arguments.iter().map(|argument| argument.bits()).collect();
        let mut pointers: Vec<*mut c_void> =
            values.iter_mut().map(|value| std::ptr::from_mut(value).cast()).collect();
        let mut message = [0; 256];
        let turn = TURN.lock().unwrap_or_else(PoisonError::into_inner);
        // SAFETY: the caller's promise; the letters keep a wrong number or kind of arguments from being unpacked.
        unsafe {
            (self.run)(
                name.as_ptr(),
                call.grid.as_ptr(),
                call.threads,
                call.shared_bytes,
                c_int::from(self.reversed),
                kinds.as_ptr(),
                pointers.as_mut_ptr(),
                message.as_mut_ptr(),
                message.len(),
            );
        }
        drop(turn);
        self.launches.fetch_add(1, Ordering::Relaxed);
        // The name ends with dtype and width.
        let name = call.kernel.to_string();
        let operation = name.rsplitn(3, '_').last().unwrap_or_default().to_owned();
        let mut by_operation = self.by_operation.lock().unwrap_or_else(PoisonError::into_inner);
        *by_operation.entry(operation).or_default() += 1;
        drop(by_operation);
        // SAFETY: the text ends with a zero, as the array began with zeros only and snprintf ends with one.
        let message = unsafe { CStr::from_ptr(message.as_ptr()) }.to_string_lossy();
        if message.is_empty() { Ok(()) } else { Err(TchError::Torch(message.into_owned())) }
    }

    fn on_stream(&self, work: &mut dyn FnMut(Stream) -> Result<(), TchError>) -> Result<(), TchError> {
        work(std::ptr::null_mut())
    }
}
