//! Reads the golden files and compares with them.
#![allow(dead_code, reason = "each test program uses its own part of this")]

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use tch::{Device, Kind, Tensor};
use worker::diffusion::config::ConfigFile;
use worker::diffusion::load_error::Fault;
use worker::diffusion::weights::WeightFile;
use worker::diffusion::{ComputeDevice, ComputeDtype, KernelChoice, LoadOptions, StableDiffusionPipeline};

/// The checkpoints among the golden files.
pub const CHECKPOINTS: [&str; 2] = ["tiny", "small"];

/// Computing in f32 on the CPU.
pub const F32: LoadOptions = LoadOptions {
    device: ComputeDevice::Cpu,
    dtype: ComputeDtype::F32,
    kernels: KernelChoice::Plain,
    convolutions: None,
};

/// How far a tensor may be from the reference: the largest difference against the reference's largest value.
pub const TOLERANCE: f64 = 1e-4;

/// A path among the golden files.
pub fn golden(path: &str) -> PathBuf {
    // The tests run side by side already, and the golden files were made with one thread.
    tch::set_num_threads(1);
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden").join(path)
}

/// A file of golden tensors.
pub fn tensors(path: &str) -> BTreeMap<String, Tensor> {
    Tensor::read_safetensors(golden(path)).unwrap().into_iter().collect()
}

/// A checkpoint of the golden files.
pub fn pipeline(checkpoint: &str, options: &LoadOptions) -> StableDiffusionPipeline {
    StableDiffusionPipeline::from_pretrained(&golden(checkpoint), options).unwrap()
}

/// A config of a golden checkpoint.
pub fn config<C>(checkpoint: &str, file: &str, read: fn(ConfigFile) -> Result<C, Vec<Fault>>) -> C {
    read(ConfigFile::read(&golden(checkpoint), file).unwrap()).unwrap()
}

/// A weight file of a golden checkpoint, in f32 on the CPU.
pub fn weights(
    checkpoint: &str,
    component: &str,
    stem: &str,
    rename: fn(&str) -> Option<String>,
) -> WeightFile {
    WeightFile::open(&golden(checkpoint), component, stem, ComputeDtype::F32, Device::Cpu, rename).unwrap()
}

/// For files whose keys are the model's own.
pub fn same_key(key: &str) -> Option<String> {
    Some(key.to_owned())
}

/// The largest difference between two tensors.
pub fn max_difference(actual: &Tensor, expected: &Tensor) -> f64 {
    (actual.to_kind(Kind::Double) - expected.to_kind(Kind::Double)).abs().max().double_value(&[])
}

/// Asserts that `max|actual − expected| ≤ TOLERANCE · max|expected|`, so that a NaN fails.
pub fn assert_close(name: &str, actual: &Tensor, expected: &Tensor) {
    assert_eq!(actual.size(), expected.size(), "{name}");
    assert_eq!(actual.kind(), expected.kind(), "{name}");
    let difference = max_difference(actual, expected);
    let scale = expected.to_kind(Kind::Double).abs().max().double_value(&[]);
    assert!(difference <= TOLERANCE * scale, "{name}: differs by {difference:e}, its values go to {scale:e}");
}
