//! Denoising diffusion implicit models (Song et al., 2020, formula 12) with η = 0: no noise is added on the way.

use tch::Tensor;

use super::linear::{LinearStep, LinearSteps};
use super::noise_schedule::NoiseSchedule;
use super::scalar::{one_minus, scalar, sqrt};
use super::spacing::{TimestepSpacing, rounded};
use super::{Generator, PredictionType, Scheduler, SchedulerConfig, SchedulerError, check_step_index};

/// diffusers' `DDIMScheduler`. `clip_sample` is false, as the pipeline's constructor makes it.
#[derive(Debug)]
pub(super) struct DDIMScheduler {
    schedule: NoiseSchedule,
    prediction_type: PredictionType,
    /// ᾱ "before" the last step.
    final_alpha_cumprod: Tensor,
    timesteps: Vec<f64>,
    num_inference_steps: usize,
}

impl DDIMScheduler {
    pub(super) fn from_config(
        config: &SchedulerConfig,
        num_inference_steps: usize,
    ) -> Result<Self, SchedulerError> {
        let schedule = NoiseSchedule::from_config(config)?;
        schedule.check_num_inference_steps(num_inference_steps)?;
        let spacing = TimestepSpacing::from_config(config, TimestepSpacing::Leading)?;
        let timesteps = rounded(spacing.timesteps(schedule.num_train_timesteps, num_inference_steps));
        let final_alpha_cumprod =
            if config.bool("set_alpha_to_one", true)? { scalar(1.0) } else { schedule.alpha_prod(0)? };
        let prediction_type = config.prediction_type()?;
        Ok(Self { schedule, prediction_type, final_alpha_cumprod, timesteps, num_inference_steps })
    }
}

impl Scheduler for DDIMScheduler {
    fn timesteps(&self) -> &[f64] {
        &self.timesteps
    }

    fn step(
        &mut self,
        model_output: &Tensor,
        step_index: usize,
        sample: &Tensor,
        _generators: &mut [Generator],
    ) -> Result<Tensor, SchedulerError> {
        check_step_index(step_index, &self.timesteps)?;
        let timestep = self.timesteps[step_index] as i64;
        let prev_timestep = timestep - (self.schedule.num_train_timesteps / self.num_inference_steps) as i64;
        let alpha_prod_t = self.schedule.alpha_prod(timestep)?;
        let alpha_prod_t_prev = self.schedule.alpha_prod_or(prev_timestep, &self.final_alpha_cumprod)?;
        let (sqrt_alpha, sqrt_beta) = (sqrt(&alpha_prod_t)?, sqrt(&one_minus(&alpha_prod_t)?)?);
        let (pred_original_sample, pred_epsilon) = match self.prediction_type {
            PredictionType::Epsilon => {
                let pred = sample.f_sub(&sqrt_beta.f_mul(model_output)?)?.f_div(&sqrt_alpha)?;
                (pred, model_output.shallow_clone())
            }
            PredictionType::VPrediction => (
                sqrt_alpha.f_mul(sample)?.f_sub(&sqrt_beta.f_mul(model_output)?)?,
                sqrt_alpha.f_mul(model_output)?.f_add(&sqrt_beta.f_mul(sample)?)?,
            ),
        };
        let pred_sample_direction = sqrt(&one_minus(&alpha_prod_t_prev)?)?.f_mul(&pred_epsilon)?;
        Ok(sqrt(&alpha_prod_t_prev)?.f_mul(&pred_original_sample)?.f_add(&pred_sample_direction)?)
    }

    fn linear_steps(&self) -> Result<Option<LinearSteps>, SchedulerError> {
        let step_ratio = (self.schedule.num_train_timesteps / self.num_inference_steps) as i64;
        let step = |timestep: &f64| {
            let prev_timestep = *timestep as i64 - step_ratio;
            let alpha = self.schedule.alpha_prod_f64(*timestep as i64)?;
            let alpha_prev =
                self.schedule.alpha_prod_or(prev_timestep, &self.final_alpha_cumprod)?.f_double_value(&[])?;
            let (signal, noise) = (alpha.sqrt(), (1.0 - alpha).sqrt());
            let (signal_prev, noise_prev) = (alpha_prev.sqrt(), (1.0 - alpha_prev).sqrt());
            // Weights of the sample and of the output.
            let row = match self.prediction_type {
                PredictionType::Epsilon => [signal_prev / signal, noise_prev - signal_prev * noise / signal],
                PredictionType::VPrediction => {
                    [signal_prev * signal + noise_prev * noise, noise_prev * signal - signal_prev * noise]
                }
            };
            Ok(LinearStep { input_scale: 1.0, rows: vec![row.to_vec()] })
        };
        let steps = self.timesteps.iter().map(step).collect::<Result<_, SchedulerError>>()?;
        Ok(Some(LinearSteps { num_rows: 1, steps }))
    }

    fn add_noise(
        &self,
        original_samples: &Tensor,
        noise: &Tensor,
        step_index: usize,
    ) -> Result<Tensor, SchedulerError> {
        check_step_index(step_index, &self.timesteps)?;
        self.schedule.add_noise(original_samples, noise, self.timesteps[step_index] as i64)
    }
}
