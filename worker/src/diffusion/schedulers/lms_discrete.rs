//! Linear multistep (Adams-Bashforth) steps of order 4 over the noise levels, after k-diffusion's `sample_lms`.

use std::collections::VecDeque;

use tch::{TchError, Tensor};

use super::euler_discrete::ScaledSchedule;
use super::scalar::scalar;
use super::spacing::FinalSigmasType;
use super::{Generator, Scheduler, SchedulerConfig, SchedulerError, check_step_index};

const ORDER: usize = 4;

/// diffusers' `LMSDiscreteScheduler`.
#[derive(Debug)]
pub(super) struct LMSDiscreteScheduler {
    schedule: ScaledSchedule,
    /// Those of the last steps, the newest first.
    derivatives: VecDeque<Tensor>,
}

impl LMSDiscreteScheduler {
    pub(super) fn from_config(
        config: &SchedulerConfig,
        num_inference_steps: usize,
    ) -> Result<Self, SchedulerError> {
        let use_karras_sigmas = config.bool("use_karras_sigmas", false)?;
        let schedule = ScaledSchedule::from_config(
            config,
            num_inference_steps,
            FinalSigmasType::Zero,
            use_karras_sigmas,
        )?;
        Ok(Self { schedule, derivatives: VecDeque::new() })
    }

    /// `get_lms_coefficient`: the integral, from this step's sigma to the next's, of the Lagrange polynomial that is
    /// 1 at the sigma of `current_order` steps ago and 0 at the others'. diffusers integrates numerically to 1e-4;
    /// two Gauss points are exact for polynomials up to degree 3, the highest here.
    fn coefficient(&self, order: usize, step_index: usize, current_order: usize) -> f64 {
        let sigma = |steps_ago: usize| f64::from(self.schedule.sigma(step_index - steps_ago));
        let basis = |tau: f64| -> f64 {
            (0..order)
                .filter(|k| *k != current_order)
                .map(|k| (tau - sigma(k)) / (sigma(current_order) - sigma(k)))
                .product()
        };
        let (from, to) = (sigma(0), f64::from(self.schedule.sigma(step_index + 1)));
        let (middle, half) = ((from + to) / 2.0, (to - from) / 2.0);
        let offset = half / 3.0_f64.sqrt();
        half * (basis(middle - offset) + basis(middle + offset))
    }
}

impl Scheduler for LMSDiscreteScheduler {
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
        let sigma = scalar(self.schedule.sigma(step_index));
        let pred_original_sample = self.schedule.pred_original_sample(model_output, sample, &sigma)?;
        self.derivatives.push_front(sample.f_sub(&pred_original_sample)?.f_div(&sigma)?);
        self.derivatives.truncate(ORDER);
        // In the middle of a schedule there can be fewer derivatives than coefficients.
        let order = ORDER.min(step_index + 1);
        let weighted = self
            .derivatives
            .iter()
            .take(order)
            .enumerate()
            .map(|(k, derivative)| derivative.f_mul_scalar(self.coefficient(order, step_index, k)));
        let change = weighted.reduce(|sum, next| sum?.f_add(&next?)).transpose()?;
        match change {
            Some(change) => Ok(sample.f_add(&change)?),
            None => Err(TchError::Shape("a linear multistep step needs a derivative".to_owned()).into()),
        }
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
