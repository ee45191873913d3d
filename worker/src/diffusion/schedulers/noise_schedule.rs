//! The noise schedule a model was trained with: betas, the running product of alphas, and the sigmas made of them.

use std::f64::consts::PI;

use tch::{Device, Kind, TchError, Tensor};

use super::{SchedulerConfig, SchedulerError};

/// The training noise schedule, in f32 as diffusers computes it.
#[derive(Debug)]
pub(super) struct NoiseSchedule {
    /// `alphas_cumprod`, f32 on the CPU, of shape `(num_train_timesteps,)`.
    pub(super) alphas_cumprod: Tensor,
    pub(super) num_train_timesteps: usize,
    /// Whether `beta_schedule` is `squaredcos_cap_v2`.
    pub(super) is_squared_cosine: bool,
}

#[derive(Clone, Copy, PartialEq)]
enum BetaSchedule {
    Linear,
    ScaledLinear,
    SquaredcosCapV2,
}

impl NoiseSchedule {
    /// From `betas`' keys, with the defaults that all classes share.
    pub(super) fn from_config(config: &SchedulerConfig) -> Result<Self, SchedulerError> {
        use BetaSchedule::{Linear, ScaledLinear, SquaredcosCapV2};
        config.refuse_unsupported()?;
        let num_train_timesteps = config.num_train_timesteps()?;
        let (start, end) = (config.fraction("beta_start", 0.0001)?, config.fraction("beta_end", 0.02)?);
        let choices =
            [("linear", Linear), ("scaled_linear", ScaledLinear), ("squaredcos_cap_v2", SquaredcosCapV2)];
        let beta_schedule = config.choice("beta_schedule", Linear, &choices)?;
        let linspace = |start: f64, end: f64| {
            Tensor::f_linspace(start, end, num_train_timesteps as i64, (Kind::Float, Device::Cpu))
        };
        let betas = match (config.fractions("trained_betas")?, beta_schedule) {
            (Some(betas), _) if betas.len() == num_train_timesteps => to_f32(&betas)?,
            (Some(betas), _) => {
                let rule = format!("as long as `num_train_timesteps`, {num_train_timesteps}");
                let value = format!("a list of {}", betas.len());
                return Err(SchedulerError::Config { key: "trained_betas", rule, value });
            }
            (None, Linear) => linspace(start, end)?,
            (None, ScaledLinear) => linspace(start.sqrt(), end.sqrt())?.f_pow_tensor_scalar(2)?,
            (None, SquaredcosCapV2) => to_f32(&squared_cosine_betas(num_train_timesteps))?,
        };
        let alphas = betas.f_neg()?.f_add_scalar(1.0)?;
        let alphas_cumprod = alphas.f_cumprod(0, Kind::Float)?;
        Ok(Self { alphas_cumprod, num_train_timesteps, is_squared_cosine: beta_schedule == SquaredcosCapV2 })
    }

    /// `((1 - alphas_cumprod) / alphas_cumprod) ** 0.5`, ascending.
    pub(super) fn sigmas(&self) -> Result<Vec<f32>, SchedulerError> {
        let ones_minus = self.alphas_cumprod.f_neg()?.f_add_scalar(1.0)?;
        let sigmas = ones_minus.f_div(&self.alphas_cumprod)?.f_pow_tensor_scalar(0.5)?;
        Ok(Vec::try_from(sigmas)?)
    }

    /// `alphas_cumprod[timestep]` as a 0-dimensional tensor.
    pub(super) fn alpha_prod(&self, timestep: i64) -> Result<Tensor, TchError> {
        self.alphas_cumprod.f_select(0, timestep)
    }

    /// `alphas_cumprod[timestep]`, or `before` for what lies before the first training step.
    pub(super) fn alpha_prod_or(&self, timestep: i64, before: &Tensor) -> Result<Tensor, TchError> {
        if timestep >= 0 { self.alpha_prod(timestep) } else { Ok(before.shallow_clone()) }
    }

    /// `alphas_cumprod[timestep]` as a number.
    pub(super) fn alpha_prod_f64(&self, timestep: i64) -> Result<f64, TchError> {
        self.alphas_cumprod.f_double_value(&[timestep])
    }

    /// `add_noise` of the schedulers that know the training step rather than a sigma.
    pub(super) fn add_noise(
        &self,
        original_samples: &Tensor,
        noise: &Tensor,
        timestep: i64,
    ) -> Result<Tensor, SchedulerError> {
        let (kind, device) = (original_samples.kind(), original_samples.device());
        // One element, not 0-dimensional, as there: its products are rounded to the samples' dtype.
        let alpha_prod =
            self.alphas_cumprod.f_narrow(0, timestep, 1)?.f_to_kind(kind)?.f_to_device(device)?;
        let sqrt_alpha_prod = alpha_prod.f_pow_tensor_scalar(0.5)?;
        let sqrt_one_minus_alpha_prod = alpha_prod.f_neg()?.f_add_scalar(1.0)?.f_pow_tensor_scalar(0.5)?;
        Ok(sqrt_alpha_prod.f_mul(original_samples)?.f_add(&sqrt_one_minus_alpha_prod.f_mul(noise)?)?)
    }

    /// The numbers of steps that can be told apart: every scheduler here stays below `num_train_timesteps`.
    pub(super) fn check_num_inference_steps(&self, num_inference_steps: usize) -> Result<(), SchedulerError> {
        if (1..self.num_train_timesteps).contains(&num_inference_steps) {
            return Ok(());
        }
        let rule = format!(
            "from 1 to {}, less than the model's {} training steps,",
            self.num_train_timesteps - 1,
            self.num_train_timesteps
        );
        Err(SchedulerError::NumInferenceSteps { rule, num_inference_steps })
    }
}

fn to_f32(values: &[f64]) -> Result<Tensor, TchError> {
    Tensor::f_from_slice(values)?.f_to_kind(Kind::Float)
}

/// `betas_for_alpha_bar` with the cosine of Nichol and Dhariwal (2021), capped at 0.999.
fn squared_cosine_betas(num_train_timesteps: usize) -> Vec<f64> {
    let alpha_bar = |t: f64| ((t + 0.008) / 1.008 * PI / 2.0).cos().powi(2);
    let n = num_train_timesteps as f64;
    (0..num_train_timesteps)
        .map(|i| (1.0 - alpha_bar((i as f64 + 1.0) / n) / alpha_bar(i as f64 / n)).min(0.999))
        .collect()
}
