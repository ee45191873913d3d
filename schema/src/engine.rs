//! What a GPU's picture was computed by.

use serde::{Deserialize, Serialize};

/// What the last bits of a GPU's picture depend on besides spec, weights and dtype: with the same here, they are the same.
/// In the picture's row (columns `engine_…` of `images`) and in its file.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct EngineFingerprint {
    /// The GPU's model.
    pub gpu: String,
    /// Its driver's version.
    pub driver: String,
    /// libtorch's version.
    pub torch: String,
    /// cuDNN's version.
    pub cudnn: String,
    /// The kernels: `plain`, or `fused` or `attention` and what they were compiled for; and which engines are pinned for
    /// convolutions, if any.
    pub kernels: String,
    /// Pictures that were computed at once, made-up ones included.
    pub batch_size: usize,
    /// Pictures that were decoded at once, at most.
    #[serde(default)]
    pub decode_size: usize,
}
