//! Arithmetic with 0-dimensional f32 tensors, in the words of diffusers' Python.
//!
//! In f16 and bf16 it matters which operand of a product is the 0-dimensional one (torch rounds a left one to the
//! samples' dtype first), so coefficients stay tensors and keep diffusers' order.

use tch::{TchError, Tensor};

/// A 0-dimensional f32 tensor on the CPU; torch combines it with samples on any device.
pub(super) fn scalar(value: f32) -> Tensor {
    Tensor::from(value)
}

/// `tensor ** 0.5`
pub(super) fn sqrt(tensor: &Tensor) -> Result<Tensor, TchError> {
    tensor.f_pow_tensor_scalar(0.5)
}

/// `tensor ** 2`
pub(super) fn square(tensor: &Tensor) -> Result<Tensor, TchError> {
    tensor.f_pow_tensor_scalar(2)
}

/// `1 - tensor`
pub(super) fn one_minus(tensor: &Tensor) -> Result<Tensor, TchError> {
    tensor.f_neg()?.f_add_scalar(1.0)
}

/// `(alpha_t, sigma_t)` of a variance-preserving process whose noise-to-signal ratio is `sigma`.
pub(super) fn sigma_to_alpha_sigma_t(sigma: &Tensor) -> Result<(Tensor, Tensor), TchError> {
    let alpha_t = sqrt(&square(sigma)?.f_add_scalar(1.0)?)?.f_reciprocal()?;
    let sigma_t = sigma.f_mul(&alpha_t)?;
    Ok((alpha_t, sigma_t))
}

/// `torch.log(alpha_t) - torch.log(sigma_t)`
pub(super) fn log_ratio(alpha_t: &Tensor, sigma_t: &Tensor) -> Result<Tensor, TchError> {
    alpha_t.f_log()?.f_sub(&sigma_t.f_log()?)
}
