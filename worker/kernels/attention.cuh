// Attention without the matrix of its weights in memory, for heads of HEAD values, by tensor cores:
// softmax(query · keyᵀ / √HEAD) · value for each head of each sample.
//
// A block has QUERIES queries of one head, and each of its warps 16 times PARTS of them, which stay in registers while the head's
// keys and values come by in tiles of KEYS: one half of shared memory is computed with while the next tile is copied into the
// other. What was summed so far is scaled down when a larger score comes along ("online softmax"), so scores are never in memory.
// Products are of 16-bit values, to which weights are rounded for the second one; all else is in f32.
//
// A query's sums are taken in an order that depends on the number of keys alone, so a sample's result depends neither on the
// batch nor on the run.
#pragma once
#include "tensor_core.cuh"

template <int HEAD> struct AttentionTiles {
    static_assert(HEAD % 8 == 0);
    static constexpr int WARPS = 4, THREADS = 32 * WARPS;
    // With 32 queries in a warp, what it loads of keys and values serves twice; of 80 values each they would take all registers.
    static constexpr int PARTS = HEAD <= 40 ? 2 : 1;
    static constexpr int QUERIES = 16 * PARTS * WARPS, KEYS = 64;
    // Pieces of 16 bytes in a row, the unit of copies and of `load_matrices`.
    static constexpr int CHUNKS = HEAD / 8;
    // Values from one row to the next in shared memory: an odd number of chunks, so that eight rows are in different banks.
    static constexpr int STRIDE = (CHUNKS | 1) * 8;
    // Values of a tile, keys and then values.
    static constexpr int TILE = 2 * KEYS * STRIDE;
    static_assert(QUERIES <= 2 * KEYS);  // They come by way of the second tile's place.
};

// Begins to copy ROWS rows of a head to shared memory, from the `first` one on; those beyond `length` become zeros.
template <int HEAD, int ROWS, typename T>
__device__ __forceinline__ void begin_copy_rows(T *to, const T *from, int first, int length, int stride) {
    using Tiles = AttentionTiles<HEAD>;
#pragma unroll
    for (int i = threadIdx.x; i < ROWS * Tiles::CHUNKS; i += Tiles::THREADS) {
        const int row = i / Tiles::CHUNKS, chunk = i % Tiles::CHUNKS;
        const bool is_there = first + row < length;
        const T *source = from + (is_there ? (first + row) * stride + chunk * 8 : 0);
        begin_copy(to + row * Tiles::STRIDE + chunk * 8, source, is_there);
    }
}

// The largest value, or the sum, of the four lanes that hold a row of a fragment.
__device__ __forceinline__ float row_max(float x) {
    x = fmaxf(x, __shfl_xor_sync(0xffffffffu, x, 1));
    return fmaxf(x, __shfl_xor_sync(0xffffffffu, x, 2));
}
__device__ __forceinline__ float row_sum(float x) {
    x += __shfl_xor_sync(0xffffffffu, x, 1);
    return x + __shfl_xor_sync(0xffffffffu, x, 2);
}

// `query`, `key` and `value` have rows of HEAD numbers side by side, each with strides of its own for batch, head and row, so that
// they can be parts of one product. Rows begin at multiples of 16 bytes; there is at least one key. `output` is (batch,
// query_length, heads, HEAD). `scale` is the scores', times log2(e). The grid is (tiles of queries, heads, batch). Shared memory:
// 2 tiles.
template <typename T, int HEAD>
__device__ void attention(const T *__restrict__ query, const T *__restrict__ key, const T *__restrict__ value,
                          T *__restrict__ output, int query_length, int key_length, int query_batch, int query_head,
                          int query_row, int key_batch, int key_head, int key_row, int value_batch, int value_head,
                          int value_row, float scale) {
    using Tiles = AttentionTiles<HEAD>;
    constexpr int STRIDE = Tiles::STRIDE, KEYS = Tiles::KEYS, PARTS = Tiles::PARTS;
    // Steps of 16 through a head's values for the scores; 8 may be left.
    constexpr int STEPS = HEAD / 16;
    constexpr bool HAS_REST = HEAD % 16 != 0;
    const float LEAST = __uint_as_float(0xff800000u);  // Minus infinity.

    extern __shared__ float shared[];  // Begins at a multiple of 16 bytes, as the cubins' sections say.
    T *const tiles = reinterpret_cast<T *>(shared);
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    const int first_query = blockIdx.x * Tiles::QUERIES, own_rows = warp * 16 * PARTS;
    query += static_cast<size_t>(blockIdx.z) * query_batch + static_cast<size_t>(blockIdx.y) * query_head;
    key += static_cast<size_t>(blockIdx.z) * key_batch + static_cast<size_t>(blockIdx.y) * key_head;
    value += static_cast<size_t>(blockIdx.z) * value_batch + static_cast<size_t>(blockIdx.y) * value_head;

    // Queries beyond the last one are zeros, and what is made of them is dropped.
    T *const staged = tiles + Tiles::TILE;
    begin_copy_rows<HEAD, Tiles::QUERIES>(staged, query, first_query, query_length, query_row);
    begin_copy_rows<HEAD, KEYS>(tiles, key, 0, key_length, key_row);
    begin_copy_rows<HEAD, KEYS>(tiles + KEYS * STRIDE, value, 0, key_length, value_row);
    end_copies();
    __syncthreads();
    unsigned queries[PARTS][STEPS][4], queries_rest[PARTS][2];
#pragma unroll
    for (int part = 0; part < PARTS; part++) {
        const T *row = staged + (own_rows + part * 16 + lane % 16) * STRIDE;
#pragma unroll
        for (int step = 0; step < STEPS; step++) load_matrices(queries[part][step], row + step * 16 + lane / 16 * 8);
        if constexpr (HAS_REST) load_matrices(queries_rest[part], row + STEPS * 16);
    }

    // Of each part, rows g and g+8 of a lane 4g + t: the largest score so far, scaled, and this lane's part of the sum of weights.
    float largest[PARTS][2], weight_sum[PARTS][2], sum[PARTS][Tiles::CHUNKS][4];
#pragma unroll
    for (int part = 0; part < PARTS; part++) {
        largest[part][0] = largest[part][1] = LEAST;
        weight_sum[part][0] = weight_sum[part][1] = 0.f;
#pragma unroll
        for (int column = 0; column < Tiles::CHUNKS; column++)
#pragma unroll
            for (int i = 0; i < 4; i++) sum[part][column][i] = 0.f;
    }

#pragma unroll 1
    for (int first = 0; first < key_length; first += KEYS) {
        const T *const keys = tiles + first / KEYS % 2 * Tiles::TILE, *const values = keys + KEYS * STRIDE;
        // This tile is there, and no thread reads the other one (or the queries) any more.
        end_copies();
        __syncthreads();
        if (first + KEYS < key_length) {
            T *const next = tiles + (first / KEYS + 1) % 2 * Tiles::TILE;
            begin_copy_rows<HEAD, KEYS>(next, key, first + KEYS, key_length, key_row);
            begin_copy_rows<HEAD, KEYS>(next + KEYS * STRIDE, value, first + KEYS, key_length, value_row);
        }

        float scores[PARTS][KEYS / 8][4];
#pragma unroll
        for (int column = 0; column < KEYS / 8; column += 2) {
#pragma unroll
            for (int part = 0; part < PARTS; part++)
#pragma unroll
                for (int i = 0; i < 4; i++) scores[part][column][i] = scores[part][column + 1][i] = 0.f;
            // Of 16 keys: those of the first eight, left and right, and those of the other eight.
            const T *row = keys + (column * 8 + lane / 16 * 8 + lane % 8) * STRIDE;
#pragma unroll
            for (int step = 0; step < STEPS; step++) {
                unsigned of_keys[4];
                load_matrices(of_keys, row + step * 16 + lane / 8 % 2 * 8);
#pragma unroll
                for (int part = 0; part < PARTS; part++) {
                    multiply(T(), scores[part][column], queries[part][step], of_keys[0], of_keys[1]);
                    multiply(T(), scores[part][column + 1], queries[part][step], of_keys[2], of_keys[3]);
                }
            }
            if constexpr (HAS_REST) {
                unsigned of_keys[2];
                load_matrices(of_keys, keys + (column * 8 + lane % 16) * STRIDE + STEPS * 16);
#pragma unroll
                for (int part = 0; part < PARTS; part++) {
                    multiply(T(), scores[part][column], queries_rest[part], of_keys[0]);
                    multiply(T(), scores[part][column + 1], queries_rest[part], of_keys[1]);
                }
            }
        }
        if (first + KEYS > key_length) {
#pragma unroll
            for (int column = 0; column < KEYS / 8; column++)
#pragma unroll
                for (int i = 0; i < 4; i++)
                    if (first + column * 8 + lane % 4 * 2 + i % 2 >= key_length) {
#pragma unroll
                        for (int part = 0; part < PARTS; part++) scores[part][column][i] = LEAST;
                    }
        }

        // The weights, in place of the scores. There is a key in every tile, so the largest is a number.
#pragma unroll
        for (int part = 0; part < PARTS; part++)
#pragma unroll
            for (int half = 0; half < 2; half++) {
                float top = LEAST;
#pragma unroll
                for (int column = 0; column < KEYS / 8; column++)
                    top = fmaxf(top, fmaxf(scores[part][column][2 * half], scores[part][column][2 * half + 1]));
                top = fmaxf(largest[part][half], row_max(top) * scale);
                const float shrink = power_of_two(largest[part][half] - top);
                largest[part][half] = top;
                float weights = weight_sum[part][half] * shrink;
#pragma unroll
                for (int column = 0; column < KEYS / 8; column++)
#pragma unroll
                    for (int i = 2 * half; i < 2 * half + 2; i++) {
                        const float weight = power_of_two(fmaf(scores[part][column][i], scale, -top));
                        weights += weight;
                        scores[part][column][i] = weight;
                    }
                weight_sum[part][half] = weights;
#pragma unroll
                for (int column = 0; column < Tiles::CHUNKS; column++) {
                    sum[part][column][2 * half] *= shrink;
                    sum[part][column][2 * half + 1] *= shrink;
                }
            }

        // A fragment of f32 sums is, rounded, one of a factor.
#pragma unroll
        for (int step = 0; step < KEYS / 16; step++) {
            unsigned weights[PARTS][4];
#pragma unroll
            for (int part = 0; part < PARTS; part++)
#pragma unroll
                for (int i = 0; i < 4; i++) {
                    const float *pair = &scores[part][2 * step + i / 2][i % 2 * 2];
                    weights[part][i] = narrow_pair<T>(pair[0], pair[1]);
                }
            const T *row = values + (step * 16 + lane % 16) * STRIDE;
#pragma unroll
            for (int column = 0; column + 1 < Tiles::CHUNKS; column += 2) {
                unsigned of_values[4];
                load_matrices_transposed(of_values, row + (column + lane / 16) * 8);
#pragma unroll
                for (int part = 0; part < PARTS; part++) {
                    multiply(T(), sum[part][column], weights[part], of_values[0], of_values[1]);
                    multiply(T(), sum[part][column + 1], weights[part], of_values[2], of_values[3]);
                }
            }
            if constexpr (Tiles::CHUNKS % 2 != 0) {
                unsigned of_values[2];
                load_matrices_transposed(of_values, row + (Tiles::CHUNKS - 1) * 8);
#pragma unroll
                for (int part = 0; part < PARTS; part++)
                    multiply(T(), sum[part][Tiles::CHUNKS - 1], weights[part], of_values[0], of_values[1]);
            }
        }
    }

    // By way of shared memory, so that a row is written in pieces of 16 bytes.
    __syncthreads();
#pragma unroll
    for (int part = 0; part < PARTS; part++)
#pragma unroll
        for (int half = 0; half < 2; half++) {
            const float share = 1.f / row_sum(weight_sum[part][half]);
            T *const row = tiles + (own_rows + part * 16 + half * 8 + lane / 4) * STRIDE + lane % 4 * 2;
#pragma unroll
            for (int column = 0; column < Tiles::CHUNKS; column++)
                *reinterpret_cast<unsigned *>(row + column * 8) =
                    narrow_pair<T>(sum[part][column][2 * half] * share, sum[part][column][2 * half + 1] * share);
        }
    __syncthreads();
    const size_t output_row = static_cast<size_t>(gridDim.y) * HEAD;
    output += (static_cast<size_t>(blockIdx.z) * query_length + first_query) * output_row + static_cast<size_t>(blockIdx.y) * HEAD;
#pragma unroll
    for (int i = threadIdx.x; i < Tiles::QUERIES * Tiles::CHUNKS; i += Tiles::THREADS) {
        const int row = i / Tiles::CHUNKS, chunk = i % Tiles::CHUNKS;
        if (first_query + row < query_length)
            *reinterpret_cast<Words *>(output + row * output_row + chunk * 8) =
                *reinterpret_cast<const Words *>(tiles + row * STRIDE + chunk * 8);
    }
}
