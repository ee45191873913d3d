//! Pseudo numerical methods for diffusion models (Liu et al., 2022): linear multistep (PLMS), after Runge-Kutta steps
//! (PRK) where the checkpoint doesn't skip them. Stable Diffusion v1 skips them, and then visits its second timestep
//! twice: 50 steps are 51 UNet calls.

use tch::Tensor;

use super::linear::{LinearStep, LinearSteps};
use super::noise_schedule::NoiseSchedule;
use super::scalar::{one_minus, scalar, sqrt};
use super::spacing::{TimestepSpacing, rounded};
use super::{Generator, PredictionType, Scheduler, SchedulerConfig, SchedulerError, check_step_index};

/// Steps that are made of Runge-Kutta's four calls each before the multistep method has history enough.
const PNDM_ORDER: usize = 4;

/// What a multistep step looks back on: the sample, the one that the first two steps start from, three outputs.
const PLMS_ROWS: usize = 5;

/// diffusers' `PNDMScheduler`.
#[derive(Debug)]
pub(super) struct PNDMScheduler {
    schedule: NoiseSchedule,
    prediction_type: PredictionType,
    /// ᾱ "before" the last step.
    final_alpha_cumprod: Tensor,
    timesteps: Vec<f64>,
    /// How many of `timesteps`, from the first, are Runge-Kutta calls.
    num_prk_timesteps: usize,
    /// Training steps between two inference steps.
    step_ratio: i64,
    /// Model outputs of the last steps, the newest last; up to four.
    ets: Vec<Tensor>,
    /// Calls of `step` so far. Not the step index: image-to-image starts in the middle of the schedule, from 0.
    counter: usize,
    /// The sample that the steps of one group start from.
    cur_sample: Option<Tensor>,
    /// Runge-Kutta's weighted sum so far.
    cur_model_output: Option<Tensor>,
}

impl PNDMScheduler {
    pub(super) fn from_config(
        config: &SchedulerConfig,
        num_inference_steps: usize,
    ) -> Result<Self, SchedulerError> {
        let schedule = NoiseSchedule::from_config(config)?;
        schedule.check_num_inference_steps(num_inference_steps)?;
        let spacing = TimestepSpacing::from_config(config, TimestepSpacing::Leading)?;
        let spaced = rounded(spacing.timesteps(schedule.num_train_timesteps, num_inference_steps));
        let step_ratio = (schedule.num_train_timesteps / num_inference_steps) as i64;
        let (timesteps, num_prk_timesteps) = if config.bool("skip_prk_steps", false)? {
            (plms_timesteps(&spaced), 0)
        } else if num_inference_steps < PNDM_ORDER {
            let rule = format!("{PNDM_ORDER} or more, as the checkpoint's `skip_prk_steps` is not true,");
            return Err(SchedulerError::NumInferenceSteps { rule, num_inference_steps });
        } else {
            prk_timesteps(&spaced, (step_ratio / 2) as f64)
        };
        let final_alpha_cumprod =
            if config.bool("set_alpha_to_one", false)? { scalar(1.0) } else { schedule.alpha_prod(0)? };
        Ok(Self {
            schedule,
            prediction_type: config.prediction_type()?,
            final_alpha_cumprod,
            timesteps,
            num_prk_timesteps,
            step_ratio,
            ets: Vec::new(),
            counter: 0,
            cur_sample: None,
            cur_model_output: None,
        })
    }

    /// One of the four calls of a Runge-Kutta step.
    fn step_prk(
        &mut self,
        model_output: &Tensor,
        timestep: i64,
        sample: &Tensor,
    ) -> Result<Tensor, SchedulerError> {
        let diff_to_prev = if self.counter % 2 == 1 { 0 } else { self.step_ratio / 2 };
        let prev_timestep = timestep - diff_to_prev;
        let group_timestep = self.timesteps[self.counter / 4 * 4] as i64;
        let weight = if matches!(self.counter % 4, 0 | 3) { 1.0 / 6.0 } else { 1.0 / 3.0 };
        let weighted = model_output.f_mul_scalar(weight)?;
        let sum = match self.cur_model_output.take() {
            Some(sum) => sum.f_add(&weighted)?,
            None => weighted,
        };
        let model_output = match self.counter % 4 {
            0 => {
                self.ets.push(model_output.shallow_clone());
                self.cur_sample = Some(sample.shallow_clone());
                self.cur_model_output = Some(sum);
                model_output.shallow_clone()
            }
            3 => sum,
            _ => {
                self.cur_model_output = Some(sum);
                model_output.shallow_clone()
            }
        };
        let cur_sample = self.cur_sample.as_ref().unwrap_or(sample).shallow_clone();
        self.prev_sample(&cur_sample, group_timestep, prev_timestep, &model_output)
    }

    fn step_plms(
        &mut self,
        model_output: &Tensor,
        mut timestep: i64,
        sample: &Tensor,
    ) -> Result<Tensor, SchedulerError> {
        let mut prev_timestep = timestep - self.step_ratio;
        if self.counter != 1 {
            let kept = self.ets.len().saturating_sub(3);
            self.ets.drain(..kept);
            self.ets.push(model_output.shallow_clone());
        } else {
            // The second call takes the first step again, with the mean of both outputs.
            prev_timestep = timestep;
            timestep += self.step_ratio;
        }
        let mut sample = sample.shallow_clone();
        let model_output = match (self.ets.as_slice(), self.counter) {
            ([_], 0) => {
                self.cur_sample = Some(sample.shallow_clone());
                model_output.shallow_clone()
            }
            ([e0], 1) => {
                sample = self.cur_sample.take().unwrap_or(sample);
                model_output.f_add(e0)?.f_div_scalar(2)?
            }
            ([e1, e0], _) => e0.f_mul_scalar(3)?.f_sub(e1)?.f_div_scalar(2)?,
            ([e2, e1, e0], _) => e0
                .f_mul_scalar(23)?
                .f_sub(&e1.f_mul_scalar(16)?)?
                .f_add(&e2.f_mul_scalar(5)?)?
                .f_div_scalar(12)?,
            ([e3, e2, e1, e0], _) => e0
                .f_mul_scalar(55)?
                .f_sub(&e1.f_mul_scalar(59)?)?
                .f_add(&e2.f_mul_scalar(37)?)?
                .f_sub(&e3.f_mul_scalar(9)?)?
                .f_mul_scalar(1.0 / 24.0)?,
            _ => model_output.shallow_clone(),
        };
        self.prev_sample(&sample, timestep, prev_timestep, &model_output)
    }

    /// [`Self::step_plms`] in numbers. The rows are the sample, the sample that the first two steps start from, and the last
    /// three outputs that count, the newest first; the weights of each are those of these rows and of the output.
    fn linear_plms(&self, step_index: usize) -> Result<LinearStep, SchedulerError> {
        let mut timestep = self.timesteps[step_index] as i64;
        let mut prev_timestep = timestep - self.step_ratio;
        if step_index == 1 {
            prev_timestep = timestep;
            timestep += self.step_ratio;
        }
        let alpha = self.schedule.alpha_prod_f64(timestep)?;
        let alpha_prev =
            self.schedule.alpha_prod_or(prev_timestep, &self.final_alpha_cumprod)?.f_double_value(&[])?;
        let (beta, beta_prev) = (1.0 - alpha, 1.0 - alpha_prev);
        let direction =
            (alpha_prev - alpha) / (alpha * beta_prev.sqrt() + (alpha * beta * alpha_prev).sqrt());
        let (of_sample, of_output) = match self.prediction_type {
            PredictionType::Epsilon => ((alpha_prev / alpha).sqrt(), -direction),
            PredictionType::VPrediction => {
                ((alpha_prev / alpha).sqrt() - direction * beta.sqrt(), -direction * alpha.sqrt())
            }
        };
        // Of the last three outputs and of this one.
        let mixed = match step_index {
            0 => [0.0, 0.0, 0.0, 1.0],
            1 => [0.5, 0.0, 0.0, 0.5],
            2 => [-0.5, 0.0, 0.0, 1.5],
            3 => [-16.0 / 12.0, 5.0 / 12.0, 0.0, 23.0 / 12.0],
            _ => [-59.0 / 24.0, 37.0 / 24.0, -9.0 / 24.0, 55.0 / 24.0],
        };
        let start = if step_index == 1 { [0.0, of_sample] } else { [of_sample, 0.0] };
        let prev_sample = start.into_iter().chain(mixed.map(|weight| weight * of_output)).collect();
        let one = |place: usize| (0..=PLMS_ROWS).map(|i| f64::from(u8::from(i == place))).collect();
        // The second step's output is used once and not kept.
        let kept = if step_index == 1 { [2, 3, 4] } else { [PLMS_ROWS, 2, 3] };
        let saved = if step_index == 0 { 0 } else { 1 };
        let rows = std::iter::once(prev_sample).chain([one(saved)]).chain(kept.map(one)).collect();
        Ok(LinearStep { input_scale: 1.0, rows })
    }

    /// `_get_prev_sample`: formula 9 of the paper.
    fn prev_sample(
        &self,
        sample: &Tensor,
        timestep: i64,
        prev_timestep: i64,
        model_output: &Tensor,
    ) -> Result<Tensor, SchedulerError> {
        let alpha_prod_t = self.schedule.alpha_prod(timestep)?;
        let alpha_prod_t_prev = self.schedule.alpha_prod_or(prev_timestep, &self.final_alpha_cumprod)?;
        let (beta_prod_t, beta_prod_t_prev) = (one_minus(&alpha_prod_t)?, one_minus(&alpha_prod_t_prev)?);
        let model_output = match self.prediction_type {
            PredictionType::Epsilon => model_output.shallow_clone(),
            PredictionType::VPrediction => {
                let from_output = sqrt(&alpha_prod_t)?.f_mul(model_output)?;
                from_output.f_add(&sqrt(&beta_prod_t)?.f_mul(sample)?)?
            }
        };
        let sample_coeff = sqrt(&alpha_prod_t_prev.f_div(&alpha_prod_t)?)?;
        let model_output_denom_coeff = alpha_prod_t
            .f_mul(&sqrt(&beta_prod_t_prev)?)?
            .f_add(&sqrt(&alpha_prod_t.f_mul(&beta_prod_t)?.f_mul(&alpha_prod_t_prev)?)?)?;
        let direction =
            alpha_prod_t_prev.f_sub(&alpha_prod_t)?.f_mul(&model_output)?.f_div(&model_output_denom_coeff)?;
        Ok(sample_coeff.f_mul(sample)?.f_sub(&direction)?)
    }
}

/// Descending, with the second timestep twice.
fn plms_timesteps(spaced: &[f64]) -> Vec<f64> {
    let mut timesteps = spaced.to_vec();
    if let [_, second, ..] = *spaced {
        timesteps.insert(1, second);
    }
    timesteps
}

/// Three groups of four Runge-Kutta timesteps over the first three of `spaced`, then the rest of `spaced`; and how
/// many are Runge-Kutta's.
fn prk_timesteps(spaced: &[f64], half_step: f64) -> (Vec<f64>, usize) {
    // Of the first four timesteps, ascending: t, t + half; without the last; each twice, but the outermost once.
    let pairs: Vec<f64> = spaced[..PNDM_ORDER].iter().rev().flat_map(|t| [*t, *t + half_step]).collect();
    let doubled: Vec<f64> = pairs[..pairs.len() - 1].iter().flat_map(|t| [*t, *t]).collect();
    let mut timesteps: Vec<f64> = doubled[1..doubled.len() - 1].to_vec();
    timesteps.reverse();
    let num_prk_timesteps = timesteps.len();
    timesteps.extend(&spaced[PNDM_ORDER - 1..]);
    (timesteps, num_prk_timesteps)
}

impl Scheduler for PNDMScheduler {
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
        let prev_sample = if self.counter < self.num_prk_timesteps {
            self.step_prk(model_output, timestep, sample)?
        } else {
            self.step_plms(model_output, timestep, sample)?
        };
        self.counter += 1;
        Ok(prev_sample)
    }

    /// Only the multistep method; with Runge-Kutta steps before it there are none.
    fn linear_steps(&self) -> Result<Option<LinearSteps>, SchedulerError> {
        if self.num_prk_timesteps > 0 {
            return Ok(None);
        }
        let steps = (0..self.timesteps.len()).map(|step_index| self.linear_plms(step_index));
        Ok(Some(LinearSteps { num_rows: PLMS_ROWS, steps: steps.collect::<Result<_, _>>()? }))
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
