//! A checkpoint that a test may change.
#![allow(dead_code, reason = "each test program uses its own part of this")]

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

use serde_json::Value;
use tch::Tensor;
use worker::diffusion::load_error::Fault;
use worker::diffusion::{LoadError, LoadOptions, StableDiffusionPipeline};

use crate::golden::{F32, golden as golden_path};

/// The UNet's weights.
pub const UNET: &str = "unet/diffusion_pytorch_model.safetensors";
/// The VAE's weights.
pub const VAE: &str = "vae/diffusion_pytorch_model.safetensors";

/// A copy of the golden checkpoint `tiny` that a test may damage.
pub struct Checkpoint {
    folder: tempfile::TempDir,
}

impl Checkpoint {
    pub fn new() -> Self {
        let folder = tempfile::tempdir().unwrap();
        copy(&golden_path("tiny"), folder.path());
        Self { folder }
    }

    pub fn path(&self, file: &str) -> PathBuf {
        self.folder.path().join(file)
    }

    /// The folder.
    pub fn folder(&self) -> &Path {
        self.folder.path()
    }

    pub fn load_as(&self, options: &LoadOptions) -> Result<StableDiffusionPipeline, LoadError> {
        StableDiffusionPipeline::from_pretrained(self.folder.path(), options)
    }

    pub fn load(&self) -> Result<StableDiffusionPipeline, LoadError> {
        self.load_as(&F32)
    }

    pub fn faults(&self) -> Vec<Fault> {
        self.load().expect_err("a damaged checkpoint is refused").faults
    }

    pub fn texts(&self) -> Vec<String> {
        self.faults().iter().map(Fault::to_string).collect()
    }

    pub fn edit_weights(&self, file: &str, edit: impl FnOnce(&mut BTreeMap<String, Tensor>)) {
        let path = self.path(file);
        let mut tensors = Tensor::read_safetensors(&path).unwrap().into_iter().collect();
        edit(&mut tensors);
        let tensors: Vec<(String, Tensor)> = tensors.into_iter().collect();
        Tensor::write_safetensors(&tensors, path).unwrap();
    }

    pub fn edit_json(&self, file: &str, edit: impl FnOnce(&mut Value)) {
        let mut json = serde_json::from_str(&fs::read_to_string(self.path(file)).unwrap()).unwrap();
        edit(&mut json);
        fs::write(self.path(file), json.to_string()).unwrap();
    }

    /// Scales a tensor so that its largest value is `largest`. What follows such a tensor is normalized, so the picture
    /// stays one as long as the numbers in between are finite.
    pub fn scale_to(&self, file: &str, key: &str, largest: f64) {
        self.edit_weights(file, |tensors| {
            let tensor = &tensors[key];
            let scaled = tensor * (largest / tensor.abs().max().double_value(&[]));
            tensors.insert(key.to_owned(), scaled);
        });
    }
}

fn copy(from: &Path, to: &Path) {
    for entry in fs::read_dir(from).unwrap() {
        let entry = entry.unwrap();
        let to = to.join(entry.file_name());
        if entry.file_type().unwrap().is_dir() {
            fs::create_dir(&to).unwrap();
            copy(&entry.path(), &to);
        } else {
            fs::copy(entry.path(), to).unwrap();
        }
    }
}
