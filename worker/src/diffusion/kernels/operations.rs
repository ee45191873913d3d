//! How each operation is launched: which kernel, on what grid, with which arguments. `None` where no kernel takes the
//! shapes, dtypes or strides; then libtorch computes it.
//!
//! Grids depend on a sample's shape alone where sums are taken, so that a sample's bits do not depend on the batch.

use tch::{Kind, TchError, Tensor};

use super::super::device::ComputeDtype;
use super::super::layout::{from_pixels, pixels};
use super::feature_map::Statistics;
use super::launch::{Argument, Call, Kernel, Launch, Operation, wide};
use super::{GroupNormParameters, LayerNormParameters};

/// Threads of a block where nothing else decides: several blocks fit on a multiprocessor.
const THREADS: i64 = 256;
/// Threads of a warp.
const WARP: i64 = 32;
/// Threads of a GroupNorm's block, unless its channels need more.
const GROUP_NORM_THREADS: i64 = 512;
/// The most threads of a block (CUDA's limit).
const MOST_THREADS: i64 = 1024;
/// Shared memory that a block has without asking for more (CUDA's limit).
const MOST_SHARED_BYTES: i64 = 48 << 10;
/// Pixels of a chunk for each row of threads: enough loads in flight, and few enough chunks to put together.
const PIXELS_PER_ROW: i64 = 8;
/// The most chunks of a sample: every block of the second pass puts all of them together.
const MOST_CHUNKS: i64 = 128;
/// The most blocks in y, and in z (CUDA's limit).
pub(super) const MOST_GRID_Y: i64 = 65_535;
/// Bytes of an address that 16 bytes can be loaded from.
pub(super) const ALIGNMENT: usize = 16;
/// Bytes of an f32.
const F32_BYTES: i64 = 4;

/// The kernel that takes `tensors`, in rows of `channels`; `None` if they differ in dtype, are not where the launcher
/// starts kernels, do not lie in one piece or have more values than an `int` counts.
pub(super) fn kernel(
    launcher: &dyn Launch,
    operation: Operation,
    tensors: &[&Tensor],
    channels: i64,
) -> Option<Kernel> {
    let kind = tensors.first()?.kind();
    let dtype = dtype_of(kind)?;
    let is_taken = |tensor: &&Tensor| {
        let num_values = tensor.numel();
        tensor.kind() == kind
            && tensor.device() == launcher.device()
            && tensor.is_contiguous()
            && num_values > 0
            && i32::try_from(num_values).is_ok()
    };
    let is_aligned = |tensor: &&Tensor| tensor.data_ptr().addr().is_multiple_of(ALIGNMENT);
    let is_wide = channels % wide(dtype) == 0 && tensors.iter().all(is_aligned);
    tensors.iter().all(is_taken).then_some(Kernel { operation, dtype, is_wide })
}

/// The dtype that kernels know a kind by.
pub(super) fn dtype_of(kind: Kind) -> Option<ComputeDtype> {
    match kind {
        Kind::Float => Some(ComputeDtype::F32),
        Kind::Half => Some(ComputeDtype::F16),
        Kind::BFloat16 => Some(ComputeDtype::Bf16),
        _ => None,
    }
}

/// The address of a tensor's first value.
pub(super) fn address(tensor: &Tensor) -> Argument {
    Argument::Address(tensor.data_ptr().addr() as u64)
}

/// As [`address`], null without a tensor.
pub(super) fn address_or_null(tensor: Option<&Tensor>) -> Argument {
    tensor.map_or(Argument::Address(0), address)
}

/// A number as the kernels' `int`.
pub(super) fn int(value: i64) -> Result<Argument, TchError> {
    i32::try_from(value).map(Argument::Int).map_err(|_| too_large(value))
}

fn too_large(value: i64) -> TchError {
    TchError::Shape(format!("{value} is too large for a kernel"))
}

/// How many of `size` hold `count`; neither is negative.
pub(super) fn div_ceil(count: i64, size: i64) -> i64 {
    (count + size - 1) / size
}

/// Blocks, threads of each, and the bytes that they share.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Grid {
    pub(super) blocks: [i64; 3],
    pub(super) threads: i64,
    pub(super) shared_bytes: i64,
}

impl Grid {
    /// A thread for each of `count`.
    fn flat(count: i64) -> Self {
        Self::of(count, 1)
    }

    /// A thread for each of `count`, `rows` times.
    pub(super) fn of(count: i64, rows: i64) -> Self {
        Self { blocks: [div_ceil(count, THREADS), rows, 1], threads: THREADS, shared_bytes: 0 }
    }

    /// # Safety
    /// See [`Launch::launch`].
    pub(super) unsafe fn launch(
        self,
        launcher: &dyn Launch,
        kernel: Kernel,
        arguments: &[Argument],
    ) -> Result<(), TchError> {
        let size = |value: i64| u32::try_from(value).map_err(|_| too_large(value));
        let call = Call {
            kernel,
            grid: [size(self.blocks[0])?, size(self.blocks[1])?, size(self.blocks[2])?],
            threads: size(self.threads)?,
            shared_bytes: size(self.shared_bytes)?,
            arguments,
        };
        // SAFETY: the caller's promise.
        unsafe { launcher.launch(&call) }
    }
}

/// How both passes of a GroupNorm are cut: the grid of the first, and the pixels of a block. `None` if a block would need
/// more threads or memory than it can have.
pub(super) fn group_norm_grid(kernel_width: i64, sample: [i64; 2], batch_size: i64) -> Option<(Grid, i64)> {
    let [num_pixels, channels] = sample;
    let columns = channels / kernel_width;
    let rows = (GROUP_NORM_THREADS / columns).max(1);
    let threads = WARP * div_ceil(columns * rows, WARP);
    let shared_bytes = 2 * rows * channels * F32_BYTES;
    if threads > MOST_THREADS || shared_bytes > MOST_SHARED_BYTES || batch_size > MOST_GRID_Y {
        return None;
    }
    let chunk = (rows * PIXELS_PER_ROW).max(div_ceil(num_pixels, MOST_CHUNKS));
    Some((Grid { blocks: [div_ceil(num_pixels, chunk), batch_size, 1], threads, shared_bytes }, chunk))
}

/// See [`super::Kernels::group_norm`]. Without the first pass where there are `statistics` of `input`, which has no addend then.
pub(super) fn group_norm(
    launcher: &dyn Launch,
    input: &Tensor,
    statistics: Option<&Statistics>,
    addend: Option<&Tensor>,
    parameters: &GroupNormParameters<'_>,
) -> Result<Option<Tensor>, TchError> {
    let GroupNormParameters { weight, bias, num_groups, eps, silu } = *parameters;
    let [batch_size, channels, height, width] = input.size()[..] else { return Ok(None) };
    let addend_stride = match addend.map(Tensor::size).as_deref() {
        None => 0,
        Some(&[of_one]) if of_one == channels => 0,
        Some(&[rows, of_one]) if of_one == channels && rows == batch_size => channels,
        Some(_) => return Ok(None),
    };
    let input = pixels(input)?.f_contiguous()?;
    let output = input.f_empty_like()?;
    let mut tensors = vec![&input, weight, bias, &output];
    tensors.extend(addend);
    let Some(stats) = kernel(launcher, Operation::GroupNormStats, &tensors, channels) else {
        return Ok(None);
    };
    let num_pixels = height * width;
    let Some((grid, chunk)) = group_norm_grid(stats.width(), [num_pixels, channels], batch_size) else {
        return Ok(None);
    };
    let sizes = [int(num_pixels)?, int(channels)?, int(num_groups)?, int(chunk)?, int(addend_stride)?];
    let statistics = match statistics {
        Some(known) if addend.is_none() && known.fit(num_groups, grid, chunk) => known.shallow_clone(),
        _ => {
            let statistics = Statistics::empty(launcher, num_groups, grid, chunk)?;
            let read = [address(&input), address_or_null(addend), statistics.address()];
            // SAFETY: the parameters of `group_norm_stats`; `kernel` has seen that the tensors lie in one piece on the device,
            // and their shapes are those that the numbers say. Freed memory goes back to libtorch's pool for this stream.
            unsafe { grid.launch(launcher, stats, &[&read[..], &sizes].concat())? };
            statistics
        }
    };
    let read = [address(&input), address_or_null(addend), statistics.address()];
    let written = [address(weight), address(bias), address(&output)];
    let settings = [Argument::Float(eps as f32), Argument::Int(i32::from(silu))];
    let apply = Kernel { operation: Operation::GroupNormApply, ..stats };
    let grid = Grid { shared_bytes: 2 * num_groups * F32_BYTES, ..grid };
    // SAFETY: as above, of `group_norm_apply`.
    unsafe { grid.launch(launcher, apply, &[&read[..], &written, &sizes, &settings].concat())? };
    from_pixels(&output).map(Some)
}

/// See [`super::Kernels::layer_norm`].
pub(super) fn layer_norm(
    launcher: &dyn Launch,
    input: &Tensor,
    pending: Option<&Tensor>,
    parameters: &LayerNormParameters<'_>,
) -> Result<Option<Tensor>, TchError> {
    let LayerNormParameters { weight, bias, eps } = *parameters;
    let Some(&channels) = input.size().last() else { return Ok(None) };
    let input = input.f_contiguous()?;
    let output = input.f_empty_like()?;
    let mut tensors = vec![&input, weight, bias, &output];
    tensors.extend(pending);
    let Some(kernel) = kernel(launcher, Operation::LayerNorm, &tensors, channels) else { return Ok(None) };
    // As many loads as a lane has registers for: LAYER_NORM_LOADS in `layer_norm.cuh`.
    let most_loads = if kernel.width() == 8 { 5 } else { 10 };
    if channels > WARP * kernel.width() * most_loads {
        return Ok(None);
    }
    let num_rows = input.numel() as i64 / channels;
    let arguments = [
        address(&input),
        address_or_null(pending),
        address(weight),
        address(bias),
        address(&output),
        int(num_rows)?,
        int(channels)?,
        Argument::Float(eps as f32),
    ];
    // SAFETY: the parameters of `layer_norm`; otherwise as in `group_norm`. A warp for each row.
    unsafe { Grid::flat(num_rows * WARP).launch(launcher, kernel, &arguments)? };
    Ok(Some(output))
}

/// See [`super::Kernels::geglu`].
pub(super) fn geglu(
    launcher: &dyn Launch,
    input: &Tensor,
    bias: Option<&Tensor>,
) -> Result<Option<Tensor>, TchError> {
    let mut output_size = input.size();
    let Some(channels) = output_size.last_mut() else { return Ok(None) };
    if *channels % 2 != 0 {
        return Ok(None);
    }
    *channels /= 2;
    let channels = *channels;
    let input = input.f_contiguous()?;
    let output = Tensor::f_empty(&output_size, (input.kind(), input.device()))?;
    let mut tensors = vec![&input, &output];
    tensors.extend(bias);
    let Some(kernel) = kernel(launcher, Operation::Geglu, &tensors, channels) else { return Ok(None) };
    let vectors = output.numel() as i64 / kernel.width();
    let arguments = [address(&input), address_or_null(bias), address(&output), int(vectors)?, int(channels)?];
    // SAFETY: the parameters of `geglu`; otherwise as in `group_norm`.
    unsafe { Grid::flat(vectors).launch(launcher, kernel, &arguments)? };
    Ok(Some(output))
}
