//! Ancestral sampling with Euler steps (k-diffusion's `sample_euler_ancestral`): each step goes down further than it
//! should and adds fresh noise back up, so pictures keep changing with the number of steps.

use tch::{Kind, Tensor};

use super::euler_discrete::ScaledSchedule;
use super::scalar::{scalar, sqrt, square};
use super::spacing::FinalSigmasType;
use super::{Generator, Scheduler, SchedulerConfig, SchedulerError, check_step_index};
use crate::diffusion::rng::randn_tensor;

/// diffusers' `EulerAncestralDiscreteScheduler`.
#[derive(Debug)]
pub(super) struct EulerAncestralDiscreteScheduler {
    schedule: ScaledSchedule,
}

impl EulerAncestralDiscreteScheduler {
    pub(super) fn from_config(
        config: &SchedulerConfig,
        num_inference_steps: usize,
    ) -> Result<Self, SchedulerError> {
        // This class knows no other end than zero and no Karras sigmas.
        let schedule =
            ScaledSchedule::from_config(config, num_inference_steps, FinalSigmasType::Zero, false)?;
        Ok(Self { schedule })
    }
}

impl Scheduler for EulerAncestralDiscreteScheduler {
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
        generators: &mut [Generator],
    ) -> Result<Tensor, SchedulerError> {
        check_step_index(step_index, &self.schedule.timesteps)?;
        let sample = sample.f_to_kind(Kind::Float)?;
        let sigma = scalar(self.schedule.sigma(step_index));
        let (variance_from, variance_to) =
            (square(&sigma)?, square(&scalar(self.schedule.sigma(step_index + 1)))?);
        let sigma_up = sqrt(&variance_to.f_mul(&variance_from.f_sub(&variance_to)?)?.f_div(&variance_from)?)?;
        let sigma_down = sqrt(&variance_to.f_sub(&square(&sigma_up)?)?)?;
        let pred_original_sample = self.schedule.pred_original_sample(model_output, &sample, &sigma)?;
        let derivative = sample.f_sub(&pred_original_sample)?.f_div(&sigma)?;
        let prev_sample = sample.f_add(&derivative.f_mul(&sigma_down.f_sub(&sigma)?)?)?;
        let noise = randn_tensor(&model_output.size(), generators, model_output.kind())?
            .f_to_device(model_output.device())?;
        let prev_sample = prev_sample.f_add(&noise.f_mul(&sigma_up)?)?;
        Ok(prev_sample.f_to_kind(model_output.kind())?)
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
