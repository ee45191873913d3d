//! Algorithm 2 (Euler steps) of Karras et al. (2022) without churn, and what the three schedulers that scale the
//! model's input (Euler, Euler ancestral, LMS) have in common.

use tch::{Kind, TchError, Tensor};

use super::linear::{LinearStep, LinearSteps};
use super::noise_schedule::NoiseSchedule;
use super::scalar::{scalar, sqrt, square};
use super::spacing::{
    FinalSigmasType, TimestepSpacing, as_f32, finish_sigmas, interpolate, karras, sigmas_to_timesteps,
};
use super::{Generator, PredictionType, Scheduler, SchedulerConfig, SchedulerError, check_step_index};

/// Timesteps and noise levels of the schedulers after k-diffusion, whose samples are `picture + sigma · noise`.
#[derive(Debug)]
pub(super) struct ScaledSchedule {
    pub(super) timesteps: Vec<f64>,
    /// One more than timesteps.
    sigmas: Vec<f32>,
    init_noise_sigma: f64,
    prediction_type: PredictionType,
}

impl ScaledSchedule {
    /// `final_sigmas_type` and `use_karras_sigmas` are the caller's, as not every class has them.
    pub(super) fn from_config(
        config: &SchedulerConfig,
        num_inference_steps: usize,
        final_sigmas_type: FinalSigmasType,
        use_karras_sigmas: bool,
    ) -> Result<Self, SchedulerError> {
        let schedule = NoiseSchedule::from_config(config)?;
        schedule.check_num_inference_steps(num_inference_steps)?;
        let spacing = TimestepSpacing::from_config(config, TimestepSpacing::Linspace)?;
        let train_sigmas = schedule.sigmas()?;
        let mut timesteps = as_f32(spacing.timesteps(schedule.num_train_timesteps, num_inference_steps));
        let mut sigmas = interpolate(&timesteps, &train_sigmas);
        if use_karras_sigmas {
            sigmas = karras(sigmas[sigmas.len() - 1], sigmas[0], num_inference_steps);
            timesteps = as_f32(sigmas_to_timesteps(&sigmas, &train_sigmas));
        }
        let sigma_last = match final_sigmas_type {
            FinalSigmasType::Zero => 0.0,
            FinalSigmasType::SigmaMin => f64::from(train_sigmas[0]),
        };
        let sigmas = finish_sigmas(sigmas, sigma_last, &schedule)?;
        let max_sigma = sigmas.iter().copied().fold(0.0, f32::max);
        let init_noise_sigma = match spacing {
            TimestepSpacing::Linspace | TimestepSpacing::Trailing => f64::from(max_sigma),
            TimestepSpacing::Leading => f64::try_from(input_scale(max_sigma)?)?,
        };
        Ok(Self { timesteps, sigmas, init_noise_sigma, prediction_type: config.prediction_type()? })
    }

    pub(super) fn init_noise_sigma(&self) -> f64 {
        self.init_noise_sigma
    }

    /// `sigmas[step_index]`; the last index is the number of timesteps.
    pub(super) fn sigma(&self, step_index: usize) -> f32 {
        self.sigmas[step_index]
    }

    /// `sample / (sigma² + 1)^½`
    pub(super) fn scale_model_input(
        &self,
        sample: &Tensor,
        step_index: usize,
    ) -> Result<Tensor, SchedulerError> {
        check_step_index(step_index, &self.timesteps)?;
        Ok(sample.f_div(&input_scale(self.sigma(step_index))?)?)
    }

    /// The picture that the model's output implies, `sample` being as noisy as `sigma`.
    pub(super) fn pred_original_sample(
        &self,
        model_output: &Tensor,
        sample: &Tensor,
        sigma: &Tensor,
    ) -> Result<Tensor, SchedulerError> {
        match self.prediction_type {
            PredictionType::Epsilon => Ok(sample.f_sub(&sigma.f_mul(model_output)?)?),
            PredictionType::VPrediction => {
                let variance = square(sigma)?.f_add_scalar(1.0)?;
                let from_output = model_output.f_mul(&sigma.f_neg()?.f_div(&sqrt(&variance)?)?)?;
                Ok(from_output.f_add(&sample.f_div(&variance)?)?)
            }
        }
    }

    /// `original_samples + noise · sigma`
    pub(super) fn add_noise(
        &self,
        original_samples: &Tensor,
        noise: &Tensor,
        step_index: usize,
    ) -> Result<Tensor, SchedulerError> {
        check_step_index(step_index, &self.timesteps)?;
        let sigma = scalar(self.sigma(step_index)).f_to_kind(original_samples.kind())?;
        Ok(original_samples.f_add(&noise.f_mul(&sigma)?)?)
    }
}

/// `(sigma ** 2 + 1) ** 0.5`
fn input_scale(sigma: f32) -> Result<Tensor, TchError> {
    sqrt(&square(&scalar(sigma))?.f_add_scalar(1.0)?)
}

/// diffusers' `EulerDiscreteScheduler`.
#[derive(Debug)]
pub(super) struct EulerDiscreteScheduler {
    schedule: ScaledSchedule,
}

impl EulerDiscreteScheduler {
    pub(super) fn from_config(
        config: &SchedulerConfig,
        num_inference_steps: usize,
    ) -> Result<Self, SchedulerError> {
        let final_sigmas_type = FinalSigmasType::from_config(config)?;
        let use_karras_sigmas = config.bool("use_karras_sigmas", false)?;
        let schedule =
            ScaledSchedule::from_config(config, num_inference_steps, final_sigmas_type, use_karras_sigmas)?;
        Ok(Self { schedule })
    }
}

impl Scheduler for EulerDiscreteScheduler {
    fn timesteps(&self) -> &[f64] {
        &self.schedule.timesteps
    }

    fn init_noise_sigma(&self) -> f64 {
        self.schedule.init_noise_sigma()
    }

    fn scale_model_input(&self, sample: &Tensor, step_index: usize) -> Result<Tensor, SchedulerError> {
        self.schedule.scale_model_input(sample, step_index)
    }

    fn step(
        &mut self,
        model_output: &Tensor,
        step_index: usize,
        sample: &Tensor,
        _generators: &mut [Generator],
    ) -> Result<Tensor, SchedulerError> {
        check_step_index(step_index, &self.schedule.timesteps)?;
        let sample = sample.f_to_kind(Kind::Float)?;
        let (sigma, next) = (self.schedule.sigma(step_index), self.schedule.sigma(step_index + 1));
        let sigma_hat = scalar(sigma);
        let pred_original_sample = self.schedule.pred_original_sample(model_output, &sample, &sigma_hat)?;
        let derivative = sample.f_sub(&pred_original_sample)?.f_div(&sigma_hat)?;
        let prev_sample = sample.f_add(&derivative.f_mul(&scalar(next - sigma))?)?;
        Ok(prev_sample.f_to_kind(model_output.kind())?)
    }

    fn linear_steps(&self) -> Result<Option<LinearSteps>, SchedulerError> {
        let step = |step_index: usize| {
            let sigma = f64::from(self.schedule.sigma(step_index));
            let delta = f64::from(self.schedule.sigma(step_index + 1)) - sigma;
            let variance = sigma * sigma + 1.0;
            // Weights of the sample and of the output.
            let row = match self.schedule.prediction_type {
                PredictionType::Epsilon => [1.0, delta],
                PredictionType::VPrediction => {
                    [1.0 + delta / sigma * (1.0 - 1.0 / variance), delta / variance.sqrt()]
                }
            };
            LinearStep { input_scale: 1.0 / variance.sqrt(), rows: vec![row.to_vec()] }
        };
        let steps = (0..self.schedule.timesteps.len()).map(step).collect();
        Ok(Some(LinearSteps { num_rows: 1, steps }))
    }

    fn add_noise(
        &self,
        original_samples: &Tensor,
        noise: &Tensor,
        step_index: usize,
    ) -> Result<Tensor, SchedulerError> {
        self.schedule.add_noise(original_samples, noise, step_index)
    }
}
