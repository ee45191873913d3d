//! Noise exactly as PyTorch's CPU generator draws it, without PyTorch's global state: one [`Generator`] per picture,
//! owned by whoever draws that picture.
//!
//! # API (stable)
//! - [`Generator::new`]`(seed)`, then [`Generator::randn`]`(shape, kind)` for one picture's noise.
//! - [`randn_tensor`]`(shape, generators, kind)` for a batch with one generator per picture.
//!
//! # What is equal to what
//! Noise drawn in f32, f16 and bf16 equals `torch.randn` of torch 2.11 bit for bit (`tests/rng.rs`). For f32 that is
//! said of x86-64 machines with AVX2 or AVX-512, where torch uses the vectorized logarithm and sine of
//! [`avx_mathfun`]; torch itself draws other last bits (at most 1.8e-6 away) on x86-64 without AVX2 and on ARM. We
//! draw the AVX2 bits everywhere, so a picture's noise does not depend on the machine. f16 and bf16 are the same
//! everywhere. The same seed draws *unrelated* noise in f32, f16 and bf16, as in torch.
//!
//! The rules are those of `ATen/core/MT19937RNGEngine.h`, `ATen/core/DistributionsHelper.h` and
//! `ATen/native/cpu/DistributionTemplates.h` of torch 2.11.

use std::f64::consts::PI;

use half::{bf16, f16};
use tch::{Device, Kind, TchError, Tensor};

pub mod avx_mathfun;
mod mt19937;

use mt19937::Mt19937;

/// Why noise could not be drawn.
#[derive(Debug, thiserror::Error)]
pub enum RngError {
    /// There is no recipe for noise in this kind.
    #[error("noise `kind` must be Float, Half or BFloat16 but is {0:?}")]
    UnsupportedKind(Kind),
    /// A list of generators has one generator for each picture.
    #[error("`generators` must have one generator per picture of the batch, {batch_size}, but has {len}")]
    GeneratorCount {
        /// Pictures in the batch.
        batch_size: i64,
        /// Generators given.
        len: usize,
    },
    /// libtorch refused to make the tensor.
    #[error(transparent)]
    Tensor(#[from] TchError),
}

/// A random state made from one seed.
#[derive(Debug, Clone)]
pub struct Generator {
    engine: Mt19937,
    /// The sine half of the last pair that a draw of fewer than 16 elements made and did not use.
    next_normal_sample: Option<f64>,
}

/// Draws of at least this many elements take torch's block-wise path.
const BLOCK: usize = 16;

impl Generator {
    /// A generator in the state of `torch.Generator("cpu").manual_seed(seed)`. Only the low 32 bits of the seed
    /// matter, as in torch: 0 and 2³² draw the same noise.
    pub fn new(seed: u64) -> Self {
        Self { engine: Mt19937::new(seed as u32), next_normal_sample: None }
    }

    /// `torch.randn(shape, generator=self, dtype=kind)` for Float, Half or BFloat16: standard normal, contiguous, on
    /// the CPU.
    pub fn randn(&mut self, shape: &[i64], kind: Kind) -> Result<Tensor, RngError> {
        let numel = usize::try_from(shape.iter().product::<i64>())
            .map_err(|_| TchError::Shape(format!("noise cannot have the shape {shape:?}")))?;
        match kind {
            Kind::Float => to_tensor(&self.normals::<f32>(numel), shape, kind),
            Kind::Half => to_tensor(&self.normals::<f16>(numel), shape, kind),
            Kind::BFloat16 => to_tensor(&self.normals::<bf16>(numel), shape, kind),
            kind => Err(RngError::UnsupportedKind(kind)),
        }
    }

    fn normals<T: Real>(&mut self, numel: usize) -> Vec<T> {
        if numel < BLOCK {
            return (0..numel).map(|_| T::from_f64(self.normal_sample())).collect();
        }
        let mut data: Vec<T> = (0..numel).map(|_| T::uniform(self.engine.next_u32())).collect();
        let (blocks, rest) = data.as_chunks_mut::<BLOCK>();
        blocks.iter_mut().for_each(T::box_muller);
        if !rest.is_empty() {
            // torch draws the last 16 anew, over values that are already transformed.
            let tail = data.last_chunk_mut::<BLOCK>().expect("there are at least 16 elements");
            tail.fill_with(|| T::uniform(self.engine.next_u32()));
            T::box_muller(tail);
        }
        data
    }

    /// One value of `at::normal_distribution<double>`.
    fn normal_sample(&mut self) -> f64 {
        if let Some(sample) = self.next_normal_sample.take() {
            return sample;
        }
        let (u1, u2) = (self.uniform_f64(), self.uniform_f64());
        let radius = (-2.0 * (-u2).ln_1p()).sqrt();
        let theta = 2.0 * PI * u1;
        self.next_normal_sample = Some(radius * theta.sin());
        radius * theta.cos()
    }

    /// 53 random bits in [0, 1).
    fn uniform_f64(&mut self) -> f64 {
        let high = u64::from(self.engine.next_u32());
        let bits = (high << 32) | u64::from(self.engine.next_u32());
        (bits & ((1 << 53) - 1)) as f64 / (1_u64 << 53) as f64
    }
}

/// diffusers' `randn_tensor` with a list of generators: `shape` is `(batch_size, …)`, picture `i` is drawn as
/// `(1, …)` from `generators[i]`, on the CPU.
pub fn randn_tensor(shape: &[i64], generators: &mut [Generator], kind: Kind) -> Result<Tensor, RngError> {
    let batch_size = shape.first().copied().unwrap_or(1);
    if usize::try_from(batch_size).ok() != Some(generators.len()) {
        return Err(RngError::GeneratorCount { batch_size, len: generators.len() });
    }
    let picture_shape: Vec<i64> = std::iter::once(1).chain(shape.iter().skip(1).copied()).collect();
    let noise = generators
        .iter_mut()
        .map(|generator| generator.randn(&picture_shape, kind))
        .collect::<Result<Vec<_>, _>>()?;
    Ok(Tensor::f_cat(&noise, 0)?)
}

fn to_tensor<T: Real>(data: &[T], shape: &[i64], kind: Kind) -> Result<Tensor, RngError> {
    let bytes: Vec<u8> = data.iter().flat_map(|value| value.to_ne_bytes()).collect();
    let tensor = Tensor::f_from_data_size(&bytes, shape, kind)?;
    debug_assert_eq!(tensor.device(), Device::Cpu);
    Ok(tensor)
}

/// The number formats that noise is drawn in, each with torch's way of turning random bits into normals.
trait Real: Copy {
    /// As many of the low bits as the format has digits, scaled to [0, 1).
    fn uniform(bits: u32) -> Self;
    /// Turns 8 + 8 uniforms into 8 cosine and 8 sine normals, in place.
    fn box_muller(block: &mut [Self; BLOCK]);
    fn from_f64(value: f64) -> Self;
    fn to_ne_bytes(self) -> impl IntoIterator<Item = u8>;
}

/// `bits` modulo 2^`digits`, divided by 2^`digits`; exact.
fn uniform(bits: u32, digits: u32) -> f32 {
    let modulus = 1_u32 << digits;
    (bits & (modulus - 1)) as f32 / modulus as f32
}

impl Real for f32 {
    fn uniform(bits: u32) -> Self {
        uniform(bits, f32::MANTISSA_DIGITS)
    }

    fn box_muller(block: &mut [Self; BLOCK]) {
        let (first, second) = block.split_at_mut(BLOCK / 2);
        for (u1, u2) in first.iter_mut().zip(second) {
            let radius = (-2.0_f32 * avx_mathfun::log(1.0 - *u1)).sqrt();
            let (sine, cosine) = avx_mathfun::sin_cos(TWO_PI * *u2);
            // torch multiplies with the deviation 1 and adds the mean 0, which makes a negative zero positive.
            (*u1, *u2) = (radius * cosine + 0.0, radius * sine + 0.0);
        }
    }

    fn from_f64(value: f64) -> Self {
        value as f32
    }

    fn to_ne_bytes(self) -> impl IntoIterator<Item = u8> {
        f32::to_ne_bytes(self)
    }
}

/// 2π as torch has it in f32.
const TWO_PI: f32 = (2.0 * PI) as f32;

/// torch computes f16 and bf16 normals in f32, rounding to the format after each operation; 2π·u2 alone is a product
/// in f64.
macro_rules! impl_real_for_reduced {
    ($($format:ty),*) => {$(
        impl Real for $format {
            fn uniform(bits: u32) -> Self {
                Self::from_f32(uniform(bits, Self::MANTISSA_DIGITS))
            }

            fn box_muller(block: &mut [Self; BLOCK]) {
                let round = |value: f32| Self::from_f32(value).to_f32();
                let (first, second) = block.split_at_mut(BLOCK / 2);
                for (u1, u2) in first.iter_mut().zip(second) {
                    let logarithm = round(round(1.0 - u1.to_f32()).ln());
                    let radius = round(round(-2.0 * logarithm).sqrt());
                    let theta = round((2.0 * PI * u2.to_f64()) as f32);
                    *u1 = Self::from_f32(round(radius * round(theta.cos())) + 0.0);
                    *u2 = Self::from_f32(round(radius * round(theta.sin())) + 0.0);
                }
            }

            fn from_f64(value: f64) -> Self {
                // Through f32, as `static_cast<c10::Half>(double)` goes.
                Self::from_f32(value as f32)
            }

            fn to_ne_bytes(self) -> impl IntoIterator<Item = u8> {
                <$format>::to_ne_bytes(self)
            }
        }
    )*};
}

impl_real_for_reduced!(f16, bf16);
