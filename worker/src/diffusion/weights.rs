//! A component's weights: one memory-mapped safetensors file, handed out tensor by tensor under the names and shapes
//! that the model asks for; or, for benchmarks, numbers drawn on the spot ([`super::drawn_weights`]).
//!
//! Each tensor is copied from the map, converted to the compute dtype and put on the device; the pages behind it are read ahead
//! and can be dropped afterwards. A tensor that is missing or has another shape does not stop the
//! building of the model; it is recorded, an empty tensor stands in for it, and [`WeightFile::into_faults`] tells in
//! the end, together with the tensors that nobody asked for.

use std::cell::{Cell, RefCell};
use std::collections::BTreeMap;
use std::fmt::Display;
use std::fs::File;
use std::ops::Div;
use std::path::Path;
use std::sync::Arc;
use std::thread;

use memmap2::{Advice, Mmap};
use safetensors::SafeTensors;
use safetensors::tensor::{Dtype, TensorInfo};
use tch::{Device, Kind, TchError, Tensor};

use super::device::ComputeDtype;
use super::drawn_weights::{DrawnTensor, DrawnWeights};
use super::kernels::Kernels;
use super::load_error::Fault;

/// How many bytes of a safetensors file give the header's length (the format's definition).
const HEADER_LENGTH_BYTES: usize = 8;

/// What [`read_ahead`] asks for at once: enough for a disk to be at its fastest, little enough to stop soon.
const READ_AHEAD_BYTES: usize = 16 << 20;

/// A source of weights and what became of its tensors.
#[derive(Debug)]
pub struct WeightFile {
    file: String,
    source: Source,
    kind: Kind,
    device: Device,
    /// What the layers will compute with.
    kernels: Kernels,
    faults: RefCell<Vec<Fault>>,
}

/// Where the numbers come from.
#[derive(Debug)]
enum Source {
    /// A memory-mapped safetensors file.
    Mapped { map: Arc<Mmap>, data_start: usize, entries: BTreeMap<String, Entry> },
    /// A seed; remembers what was asked for.
    Drawn { weights: DrawnWeights, asked_for: RefCell<Vec<DrawnTensor>> },
}

/// One tensor in the file.
#[derive(Debug)]
struct Entry {
    /// The name as the file spells it.
    spelled: String,
    info: TensorInfo,
    used: Cell<bool>,
}

/// The base names under which diffusers and transformers save a component's weights: of the fp32 and the fp16 file.
fn candidates(stem: &str, dtype: ComputeDtype) -> [String; 2] {
    let full = format!("{stem}.safetensors");
    let half = format!("{stem}.fp16.safetensors");
    match dtype {
        // bf16 keeps fewer digits than f16: rounding once, from the fp32 file, is what diffusers does.
        ComputeDtype::F32 | ComputeDtype::Bf16 => [full, half],
        ComputeDtype::F16 => [half, full],
    }
}

impl WeightFile {
    /// Maps `{component}/{stem}.safetensors` or its `.fp16` sibling, whichever fits the compute dtype better and
    /// exists. `rename` turns a key of the file into the model's, or drops it (`None`).
    pub fn open(
        directory: &Path,
        component: &str,
        stem: &str,
        dtype: ComputeDtype,
        device: Device,
        rename: fn(&str) -> Option<String>,
    ) -> Result<Self, Fault> {
        let names = candidates(stem, dtype).map(|name| format!("{component}/{name}"));
        let file = names
            .iter()
            .find(|name| directory.join(name.as_str()).exists())
            .ok_or_else(|| Fault::MissingFile { file: names.join(" or ") })?;
        Self::map(directory, file, dtype.to_tch(), device, rename)
    }

    /// Maps one file and reads its header.
    fn map(
        directory: &Path,
        file: &str,
        kind: Kind,
        device: Device,
        rename: fn(&str) -> Option<String>,
    ) -> Result<Self, Fault> {
        let unreadable = |error| Fault::Unreadable { file: file.to_owned(), error };
        let handle = File::open(directory.join(file)).map_err(unreadable)?;
        // SAFETY: the map is read while the model is loaded and then dropped. A checkpoint is not rewritten in place
        // while workers load it: installing one means writing new files.
        let map = unsafe { Mmap::map(&handle) }.map_err(unreadable)?;
        let map = Arc::new(map);
        read_ahead(Arc::clone(&map));
        let (header_length, metadata) = SafeTensors::read_metadata(&map)
            .map_err(|error| Fault::Safetensors { file: file.to_owned(), reason: error.to_string() })?;
        let mut faults = Vec::new();
        let mut entries = BTreeMap::new();
        for (spelled, info) in metadata.tensors() {
            let Some(name) = rename(&spelled) else { continue };
            let entry = Entry { spelled, info: info.clone(), used: Cell::new(false) };
            if let Some(twin) = entries.insert(name, entry) {
                faults.push(Fault::UnexpectedKey { file: file.to_owned(), key: twin.spelled });
            }
        }
        Ok(Self {
            file: file.to_owned(),
            source: Source::Mapped { map, data_start: HEADER_LENGTH_BYTES + header_length, entries },
            kind,
            device,
            kernels: Kernels::plain(false),
            faults: RefCell::new(faults),
        })
    }

    /// Weights of whatever names and shapes the model asks for, drawn from a seed.
    pub fn drawn(component: &str, seed: u64, dtype: ComputeDtype, device: Device) -> Self {
        let weights = DrawnWeights::new(component, seed);
        Self {
            file: component.to_owned(),
            source: Source::Drawn { weights, asked_for: RefCell::default() },
            kind: dtype.to_tch(),
            device,
            kernels: Kernels::plain(false),
            faults: RefCell::default(),
        }
    }

    /// Weights for layers that compute with `kernels`; without it, with libtorch's operations, channels first.
    pub fn with_kernels(self, kernels: Kernels) -> Self {
        Self { kernels, ..self }
    }

    /// What the model asked for so far, in that order, if the weights are drawn.
    pub fn asked_for(&self) -> Vec<DrawnTensor> {
        match &self.source {
            Source::Mapped { .. } => Vec::new(),
            Source::Drawn { asked_for, .. } => asked_for.borrow().clone(),
        }
    }

    /// The top of the file's name tree.
    pub fn root(&self) -> Weights<'_> {
        Weights { file: self, prefix: String::new() }
    }

    /// What was wrong: tensors that were missing or misshapen when asked for, then those that nobody asked for.
    pub fn into_faults(self) -> Vec<Fault> {
        let mut faults = self.faults.into_inner();
        let Source::Mapped { entries, .. } = self.source else { return faults };
        let unused = entries.into_values().filter(|entry| !entry.used.get());
        faults
            .extend(unused.map(|entry| Fault::UnexpectedKey { file: self.file.clone(), key: entry.spelled }));
        faults
    }

    /// The tensor of this name and shape, in the compute dtype and on the device.
    fn tensor(&self, name: &str, shape: &[i64]) -> Result<Tensor, Fault> {
        let (file, key) = (self.file.clone(), name.to_owned());
        let (map, data_start, entries) = match &self.source {
            Source::Mapped { map, data_start, entries } => (map, *data_start, entries),
            Source::Drawn { weights, asked_for } => {
                asked_for.borrow_mut().push(DrawnTensor { name: key.clone(), shape: shape.to_vec() });
                let drawn = weights.tensor(name, shape).and_then(|tensor| self.place(&tensor));
                return drawn.map_err(|error| Fault::Tensor { file, key, error });
            }
        };
        let Some(entry) = entries.get(name) else {
            return Err(Fault::MissingKey { file, key, expected: shape.to_vec() });
        };
        entry.used.set(true);
        let found = &entry.info.shape;
        if !found.iter().map(|&size| i64::try_from(size)).eq(shape.iter().map(|&size| Ok(size))) {
            return Err(Fault::MisshapenKey { file, key, expected: shape.to_vec(), found: found.clone() });
        }
        let Some(kind) = float_kind(entry.info.dtype) else {
            return Err(Fault::WrongDtype { file, key, found: format!("{:?}", entry.info.dtype) });
        };
        // The parser has checked that the bytes lie within the file and are as many as shape and dtype say.
        let (start, end) = entry.info.data_offsets;
        let bytes = &map[data_start + start..data_start + end];
        Tensor::f_from_data_size(bytes, shape, kind)
            .and_then(|tensor| self.place(&tensor))
            .map_err(|error| Fault::Tensor { file, key, error })
    }

    /// The tensor in the compute dtype and on the device.
    fn place(&self, tensor: &Tensor) -> Result<Tensor, TchError> {
        tensor.f_to_device_(self.device, self.kind, false, false)
    }
}

/// Brings a file into memory from its start to its end, on a thread of its own, while its tensors are copied: they lie in
/// another order than they are asked for in, and fetching them page by page takes several times as long as the disk needs.
/// Stops when the file is no longer used. Where this is refused, nothing is lost but time.
fn read_ahead(map: Arc<Mmap>) {
    // Without a thread to be had, the pages come one by one.
    let _ = thread::Builder::new().name("read-ahead".to_owned()).spawn(move || {
        let mut start = 0;
        while start < map.len() && Arc::strong_count(&map) > 1 {
            let length = READ_AHEAD_BYTES.min(map.len() - start);
            if map.advise_range(Advice::PopulateRead, start, length).is_err() {
                // Before Linux 5.14. This one returns at once, or when the disk's queue has room again.
                let _ = map.advise_range(Advice::WillNeed, start, length);
            }
            start += length;
        }
    });
}

/// libtorch's name of a safetensors dtype, if it is one that weights are stored in.
fn float_kind(dtype: Dtype) -> Option<Kind> {
    match dtype {
        Dtype::F64 => Some(Kind::Double),
        Dtype::F32 => Some(Kind::Float),
        Dtype::F16 => Some(Kind::Half),
        Dtype::BF16 => Some(Kind::BFloat16),
        _ => None,
    }
}

/// A place in the tree of names: `&weights / "down_blocks" / 0` is where the first down block's tensors are.
#[derive(Debug, Clone)]
pub struct Weights<'a> {
    file: &'a WeightFile,
    prefix: String,
}

impl Weights<'_> {
    /// The tensor `name` of this place, of the given shape, in the compute dtype and on the device. Where the file has
    /// no such tensor, the fault is recorded and an empty tensor returned.
    pub fn tensor(&self, name: &str, shape: &[i64]) -> Tensor {
        self.file.tensor(&format!("{}{name}", self.prefix), shape).unwrap_or_else(|fault| {
            self.file.faults.borrow_mut().push(fault);
            Tensor::new()
        })
    }

    /// As [`Self::tensor`], of shape `file_shape` in the file and `shape`, with as many elements, in the model.
    pub fn reshaped_tensor(&self, name: &str, file_shape: &[i64], shape: &[i64]) -> Tensor {
        let tensor = self.tensor(name, file_shape);
        // An empty tensor stands for a fault that is recorded already.
        if tensor.defined() { tensor.view(shape) } else { tensor }
    }

    /// The tensors `name` of several places below this one, each of the given shape, one after the other.
    pub fn stacked(&self, places: &[&str], name: &str, shape: &[i64]) -> Tensor {
        let tensors: Vec<Tensor> = places.iter().map(|place| (self / place).tensor(name, shape)).collect();
        if tensors.iter().all(Tensor::defined) { Tensor::cat(&tensors, 0) } else { Tensor::new() }
    }

    /// As [`Self::tensor`], a convolution's, which lies in memory as its feature maps do.
    pub fn kernel_tensor(&self, name: &str, shape: &[i64]) -> Tensor {
        let tensor = self.tensor(name, shape);
        if tensor.defined() { self.made(name, self.kernels().lay_out(&tensor)) } else { tensor }
    }

    /// What was made of the tensor `name` of this place. Where that failed, the fault is recorded and an empty tensor
    /// returned.
    pub fn made(&self, name: &str, tensor: Result<Tensor, TchError>) -> Tensor {
        tensor.unwrap_or_else(|error| {
            let (file, key) = (self.file.file.clone(), format!("{}{name}", self.prefix));
            self.file.faults.borrow_mut().push(Fault::Tensor { file, key, error });
            Tensor::new()
        })
    }

    /// What the layers compute with.
    pub fn kernels(&self) -> &Kernels {
        &self.file.kernels
    }

    /// The device that the tensors are put on.
    pub fn device(&self) -> Device {
        self.file.device
    }
}

impl<'a, T: Display> Div<T> for &Weights<'a> {
    type Output = Weights<'a>;

    fn div(self, name: T) -> Weights<'a> {
        Weights { file: self.file, prefix: format!("{}{name}.", self.prefix) }
    }
}

impl<'a, T: Display> Div<T> for Weights<'a> {
    type Output = Weights<'a>;

    fn div(self, name: T) -> Weights<'a> {
        &self / name
    }
}
