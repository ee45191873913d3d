//! The operations of [`super::Kernels`] by libtorch's own. The CPU's pictures are made by these, so their order is fixed:
//! the golden files hold what comes out to the last bits.

use tch::{TchError, Tensor};

use super::{GroupNormParameters, LayerNormParameters};

/// See [`super::Kernels::group_norm`].
pub(super) fn group_norm(
    input: &Tensor,
    addend: Option<&Tensor>,
    parameters: &GroupNormParameters<'_>,
) -> Result<Tensor, TchError> {
    let GroupNormParameters { weight, bias, num_groups, eps, silu } = *parameters;
    let normalize = |input: &Tensor| input.f_group_norm(num_groups, Some(weight), Some(bias), eps, true);
    let mut normalized = match addend {
        Some(addend) => normalize(&input.f_add(&over_pixels(addend)?)?)?,
        None => normalize(input)?,
    };
    if silu { normalized.f_silu_() } else { Ok(normalized) }
}

/// See [`super::Kernels::layer_norm`].
pub(super) fn layer_norm(
    input: &Tensor,
    pending: Option<&Tensor>,
    parameters: &LayerNormParameters<'_>,
) -> Result<Tensor, TchError> {
    let LayerNormParameters { weight, bias, eps } = *parameters;
    let normalize = |input: &Tensor| input.f_layer_norm(weight.size(), Some(weight), Some(bias), eps, true);
    match pending {
        Some(pending) => normalize(&input.f_add(pending)?),
        None => normalize(input),
    }
}

/// See [`super::Kernels::geglu`].
pub(super) fn geglu(input: &Tensor, bias: Option<&Tensor>) -> Result<Tensor, TchError> {
    let input = match bias {
        Some(bias) => input.f_add(bias)?,
        None => input.shallow_clone(),
    };
    let halves = input.f_chunk(2, -1)?;
    match halves.as_slice() {
        [values, gates] => values.f_mul(&gates.f_gelu("none")?),
        _ => Err(TchError::Shape(format!("GEGLU needs an even number of channels, not {:?}", input.size()))),
    }
}

/// See [`super::Kernels::add_bias_residual`].
pub(super) fn add_bias_residual(
    mut map: Tensor,
    bias: Option<&Tensor>,
    residual: Option<&Tensor>,
) -> Result<Tensor, TchError> {
    if let Some(bias) = bias {
        map = map.f_add_(&over_pixels(bias)?)?;
    }
    match residual {
        Some(residual) => map.f_add_(residual),
        None => Ok(map),
    }
}

/// See [`super::Kernels::attention`].
pub(super) fn attention(query: &Tensor, key: &Tensor, value: &Tensor) -> Result<Tensor, TchError> {
    let no_mask = None::<&Tensor>;
    let attended =
        Tensor::f_scaled_dot_product_attention(query, key, value, no_mask, 0.0, false, None, false)?;
    attended.f_transpose(1, 2)?.f_flatten(2, 3)
}

/// `(channels)` or `(batch_size, channels)` so that it is added to each pixel of `(batch_size, channels, height, width)`.
fn over_pixels(of_channels: &Tensor) -> Result<Tensor, TchError> {
    of_channels.f_unsqueeze(-1)?.f_unsqueeze(-1)
}
