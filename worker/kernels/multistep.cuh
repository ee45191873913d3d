// Guidance and one step of a linear multistep noise scheduler (PNDM without Runge-Kutta steps), and the UNet's next input.
//
// What a step does is read from row `*step` of `table` (beyond its `rows`, the last), on the device, so that a captured
// graph can be replayed for every step. A row says how much of what makes the new latents, where the model's output is kept,
// and whether the latents are:
//     latents, kept latents, output, history 0, 1, 2; the output's place in the history, or -1; 1 to keep the latents
#pragma once
#include "number.cuh"

#define MULTISTEP_HISTORY 3
#define MULTISTEP_ROW (3 + MULTISTEP_HISTORY + 2)

// `noise` is (pictures, 2, cells) with guidance, without text first, and (pictures, cells) where `guidance`, a number for
// each picture, is null. `latents` and `kept` are (pictures, cells) and `history` (3, pictures, cells), in f32 and changed.
// `next`, of the shape of `noise`, becomes the latents in the UNet's dtype.
template <typename T>
__device__ void multistep(const T *__restrict__ noise, const float *__restrict__ guidance, const float *__restrict__ table,
                          const long long *__restrict__ step, float *__restrict__ latents, float *__restrict__ kept,
                          float *__restrict__ history, T *__restrict__ next, int cells, int rows) {
    const int cell = blockIdx.x * blockDim.x + threadIdx.x;
    if (cell >= cells) return;
    const float *row = table + (*step < rows ? *step : rows - 1) * MULTISTEP_ROW;
    const size_t at = static_cast<size_t>(blockIdx.y) * cells + cell;
    const size_t size = static_cast<size_t>(gridDim.y) * cells;
    float output;
    if (guidance) {
        const size_t pair = 2 * static_cast<size_t>(blockIdx.y) * cells + cell;
        const float without = widen(noise[pair]);
        output = without + guidance[blockIdx.y] * (widen(noise[pair + cells]) - without);
    } else {
        output = widen(noise[at]);
    }
    const float before = latents[at];
    float after = row[0] * before + row[2] * output;
    // What was never written is not read: it may be anything, and 0 times NaN is NaN.
    if (row[1] != 0.f) after += row[1] * kept[at];
#pragma unroll
    for (int i = 0; i < MULTISTEP_HISTORY; i++)
        if (row[3 + i] != 0.f) after += row[3 + i] * history[i * size + at];
    const int place = static_cast<int>(row[3 + MULTISTEP_HISTORY]);
    if (place >= 0) history[place * size + at] = output;
    if (row[4 + MULTISTEP_HISTORY] != 0.f) kept[at] = before;
    latents[at] = after;
    if (guidance) {
        const size_t pair = 2 * static_cast<size_t>(blockIdx.y) * cells + cell;
        next[pair] = next[pair + cells] = narrow<T>(after);
    } else {
        next[at] = narrow<T>(after);
    }
}
