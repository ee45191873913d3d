// What is done to each number by itself, with a number for each channel: a thread for each WIDTH of them.
#pragma once
#include "number.cuh"

// GEGLU: (rows, 2 * channels) to (rows, channels), the first half times the exact GELU, by erf, of the second. `bias`, if
// any, has 2 * channels numbers that are added first.
template <typename T, int WIDTH>
__device__ void geglu(const T *__restrict__ input, const T *__restrict__ bias, T *__restrict__ output, unsigned vectors,
                      unsigned channels) {
    const unsigned index = blockIdx.x * blockDim.x + threadIdx.x;
    if (index >= vectors) return;
    const unsigned columns = channels / WIDTH, row = index / columns, channel = (index - row * columns) * WIDTH;
    const T *own = input + static_cast<size_t>(row) * 2 * channels + channel;
    Lanes<WIDTH> values = load<WIDTH>(own), gates = load<WIDTH>(own + channels);
    if (bias) {
        const Lanes<WIDTH> value_bias = load<WIDTH>(bias + channel), gate_bias = load<WIDTH>(bias + channels + channel);
#pragma unroll
        for (int i = 0; i < WIDTH; i++) {
            values.at[i] += value_bias.at[i];
            gates.at[i] += gate_bias.at[i];
        }
    }
#pragma unroll
    for (int i = 0; i < WIDTH; i++) {
        const float gate = gates.at[i];
        values.at[i] *= 0.5f * gate * (1.f + erff(gate * 0.70710678f));
    }
    store<WIDTH>(output + static_cast<size_t>(row) * channels + channel, values);
}
