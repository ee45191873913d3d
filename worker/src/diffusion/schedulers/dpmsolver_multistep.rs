//! DPM-Solver++ of order 2 in its multistep form (Lu et al., 2022, arXiv 2211.01095), "DPM++ 2M"; with Karras sigmas
//! "DPM++ 2M Karras".

use tch::{Kind, Tensor};

use super::linear::{LinearStep, LinearSteps};
use super::noise_schedule::NoiseSchedule;
use super::scalar::{log_ratio, scalar, sigma_to_alpha_sigma_t};
use super::spacing::{
    FinalSigmasType, TimestepSpacing, finish_sigmas, interpolate, karras, rounded, sigmas_to_timesteps,
};
use super::{Generator, PredictionType, Scheduler, SchedulerConfig, SchedulerError, check_step_index};

/// Timesteps and noise levels of DPM-Solver and UniPC, whose samples keep their variance.
#[derive(Debug)]
pub(super) struct SolverSchedule {
    pub(super) timesteps: Vec<f64>,
    /// One more than timesteps.
    sigmas: Vec<f32>,
    prediction_type: PredictionType,
}

/// Whose schedule it is: the two classes differ in details of Karras sigmas.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(super) enum Solver {
    DpmSolver,
    UniPC,
}

impl SolverSchedule {
    pub(super) fn from_config(
        config: &SchedulerConfig,
        num_inference_steps: usize,
        solver: Solver,
    ) -> Result<Self, SchedulerError> {
        let schedule = NoiseSchedule::from_config(config)?;
        schedule.check_num_inference_steps(num_inference_steps)?;
        let spacing = TimestepSpacing::from_config(config, TimestepSpacing::Linspace)?;
        let train_sigmas = schedule.sigmas()?;
        let (sigma_min, sigma_max) = (train_sigmas[0], train_sigmas[train_sigmas.len() - 1]);
        let use_karras_sigmas = config.bool("use_karras_sigmas", false)?;
        let (timesteps, sigmas) = if use_karras_sigmas {
            let sigmas = karras(f64::from(sigma_min), f64::from(sigma_max), num_inference_steps);
            let timesteps = sigmas_to_timesteps(&sigmas, &train_sigmas);
            // Timesteps are whole numbers; this combination alone comes to them by truncation.
            if solver == Solver::DpmSolver && schedule.is_squared_cosine {
                (timesteps.into_iter().map(f64::trunc).collect(), sigmas)
            } else {
                (rounded(timesteps), sigmas)
            }
        } else {
            let timesteps = spacing.solver_timesteps(schedule.num_train_timesteps, num_inference_steps);
            let sigmas = interpolate(&timesteps, &train_sigmas);
            (timesteps, sigmas)
        };
        let sigma_last = match FinalSigmasType::from_config(config)? {
            FinalSigmasType::Zero => 0.0,
            FinalSigmasType::SigmaMin if use_karras_sigmas && solver == Solver::UniPC => {
                sigmas[sigmas.len() - 1]
            }
            FinalSigmasType::SigmaMin => f64::from(sigma_min),
        };
        let sigmas = finish_sigmas(sigmas, sigma_last, &schedule)?;
        Ok(Self { timesteps, sigmas, prediction_type: config.prediction_type()? })
    }

    /// `(alpha_t, sigma_t)` at an index of the noise levels.
    pub(super) fn alpha_sigma(&self, index: usize) -> Result<(Tensor, Tensor), SchedulerError> {
        Ok(sigma_to_alpha_sigma_t(&scalar(self.sigmas[index]))?)
    }

    /// As [`Self::alpha_sigma`], in numbers, and the logarithm of their ratio.
    fn alpha_sigma_lambda(&self, index: usize) -> (f64, f64, f64) {
        let sigma = f64::from(self.sigmas[index]);
        let alpha_t = 1.0 / (sigma * sigma + 1.0).sqrt();
        let sigma_t = sigma * alpha_t;
        (alpha_t, sigma_t, alpha_t.ln() - sigma_t.ln())
    }

    /// `convert_model_output`: the picture that the model's output implies.
    pub(super) fn x0_pred(
        &self,
        model_output: &Tensor,
        sample: &Tensor,
        step_index: usize,
    ) -> Result<Tensor, SchedulerError> {
        let (alpha_t, sigma_t) = self.alpha_sigma(step_index)?;
        Ok(match self.prediction_type {
            PredictionType::Epsilon => sample.f_sub(&sigma_t.f_mul(model_output)?)?.f_div(&alpha_t)?,
            PredictionType::VPrediction => alpha_t.f_mul(sample)?.f_sub(&sigma_t.f_mul(model_output)?)?,
        })
    }

    pub(super) fn add_noise(
        &self,
        original_samples: &Tensor,
        noise: &Tensor,
        step_index: usize,
    ) -> Result<Tensor, SchedulerError> {
        check_step_index(step_index, &self.timesteps)?;
        let sigma = Tensor::f_from_slice(&[self.sigmas[step_index]])?
            .f_to_kind(original_samples.kind())?
            .f_to_device(original_samples.device())?;
        let (alpha_t, sigma_t) = sigma_to_alpha_sigma_t(&sigma)?;
        Ok(alpha_t.f_mul(original_samples)?.f_add(&sigma_t.f_mul(noise)?)?)
    }
}

#[derive(Debug, Clone, Copy, PartialEq)]
enum SolverType {
    Midpoint,
    Heun,
}

/// diffusers' `DPMSolverMultistepScheduler` with `algorithm_type` `dpmsolver++`.
#[derive(Debug)]
pub(super) struct DPMSolverMultistepScheduler {
    schedule: SolverSchedule,
    solver_type: SolverType,
    /// Whether the last step is one of order 1.
    first_order_last: bool,
    /// The picture that the last step's output implied, if there was one.
    last_x0_pred: Option<Tensor>,
}

/// Schedules shorter than this end with a step of order 1, for stability, unless `lower_order_final` is false.
const SHORT_SCHEDULE: usize = 15;

impl DPMSolverMultistepScheduler {
    pub(super) fn from_config(
        config: &SchedulerConfig,
        num_inference_steps: usize,
    ) -> Result<Self, SchedulerError> {
        use SolverType::{Heun, Midpoint};
        let schedule = SolverSchedule::from_config(config, num_inference_steps, Solver::DpmSolver)?;
        // The last three are other classes' words, which this one takes for its default.
        let solver_types = [
            ("midpoint", Midpoint),
            ("heun", Heun),
            ("logrho", Midpoint),
            ("bh1", Midpoint),
            ("bh2", Midpoint),
        ];
        let first_order_last = config.bool("euler_at_final", false)?
            || (config.bool("lower_order_final", true)? && schedule.timesteps.len() < SHORT_SCHEDULE)
            || FinalSigmasType::from_config(config)? == FinalSigmasType::Zero;
        let solver_type = config.choice("solver_type", Midpoint, &solver_types)?;
        Ok(Self { schedule, solver_type, first_order_last, last_x0_pred: None })
    }
}

impl Scheduler for DPMSolverMultistepScheduler {
    fn timesteps(&self) -> &[f64] {
        &self.schedule.timesteps
    }

    fn step(
        &mut self,
        model_output: &Tensor,
        step_index: usize,
        sample: &Tensor,
        _generators: &mut [Generator],
    ) -> Result<Tensor, SchedulerError> {
        check_step_index(step_index, &self.schedule.timesteps)?;
        let m0 = self.schedule.x0_pred(model_output, sample, step_index)?;
        let m1 = self.last_x0_pred.replace(m0.shallow_clone());
        let sample = sample.f_to_kind(Kind::Float)?;
        let (alpha_t, sigma_t) = self.schedule.alpha_sigma(step_index + 1)?;
        let (alpha_s0, sigma_s0) = self.schedule.alpha_sigma(step_index)?;
        let lambda_s0 = log_ratio(&alpha_s0, &sigma_s0)?;
        let h = log_ratio(&alpha_t, &sigma_t)?.f_sub(&lambda_s0)?;
        // alpha_t (e^-h - 1)
        let weight = alpha_t.f_mul(&h.f_neg()?.f_exp()?.f_sub_scalar(1.0)?)?;
        let first_order = sigma_t.f_div(&sigma_s0)?.f_mul(&sample)?.f_sub(&weight.f_mul(&m0)?)?;
        let is_last = step_index + 1 == self.schedule.timesteps.len();
        let prev_sample = match m1 {
            Some(m1) if !(is_last && self.first_order_last) => {
                let (alpha_s1, sigma_s1) = self.schedule.alpha_sigma(step_index.saturating_sub(1))?;
                let h_0 = lambda_s0.f_sub(&log_ratio(&alpha_s1, &sigma_s1)?)?;
                let r0 = h_0.f_div(&h)?;
                let d1 = r0.f_reciprocal()?.f_mul(&m0.f_sub(&m1)?)?;
                match self.solver_type {
                    SolverType::Midpoint => first_order.f_sub(&weight.f_mul_scalar(0.5)?.f_mul(&d1)?)?,
                    SolverType::Heun => {
                        let h_phi = h.f_neg()?.f_exp()?.f_sub_scalar(1.0)?.f_div(&h)?.f_add_scalar(1.0)?;
                        first_order.f_add(&alpha_t.f_mul(&h_phi)?.f_mul(&d1)?)?
                    }
                }
            }
            _ => first_order,
        };
        Ok(prev_sample.f_to_kind(m0.kind())?)
    }

    fn linear_steps(&self) -> Result<Option<LinearSteps>, SchedulerError> {
        let num_steps = self.schedule.timesteps.len();
        let step = |step_index: usize| {
            let (alpha_t, sigma_t, lambda_t) = self.schedule.alpha_sigma_lambda(step_index + 1);
            let (alpha_s0, sigma_s0, lambda_s0) = self.schedule.alpha_sigma_lambda(step_index);
            let h = lambda_t - lambda_s0;
            let weight = alpha_t * (-h).exp_m1();
            // Weights of the sample, of the last step's x0 and of the output: of this step's x0, and of the next sample.
            let x0 = match self.schedule.prediction_type {
                PredictionType::Epsilon => [1.0 / alpha_s0, 0.0, -sigma_s0 / alpha_s0],
                PredictionType::VPrediction => [alpha_s0, 0.0, -sigma_s0],
            };
            let is_first_order = step_index == 0 || (step_index + 1 == num_steps && self.first_order_last);
            let difference = if is_first_order {
                0.0
            } else {
                let (_, _, lambda_s1) = self.schedule.alpha_sigma_lambda(step_index - 1);
                let r0 = (lambda_s0 - lambda_s1) / h;
                match self.solver_type {
                    SolverType::Midpoint => -0.5 * weight / r0,
                    SolverType::Heun => alpha_t * ((-h).exp_m1() / h + 1.0) / r0,
                }
            };
            let mut sample = x0.map(|part| part * (difference - weight));
            sample[0] += sigma_t / sigma_s0;
            sample[1] -= difference;
            LinearStep { input_scale: 1.0, rows: vec![sample.to_vec(), x0.to_vec()] }
        };
        Ok(Some(LinearSteps { num_rows: 2, steps: (0..num_steps).map(step).collect() }))
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
