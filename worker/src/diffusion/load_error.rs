//! Everything that is wrong with a checkpoint, in one error: a person who downloads gigabytes again after each
//! message deserves the whole list.

use std::fmt;
use std::path::PathBuf;

/// At most this many faults of a checkpoint are printed; all of them are in [`LoadError::faults`].
const MAX_PRINTED_FAULTS: usize = 40;

/// A checkpoint that cannot be used.
#[derive(Debug)]
pub struct LoadError {
    /// The checkpoint's folder.
    pub directory: PathBuf,
    /// What is wrong, in the order in which it was found; never empty.
    pub faults: Vec<Fault>,
}

/// One thing that is wrong with a checkpoint. `file` is always relative to the checkpoint's folder.
#[derive(Debug, thiserror::Error)]
pub enum Fault {
    /// No file of these names.
    #[error("{file}: there is no such file")]
    MissingFile {
        /// The file, or several joined by "or".
        file: String,
    },
    /// The file is there and cannot be read.
    #[error("{file}: cannot be read: {error}")]
    Unreadable {
        /// The file.
        file: String,
        /// The operating system's answer.
        error: std::io::Error,
    },
    /// The file is not JSON, or not the JSON object it must be.
    #[error("{file}: is not a JSON object: {reason}")]
    Json {
        /// The file.
        file: String,
        /// Where and why.
        reason: String,
    },
    /// A field of a JSON file breaks a rule.
    #[error("{file}: `{field}` must be {rule} but is {value}")]
    Config {
        /// The file.
        file: String,
        /// The field's path.
        field: String,
        /// What is accepted.
        rule: String,
        /// What the file says.
        value: String,
    },
    /// The noise scheduler cannot be built from its JSON.
    #[error("{file}: {reason}")]
    Scheduler {
        /// The file.
        file: String,
        /// The scheduler's answer, with its causes.
        reason: String,
    },
    /// The tokenizer cannot be built from its files.
    #[error("{file}: {reason}")]
    Tokenizer {
        /// The file.
        file: String,
        /// What the tokenizers library says.
        reason: String,
    },
    /// Not a safetensors file, or a truncated one.
    #[error("{file}: is not a whole safetensors file: {reason}")]
    Safetensors {
        /// The file.
        file: String,
        /// The parser's answer.
        reason: String,
    },
    /// A tensor that the model needs is not in the file.
    #[error("{file}: has no `{key}` of shape {expected:?}")]
    MissingKey {
        /// The file.
        file: String,
        /// The tensor.
        key: String,
        /// The shape that the JSON asks for.
        expected: Vec<i64>,
    },
    /// A tensor in the file that the model has no place for.
    #[error("{file}: has `{key}`, which the model has no place for")]
    UnexpectedKey {
        /// The file.
        file: String,
        /// The tensor, as the file spells it.
        key: String,
    },
    /// A tensor of another shape than the JSON asks for.
    #[error("{file}: `{key}` must have shape {expected:?} but has {found:?}")]
    MisshapenKey {
        /// The file.
        file: String,
        /// The tensor.
        key: String,
        /// The shape that the JSON asks for.
        expected: Vec<i64>,
        /// The shape in the file.
        found: Vec<usize>,
    },
    /// A tensor of numbers that are no weights.
    #[error("{file}: `{key}` must be f64, f32, f16 or bf16 but is {found}")]
    WrongDtype {
        /// The file.
        file: String,
        /// The tensor.
        key: String,
        /// The type in the file.
        found: String,
    },
    /// libtorch could not hold a tensor.
    #[error("{file}: `{key}` cannot be put on the device: {error}")]
    Tensor {
        /// The file.
        file: String,
        /// The tensor.
        key: String,
        /// libtorch's answer.
        error: tch::TchError,
    },
    /// Engines were named for convolutions and cannot be used here.
    #[error("engines for convolutions: {reason}")]
    Convolutions {
        /// Which rule is broken, or cuDNN's words.
        reason: String,
    },
    /// The device cannot be used.
    #[error(transparent)]
    Device(#[from] super::device::DeviceError),
}

impl LoadError {
    /// What may help, one line each, for the kinds of faults that occurred.
    fn hints(&self) -> Vec<&'static str> {
        let any = |matches: fn(&Fault) -> bool| self.faults.iter().any(matches);
        let mut hints = Vec::new();
        if any(|fault| matches!(fault, Fault::MissingFile { file } if file == "model_index.json")) {
            hints.push("the folder must hold a diffusers checkpoint: model_index.json, unet/, vae/, text_encoder/, …");
        }
        if any(|fault| matches!(fault, Fault::MissingFile { file } if file.ends_with(".safetensors"))) {
            hints.push(
                "weights are read from .safetensors files; .bin and .ckpt files must be converted first",
            );
        }
        if any(|fault| matches!(fault, Fault::Safetensors { .. })) {
            hints.push(
                "the download may have been cut short: compare the file's size and SHA-256 with its source",
            );
        }
        if any(|fault| matches!(fault, Fault::MisshapenKey { .. })) {
            hints.push("weights and config.json may come from different checkpoints");
        }
        if any(|fault| matches!(fault, Fault::Config { field, .. } if field == "_class_name")) {
            hints.push("only the Stable Diffusion v1 family is supported: no SD 2, SDXL or SD 3");
        }
        if any(|fault| matches!(fault, Fault::Convolutions { .. })) {
            hints.push("`darkroom-worker tune` on this kind of GPU writes a file of engines that fits it");
        }
        hints
    }
}

impl fmt::Display for LoadError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let count = self.faults.len();
        let noun = if count == 1 { "fault" } else { "faults" };
        write!(f, "the checkpoint {} cannot be used, {count} {noun}:", self.directory.display())?;
        for fault in self.faults.iter().take(MAX_PRINTED_FAULTS) {
            write!(f, "\n  {fault}")?;
        }
        if count > MAX_PRINTED_FAULTS {
            write!(f, "\n  … and {} more", count - MAX_PRINTED_FAULTS)?;
        }
        for hint in self.hints() {
            write!(f, "\n  hint: {hint}")?;
        }
        Ok(())
    }
}

impl std::error::Error for LoadError {}
