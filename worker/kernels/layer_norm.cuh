// LayerNorm over the last dimension of (rows, channels): a warp for each row, which it holds in registers from the one
// time that it reads it.
#pragma once
#include "number.cuh"

// Loads of a lane for its part of a row: 40 numbers of 1280 channels, the UNet's widest rows. One at a time, 10.
#define LAYER_NORM_LOADS(WIDTH) ((WIDTH) == 8 ? 5 : 10)

// `pending`, if any, has a number for each channel that is added to the input first: biases of the layers before.
template <typename T, int WIDTH>
__device__ void layer_norm(const T *__restrict__ input, const T *__restrict__ pending, const T *__restrict__ weight,
                           const T *__restrict__ bias, T *__restrict__ output, int rows, int channels, float eps) {
    constexpr int HELD = LAYER_NORM_LOADS(WIDTH);
    const int lane = threadIdx.x % 32, row = blockIdx.x * (blockDim.x / 32) + threadIdx.x / 32;
    if (row >= rows) return;
    const size_t start = static_cast<size_t>(row) * channels;
    Lanes<WIDTH> held[HELD];
    float sum = 0.f;
#pragma unroll
    for (int k = 0; k < HELD; k++) {
        const int channel = (k * 32 + lane) * WIDTH;
        if (channel < channels) {
            held[k] = load<WIDTH>(input + start + channel);
            if (pending) {
                const Lanes<WIDTH> added = load<WIDTH>(pending + channel);
#pragma unroll
                for (int i = 0; i < WIDTH; i++) held[k].at[i] += added.at[i];
            }
#pragma unroll
            for (int i = 0; i < WIDTH; i++) sum += held[k].at[i];
        }
    }
    const float mean = warp_sum(sum) / channels;
    float square = 0.f;
#pragma unroll
    for (int k = 0; k < HELD; k++) {
        if ((k * 32 + lane) * WIDTH < channels) {
#pragma unroll
            for (int i = 0; i < WIDTH; i++) {
                held[k].at[i] -= mean;
                square += held[k].at[i] * held[k].at[i];
            }
        }
    }
    const float scale = rsqrtf(warp_sum(square) / channels + eps);
#pragma unroll
    for (int k = 0; k < HELD; k++) {
        const int channel = (k * 32 + lane) * WIDTH;
        if (channel < channels) {
            const Lanes<WIDTH> weights = load<WIDTH>(weight + channel), biases = load<WIDTH>(bias + channel);
#pragma unroll
            for (int i = 0; i < WIDTH; i++) held[k].at[i] = held[k].at[i] * scale * weights.at[i] + biases.at[i];
            store<WIDTH>(output + start + channel, held[k]);
        }
    }
}
