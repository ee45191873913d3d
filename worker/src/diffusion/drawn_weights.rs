//! Weights drawn from a seed, for benchmarks: a full-size model without a download.
//!
//! A tensor's numbers depend on seed, component and name alone, so a model that is built in memory and one that is read
//! from the files saved here are the same. They are spread as PyTorch's layers are when they are made, so that activations
//! stay near 1 through all layers: zeros would draw less power on a GPU, and large numbers overflow in half precision.

use std::borrow::Cow;
use std::collections::HashMap;
use std::path::Path;

use safetensors::tensor::{Dtype, View};
use tch::{TchError, Tensor};

/// A tensor that a model asked for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DrawnTensor {
    /// Its name in the component.
    pub name: String,
    /// Its shape.
    pub shape: Vec<i64>,
}

/// The weights of one component.
#[derive(Debug, Clone)]
pub struct DrawnWeights {
    component: String,
    seed: u64,
}

impl DrawnWeights {
    /// `component` is the folder's name, such as `unet`.
    pub fn new(component: &str, seed: u64) -> Self {
        Self { component: component.to_owned(), seed }
    }

    /// The tensor of this name in f32 on the CPU.
    pub fn tensor(&self, name: &str, shape: &[i64]) -> Result<Tensor, TchError> {
        Tensor::f_from_slice(&self.draw(name, shape))?.f_view(shape)
    }

    /// Its numbers, row by row.
    fn draw(&self, name: &str, shape: &[i64]) -> Vec<f32> {
        let count = usize::try_from(shape.iter().product::<i64>()).unwrap_or_default();
        let Spread { center, radius } = Spread::of(name, shape);
        let mut state = hash(self.seed, &format!("{}/{name}", self.component));
        let mut numbers = Vec::with_capacity(count + 1);
        while numbers.len() < count {
            let bits = split_mix(&mut state);
            for half in [bits as u32, (bits >> 32) as u32] {
                // 24 bits are what an f32 holds exactly: -1 to 1, without 1.
                numbers.push(center + radius * ((half >> 8) as f32 * (2.0 / (1 << 24) as f32) - 1.0));
            }
        }
        numbers.truncate(count);
        numbers
    }

    /// Writes tensors as a safetensors file in f32, one at a time in memory.
    pub fn save(&self, tensors: &[DrawnTensor], path: &Path) -> Result<(), safetensors::SafeTensorError> {
        let sizes =
            |shape: &[i64]| shape.iter().map(|&size| usize::try_from(size).unwrap_or_default()).collect();
        let views = tensors.iter().map(|tensor| {
            (tensor.name.as_str(), Drawing { weights: self, tensor, sizes: sizes(&tensor.shape) })
        });
        let metadata = HashMap::from([("format".to_owned(), "pt".to_owned())]);
        safetensors::serialize_to_file(views, Some(metadata), path)
    }
}

/// A tensor that is drawn when the writer comes to it.
struct Drawing<'a> {
    weights: &'a DrawnWeights,
    tensor: &'a DrawnTensor,
    sizes: Vec<usize>,
}

impl View for Drawing<'_> {
    fn dtype(&self) -> Dtype {
        Dtype::F32
    }

    fn shape(&self) -> &[usize] {
        &self.sizes
    }

    fn data(&self) -> Cow<'_, [u8]> {
        let numbers = self.weights.draw(&self.tensor.name, &self.tensor.shape);
        let mut bytes = Vec::with_capacity(self.data_len());
        for number in numbers {
            bytes.extend_from_slice(&number.to_le_bytes());
        }
        Cow::Owned(bytes)
    }

    fn data_len(&self) -> usize {
        self.sizes.iter().product::<usize>() * size_of::<f32>()
    }
}

/// A tensor's numbers are even between `center - radius` and `center + radius`.
#[derive(Debug, Clone, Copy, PartialEq)]
struct Spread {
    center: f32,
    radius: f32,
}

impl Spread {
    /// By the tensor's part in its layer, which its name and number of dimensions tell.
    fn of(name: &str, shape: &[i64]) -> Self {
        // The cosine of no picture reaches 1: nothing is flagged, so a benchmark's pictures are not black.
        if name.ends_with("embeds_weights") {
            return Self { center: 1.0, radius: 0.0 };
        }
        if name.contains("embedding.weight") && shape.len() == 2 {
            return Self { center: 0.0, radius: 0.05 };
        }
        match shape {
            // A norm's gain.
            [_] if name.ends_with("weight") => Self { center: 1.0, radius: 0.1 },
            [_] => Self { center: 0.0, radius: 0.05 },
            // A layer's weight: PyTorch's 1/sqrt(inputs of an output), times sqrt(3), which keeps the variance.
            [_, inputs @ ..] => {
                let inputs = inputs.iter().product::<i64>() as f32;
                Self { center: 0.0, radius: (3.0 / inputs).sqrt() }
            }
            [] => Self { center: 0.0, radius: 1.0 },
        }
    }
}

/// FNV-1a of the name, begun with the seed.
fn hash(seed: u64, name: &str) -> u64 {
    name.bytes().fold(seed ^ 0xcbf2_9ce4_8422_2325, |hash, byte| {
        (hash ^ u64::from(byte)).wrapping_mul(0x0000_0100_0000_01b3)
    })
}

/// The next 64 bits of splitmix64 (Steele, Lea and Flood, 2014), which needs no warming up.
fn split_mix(state: &mut u64) -> u64 {
    *state = state.wrapping_add(0x9e37_79b9_7f4a_7c15);
    let mixed = (*state ^ (*state >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    let mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    mixed ^ (mixed >> 31)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_depend_on_seed_component_and_name_and_are_spread_as_asked() {
        let draw =
            |component: &str, seed, name: &str| DrawnWeights::new(component, seed).draw(name, &[40, 75]);
        let numbers = draw("unet", 1, "a.weight");
        assert_eq!(numbers.len(), 3000);
        assert_eq!(numbers, draw("unet", 1, "a.weight"));
        for other in [draw("unet", 2, "a.weight"), draw("vae", 1, "a.weight"), draw("unet", 1, "b.weight")] {
            assert_ne!(numbers, other);
        }
        let radius = (3.0_f32 / 75.0).sqrt();
        assert!(numbers.iter().all(|number| number.abs() <= radius));
        let mean_square = numbers.iter().map(|number| number * number).sum::<f32>() / 3000.0;
        assert!((mean_square * 75.0 - 1.0).abs() < 0.1, "{mean_square}");
    }

    #[test]
    fn a_saved_file_holds_the_drawn_numbers() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("model.safetensors");
        let weights = DrawnWeights::new("unet", 7);
        let tensors = [("norm.weight", vec![5]), ("conv.weight", vec![2, 3, 3, 3])]
            .map(|(name, shape)| DrawnTensor { name: name.to_owned(), shape });
        weights.save(&tensors, &path).unwrap();
        let read: HashMap<_, _> = Tensor::read_safetensors(&path).unwrap().into_iter().collect();
        assert_eq!(read.len(), 2);
        for DrawnTensor { name, shape } in &tensors {
            assert_eq!(read[name], weights.tensor(name, shape).unwrap(), "{name}");
        }
    }
}
