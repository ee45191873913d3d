//! The file that pins engines: which one computes which convolution, on which kind of GPU and by which cuDNN.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};
use sha2::{Digest as _, Sha256};

use super::Convolution;
use crate::diffusion::device::ComputeDtype;

/// At most this many faults of a file are printed; all of them are in [`EnginesFileError::faults`].
const MAX_PRINTED_FAULTS: usize = 40;
/// Characters of the digest that a picture's row shows.
const NAME_CHARS: usize = 12;
/// Larger than any side, number of channels or batch that there is.
const MOST: i64 = 1 << 20;

/// One of cuDNN's engines with its settings.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub struct EngineChoice {
    /// Its number among the engines for graphs of this form.
    pub engine: i64,
    /// Settings by the numbers of `cudnnBackendKnobType_t`.
    pub knobs: BTreeMap<i32, i64>,
}

/// A convolution with its engine.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct PinnedEngine {
    /// What is computed.
    pub convolution: Convolution,
    /// By what.
    pub choice: EngineChoice,
    /// Microseconds that it took when it was chosen.
    pub microseconds: f64,
    /// What libtorch's way took then.
    pub libtorch_microseconds: f64,
}

/// The file's content.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ConvolutionEngines {
    /// The GPU's name.
    pub gpu: String,
    /// cuDNN's version: an engine's number means another one in another version.
    pub cudnn: String,
    /// Each convolution once.
    pub pinned: Vec<PinnedEngine>,
}

/// A file of engines that cannot be used.
#[derive(Debug)]
pub struct EnginesFileError {
    /// The file.
    pub file: PathBuf,
    /// What is wrong with it, never empty.
    pub faults: Vec<EnginesFault>,
}

/// One thing that is wrong with a file of engines.
#[derive(Debug, thiserror::Error)]
pub enum EnginesFault {
    /// It is not there, or not for us.
    #[error("cannot be read: {0}")]
    Unreadable(std::io::Error),
    /// It is not JSON, or not of this form.
    #[error("is not a file of `darkroom-worker tune`: {0}")]
    Json(serde_json::Error),
    /// A value breaks a rule.
    #[error("`{field}` must be {rule} but is {value}")]
    Value {
        /// The value's path.
        field: String,
        /// What is accepted.
        rule: String,
        /// What the file says.
        value: String,
    },
}

impl ConvolutionEngines {
    /// Reads a file and checks all that can be checked without a GPU.
    pub fn read(file: &Path) -> Result<Self, EnginesFileError> {
        let failed = |faults| EnginesFileError { file: file.to_owned(), faults };
        let text =
            std::fs::read_to_string(file).map_err(|error| failed(vec![EnginesFault::Unreadable(error)]))?;
        let engines: Self =
            serde_json::from_str(&text).map_err(|error| failed(vec![EnginesFault::Json(error)]))?;
        let faults = engines.faults();
        if faults.is_empty() { Ok(engines) } else { Err(failed(faults)) }
    }

    fn faults(&self) -> Vec<EnginesFault> {
        let mut faults = Vec::new();
        let mut seen = BTreeSet::new();
        for (index, PinnedEngine { convolution, choice, .. }) in self.pinned.iter().enumerate() {
            let mut refuse = |field: &str, rule: &str, value: String| {
                let field = format!("pinned[{index}].{field}");
                faults.push(EnginesFault::Value { field, rule: rule.to_owned(), value });
            };
            if convolution.dtype == ComputeDtype::F32 {
                refuse("convolution.dtype", "f16 or bf16", convolution.dtype.to_string());
            }
            for (field, value, least) in [
                ("batch_size", convolution.batch_size, 1),
                ("in_channels", convolution.in_channels, 1),
                ("height", convolution.height, 1),
                ("width", convolution.width, 1),
                ("out_channels", convolution.out_channels, 1),
                ("kernel_size", convolution.kernel_size, 1),
                ("stride", convolution.stride, 1),
                ("padding", convolution.padding, 0),
            ] {
                if !(least..=MOST).contains(&value) {
                    let rule = format!("from {least} to {MOST}");
                    refuse(&format!("convolution.{field}"), &rule, value.to_string());
                }
            }
            if choice.engine < 0 {
                refuse("choice.engine", "0 or more", choice.engine.to_string());
            }
            if !seen.insert(convolution) {
                refuse("convolution", "named once", format!("`{convolution}` again"));
            }
        }
        faults
    }

    /// What is wrong if this GPU and this cuDNN are to compute with it.
    pub fn faults_on(&self, gpu: &str, cudnn: &str) -> Vec<EnginesFault> {
        let check = |field: &str, ours: &str, theirs: &str| {
            (ours != theirs).then(|| EnginesFault::Value {
                field: field.to_owned(),
                rule: format!("`{ours}`, as here"),
                value: format!("`{theirs}`"),
            })
        };
        [check("gpu", gpu, &self.gpu), check("cudnn", cudnn, &self.cudnn)].into_iter().flatten().collect()
    }

    /// A few characters of a digest of what is pinned: equal names, equal engines.
    pub fn name(&self) -> String {
        let mut pinned: Vec<_> =
            self.pinned.iter().map(|pinned| (&pinned.convolution, &pinned.choice)).collect();
        pinned.sort();
        let mut digest = Sha256::new();
        digest.update(format!("{} {}\n", self.gpu, self.cudnn));
        for (convolution, EngineChoice { engine, knobs }) in pinned {
            digest.update(format!("{convolution}, padding {}: {engine} {knobs:?}\n", convolution.padding));
        }
        hex::encode(digest.finalize()).chars().take(NAME_CHARS).collect()
    }
}

impl fmt::Display for EnginesFileError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "the convolutions' engines in {} cannot be used:", self.file.display())?;
        for fault in self.faults.iter().take(MAX_PRINTED_FAULTS) {
            write!(f, "\n  {fault}")?;
        }
        let count = self.faults.len();
        if count > MAX_PRINTED_FAULTS {
            write!(f, "\n  and {} more", count - MAX_PRINTED_FAULTS)?;
        }
        write!(f, "\n  hint: `darkroom-worker tune` on this kind of GPU writes such a file")
    }
}

impl std::error::Error for EnginesFileError {}

#[cfg(test)]
mod tests;
