//! Guidance and a denoising step of a noise scheduler in one kernel, for all pictures of a batch.
//!
//! What a step does is numbers on the device ([`super::super::schedulers::LinearStep`]): nothing that is launched depends on the
//! step, so a captured graph can be replayed for each.

use tch::{Kind, TchError, Tensor};

use super::launch::{Kernel, Launch, Operation};
use super::operations::{Grid, address, address_or_null, dtype_of, int};

/// The most tensors that a scheduler keeps (`LINEAR_STEP_ROWS` in `linear_step.cuh`).
const MOST_ROWS: i64 = 6;

/// What a step reads and writes; all on one device.
#[derive(Debug)]
pub struct LinearStepTensors<'t> {
    /// The UNet's prediction: `(2 * num_pictures, …)` with guidance, all without their texts first, else `(num_pictures, …)`.
    pub noise_pred: &'t Tensor,
    /// `(num_pictures, 1, 1, 1)` in f32, if there is guidance.
    pub guidance_scale: Option<&'t Tensor>,
    /// One that is not used here and then, row by row, the weights: `1 + num_rows * (num_rows + 1)` in f32.
    pub numbers: &'t Tensor,
    /// `(num_rows, num_pictures, …)` in f32; changed. The first becomes the new sample.
    pub kept: &'t Tensor,
    /// `(num_pictures, …)`: the new sample in the dtype of `noise_pred`.
    pub sample: &'t Tensor,
}

/// By the kernel; whether it takes the tensors.
pub(super) fn launch(launcher: &dyn Launch, tensors: &LinearStepTensors<'_>) -> Result<bool, TchError> {
    let LinearStepTensors { noise_pred, guidance_scale, numbers, kept, sample } = *tensors;
    let kind = noise_pred.kind();
    let Some(dtype) = dtype_of(kind) else { return Ok(false) };
    let sample_size = sample.size();
    let (Some(&num_pictures), Some(&num_rows)) = (sample_size.first(), kept.size().first()) else {
        return Ok(false);
    };
    let is_here = |tensor: &Tensor, kind: Kind| {
        tensor.kind() == kind && tensor.device() == launcher.device() && tensor.is_contiguous()
    };
    // Channels first, as the latents lie: a prediction that lies by pixels is put in their order.
    let noise = noise_pred.f_contiguous()?;
    let num_inputs = if guidance_scale.is_some() { 2 * num_pictures } else { num_pictures };
    let noise_size: Vec<i64> =
        std::iter::once(num_inputs).chain(sample_size.iter().skip(1).copied()).collect();
    let kept_size: Vec<i64> = std::iter::once(num_rows).chain(sample_size.iter().copied()).collect();
    let fits = noise.size() == noise_size
        && kept.size() == kept_size
        && numbers.numel() as i64 == 1 + num_rows * (num_rows + 1)
        && (1..=MOST_ROWS).contains(&num_rows)
        && is_here(&noise, kind)
        && is_here(sample, kind)
        && is_here(kept, Kind::Float)
        && is_here(numbers, Kind::Float)
        && guidance_scale
            .is_none_or(|scale| is_here(scale, Kind::Float) && scale.numel() as i64 == num_pictures);
    if !fits || num_pictures == 0 {
        return Ok(false);
    }
    let cells = sample.numel() as i64 / num_pictures;
    let arguments = [
        address(&noise),
        address_or_null(guidance_scale),
        address(numbers),
        address(kept),
        address(sample),
        int(cells)?,
        int(num_rows)?,
    ];
    let kernel = Kernel { operation: Operation::LinearStep, dtype, is_wide: false };
    // SAFETY: the parameters of `linear_step`, and shapes, dtypes and places as seen above.
    unsafe { Grid::of(cells, num_pictures).launch(launcher, kernel, &arguments)? };
    Ok(true)
}

/// By libtorch's operations.
pub(super) fn compose(tensors: &LinearStepTensors<'_>) -> Result<(), TchError> {
    let LinearStepTensors { noise_pred, guidance_scale, numbers, kept, sample } = *tensors;
    let output = guided(noise_pred, guidance_scale)?;
    let num_rows = kept.size().first().copied().unwrap_or(0);
    let weights = numbers.f_narrow(0, 1, num_rows * (num_rows + 1))?;
    let of_each: Vec<i64> =
        [num_rows, num_rows + 1].into_iter().chain(sample.size().iter().map(|_| 1)).collect();
    let weights = weights.f_view(of_each.as_slice())?;
    // Products and sums apart, term by term: so no two machine instructions of different rounding can be chosen for different
    // places of a batch.
    let mut next = weights.f_select(1, num_rows)?.f_mul(&output)?;
    for row in 0..num_rows {
        next = next.f_add_(&weights.f_select(1, row)?.f_mul(&kept.f_select(0, row)?)?)?;
    }
    kept.shallow_clone().f_copy_(&next)?;
    sample.shallow_clone().f_copy_(&next.f_select(0, 0)?)
}

/// The prediction in f32, with guidance if there is a scale; shapes as in [`LinearStepTensors`].
pub fn guided(noise_pred: &Tensor, guidance_scale: Option<&Tensor>) -> Result<Tensor, TchError> {
    let noise_pred = noise_pred.f_to_kind(Kind::Float)?;
    let Some(scale) = guidance_scale else { return Ok(noise_pred) };
    let num_pictures = noise_pred.size().first().copied().unwrap_or(0) / 2;
    let uncond = noise_pred.f_narrow(0, 0, num_pictures)?;
    let text = noise_pred.f_narrow(0, num_pictures, num_pictures)?;
    text.f_sub(&uncond)?.f_mul_(scale)?.f_add_(&uncond)
}
