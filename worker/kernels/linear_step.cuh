// Guidance and one step of a noise scheduler whose steps are sums with numbers known ahead (PNDM without Runge-Kutta steps,
// DDIM, Euler, DPM++ 2M): what worker/src/diffusion/schedulers/linear.rs describes.
//
// What a step does is read from `numbers`, on the device, so that a captured graph can be replayed for every step.
#pragma once
#include "number.cuh"

// The most tensors that a scheduler keeps.
#define LINEAR_STEP_ROWS 6

// `noise` is (2, pictures, cells) with guidance, all without their texts first, and (pictures, cells) where `guidance`, a number
// for each picture, is null. `kept` is (rows, pictures, cells) in f32 and changed; its first row becomes the new sample, which is
// also written to `sample` (pictures, cells) in the UNet's dtype. `numbers` are one that is not used here and then, for each row,
// the weights of all kept rows and of the output.
//
// Products and sums are rounded one by one and in the order of the plain operations: fused, they would be other bits.
template <typename T>
__device__ void linear_step(const T *__restrict__ noise, const float *__restrict__ guidance, const float *__restrict__ numbers,
                            float *__restrict__ kept, T *__restrict__ sample, int cells, int rows) {
    const int cell = blockIdx.x * blockDim.x + threadIdx.x;
    if (cell >= cells) return;
    const size_t at = static_cast<size_t>(blockIdx.y) * cells + cell, size = static_cast<size_t>(gridDim.y) * cells;
    float output = widen(noise[at]);
    if (guidance) {
        const float difference = __fsub_rn(widen(noise[size + at]), output);
        output = __fadd_rn(__fmul_rn(difference, guidance[blockIdx.y]), output);
    }
    float before[LINEAR_STEP_ROWS];
#pragma unroll
    for (int i = 0; i < LINEAR_STEP_ROWS; i++)
        if (i < rows) before[i] = kept[i * size + at];
    const float *weights = numbers + 1;
    for (int row = 0; row < rows; row++, weights += rows + 1) {
        float after = __fmul_rn(weights[rows], output);
#pragma unroll
        for (int i = 0; i < LINEAR_STEP_ROWS; i++)
            if (i < rows) after = __fadd_rn(after, __fmul_rn(weights[i], before[i]));
        kept[row * size + at] = after;
        if (row == 0) sample[at] = narrow<T>(after);
    }
}
