// What writes a feature map that a GroupNorm reads next: it does the norm's first pass on the way, with the same threads in the
// same order on the same numbers, so `partials` are the bits that `group_norm_stats` would find. Grid and shared memory are that
// pass's.
#pragma once
#include "group_norm.cuh"

// `output` (samples, pixels, channels) is `map` + `bias` + `residual`: one for each channel, one for each number; null where
// there is none.
template <typename T, int WIDTH>
__device__ void add_bias_residual(const T *__restrict__ map, const T *__restrict__ bias, const T *__restrict__ residual,
                                  T *__restrict__ output, float2 *__restrict__ partials, int pixels, int channels, int groups,
                                  int chunk) {
    const Part<WIDTH> part(pixels, channels, chunk);
    const Packed<T, WIDTH> biases = bias && part.row < part.rows ? load_packed<WIDTH>(bias + part.channel) : Packed<T, WIDTH>{};
    const auto read = [&](int pixel) {
        const size_t at = part.at(pixel, channels);
        const Packed<T, WIDTH> residuals = residual ? load_packed<WIDTH>(residual + at) : Packed<T, WIDTH>{};
        const Lanes<WIDTH> added = unpack<T, WIDTH>(residuals), pending = unpack<T, WIDTH>(biases);
        Lanes<WIDTH> lanes = load<WIDTH>(map + at);
#pragma unroll
        for (int i = 0; i < WIDTH; i++) lanes.at[i] += pending.at[i] + added.at[i];
        return pack<T, WIDTH>(lanes);
    };
    const auto write = [&](int pixel, const Packed<T, WIDTH> &packed) {
        store_packed<WIDTH>(output + part.at(pixel, channels), packed);
    };
    // One at a time, which is two loads: for more, threads need so many registers that only one block finds room.
    group_partials<1, T>(part, read, write, output, nullptr, partials, channels, groups, 0);
}

// `output` (samples, pixels, channels) has the channels of `first`, which are `first_channels`, and then those of `second`. Both
// counts are multiples of WIDTH.
template <typename T, int WIDTH>
__device__ void cat_channels(const T *__restrict__ first, const T *__restrict__ second, T *__restrict__ output,
                             float2 *__restrict__ partials, int pixels, int channels, int first_channels, int groups, int chunk) {
    const Part<WIDTH> part(pixels, channels, chunk);
    const bool is_first = part.channel < first_channels;
    const int stride = is_first ? first_channels : channels - first_channels;
    const T *own = is_first ? first + part.channel : second + (part.channel - first_channels);
    const auto read = [&](int pixel) { return load_packed<WIDTH>(own + (part.sample + pixel) * stride); };
    const auto write = [&](int pixel, const Packed<T, WIDTH> &packed) {
        store_packed<WIDTH>(output + part.at(pixel, channels), packed);
    };
    group_partials<WIDTH == 1 ? 1 : 2, T>(part, read, write, output, nullptr, partials, channels, groups, 0);
}
