//! The kernels on a GPU: the cubin that fits it, loaded by the CUDA driver into libtorch's own context, started on
//! libtorch's current stream. Nothing here allocates on the device, waits for it or has a stream of its own, so launches
//! can be captured in a CUDA graph. The driver is opened at run time: machines without one build and run the same binary.

use std::collections::BTreeMap;
use std::ffi::{CStr, CString, c_char, c_int, c_uint, c_void};
use std::ptr;
use std::sync::{Arc, Mutex, PoisonError};

use libloading::os::unix::Library;
use tch::{Device, TchError};

use super::super::device::open_for_good;
use super::cubins;
use super::launch::{Call, Kernel, Launch, Stream};

/// The driver's library.
const DRIVER: &str = "libcuda.so.1";
/// libtorch's, which knows the current stream.
const LIBTORCH: &str = "libtorch_cuda.so";

/// `CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR` and `_MINOR` of `cuda.h`.
const COMPUTE_CAPABILITY: [c_int; 2] = [75, 76];

/// A pointer that the driver gave out and that only the driver reads.
type Handle = *mut c_void;
/// `CUresult`; 0 is success.
type Status = c_int;

/// The functions of the driver that are used, with their types in `cuda.h`, and the one of libtorch
/// (`torch/csrc/inductor/aoti_torch/c/shim.h`).
#[derive(Debug)]
struct Functions {
    init: unsafe extern "C" fn(c_uint) -> Status,
    device_get: unsafe extern "C" fn(*mut c_int, c_int) -> Status,
    device_get_attribute: unsafe extern "C" fn(*mut c_int, c_int, c_int) -> Status,
    primary_context_retain: unsafe extern "C" fn(*mut Handle, c_int) -> Status,
    context_get_current: unsafe extern "C" fn(*mut Handle) -> Status,
    context_push: unsafe extern "C" fn(Handle) -> Status,
    context_pop: unsafe extern "C" fn(*mut Handle) -> Status,
    module_load_data: unsafe extern "C" fn(*mut Handle, *const c_void) -> Status,
    module_get_function: unsafe extern "C" fn(*mut Handle, Handle, *const c_char) -> Status,
    launch_kernel: LaunchKernel,
    get_error_string: unsafe extern "C" fn(Status, *mut *const c_char) -> Status,
    current_stream: unsafe extern "C" fn(i32, *mut Handle) -> c_int,
}

/// `cuLaunchKernel`: function, grid, block, shared bytes, stream, arguments, extra.
type LaunchKernel = unsafe extern "C" fn(
    Handle,
    c_uint,
    c_uint,
    c_uint,
    c_uint,
    c_uint,
    c_uint,
    c_uint,
    Handle,
    *mut *mut c_void,
    *mut *mut c_void,
) -> Status;

/// Why a GPU's kernels cannot be used.
#[derive(Debug, thiserror::Error)]
pub(super) enum OpenError {
    /// The driver or a function of it is missing.
    #[error("{library} lacks what they need: {reason}")]
    Library { library: &'static str, reason: String },
    /// No cubin fits.
    #[error("they were not compiled for compute capability {major}.{minor}")]
    Architecture { major: c_int, minor: c_int },
    /// The driver refused something.
    #[error(transparent)]
    Driver(#[from] TchError),
}

/// The kernels of one GPU.
#[derive(Debug)]
pub(super) struct CudaKernels {
    functions: Functions,
    index: usize,
    architecture: &'static str,
    /// The context that libtorch computes in.
    context: Handle,
    /// By [`Kernel::index`]; null where no kernel is.
    kernels: [Handle; Kernel::COUNT],
}

// SAFETY: the handles are only given back to the driver, whose functions may be called by any thread.
unsafe impl Send for CudaKernels {}
// SAFETY: as above; nothing is changed after `open`.
unsafe impl Sync for CudaKernels {}

impl CudaKernels {
    /// The kernels of the GPU with this number, which is open already. Loaded once in the process and kept: work that
    /// uses them may still be on its way when a model is dropped.
    pub(super) fn open(index: usize) -> Result<Arc<dyn Launch>, OpenError> {
        static OPENED: Mutex<BTreeMap<usize, Arc<CudaKernels>>> = Mutex::new(BTreeMap::new());
        let mut opened = OPENED.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(kernels) = opened.get(&index) {
            return Ok(kernels.clone());
        }
        let kernels = Arc::new(Self::load(index)?);
        opened.insert(index, kernels.clone());
        Ok(kernels)
    }

    fn load(index: usize) -> Result<Self, OpenError> {
        let functions = Functions::open()?;
        let number = i32::try_from(index).unwrap_or(i32::MAX);
        let (mut device, mut major, mut minor) = (0, 0, 0);
        let mut context = ptr::null_mut();
        // SAFETY: the functions' own types; all pointers are to variables of ours.
        unsafe {
            functions.check("cuInit", (functions.init)(0))?;
            functions.check("cuDeviceGet", (functions.device_get)(&raw mut device, number))?;
            for (attribute, value) in COMPUTE_CAPABILITY.into_iter().zip([&raw mut major, &raw mut minor]) {
                let status = (functions.device_get_attribute)(value, attribute, device);
                functions.check("cuDeviceGetAttribute", status)?;
            }
        }
        let Some(cubin) = cubins::for_capability(major, minor) else {
            return Err(OpenError::Architecture { major, minor });
        };
        // SAFETY: as above.
        let status = unsafe { (functions.primary_context_retain)(&raw mut context, device) };
        functions.check("cuDevicePrimaryCtxRetain", status)?;
        let mut kernels = [ptr::null_mut(); Kernel::COUNT];
        functions.within(context, || {
            let mut module = ptr::null_mut();
            // SAFETY: the bytes are an ELF file, whose size its header says, and outlive the call.
            let status =
                unsafe { (functions.module_load_data)(&raw mut module, cubin.bytes.as_ptr().cast()) };
            functions.check("cuModuleLoadData", status)?;
            for kernel in Kernel::all() {
                let name = CString::new(kernel.to_string())?;
                // SAFETY: the module was loaded above and is never unloaded; the name ends with a zero.
                let status = unsafe {
                    let function = &raw mut kernels[kernel.index()];
                    (functions.module_get_function)(function, module, name.as_ptr())
                };
                functions.check(&kernel.to_string(), status)?;
            }
            Ok(())
        })?;
        Ok(Self { functions, index, architecture: cubin.architecture, context, kernels })
    }
}

impl Launch for CudaKernels {
    fn device(&self) -> Device {
        Device::Cuda(self.index)
    }

    fn architecture(&self) -> &str {
        self.architecture
    }

    unsafe fn launch(&self, call: &Call<'_>) -> Result<(), TchError> {
        let Call { kernel, grid: [x, y, z], threads, shared_bytes, .. } = *call;
        let function = self.kernels[kernel.index()];
        if function.is_null() {
            return Err(TchError::Torch(format!("there is no kernel {kernel}")));
        }
        // The driver reads as many bytes from each pointer as the parameter has: the values of an `Argument`, and not it.
        let mut values: Vec<u64> = call.arguments.iter().map(|argument| argument.bits()).collect();
        let mut pointers: Vec<*mut c_void> =
            values.iter_mut().map(|value| ptr::from_mut(value).cast()).collect();
        self.on_stream(&mut |stream| {
            // SAFETY: the function is of a module in this context; the caller promises that the arguments are what the
            // kernel takes. The driver copies them before it returns.
            let status = unsafe {
                (self.functions.launch_kernel)(
                    function,
                    x,
                    y,
                    z,
                    threads,
                    1,
                    1,
                    shared_bytes,
                    stream,
                    pointers.as_mut_ptr(),
                    ptr::null_mut(),
                )
            };
            self.functions.check(&format!("launching {kernel}"), status)
        })
    }

    fn on_stream(&self, work: &mut dyn FnMut(Stream) -> Result<(), TchError>) -> Result<(), TchError> {
        let mut stream = ptr::null_mut();
        let number = i32::try_from(self.index).unwrap_or(i32::MAX);
        // SAFETY: libtorch's own type; it writes the stream's handle.
        if unsafe { (self.functions.current_stream)(number, &raw mut stream) } != 0 {
            return Err(TchError::Torch(format!(
                "libtorch does not tell the current stream of cuda:{number}"
            )));
        }
        self.functions.within(self.context, || work(stream))
    }
}

impl Functions {
    /// Finds them all; the libraries stay open for the life of the process.
    fn open() -> Result<Self, OpenError> {
        let open = |library| open_for_good(library).map_err(|reason| OpenError::Library { library, reason });
        let (driver, libtorch) = (open(DRIVER)?, open(LIBTORCH)?);
        // SAFETY: each field has the type of the function of that name in the library's header.
        unsafe {
            Ok(Self {
                init: find(driver, DRIVER, "cuInit")?,
                device_get: find(driver, DRIVER, "cuDeviceGet")?,
                device_get_attribute: find(driver, DRIVER, "cuDeviceGetAttribute")?,
                primary_context_retain: find(driver, DRIVER, "cuDevicePrimaryCtxRetain")?,
                context_get_current: find(driver, DRIVER, "cuCtxGetCurrent")?,
                context_push: find(driver, DRIVER, "cuCtxPushCurrent_v2")?,
                context_pop: find(driver, DRIVER, "cuCtxPopCurrent_v2")?,
                module_load_data: find(driver, DRIVER, "cuModuleLoadData")?,
                module_get_function: find(driver, DRIVER, "cuModuleGetFunction")?,
                launch_kernel: find(driver, DRIVER, "cuLaunchKernel")?,
                get_error_string: find(driver, DRIVER, "cuGetErrorString")?,
                current_stream: find(libtorch, LIBTORCH, "aoti_torch_get_current_cuda_stream")?,
            })
        }
    }

    /// An error in libtorch's words, by which a lost device is known.
    fn check(&self, what: &str, status: Status) -> Result<(), TchError> {
        if status == 0 {
            return Ok(());
        }
        let mut text = ptr::null();
        // SAFETY: the driver writes the address of a constant text, or null.
        let text = unsafe {
            let _ = (self.get_error_string)(status, &raw mut text);
            if text.is_null() { "unknown".into() } else { CStr::from_ptr(text).to_string_lossy() }
        };
        Err(TchError::Torch(format!("CUDA error: {text} ({status}) in {what}")))
    }

    /// Does `work` with `context` current on this thread, as it is already wherever libtorch has computed.
    fn within(&self, context: Handle, work: impl FnOnce() -> Result<(), TchError>) -> Result<(), TchError> {
        let mut current = ptr::null_mut();
        // SAFETY: the driver writes a handle, or null.
        self.check("cuCtxGetCurrent", unsafe { (self.context_get_current)(&raw mut current) })?;
        if current == context {
            return work();
        }
        // SAFETY: the context was retained for good.
        self.check("cuCtxPushCurrent", unsafe { (self.context_push)(context) })?;
        let result = work();
        // SAFETY: what was pushed above is popped; the driver writes its handle.
        let popped = unsafe { (self.context_pop)(&raw mut current) };
        result.and_then(|()| self.check("cuCtxPopCurrent", popped))
    }
}

/// # Safety
/// `F` is the type of the function.
unsafe fn find<F: Copy>(
    opened: &'static Library,
    library: &'static str,
    function: &'static str,
) -> Result<F, OpenError> {
    let name = format!("{function}\0");
    // SAFETY: the caller's promise.
    match unsafe { opened.get::<F>(name.as_bytes()) } {
        Ok(symbol) => Ok(*symbol),
        Err(error) => Err(OpenError::Library { library, reason: error.to_string() }),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_machine_without_a_driver_says_what_is_missing() {
        // Where a driver is, this opens it, and libtorch's CUDA half may still be missing.
        if let Err(error) = Functions::open() {
            let text = error.to_string();
            assert!(text.contains("lacks what they need"), "{text}");
        }
    }
}
