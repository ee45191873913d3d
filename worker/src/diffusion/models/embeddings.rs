//! How the UNet is told the training step: sinusoids of it, through a small network (diffusers'
//! `models/embeddings.py`).

use tch::{Device, Kind, TchError, Tensor};

use super::super::nn::Linear;
use super::super::weights::Weights;

/// The longest wavelength of the sinusoids (`max_period` of diffusers' `get_timestep_embedding`).
const MAX_PERIOD: f64 = 10_000.0;

/// Sinusoidal timestep embeddings, `Timesteps` in diffusers.
#[derive(Debug)]
pub struct Timesteps {
    /// `(1, num_channels / 2)` in f32.
    frequencies: Tensor,
    flip_sin_to_cos: bool,
}

impl Timesteps {
    /// `num_channels` is even and above `2 * freq_shift`.
    pub fn new(
        num_channels: i64,
        flip_sin_to_cos: bool,
        freq_shift: f64,
        device: Device,
    ) -> Result<Self, TchError> {
        let half = num_channels / 2;
        // The order of operations is diffusers', so that f32 rounds as there.
        let exponent = Tensor::f_arange(half, (Kind::Float, Device::Cpu))?
            .f_mul_scalar(-MAX_PERIOD.ln())?
            .f_div_scalar(half as f64 - freq_shift)?;
        let frequencies = exponent.f_exp()?.f_unsqueeze(0)?.f_to_device(device)?;
        Ok(Self { frequencies, flip_sin_to_cos })
    }

    /// Training steps, possibly fractions, to `(timesteps.len(), num_channels)` in f32: a row for each, as all pictures of
    /// a batch are at the same step.
    pub fn forward(&self, timesteps: &[f64]) -> Result<Tensor, TchError> {
        let timesteps = Tensor::f_from_slice(timesteps)?.f_to_kind(Kind::Float)?;
        let timesteps = timesteps.f_unsqueeze(1)?.f_to_device(self.frequencies.device())?;
        let angles = timesteps.f_mul(&self.frequencies)?;
        let (sin, cos) = (angles.f_sin()?, angles.f_cos()?);
        let halves = if self.flip_sin_to_cos { [cos, sin] } else { [sin, cos] };
        Tensor::f_cat(&halves, -1)
    }
}

/// The network behind the sinusoids, `TimestepEmbedding` in diffusers.
#[derive(Debug)]
pub struct TimestepEmbedding {
    linear_1: Linear,
    linear_2: Linear,
}

impl TimestepEmbedding {
    /// From `in_channels` sinusoids to an embedding of `time_embed_dim`.
    pub fn load(weights: &Weights<'_>, in_channels: i64, time_embed_dim: i64) -> Self {
        Self {
            linear_1: Linear::load(&(weights / "linear_1"), in_channels, time_embed_dim),
            linear_2: Linear::load(&(weights / "linear_2"), time_embed_dim, time_embed_dim),
        }
    }

    /// `(batch_size, in_channels)` in the compute dtype to `(batch_size, time_embed_dim)`.
    pub fn forward(&self, sample: &Tensor) -> Result<Tensor, TchError> {
        self.linear_2.forward(&self.linear_1.forward(sample)?.f_silu_()?)
    }
}
