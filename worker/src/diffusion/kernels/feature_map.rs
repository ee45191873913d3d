//! Feature maps with the statistics that the GroupNorm after them needs: the kernel that writes the map takes them on the way, so
//! that the norm reads it once and not twice.

use tch::{Kind, TchError, Tensor};

use super::super::layout::{from_pixels, pixels};
use super::launch::{Argument, Kernel, Launch, Operation, wide};
use super::operations::{Grid, address, address_or_null, group_norm_grid, int, kernel};

/// `(batch_size, channels, height, width)` between two layers, and what is known of it. Whoever has one leaves the tensor's
/// numbers as they are.
#[derive(Debug)]
pub struct FeatureMap {
    tensor: Tensor,
    statistics: Option<Statistics>,
}

/// What a GroupNorm's first pass finds in a feature map; see `group_partials` in `group_norm.cuh`.
#[derive(Debug)]
pub(super) struct Statistics {
    /// `(batch_size, num_groups, num_chunks, 2)` in f32: mean and sum of squared differences from it.
    partials: Tensor,
    /// Pixels of a chunk.
    chunk: i64,
}

impl From<Tensor> for FeatureMap {
    /// A map of which nothing is known.
    fn from(tensor: Tensor) -> Self {
        Self { tensor, statistics: None }
    }
}

impl FeatureMap {
    /// `(batch_size, channels, height, width)`.
    pub fn tensor(&self) -> &Tensor {
        &self.tensor
    }

    /// The tensor alone, which its owner may overwrite.
    pub fn into_tensor(self) -> Tensor {
        self.tensor
    }

    /// The same map once more; nothing is copied.
    pub fn shallow_clone(&self) -> Self {
        Self {
            tensor: self.tensor.shallow_clone(),
            statistics: self.statistics.as_ref().map(Statistics::shallow_clone),
        }
    }

    /// The map after `repeat`, which does the same to the first dimension of whatever it is given: whole samples.
    pub fn with_samples(
        &self,
        repeat: impl Fn(&Tensor) -> Result<Tensor, TchError>,
    ) -> Result<Self, TchError> {
        let repeated = |Statistics { partials, chunk }: &Statistics| -> Result<_, TchError> {
            Ok(Statistics { partials: repeat(partials)?, chunk: *chunk })
        };
        Ok(Self {
            tensor: repeat(&self.tensor)?,
            statistics: self.statistics.as_ref().map(repeated).transpose()?,
        })
    }

    pub(super) fn statistics(&self) -> Option<&Statistics> {
        self.statistics.as_ref()
    }
}

impl Statistics {
    /// Room for what a first pass on `grid`, with chunks of this many pixels, is going to find.
    pub(super) fn empty(
        launcher: &dyn Launch,
        num_groups: i64,
        grid: Grid,
        chunk: i64,
    ) -> Result<Self, TchError> {
        let size = Self::size(num_groups, grid);
        Ok(Self { partials: Tensor::f_empty(size, (Kind::Float, launcher.device()))?, chunk })
    }

    fn size(num_groups: i64, grid: Grid) -> [i64; 4] {
        let [num_chunks, batch_size, _] = grid.blocks;
        [batch_size, num_groups, num_chunks, 2]
    }

    /// Whether they are cut as a norm on `grid` with this chunk reads them.
    pub(super) fn fit(&self, num_groups: i64, grid: Grid, chunk: i64) -> bool {
        self.partials.size() == Self::size(num_groups, grid) && self.chunk == chunk
    }

    pub(super) fn shallow_clone(&self) -> Self {
        Self { partials: self.partials.shallow_clone(), chunk: self.chunk }
    }

    /// Where they are.
    pub(super) fn address(&self) -> Argument {
        address(&self.partials)
    }
}

/// Starts a kernel that writes `output` `(batch_size, height, width, channels)`: `inputs` are its arguments before the output,
/// `sizes` those between the numbers of channels and of groups. `None` if it does not take the shape.
fn write_map(
    launcher: &dyn Launch,
    kernel: Kernel,
    inputs: &[Argument],
    output: &Tensor,
    sizes: &[Argument],
    num_groups: i64,
) -> Result<Option<FeatureMap>, TchError> {
    let [batch_size, height, width, channels] = output.size()[..] else { return Ok(None) };
    if num_groups < 1 || channels % num_groups != 0 {
        return Ok(None);
    }
    let num_pixels = height * width;
    let Some((grid, chunk)) = group_norm_grid(kernel.width(), [num_pixels, channels], batch_size) else {
        return Ok(None);
    };
    let statistics = Statistics::empty(launcher, num_groups, grid, chunk)?;
    let written = [address(output), statistics.address(), int(num_pixels)?, int(channels)?];
    let arguments = [inputs, &written, sizes, &[int(num_groups)?, int(chunk)?]].concat();
    // SAFETY: the parameters of the kernels here; the callers' `kernel` has seen that the tensors lie in one piece on the device,
    // and their shapes are those that the numbers say. Freed memory goes back to libtorch's pool for this stream.
    unsafe { grid.launch(launcher, kernel, &arguments)? };
    Ok(Some(FeatureMap { tensor: from_pixels(output)?, statistics: Some(statistics) }))
}

/// See [`super::Kernels::add_bias_residual`].
pub(super) fn add_bias_residual(
    launcher: &dyn Launch,
    map: &Tensor,
    bias: Option<&Tensor>,
    residual: Option<&Tensor>,
    num_groups: i64,
) -> Result<Option<FeatureMap>, TchError> {
    let [_, channels, _, _] = map.size()[..] else { return Ok(None) };
    if residual.is_some_and(|residual| residual.size() != map.size())
        || bias.is_some_and(|bias| bias.size() != [channels])
    {
        return Ok(None);
    }
    let map = pixels(map)?.f_contiguous()?;
    let residual = residual.map(|residual| pixels(residual)?.f_contiguous()).transpose()?;
    let output = map.f_empty_like()?;
    let tensors: Vec<&Tensor> = [&map, &output].into_iter().chain(bias).chain(&residual).collect();
    let Some(kernel) = kernel(launcher, Operation::AddBiasResidual, &tensors, channels) else {
        return Ok(None);
    };
    let inputs = [address(&map), address_or_null(bias), address_or_null(residual.as_ref())];
    write_map(launcher, kernel, &inputs, &output, &[], num_groups)
}

/// See [`super::Kernels::cat_channels`].
pub(super) fn cat_channels(
    launcher: &dyn Launch,
    first: &Tensor,
    second: &Tensor,
    num_groups: i64,
) -> Result<Option<FeatureMap>, TchError> {
    let [batch_size, first_channels, height, width] = first.size()[..] else { return Ok(None) };
    let [_, second_channels, _, _] = second.size()[..] else { return Ok(None) };
    if second.size() != [batch_size, second_channels, height, width] {
        return Ok(None);
    }
    let (first, second) = (pixels(first)?.f_contiguous()?, pixels(second)?.f_contiguous()?);
    let channels = first_channels + second_channels;
    let output = Tensor::f_empty([batch_size, height, width, channels], (first.kind(), first.device()))?;
    let tensors = [&first, &second, &output];
    let Some(kernel) = kernel(launcher, Operation::CatChannels, &tensors, channels) else {
        return Ok(None);
    };
    // 16 bytes are of one of the two.
    let is_wide = kernel.is_wide && first_channels % wide(kernel.dtype) == 0;
    let kernel = Kernel { is_wide, ..kernel };
    let inputs = [address(&first), address(&second)];
    write_map(launcher, kernel, &inputs, &output, &[int(first_channels)?], num_groups)
}
