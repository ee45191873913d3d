//! Which training steps are visited, and how strong the noise is there: NumPy's half of diffusers' `set_timesteps`,
//! in f64 where NumPy has f64.

use super::noise_schedule::NoiseSchedule;
use super::{SchedulerConfig, SchedulerError};

/// `timestep_spacing`, table 2 of "Common Diffusion Noise Schedules and Sample Steps are Flawed" (Lin et al., 2023).
#[derive(Debug, Clone, Copy, PartialEq)]
pub(super) enum TimestepSpacing {
    Linspace,
    Leading,
    Trailing,
}

/// StableDiffusionPipeline's constructor sets `steps_offset` to 1, whatever the JSON says.
const STEPS_OFFSET: f64 = 1.0;

impl TimestepSpacing {
    pub(super) fn from_config(config: &SchedulerConfig, default: Self) -> Result<Self, SchedulerError> {
        let choices =
            [("linspace", Self::Linspace), ("leading", Self::Leading), ("trailing", Self::Trailing)];
        config.choice("timestep_spacing", default, &choices)
    }

    /// Descending timesteps as DDIM, PNDM, Euler and LMS space them; `linspace` gives fractions.
    pub(super) fn timesteps(self, num_train_timesteps: usize, num_inference_steps: usize) -> Vec<f64> {
        let n = num_inference_steps;
        match self {
            Self::Linspace => reversed(linspace(0.0, (num_train_timesteps - 1) as f64, n)),
            Self::Leading => leading(num_train_timesteps / n, n),
            Self::Trailing => trailing(num_train_timesteps, n),
        }
    }

    /// Descending whole timesteps as DPM-Solver and UniPC space them, one short of clean.
    pub(super) fn solver_timesteps(self, num_train_timesteps: usize, num_inference_steps: usize) -> Vec<f64> {
        let n = num_inference_steps + 1;
        let mut timesteps = match self {
            Self::Linspace => reversed(rounded(linspace(0.0, (num_train_timesteps - 1) as f64, n))),
            Self::Leading => leading(num_train_timesteps / n, n),
            Self::Trailing => return trailing(num_train_timesteps, num_inference_steps),
        };
        timesteps.pop();
        timesteps
    }
}

fn leading(step_ratio: usize, n: usize) -> Vec<f64> {
    (0..n).rev().map(|i| (i * step_ratio) as f64 + STEPS_OFFSET).collect()
}

/// `np.arange(num_train_timesteps, 0, -step_ratio)`. NumPy's rounding makes it one too long at some n (61 of 1000),
/// with a step to -1 that would undo the picture; that one is left out.
fn trailing(num_train_timesteps: usize, n: usize) -> Vec<f64> {
    let step_ratio = num_train_timesteps as f64 / n as f64;
    let start = num_train_timesteps as f64;
    (0..n).map(|i| (start - i as f64 * step_ratio).round_ties_even() - 1.0).collect()
}

/// `np.linspace`
pub(super) fn linspace(start: f64, stop: f64, n: usize) -> Vec<f64> {
    let step = (stop - start) / (n.max(2) - 1) as f64;
    let last = n.saturating_sub(1);
    (0..n).map(|i| if i == last && i > 0 { stop } else { i as f64 * step + start }).collect()
}

pub(super) fn rounded(values: Vec<f64>) -> Vec<f64> {
    values.into_iter().map(f64::round_ties_even).collect()
}

fn reversed(mut values: Vec<f64>) -> Vec<f64> {
    values.reverse();
    values
}

/// What an f64 becomes in a float32 array.
pub(super) fn as_f32(values: Vec<f64>) -> Vec<f64> {
    values.into_iter().map(|value| f64::from(value as f32)).collect()
}

/// `np.interp(timesteps, np.arange(len(sigmas)), sigmas)`
pub(super) fn interpolate(timesteps: &[f64], sigmas: &[f32]) -> Vec<f64> {
    let at = |index: usize| f64::from(sigmas[index.min(sigmas.len() - 1)]);
    timesteps
        .iter()
        .map(|timestep| {
            let low = timestep.floor().max(0.0);
            (at(low as usize + 1) - at(low as usize)) * (timestep - low) + at(low as usize)
        })
        .collect()
}

/// Descending sigmas after Karras et al. (2022), equation 5 with ρ = 7.
pub(super) fn karras(sigma_min: f64, sigma_max: f64, num_inference_steps: usize) -> Vec<f64> {
    const RHO: f64 = 7.0;
    let (min_inv_rho, max_inv_rho) = (sigma_min.powf(1.0 / RHO), sigma_max.powf(1.0 / RHO));
    linspace(0.0, 1.0, num_inference_steps)
        .into_iter()
        .map(|ramp| (max_inv_rho + ramp * (min_inv_rho - max_inv_rho)).powf(RHO))
        .collect()
}

/// `_sigma_to_t`: the fractional training steps at which the noise is as strong as `sigmas`.
pub(super) fn sigmas_to_timesteps(sigmas: &[f64], train_sigmas: &[f32]) -> Vec<f64> {
    let log_sigmas: Vec<f32> = train_sigmas.iter().map(|sigma| f64::from(*sigma).ln() as f32).collect();
    sigmas
        .iter()
        .map(|sigma| {
            let log_sigma = sigma.max(1e-10).ln();
            let below = log_sigmas.partition_point(|log| f64::from(*log) <= log_sigma);
            let low_index = below.saturating_sub(1).min(log_sigmas.len() - 2);
            let (low, high) = (log_sigmas[low_index], log_sigmas[low_index + 1]);
            let weight = ((f64::from(low) - log_sigma) / f64::from(low - high)).clamp(0.0, 1.0);
            (1.0 - weight) * low_index as f64 + weight * (low_index + 1) as f64
        })
        .collect()
}

/// `final_sigmas_type`: what the last step ends at.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(super) enum FinalSigmasType {
    Zero,
    SigmaMin,
}

impl FinalSigmasType {
    pub(super) fn from_config(config: &SchedulerConfig) -> Result<Self, SchedulerError> {
        let choices = [("zero", Self::Zero), ("sigma_min", Self::SigmaMin)];
        config.choice("final_sigmas_type", Self::Zero, &choices)
    }
}

/// The noise levels of a schedule as its f32 tensor has them: one per timestep, and the one that the last step ends
/// at. Two equal levels would make a step of length 0, by which the multistep schedulers divide.
pub(super) fn finish_sigmas(
    sigmas: Vec<f64>,
    sigma_last: f64,
    schedule: &NoiseSchedule,
) -> Result<Vec<f32>, SchedulerError> {
    let num_inference_steps = sigmas.len();
    let sigmas: Vec<f32> = sigmas.into_iter().chain([sigma_last]).map(|sigma| sigma as f32).collect();
    let (before_last, _) = sigmas.split_at(num_inference_steps);
    if before_last.is_sorted_by(|a, b| a > b) {
        return Ok(sigmas);
    }
    let rule = format!(
        "so small that no two of them have the same noise (the model has {} training steps)",
        schedule.num_train_timesteps
    );
    Err(SchedulerError::NumInferenceSteps { rule, num_inference_steps })
}
