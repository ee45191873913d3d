//! UniPC (Zhao et al., 2023), a predictor-corrector of order 2 with B(h) = e^h - 1 ("bh2"), in its form that predicts
//! the picture. Each call first corrects the sample it is given with the new model output, then predicts the next.

use tch::{Device, Kind, Tensor};

use super::dpmsolver_multistep::{Solver, SolverSchedule};
use super::scalar::log_ratio;
use super::spacing::FinalSigmasType;
use super::{Generator, Scheduler, SchedulerConfig, SchedulerError, check_step_index};

const SOLVER_ORDER: usize = 2;

/// diffusers' `UniPCMultistepScheduler`.
#[derive(Debug)]
pub(super) struct UniPCMultistepScheduler {
    schedule: SolverSchedule,
    lower_order_final: bool,
    /// The pictures that the last two outputs implied, the newest last.
    model_outputs: Vec<Tensor>,
    /// The last call's corrected sample and the order of its prediction.
    last: Option<(Tensor, usize)>,
}

/// What predictor and corrector share over one interval of noise levels.
struct Interval {
    /// `sigma_t / sigma_s0 * x - alpha_t * (e^-h - 1) * m0`
    first_order: Tensor,
    /// `alpha_t * B(h)`
    alpha_b_h: Tensor,
    /// -h, h being the difference of the log signal-to-noise ratios.
    hh: Tensor,
    /// `(lambda_si - lambda_s0) / h` of the step before, at order 2.
    rk: Option<Tensor>,
}

impl UniPCMultistepScheduler {
    pub(super) fn from_config(
        config: &SchedulerConfig,
        num_inference_steps: usize,
    ) -> Result<Self, SchedulerError> {
        let schedule = SolverSchedule::from_config(config, num_inference_steps, Solver::UniPC)?;
        // The last three are other classes' words, which this one takes for its default.
        config.choice("solver_type", (), &[("bh2", ()), ("midpoint", ()), ("heun", ()), ("logrho", ())])?;
        let lower_order_final = config.bool("lower_order_final", true)?;
        if !lower_order_final && FinalSigmasType::from_config(config)? == FinalSigmasType::Zero {
            return Err(SchedulerError::Config {
                key: "lower_order_final",
                rule: "true, unless `final_sigmas_type` is \"sigma_min\",".to_owned(),
                value: "false".to_owned(),
            });
        }
        Ok(Self { schedule, lower_order_final, model_outputs: Vec::new(), last: None })
    }

    /// From the noise level at index `from` to the next one.
    fn interval(
        &self,
        from: usize,
        order: usize,
        x: &Tensor,
        m0: &Tensor,
    ) -> Result<Interval, SchedulerError> {
        let (alpha_t, sigma_t) = self.schedule.alpha_sigma(from + 1)?;
        let (alpha_s0, sigma_s0) = self.schedule.alpha_sigma(from)?;
        let lambda_s0 = log_ratio(&alpha_s0, &sigma_s0)?;
        let h = log_ratio(&alpha_t, &sigma_t)?.f_sub(&lambda_s0)?;
        let hh = h.f_neg()?;
        let h_phi_1 = hh.f_expm1()?;
        let first_order = sigma_t.f_div(&sigma_s0)?.f_mul(x)?.f_sub(&alpha_t.f_mul(&h_phi_1)?.f_mul(m0)?)?;
        let rk = if order == SOLVER_ORDER {
            let (alpha_si, sigma_si) = self.schedule.alpha_sigma(from.saturating_sub(1))?;
            Some(log_ratio(&alpha_si, &sigma_si)?.f_sub(&lambda_s0)?.f_div(&h)?)
        } else {
            None
        };
        Ok(Interval { first_order, alpha_b_h: alpha_t.f_mul(&h_phi_1)?, hh, rk })
    }

    /// `multistep_uni_p_bh_update`: the sample of the next step.
    fn predict(&self, sample: &Tensor, step_index: usize, order: usize) -> Result<Tensor, SchedulerError> {
        let [.., m0] = self.model_outputs.as_slice() else { return Ok(sample.shallow_clone()) };
        let interval = self.interval(step_index, order, sample, m0)?;
        let predicted = match (interval.rk, self.model_outputs.as_slice()) {
            (Some(rk), [mi, m0]) => {
                let half = Tensor::from(0.5_f32).f_to_kind(sample.kind())?;
                let pred_res = mi.f_sub(m0)?.f_div(&rk)?.f_mul(&half.f_to_device(sample.device())?)?;
                interval.first_order.f_sub(&interval.alpha_b_h.f_mul(&pred_res)?)?
            }
            _ => interval.first_order,
        };
        Ok(predicted.f_to_kind(sample.kind())?)
    }

    /// `multistep_uni_c_bh_update`: this step's sample, corrected by this step's output.
    fn correct(
        &self,
        model_t: &Tensor,
        last_sample: &Tensor,
        step_index: usize,
        order: usize,
    ) -> Result<Tensor, SchedulerError> {
        let [.., m0] = self.model_outputs.as_slice() else { return Ok(last_sample.shallow_clone()) };
        let (kind, device) = (last_sample.kind(), last_sample.device());
        let interval = self.interval(step_index - 1, order, last_sample, m0)?;
        let d1_t = model_t.f_sub(m0)?;
        let residual = match (interval.rk, self.model_outputs.as_slice()) {
            (Some(rk), [mi, m0]) => {
                let rhos_c = corrector_weights(&rk, &interval.hh)?.f_to_kind(kind)?.f_to_device(device)?;
                let corr_res = mi.f_sub(m0)?.f_div(&rk)?.f_mul(&rhos_c.f_select(0, 0)?)?;
                corr_res.f_add(&rhos_c.f_select(0, 1)?.f_mul(&d1_t)?)?
            }
            _ => {
                let half = Tensor::from(0.5_f32).f_to_kind(kind)?.f_to_device(device)?;
                half.f_mul(&d1_t)?
            }
        };
        let corrected = interval.first_order.f_sub(&interval.alpha_b_h.f_mul(&residual)?)?;
        Ok(corrected.f_to_kind(kind)?)
    }
}

/// `torch.linalg.solve(R, b)` with R = [[1, 1], [rk, 1]] and b from the series of e^hh.
fn corrector_weights(rk: &Tensor, hh: &Tensor) -> Result<Tensor, SchedulerError> {
    let b_h = hh.f_expm1()?;
    let one = Tensor::f_ones([1_i64; 0], (Kind::Float, Device::Cpu))?;
    let rks = Tensor::f_stack(&[rk, &one], 0)?;
    let h_phi_2 = b_h.f_div(hh)?.f_sub_scalar(1.0)?;
    let h_phi_3 = h_phi_2.f_div(hh)?.f_sub_scalar(0.5)?;
    let r = Tensor::f_stack(&[rks.f_pow_tensor_scalar(0)?, rks], 0)?;
    let b = Tensor::f_stack(&[h_phi_2.f_div(&b_h)?, h_phi_3.f_mul_scalar(2)?.f_div(&b_h)?], 0)?;
    Ok(Tensor::f_linalg_solve(&r, &b, true)?)
}

impl Scheduler for UniPCMultistepScheduler {
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
        let x0_pred = self.schedule.x0_pred(model_output, sample, step_index)?;
        let sample = match &self.last {
            Some((last_sample, order)) if step_index > 0 => {
                self.correct(&x0_pred, last_sample, step_index, *order)?
            }
            _ => sample.shallow_clone(),
        };
        // At the start and (for stability) at the end the order is 1.
        let warm_up = self.model_outputs.len() + 1;
        let remaining = self.schedule.timesteps.len() - step_index;
        let wanted = if self.lower_order_final { SOLVER_ORDER.min(remaining) } else { SOLVER_ORDER };
        let order = wanted.min(warm_up);
        if self.model_outputs.len() == SOLVER_ORDER {
            drop(self.model_outputs.remove(0));
        }
        self.model_outputs.push(x0_pred);
        let prev_sample = self.predict(&sample, step_index, order)?;
        self.last = Some((sample, order));
        Ok(prev_sample)
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
