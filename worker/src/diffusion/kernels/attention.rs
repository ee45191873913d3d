//! Attention by our own kernel, for heads of few values: how it is launched.

use std::f64::consts::LOG2_E;

use tch::{Kind, TchError, Tensor};

use super::super::device::ComputeDtype;
use super::launch::{Argument, Kernel, Launch, Operation, wide};
use super::operations::{ALIGNMENT, Grid, MOST_GRID_Y, address, div_ceil, dtype_of, int};

/// Threads of a block (`THREADS` in `attention.cuh`).
const THREADS: i64 = 128;
/// Keys of a tile (`KEYS` there).
const KEYS: i64 = 64;

/// The kernel for heads of `head_dim` values of a kind, and the queries of a block (`QUERIES` in `attention.cuh`).
fn kernel(kind: Kind, head_dim: i64) -> Option<(Kernel, i64)> {
    let (operation, num_queries) = match head_dim {
        40 => (Operation::Attention40, 128),
        80 => (Operation::Attention80, 64),
        _ => return None,
    };
    let dtype = dtype_of(kind).filter(|&dtype| dtype != ComputeDtype::F32)?;
    Some((Kernel { operation, dtype, is_wide: true }, num_queries))
}

/// Whether there is a kernel for heads of `head_dim` values of a kind.
pub(super) fn takes(kind: Kind, head_dim: i64) -> bool {
    kernel(kind, head_dim).is_some()
}

/// The strides of batch, head and row in values. `None` if the kernel cannot read from there: each row has to begin where 16
/// bytes can be loaded.
fn strides(tensor: &Tensor) -> Option<[i64; 3]> {
    let size @ [_, _, length, head_dim] = tensor.size()[..].try_into().ok()?;
    let given: [i64; 4] = tensor.stride()[..].try_into().ok()?;
    // libtorch may give any stride to what there is one of.
    let strides = [0, 1, 2].map(|i| if size[i] == 1 { 0 } else { given[i] });
    let width = wide(dtype_of(tensor.kind())?);
    let is_aligned = tensor.data_ptr().addr().is_multiple_of(ALIGNMENT)
        && strides.iter().all(|stride| stride % width == 0);
    // An `int` counts the values of a head.
    let is_counted = i32::try_from((length - 1) * strides[2] + head_dim).is_ok();
    (given[3] == 1 && is_aligned && is_counted).then_some(strides)
}

/// See [`super::Kernels::attention`]. Reads the tensors where they lie, without a copy.
pub(super) fn attention(
    launcher: &dyn Launch,
    query: &Tensor,
    key: &Tensor,
    value: &Tensor,
) -> Result<Option<Tensor>, TchError> {
    let [batch_size, heads, query_length, head_dim] = query.size()[..] else { return Ok(None) };
    let [_, _, key_length, _] = key.size()[..] else { return Ok(None) };
    let kind = query.kind();
    let Some((kernel, num_queries)) = kernel(kind, head_dim) else { return Ok(None) };
    let rows = [batch_size, heads, key_length, head_dim];
    let fits = key.size() == rows
        && value.size() == rows
        && [query, key, value].iter().all(|part| part.kind() == kind && part.device() == launcher.device())
        && batch_size * heads * query_length * key_length > 0
        && batch_size.max(heads) <= MOST_GRID_Y;
    let (true, Some(query_strides), Some(key_strides), Some(value_strides)) =
        (fits, strides(query), strides(key), strides(value))
    else {
        return Ok(None);
    };
    let output = Tensor::f_empty([batch_size, query_length, heads * head_dim], (kind, query.device()))?;
    let mut arguments = vec![address(query), address(key), address(value), address(&output)];
    for number in
        [query_length, key_length].into_iter().chain([query_strides, key_strides, value_strides].concat())
    {
        arguments.push(int(number)?);
    }
    arguments.push(Argument::Float((LOG2_E / (head_dim as f64).sqrt()) as f32));
    // A tile's keys and values, twice; an odd number of 16 bytes for each row.
    let row_bytes = ((head_dim / wide(kernel.dtype)) | 1) * ALIGNMENT as i64;
    let blocks = [div_ceil(query_length, num_queries), heads, batch_size];
    let grid = Grid { blocks, threads: THREADS, shared_bytes: 2 * 2 * KEYS * row_bytes };
    // SAFETY: the parameters of `attention`; shapes and strides are those of the tensors, which are where the launcher
    // computes. Freed memory goes back to libtorch's pool for this stream.
    unsafe { grid.launch(launcher, kernel, &arguments)? };
    Ok(Some(output))
}
