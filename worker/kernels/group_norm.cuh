// GroupNorm, with SiLU if asked for, over (samples, pixels, channels): channels_last without its height and width.
//
// Two passes over the same grid, (chunks of pixels, samples), with the same threads: `columns` of them side by side, one
// for each WIDTH channels, and as many rows of such as fit; a row takes every rows-th pixel of its chunk. Threads that
// are left over only help with sums. Chunks depend on pixels and channels alone, and all sums are taken in a fixed
// order, so a sample's result depends neither on the batch nor on the run.
//
// `addend`, if any, is added to the input as it is read: a number for each channel, `addend_stride` apart from one sample
// to the next (0: the same for all). A convolution's bias and the time embedding come in by it, without a pass of their own.
#pragma once
#include "number.cuh"

// A thread's part of a feature map: WIDTH channels from `channel` on, in every rows-th pixel of its block's chunk.
template <int WIDTH> struct Part {
    int rows, row, channel, first, end;
    // Where its sample starts, in pixels.
    size_t sample;

    __device__ __forceinline__ Part(int pixels, int channels, int chunk)
        : rows(blockDim.x / (channels / WIDTH)),
          row(threadIdx.x / (channels / WIDTH)),
          channel(threadIdx.x % (channels / WIDTH) * WIDTH),
          first(blockIdx.x * chunk),
          end(min(first + chunk, pixels)),
          sample(static_cast<size_t>(blockIdx.y) * pixels) {}

    // Where its channels of one of the sample's pixels are.
    __device__ __forceinline__ size_t at(int pixel, int channels) const {
        return (sample + pixel) * channels + channel;
    }
};

// Mean and sum of squared differences from it, of each group of the block's chunk: `partials` is (samples, groups, chunks).
// `read` gives a thread's part of a pixel as the norm will find it, `write` puts it there; by the end of the chunk it is found in
// `map`. Differences are taken from the chunk's first pixel, so that a channel far from zero keeps its digits. BATCH pixels are
// read before the first of them is used: the compiler does not move loads over a loop's end by itself.
// Shared memory: 2 * rows * channels floats.
template <int BATCH, typename T, int WIDTH, typename Read, typename Write>
__device__ __forceinline__ void group_partials(const Part<WIDTH> &part, Read read, Write write, const T *map, const T *addend,
                                               float2 *partials, int channels, int groups, int addend_stride) {
    extern __shared__ float shared[];
    float *sums = shared, *squares = shared + part.rows * channels;

    if (part.row < part.rows) {
        const Lanes<WIDTH> origin = unpack<T, WIDTH>(read(part.first));
        float sum[WIDTH], square[WIDTH];
#pragma unroll
        for (int i = 0; i < WIDTH; i++) sum[i] = square[i] = 0.f;
        const auto take = [&](int pixel, const Packed<T, WIDTH> &packed) {
            write(pixel, packed);
            const Lanes<WIDTH> lanes = unpack<T, WIDTH>(packed);
#pragma unroll
            for (int i = 0; i < WIDTH; i++) {
                const float difference = lanes.at[i] - origin.at[i];
                sum[i] += difference;
                square[i] += difference * difference;
            }
        };
        int pixel = part.first + part.row;
#pragma unroll 1
        for (; pixel + (BATCH - 1) * part.rows < part.end; pixel += BATCH * part.rows) {
            Packed<T, WIDTH> batch[BATCH];
#pragma unroll
            for (int i = 0; i < BATCH; i++) batch[i] = read(pixel + i * part.rows);
#pragma unroll
            for (int i = 0; i < BATCH; i++) take(pixel + i * part.rows, batch[i]);
        }
        if constexpr (BATCH > 1) {
#pragma unroll 1
            for (; pixel < part.end; pixel += part.rows) take(pixel, read(pixel));
        }
#pragma unroll
        for (int i = 0; i < WIDTH; i++) {
            sums[part.row * channels + part.channel + i] = sum[i];
            squares[part.row * channels + part.channel + i] = square[i];
        }
    }
    __syncthreads();

    // Each channel's mean and squares, in place of its first row's sums.
    const float count = static_cast<float>(part.end - part.first);
#pragma unroll 1
    for (int channel = threadIdx.x; channel < channels; channel += blockDim.x) {
        float sum = 0.f, square = 0.f;
#pragma unroll 1
        for (int i = 0; i < part.rows; i++) {
            sum += sums[i * channels + channel];
            square += squares[i * channels + channel];
        }
        const float offset = sum / count;
        float mean = widen(map[(part.sample + part.first) * channels + channel]) + offset;
        if (addend) mean += widen(addend[static_cast<size_t>(blockIdx.y) * addend_stride + channel]);
        sums[channel] = mean;
        squares[channel] = fmaxf(square - sum * offset, 0.f);
    }
    __syncthreads();

    const int lane = threadIdx.x % 32, group_channels = channels / groups;
#pragma unroll 1
    for (int group = threadIdx.x / 32; group < groups; group += blockDim.x / 32) {
        const float *means = sums + group * group_channels, *of_channels = squares + group * group_channels;
        float sum = 0.f, square = 0.f;
#pragma unroll 1
        for (int i = lane; i < group_channels; i += 32) sum += means[i];
        const float mean = warp_sum(sum) / group_channels;
#pragma unroll 1
        for (int i = lane; i < group_channels; i += 32) {
            const float difference = means[i] - mean;
            square += of_channels[i] + count * difference * difference;
        }
        square = warp_sum(square);
        if (lane == 0)
            partials[(static_cast<size_t>(blockIdx.y) * groups + group) * gridDim.x + blockIdx.x] = make_float2(mean, square);
    }
}

// The first pass by itself.
template <typename T, int WIDTH>
__device__ void group_norm_stats(const T *__restrict__ input, const T *__restrict__ addend, float2 *__restrict__ partials,
                                 int pixels, int channels, int groups, int chunk, int addend_stride) {
    const Part<WIDTH> part(pixels, channels, chunk);
    const auto read = [&](int pixel) { return load_packed<WIDTH>(input + part.at(pixel, channels)); };
    const auto leave = [](int, const Packed<T, WIDTH> &) {};
    group_partials<WIDTH == 1 ? 1 : 4>(part, read, leave, input, addend, partials, channels, groups, addend_stride);
}

// The normalized input, from what the first pass left in `partials`. Shared memory: 2 * groups floats.
template <typename T, int WIDTH>
__device__ void group_norm_apply(const T *__restrict__ input, const T *__restrict__ addend, const float2 *__restrict__ partials,
                                 const T *__restrict__ weight, const T *__restrict__ bias, T *__restrict__ output, int pixels,
                                 int channels, int groups, int chunk, int addend_stride, float eps, int silu) {
    extern __shared__ float shared[];
    float *means = shared, *scales = shared + groups;
    const int lane = threadIdx.x % 32, group_channels = channels / groups, chunks = gridDim.x;
#pragma unroll 1
    for (int group = threadIdx.x / 32; group < groups; group += blockDim.x / 32) {
        const float2 *of_group = partials + (static_cast<size_t>(blockIdx.y) * groups + group) * chunks;
        float sum = 0.f, square = 0.f;
#pragma unroll 1
        for (int i = lane; i < chunks; i += 32) {
            const float count = static_cast<float>(min(chunk, pixels - i * chunk));
            sum += count * of_group[i].x;
        }
        const float mean = warp_sum(sum) / pixels;
#pragma unroll 1
        for (int i = lane; i < chunks; i += 32) {
            const float count = static_cast<float>(min(chunk, pixels - i * chunk)) * group_channels;
            const float difference = of_group[i].x - mean;
            square += of_group[i].y + count * difference * difference;
        }
        square = warp_sum(square);
        if (lane == 0) {
            means[group] = mean;
            scales[group] = rsqrtf(square / (static_cast<float>(pixels) * group_channels) + eps);
        }
    }
    __syncthreads();

    const int columns = channels / WIDTH, rows = blockDim.x / columns;
    const int column = threadIdx.x % columns, row = threadIdx.x / columns;
    if (row >= rows) return;
    const Lanes<WIDTH> weights = load<WIDTH>(weight + column * WIDTH), biases = load<WIDTH>(bias + column * WIDTH);
    Lanes<WIDTH> offsets;
    if (addend) {
        offsets = load<WIDTH>(addend + static_cast<size_t>(blockIdx.y) * addend_stride + column * WIDTH);
    } else {
#pragma unroll
        for (int i = 0; i < WIDTH; i++) offsets.at[i] = 0.f;
    }
    float scale[WIDTH], shift[WIDTH];
    // A group may end within the lanes.
    int group = column * WIDTH / group_channels, group_end = (group + 1) * group_channels;
#pragma unroll
    for (int i = 0; i < WIDTH; i++) {
        if (column * WIDTH + i == group_end) {
            group++;
            group_end += group_channels;
        }
        scale[i] = scales[group] * weights.at[i];
        shift[i] = (offsets.at[i] - means[group]) * scale[i] + biases.at[i];
    }
    const int first = blockIdx.x * chunk, end = min(first + chunk, pixels);
    const size_t own = static_cast<size_t>(blockIdx.y) * pixels * channels + column * WIDTH;
#pragma unroll 2
    for (int pixel = first + row; pixel < end; pixel += rows) {
        const size_t at = own + static_cast<size_t>(pixel) * channels;
        Lanes<WIDTH> lanes = load<WIDTH>(input + at);
#pragma unroll
        for (int i = 0; i < WIDTH; i++) {
            const float normalized = lanes.at[i] * scale[i] + shift[i];
            // Where exp overflows, dividing by infinity gives the 0 that is the limit.
            lanes.at[i] = silu ? __fdividef(normalized, 1.f + __expf(-normalized)) : normalized;
        }
        store<WIDTH>(output + at, lanes);
    }
}
