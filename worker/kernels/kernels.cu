// All kernels under the names that worker/src/diffusion/kernels/launch.rs asks for: OPERATION_DTYPE_xWIDTH.
#include "attention.cuh"
#include "feature_map.cuh"
#include "group_norm.cuh"
#include "layer_norm.cuh"
#include "linear_step.cuh"
#include "pointwise.cuh"

// A kernel: the most threads of a block, the function template that does its work, and its parameters. The tests compile
// this file for the CPU, where KERNEL also notes how to unpack the arguments.
#ifndef KERNEL
#define KERNEL(NAME, THREADS, BODY, PARAMETERS, ARGUMENTS) \
    extern "C" __global__ void __launch_bounds__(THREADS) NAME PARAMETERS { BODY ARGUMENTS; }
// In place of THREADS where so many blocks are to fit on a multiprocessor: bounds the registers of a thread.
#define BLOCKS(THREADS, COUNT) THREADS, COUNT
#endif
// Commas within a macro's argument.
#define TEMPLATE(BODY, T, WIDTH) BODY<T, WIDTH>

#define KERNELS(DTYPE, T, WIDTH)                                                                                              \
    KERNEL(group_norm_stats_##DTYPE##_x##WIDTH, 1024, TEMPLATE(group_norm_stats, T, WIDTH),                                          \
           (const T *input, const T *addend, float2 *partials, int pixels, int channels, int groups, int chunk,                \
            int addend_stride),                                                                                                \
           (input, addend, partials, pixels, channels, groups, chunk, addend_stride))                                          \
    KERNEL(group_norm_apply_##DTYPE##_x##WIDTH, 1024, TEMPLATE(group_norm_apply, T, WIDTH),                                          \
           (const T *input, const T *addend, const float2 *partials, const T *weight, const T *bias, T *output, int pixels,    \
            int channels, int groups, int chunk, int addend_stride, float eps, int silu),                                      \
           (input, addend, partials, weight, bias, output, pixels, channels, groups, chunk, addend_stride, eps, silu))         \
    KERNEL(layer_norm_##DTYPE##_x##WIDTH, 256, TEMPLATE(layer_norm, T, WIDTH),                                                      \
           (const T *input, const T *pending, const T *weight, const T *bias, T *output, int rows, int channels, float eps),   \
           (input, pending, weight, bias, output, rows, channels, eps))                                                        \
    KERNEL(geglu_##DTYPE##_x##WIDTH, 256, TEMPLATE(geglu, T, WIDTH),                                                                \
           (const T *input, const T *bias, T *output, unsigned vectors, unsigned channels),                                    \
           (input, bias, output, vectors, channels))                                                                           \
    KERNEL(add_bias_residual_##DTYPE##_x##WIDTH, 1024, TEMPLATE(add_bias_residual, T, WIDTH),                                  \
           (const T *map, const T *bias, const T *residual, T *output, float2 *partials, int pixels, int channels, int groups, \
            int chunk),                                                                                                        \
           (map, bias, residual, output, partials, pixels, channels, groups, chunk))                                           \
    KERNEL(cat_channels_##DTYPE##_x##WIDTH, 1024, TEMPLATE(cat_channels, T, WIDTH),                                            \
           (const T *first, const T *second, T *output, float2 *partials, int pixels, int channels, int first_channels,        \
            int groups, int chunk),                                                                                            \
           (first, second, output, partials, pixels, channels, first_channels, groups, chunk))

#define LINEAR_STEP(DTYPE, T)                                                                                                  \
    KERNEL(linear_step_##DTYPE##_x1, 256, linear_step<T>,                                                                             \
           (const T *noise, const float *guidance, const float *numbers, float *kept, T *sample, int cells, int rows),          \
           (noise, guidance, numbers, kept, sample, cells, rows))

#define ATTENTION(DTYPE, T, HEAD)                                                                                              \
    KERNEL(attention_##HEAD##_##DTYPE##_x8, BLOCKS(128, 3), TEMPLATE(attention, T, HEAD),                                                        \
           (const T *query, const T *key, const T *value, T *output, int query_length, int key_length, int query_batch,         \
            int query_head, int query_row, int key_batch, int key_head, int key_row, int value_batch, int value_head,           \
            int value_row, float scale),                                                                                        \
           (query, key, value, output, query_length, key_length, query_batch, query_head, query_row, key_batch, key_head,       \
            key_row, value_batch, value_head, value_row, scale))

KERNELS(f32, float, 4)
KERNELS(f32, float, 1)
KERNELS(f16, f16, 8)
KERNELS(f16, f16, 1)
KERNELS(bf16, bf16, 8)
KERNELS(bf16, bf16, 1)
LINEAR_STEP(f32, float)
LINEAR_STEP(f16, f16)
LINEAR_STEP(bf16, bf16)
ATTENTION(f16, f16, 40)
ATTENTION(f16, f16, 80)
ATTENTION(bf16, bf16, 40)
ATTENTION(bf16, bf16, 80)
