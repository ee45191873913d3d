//! cuDNN's backend interface (`cudnn_graph_v9.h`), as far as it is used: a few functions and descriptors with typed attributes. The
//! library is the one that libtorch's CUDA half has opened already; without that, the one on the linker's path.

mod names;

use std::ffi::{CStr, c_char, c_int, c_void};
use std::ptr;
use std::sync::OnceLock;

use libloading::os::unix::Library;
use tch::TchError;

pub(super) use self::names::{Attribute, Kind, Named, Value};
use self::names::{TYPE_BEHAVIOR_NOTE, TYPE_DESCRIPTOR, TYPE_KNOB, TYPE_NUMERICAL_NOTE};
use super::super::device::open_for_good;

/// The library, which loads its parts itself.
const LIBRARY: &str = "libcudnn.so.9";

/// The first version that plans can be made by without a GPU.
const LEAST_VERSION: usize = 90_800;

/// Whatever cuDNN gave out and only cuDNN reads.
pub(super) type Handle = *mut c_void;

/// What executes on a GPU, for one thread at a time.
#[derive(Debug, Clone, Copy)]
pub struct CudnnHandle(Handle);

/// Why cuDNN does not do something.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum CudnnError {
    /// The library or a function of it is missing.
    #[error("{LIBRARY} cannot be used: {reason}")]
    Library {
        /// The dynamic linker's words.
        reason: String,
    },
    /// It is too old.
    #[error("cuDNN must be of version {LEAST_VERSION} or newer but is {version}")]
    Version {
        /// As one number.
        version: usize,
    },
    /// It refused.
    #[error("cuDNN refuses {what} ({status}): {reason}")]
    Refused {
        /// What was asked of it.
        what: &'static str,
        /// `cudnnStatus_t`.
        status: c_int,
        /// Its own words, if it had any.
        reason: String,
    },
}

impl From<CudnnError> for TchError {
    /// As one of libtorch's: who computes by the one computes by the other.
    fn from(error: CudnnError) -> Self {
        Self::Torch(error.to_string())
    }
}

/// The functions, with their types in the header.
#[derive(Debug)]
struct Functions {
    version: unsafe extern "C" fn() -> usize,
    last_error: unsafe extern "C" fn(*mut c_char, usize),
    create: unsafe extern "C" fn(*mut Handle) -> c_int,
    set_stream: unsafe extern "C" fn(Handle, Handle) -> c_int,
    create_descriptor: unsafe extern "C" fn(c_int, *mut Handle) -> c_int,
    destroy_descriptor: unsafe extern "C" fn(Handle) -> c_int,
    set_attribute: unsafe extern "C" fn(Handle, c_int, c_int, i64, *const c_void) -> c_int,
    get_attribute: unsafe extern "C" fn(Handle, c_int, c_int, i64, *mut i64, *mut c_void) -> c_int,
    finalize: unsafe extern "C" fn(Handle) -> c_int,
    execute: unsafe extern "C" fn(Handle, Handle, Handle) -> c_int,
}

/// The open library.
#[derive(Debug)]
pub struct Cudnn {
    functions: Functions,
}

impl Cudnn {
    /// Opens it, once in the process; it is never closed.
    pub fn open() -> Result<&'static Self, CudnnError> {
        static OPENED: OnceLock<Result<Cudnn, CudnnError>> = OnceLock::new();
        OPENED.get_or_init(Self::load).as_ref().map_err(Clone::clone)
    }

    fn load() -> Result<Self, CudnnError> {
        let library = open_for_good(LIBRARY).map_err(|reason| CudnnError::Library { reason })?;
        // SAFETY: each field has the type of the function of that name in the library's header.
        let functions = unsafe {
            Functions {
                version: find(library, "cudnnGetVersion")?,
                last_error: find(library, "cudnnGetLastErrorString")?,
                create: find(library, "cudnnCreate")?,
                set_stream: find(library, "cudnnSetStream")?,
                create_descriptor: find(library, "cudnnBackendCreateDescriptor")?,
                destroy_descriptor: find(library, "cudnnBackendDestroyDescriptor")?,
                set_attribute: find(library, "cudnnBackendSetAttribute")?,
                get_attribute: find(library, "cudnnBackendGetAttribute")?,
                finalize: find(library, "cudnnBackendFinalize")?,
                execute: find(library, "cudnnBackendExecute")?,
            }
        };
        let opened = Self { functions };
        match opened.version() {
            version if version < LEAST_VERSION => Err(CudnnError::Version { version }),
            _ => Ok(opened),
        }
    }

    /// Its version as one number: 91900 is 9.19.0.
    pub fn version(&self) -> usize {
        // SAFETY: it takes nothing.
        unsafe { (self.functions.version)() }
    }

    fn check(&self, what: &'static str, status: c_int) -> Result<(), CudnnError> {
        if status == 0 {
            return Ok(());
        }
        let mut text = [0 as c_char; 512];
        // SAFETY: at most all but the last byte is written, so the text ends with a zero.
        let reason = unsafe {
            (self.functions.last_error)(text.as_mut_ptr(), text.len() - 1);
            CStr::from_ptr(text.as_ptr()).to_string_lossy().trim().to_owned()
        };
        Err(CudnnError::Refused { what, status, reason })
    }

    /// A new handle for the current GPU, which is kept for good.
    pub fn handle(&self) -> Result<CudnnHandle, CudnnError> {
        let mut handle = ptr::null_mut();
        // SAFETY: the function's own types; it writes the pointer.
        self.check("a handle", unsafe { (self.functions.create)(&raw mut handle) })?;
        Ok(CudnnHandle(handle))
    }

    /// Starts `plan` with what `pack` names, on `stream`.
    ///
    /// # Safety
    /// The pointers in `pack` are those of as many values as the plan reads and writes, on the handle's GPU, and live until the
    /// stream has passed the launch; the handle is used by no other thread meanwhile.
    pub(super) unsafe fn execute(
        &self,
        handle: CudnnHandle,
        stream: Handle,
        plan: &Descriptor,
        pack: &Descriptor,
    ) -> Result<(), CudnnError> {
        // SAFETY: the caller's promise; the descriptors are finalized and alive.
        unsafe {
            self.check("a stream", (self.functions.set_stream)(handle.0, stream))?;
            self.check("an execution", (self.functions.execute)(handle.0, plan.raw, pack.raw))
        }
    }
}

/// # Safety
/// `F` is the type of the function.
unsafe fn find<F: Copy>(library: &'static Library, function: &str) -> Result<F, CudnnError> {
    let name = format!("{function}\0");
    // SAFETY: the caller's promise.
    match unsafe { library.get::<F>(name.as_bytes()) } {
        Ok(symbol) => Ok(*symbol),
        Err(error) => Err(CudnnError::Library { reason: error.to_string() }),
    }
}

/// A backend descriptor. Those that it names have to outlive it.
#[derive(Debug)]
pub(super) struct Descriptor {
    raw: Handle,
    cudnn: &'static Cudnn,
}

// SAFETY: what a descriptor points to belongs to it alone, and cuDNN lets any thread use it.
unsafe impl Send for Descriptor {}
// SAFETY: after `finalize` nothing changes it any more; before, it is behind `&mut` or local.
unsafe impl Sync for Descriptor {}

impl Descriptor {
    pub(super) fn new(cudnn: &'static Cudnn, kind: Kind) -> Result<Self, CudnnError> {
        let mut raw = ptr::null_mut();
        // SAFETY: the function's own types; it writes the pointer.
        let status = unsafe { (cudnn.functions.create_descriptor)(kind as c_int, &raw mut raw) };
        cudnn.check("a descriptor", status)?;
        Ok(Self { raw, cudnn })
    }

    fn set_raw<T>(&mut self, attribute: Attribute, kind: c_int, values: &[T]) -> Result<(), CudnnError> {
        // SAFETY: `values` are as many of the type as the count says, and are copied during the call.
        let status = unsafe {
            let count = values.len() as i64;
            (self.cudnn.functions.set_attribute)(
                self.raw,
                attribute as c_int,
                kind,
                count,
                values.as_ptr().cast(),
            )
        };
        self.cudnn.check("an attribute", status)
    }

    /// Sets an attribute of plain values.
    pub(super) fn set<T: Value>(&mut self, attribute: Attribute, values: &[T]) -> Result<(), CudnnError> {
        self.set_raw(attribute, T::TYPE, values)
    }

    /// Sets an attribute to a value of an enumeration.
    pub(super) fn set_named(&mut self, attribute: Attribute, value: Named) -> Result<(), CudnnError> {
        let (kind, number) = value.parts();
        self.set_raw(attribute, kind, &[number])
    }

    /// Sets an attribute to other descriptors, which outlive this one.
    pub(super) fn set_descriptors(
        &mut self,
        attribute: Attribute,
        descriptors: &[&Self],
    ) -> Result<(), CudnnError> {
        let raws: Vec<Handle> = descriptors.iter().map(|descriptor| descriptor.raw).collect();
        self.set_raw(attribute, TYPE_DESCRIPTOR, &raws)
    }

    /// Completes the descriptor; nothing is set any more.
    pub(super) fn finalize(self, what: &'static str) -> Result<Self, CudnnError> {
        // SAFETY: the descriptor is alive.
        let status = unsafe { (self.cudnn.functions.finalize)(self.raw) };
        self.cudnn.check(what, status)?;
        Ok(self)
    }

    fn get_raw<T: Copy>(
        &self,
        attribute: Attribute,
        kind: c_int,
        room: &mut [T],
    ) -> Result<usize, CudnnError> {
        let mut count = 0;
        // SAFETY: there is room for as many values of the type as the call is told.
        let status = unsafe {
            let values = room.as_mut_ptr().cast();
            (self.cudnn.functions.get_attribute)(
                self.raw,
                attribute as c_int,
                kind,
                room.len() as i64,
                &raw mut count,
                values,
            )
        };
        self.cudnn.check("to tell an attribute", status)?;
        Ok(usize::try_from(count).unwrap_or(0).min(room.len()))
    }

    /// A number.
    pub(super) fn number(&self, attribute: Attribute) -> Result<i64, CudnnError> {
        let mut value = [0i64];
        self.get_raw(attribute, i64::TYPE, &mut value)?;
        Ok(value[0])
    }

    /// A knob's kind.
    pub(super) fn knob(&self) -> Result<c_int, CudnnError> {
        let mut value = [0];
        self.get_raw(Attribute::KnobKind, TYPE_KNOB, &mut value)?;
        Ok(value[0])
    }

    /// An engine's numerical notes, `cudnnBackendNumericalNote_t`.
    pub(super) fn numerical_notes(&self) -> Result<Vec<c_int>, CudnnError> {
        self.notes(Attribute::EngineNumericalNotes, TYPE_NUMERICAL_NOTE)
    }

    /// An engine's notes on how it works, `cudnnBackendBehaviorNote_t`.
    pub(super) fn behavior_notes(&self) -> Result<Vec<c_int>, CudnnError> {
        self.notes(Attribute::EngineBehaviorNotes, TYPE_BEHAVIOR_NOTE)
    }

    fn notes(&self, attribute: Attribute, kind: c_int) -> Result<Vec<c_int>, CudnnError> {
        let mut notes = [0; 32];
        let count = self.get_raw(attribute, kind, &mut notes)?;
        Ok(notes[..count].to_vec())
    }

    /// Other descriptors, at most `room` of them, which cuDNN fills in.
    pub(super) fn descriptors(
        &self,
        attribute: Attribute,
        kind: Kind,
        room: usize,
    ) -> Result<Vec<Self>, CudnnError> {
        let mut descriptors =
            (0..room).map(|_| Self::new(self.cudnn, kind)).collect::<Result<Vec<_>, _>>()?;
        let mut raws: Vec<Handle> = descriptors.iter().map(|descriptor| descriptor.raw).collect();
        let count = self.get_raw(attribute, TYPE_DESCRIPTOR, &mut raws)?;
        descriptors.truncate(count);
        Ok(descriptors)
    }
}

impl Drop for Descriptor {
    fn drop(&mut self) {
        // SAFETY: it came from `create_descriptor` and is not used after this.
        let _ = unsafe { (self.cudnn.functions.destroy_descriptor)(self.raw) };
    }
}
