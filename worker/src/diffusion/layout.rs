//! How feature maps lie in memory: by channels, as diffusers has them, or by pixels (libtorch's channels_last), as GPUs like them.

use tch::{TchError, Tensor};

/// A feature map `(batch_size, channels, height, width)` by pixels, `(batch_size, height, width, channels)`; a view.
pub fn pixels(map: &Tensor) -> Result<Tensor, TchError> {
    map.f_permute([0, 2, 3, 1])
}

/// Whether a map's channels are side by side and its pixels in one piece.
pub fn is_by_pixels(map: &Tensor) -> bool {
    pixels(map).is_ok_and(|pixels| pixels.is_contiguous())
}

/// The reverse of [`pixels`].
pub fn from_pixels(pixels: &Tensor) -> Result<Tensor, TchError> {
    pixels.f_permute([0, 3, 1, 2])
}
