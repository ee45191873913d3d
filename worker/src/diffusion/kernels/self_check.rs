//! Tries the kernels out against libtorch's own operations, on small tensors, before a model relies on them: a GPU or a
//! driver that computes something else with them must not make pictures.

use tch::{Device, Kind, TchError, Tensor};

use super::{GroupNormParameters, Kernels, LayerNormParameters, LinearStepTensors, linear_step, plain};
use crate::diffusion::device::ComputeDtype;

/// Why kernels are not to be trusted.
#[derive(Debug, thiserror::Error)]
pub enum SelfCheckError {
    /// Too far from what libtorch computes.
    #[error("`{operation}` differs from libtorch's by {difference:e} of the largest value")]
    Differs {
        /// What was computed.
        operation: &'static str,
        /// The largest difference, by the largest value.
        difference: f64,
    },
    /// Not even computed.
    #[error(transparent)]
    Tensor(#[from] TchError),
}

/// How far a result may be from that of f32 arithmetic on the same numbers, of the largest value: a few roundings.
pub(in crate::diffusion) fn tolerance(dtype: ComputeDtype) -> f64 {
    match dtype {
        ComputeDtype::F32 => 1e-5,
        ComputeDtype::F16 => 2e-3,
        ComputeDtype::Bf16 => 1.6e-2,
    }
}

/// Large enough to be missed where it is forgotten.
const EPS: f64 = 0.3;

/// Values from -1.5 to 2.5 that look random, the same on every device.
fn values(size: &[i64], seed: f64, kind: Kind, device: Device) -> Result<Tensor, TchError> {
    let count = size.iter().product::<i64>();
    let angles = Tensor::f_arange(count, (Kind::Double, Device::Cpu))?.f_mul_scalar(12.9898 + seed)?;
    let values = angles.f_sin()?.f_mul_scalar(43.7585)?.f_sin()?.f_mul_scalar(2.0)?.f_add_scalar(0.5)?;
    values.f_to_kind(kind)?.f_to_device(device)?.f_view(size)
}

/// Compares every operation with libtorch's, for tensors of `dtype` where the launcher computes. Without a launcher there
/// is nothing to compare.
pub fn self_check(kernels: &Kernels, dtype: ComputeDtype) -> Result<(), SelfCheckError> {
    let Some(launcher) = &kernels.launcher else { return Ok(()) };
    let _no_grad = tch::no_grad_guard();
    let values = |size: &[i64], seed| values(size, seed, dtype.to_tch(), launcher.device());
    let float = |tensor: &Tensor| tensor.f_to_kind(Kind::Float);
    let compare = |operation, actual: &Tensor, expected: &Tensor| -> Result<(), SelfCheckError> {
        let off = float(actual)?.f_sub(expected)?.f_abs()?.f_max()?.f_double_value(&[])?;
        let difference = off / expected.f_abs()?.f_max()?.f_double_value(&[])?;
        // So written that a NaN fails.
        if difference <= tolerance(dtype) {
            Ok(())
        } else {
            Err(SelfCheckError::Differs { operation, difference })
        }
    };

    // Groups of 10 channels, as at the UNet's widest resolution, do not end where 16 bytes do.
    let map = kernels.lay_out(&values(&[2, 320, 9, 7], 0.0)?)?;
    let residual = kernels.lay_out(&values(&[2, 320, 9, 7], 0.1)?)?;
    let (weight, bias, addend) = (values(&[320], 0.2)?, values(&[320], 0.3)?, values(&[320], 0.4)?);
    let (wide_weight, wide_bias) = (float(&weight)?, float(&bias)?);
    let norm = GroupNormParameters { weight: &weight, bias: &bias, num_groups: 32, eps: EPS, silu: true };
    let wide_norm = GroupNormParameters { weight: &wide_weight, bias: &wide_bias, ..norm };
    let expected = plain::group_norm(&float(&map)?, Some(&float(&addend)?), &wide_norm)?;
    compare("group_norm", &kernels.group_norm(&map, Some(&addend), &norm)?, &expected)?;

    let rows = values(&[3, 5, 320], 0.5)?;
    let layer = LayerNormParameters { weight: &weight, bias: &bias, eps: EPS };
    let expected = LayerNormParameters { weight: &wide_weight, bias: &wide_bias, ..layer };
    let expected = plain::layer_norm(&float(&rows)?, Some(&float(&addend)?), &expected)?;
    compare("layer_norm", &kernels.layer_norm(&rows, Some(&addend), &layer)?, &expected)?;

    let half = values(&[160], 0.6)?;
    let halves = Tensor::f_cat(&[&half, &half], 0)?;
    let expected = plain::geglu(&float(&rows)?, Some(&float(&halves)?))?;
    compare("geglu", &kernels.geglu(&rows, Some(&halves))?, &expected)?;

    let groups = norm.num_groups;
    let expected = plain::add_bias_residual(
        float(&map)?.f_mul_scalar(1.0)?,
        Some(&wide_bias),
        Some(&float(&residual)?),
    )?;
    let sum = kernels.add_bias_residual(map.shallow_clone(), Some(&bias), Some(&residual), groups)?;
    compare("add_bias_residual", sum.tensor(), &expected)?;
    // What the map was written with has to be right for the norm after it, too.
    let expected = plain::group_norm(&float(sum.tensor())?, None, &wide_norm)?;
    compare("add_bias_residual's statistics", &kernels.group_norm_of_map(&sum, &norm)?, &expected)?;

    let (first, second) = (map.f_narrow(1, 0, 200)?, residual.f_narrow(1, 0, 120)?);
    let both = kernels.cat_channels(&first, &second, groups)?;
    compare("cat_channels", both.tensor(), &float(&Tensor::f_cat(&[&first, &second], 1)?)?)?;
    let expected = plain::group_norm(&float(both.tensor())?, None, &wide_norm)?;
    compare("cat_channels' statistics", &kernels.group_norm_of_map(&both, &norm)?, &expected)?;

    for head_dim in [40, 80].into_iter().filter(|&head_dim| kernels.attends(dtype.to_tch(), head_dim)) {
        // As one product gives them, and neither queries nor keys fill their last tile.
        let packed = values(&[2, 150, 3, 2, head_dim], 1.1)?.f_permute([2, 0, 3, 1, 4])?;
        let [query, key, value] = [packed.f_select(0, 0)?, packed.f_select(0, 1)?, packed.f_select(0, 2)?];
        let expected = plain::attention(&float(&query)?, &float(&key)?, &float(&value)?)?;
        compare("attention", &kernels.attention(&query, &key, &value)?, &expected)?;
    }

    let noise_pred = values(&[4, 4, 3, 5], 0.7)?;
    let kept = float(&values(&[5, 2, 4, 3, 5], 0.8)?)?;
    let guidance_scale = float(&values(&[2, 1, 1, 1], 0.9)?)?;
    let numbers = float(&values(&[31], 1.0)?)?;
    let stepped =
        |step: &dyn Fn(&LinearStepTensors<'_>) -> Result<(), TchError>| -> Result<Tensor, TchError> {
            let kept = kept.copy();
            let sample = noise_pred.f_narrow(0, 0, 2)?.f_zeros_like()?;
            let guidance_scale = Some(&guidance_scale);
            let tensors = LinearStepTensors {
                noise_pred: &noise_pred,
                guidance_scale,
                numbers: &numbers,
                kept: &kept,
                sample: &sample,
            };
            step(&tensors)?;
            Tensor::f_cat(&[&kept.f_flatten(0, -1)?, &float(&sample)?.f_flatten(0, -1)?], 0)
        };
    let expected = stepped(&|tensors| linear_step::compose(tensors))?;
    compare("linear_step", &stepped(&|tensors| kernels.linear_step(tensors))?, &expected)?;
    Ok(())
}
