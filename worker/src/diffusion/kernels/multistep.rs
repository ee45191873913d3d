//! Guidance and a denoising step of a linear multistep noise scheduler in one kernel, for all pictures of a batch.
//!
//! What a step does is a row of a table on the device, and which row is a number on the device: nothing that is launched
//! depends on the step, so a captured graph can be replayed for each. Latents and history are f32 whatever the UNet
//! computes in.

use tch::{Device, Kind, TchError, Tensor};

use super::Kernels;
use super::launch::{Kernel, Operation};
use super::operations::{Grid, address, address_or_null, dtype_of, int};

/// Model outputs that a step can look back at (`MULTISTEP_HISTORY` in `multistep.cuh`).
pub const HISTORY: usize = 3;

/// What makes the latents after a step, and what is kept for later steps.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct MultistepRow {
    /// How much of the latents before the step.
    pub of_latents: f64,
    /// How much of the latents that were kept.
    pub of_kept: f64,
    /// How much of the model's guided output at this step.
    pub of_output: f64,
    /// How much of each output in the history.
    pub of_history: [f64; HISTORY],
    /// The place in the history that the output takes, after the history was read.
    pub place: Option<usize>,
    /// Whether the latents before the step are kept.
    pub keeps: bool,
}

impl MultistepRow {
    /// As `multistep.cuh` reads it.
    fn to_f32(self) -> [f32; 5 + HISTORY] {
        let place = self.place.map_or(-1.0, |place| place as f64);
        let [first, second, third] = self.of_history;
        let keeps = f64::from(u8::from(self.keeps));
        [self.of_latents, self.of_kept, self.of_output, first, second, third, place, keeps]
            .map(|number| number as f32)
    }
}

/// A batch of pictures between noise and latents.
#[derive(Debug)]
pub struct Multistep {
    kernels: Kernels,
    /// `(num_steps, 8)` in f32.
    table: Tensor,
    /// The row of the next step, one i64.
    step: Tensor,
    /// `(num_pictures, …)` in f32.
    latents: Tensor,
    /// As `latents`; undefined numbers until a step keeps some.
    kept: Tensor,
    /// `(3, num_pictures, …)` in f32; undefined numbers until steps put some there.
    history: Tensor,
}

impl Multistep {
    /// Pictures before their first step. `latents` is `(num_pictures, …)`, on the device to compute on.
    pub fn start(kernels: &Kernels, rows: &[MultistepRow], latents: &Tensor) -> Result<Self, TchError> {
        let device = latents.device();
        let table: Vec<f32> = rows.iter().flat_map(|row| row.to_f32()).collect();
        // A copy in any case: steps overwrite it.
        let latents = latents.f_to_device_(device, Kind::Float, false, true)?.f_contiguous()?;
        let mut history_size = vec![HISTORY as i64];
        history_size.extend(latents.size());
        Ok(Self {
            kernels: kernels.clone(),
            table: Tensor::f_from_slice(&table)?.f_view([rows.len() as i64, -1])?.f_to_device(device)?,
            step: Tensor::f_zeros([1], (Kind::Int64, device))?,
            kept: latents.f_empty_like()?,
            history: Tensor::f_empty(&history_size, (Kind::Float, device))?,
            latents,
        })
    }

    /// The latents now, `(num_pictures, …)` in f32.
    pub fn latents(&self) -> &Tensor {
        &self.latents
    }

    /// Takes a step and moves on to the next row of the table; after the last one, takes that again.
    ///
    /// `noise_pred` is `(2 * num_pictures, …)` with `guidance`, each picture's prediction without its text first, and
    /// `(num_pictures, …)` without. `guidance` is `(num_pictures)` in f32. The latents in the dtype of `noise_pred` are
    /// written to `next`, of its shape: what the UNet is shown at the next step.
    pub fn step(
        &mut self,
        noise_pred: &Tensor,
        guidance: Option<&Tensor>,
        next: &mut Tensor,
    ) -> Result<(), TchError> {
        if !self.launch(noise_pred, guidance, next)? {
            self.compose(noise_pred, guidance, next)?;
        }
        let _ = self.step.f_add_scalar_(1)?;
        Ok(())
    }

    /// By the kernel; whether it takes the tensors.
    fn launch(
        &self,
        noise_pred: &Tensor,
        guidance: Option<&Tensor>,
        next: &Tensor,
    ) -> Result<bool, TchError> {
        let Some(launcher) = &self.kernels.launcher else { return Ok(false) };
        let Some(dtype) = dtype_of(noise_pred.kind()) else { return Ok(false) };
        let num_pictures = self.latents.size().first().copied().unwrap_or(0);
        let num_inputs = if guidance.is_some() { 2 * num_pictures } else { num_pictures };
        // The latents of a picture, channels first: a prediction that lies by pixels is put in their order.
        let noise = noise_pred.f_contiguous()?;
        let is_here = |tensor: &Tensor, kind: Kind| {
            tensor.kind() == kind && tensor.device() == launcher.device() && tensor.is_contiguous()
        };
        let mut size = self.latents.size();
        if let Some(rows) = size.first_mut() {
            *rows = num_inputs;
        }
        let fits = noise.size() == size
            && next.size() == size
            && is_here(&noise, noise_pred.kind())
            && is_here(next, noise_pred.kind())
            && is_here(&self.latents, Kind::Float)
            && guidance.is_none_or(|guidance| {
                is_here(guidance, Kind::Float) && guidance.numel() as i64 == num_pictures
            });
        if !fits || num_pictures == 0 {
            return Ok(false);
        }
        let cells = self.latents.numel() as i64 / num_pictures;
        let arguments = [
            address(&noise),
            address_or_null(guidance),
            address(&self.table),
            address(&self.step),
            address(&self.latents),
            address(&self.kept),
            address(&self.history),
            address(next),
            int(cells)?,
            int(self.table.size()[0])?,
        ];
        let kernel = Kernel { operation: Operation::Multistep, dtype, is_wide: false };
        // SAFETY: the parameters of `multistep`, and shapes, dtypes and places as seen above.
        unsafe { Grid::of(cells, num_pictures).launch(launcher.as_ref(), kernel, &arguments)? };
        Ok(true)
    }

    /// By libtorch's operations; waits for the device.
    fn compose(
        &mut self,
        noise_pred: &Tensor,
        guidance: Option<&Tensor>,
        next: &mut Tensor,
    ) -> Result<(), TchError> {
        let last = self.table.size()[0] - 1;
        let step = self.step.f_clamp_max(last)?;
        let row = self.table.f_index_select(0, &step)?.f_flatten(0, 1)?.f_to_device(Device::Cpu)?;
        let row = Vec::<f32>::try_from(row)?.into_iter().map(f64::from).collect::<Vec<_>>();
        let [of_latents, of_kept, of_output, of_history @ .., place, keeps] = row.as_slice() else {
            return Err(TchError::Shape(format!("a row of the table has {} numbers", row.len())));
        };
        let noise_pred = noise_pred.f_to_kind(Kind::Float)?;
        let output = match guidance {
            Some(guidance) => {
                let mut size = self.latents.size();
                size.insert(1, 2);
                let pairs = noise_pred.f_reshape(&size)?;
                let (without, with) = (pairs.f_select(1, 0)?, pairs.f_select(1, 1)?);
                let mut of_each = vec![1i64; self.latents.dim()];
                if let Some(first) = of_each.first_mut() {
                    *first = -1;
                }
                with.f_sub(&without)?.f_mul(&guidance.f_view(of_each.as_slice())?)?.f_add(&without)?
            }
            None => noise_pred,
        };
        let mut after = self.latents.f_mul_scalar(*of_latents)?.f_add(&output.f_mul_scalar(*of_output)?)?;
        if *of_kept != 0.0 {
            after = after.f_add(&self.kept.f_mul_scalar(*of_kept)?)?;
        }
        for (i, of_one) in of_history.iter().enumerate().filter(|(_, of_one)| **of_one != 0.0) {
            after = after.f_add(&self.history.f_select(0, i as i64)?.f_mul_scalar(*of_one)?)?;
        }
        if *place >= 0.0 {
            self.history.f_select(0, *place as i64)?.f_copy_(&output)?;
        }
        if *keeps != 0.0 {
            self.kept.f_copy_(&self.latents)?;
        }
        self.latents.f_copy_(&after)?;
        let shown = match guidance {
            Some(_) => after.f_repeat_interleave_self_int(2, 0, None)?,
            None => after,
        };
        next.f_copy_(&shown)?;
        Ok(())
    }
}
