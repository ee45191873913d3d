// Numbers as the kernels see them: f32, f16 or bf16 in memory, f32 in registers, and 16 bytes of them at once.
#pragma once

#ifndef KERNELS_ON_HOST  // For a CPU, worker/tests/kernels/on_host.h has what lies between this and #endif.
// IEEE half precision and bfloat16, as bits. No header of the CUDA toolkit is needed for them.
struct f16 {
    unsigned short bits;
};
struct bf16 {
    unsigned short bits;
};

__device__ __forceinline__ float widen(f16 x) {
    float wide;
    asm("cvt.f32.f16 %0, %1;" : "=f"(wide) : "h"(x.bits));
    return wide;
}
__device__ __forceinline__ float widen(bf16 x) {
    return __uint_as_float(static_cast<unsigned>(x.bits) << 16);
}
// Two numbers, rounded to nearest, in one word; the first one in its low half.
template <typename T> __device__ unsigned narrow_pair(float low, float high);
template <> __device__ __forceinline__ unsigned narrow_pair<f16>(float low, float high) {
    unsigned pair;
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
    return pair;
}
template <> __device__ __forceinline__ unsigned narrow_pair<bf16>(float low, float high) {
    unsigned pair;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
    return pair;
}
#endif

__device__ __forceinline__ float widen(float x) { return x; }

template <typename T> __device__ __forceinline__ T narrow(float x) {
    return T{static_cast<unsigned short>(narrow_pair<T>(x, 0.f))};
}
template <> __device__ __forceinline__ float narrow<float>(float x) { return x; }

// 16 bytes, loaded and stored by one instruction.
struct alignas(16) Words {
    unsigned word[4];
};

// WIDTH numbers of adjacent channels, in f32. WIDTH is 1, or 16 bytes' worth where channels and addresses allow it.
template <int WIDTH> struct Lanes {
    float at[WIDTH];
};

// As they are in memory: 16 bytes, or one number.
template <typename T, int WIDTH> struct PackedAs {
    using Type = Words;
};
template <typename T> struct PackedAs<T, 1> {
    using Type = T;
};
template <typename T, int WIDTH> using Packed = typename PackedAs<T, WIDTH>::Type;

template <int WIDTH, typename T> __device__ __forceinline__ Packed<T, WIDTH> load_packed(const T *from) {
    return *reinterpret_cast<const Packed<T, WIDTH> *>(from);
}

template <int WIDTH, typename T> __device__ __forceinline__ void store_packed(T *to, const Packed<T, WIDTH> &packed) {
    *reinterpret_cast<Packed<T, WIDTH> *>(to) = packed;
}

template <typename T, int WIDTH> __device__ __forceinline__ Lanes<WIDTH> unpack(const Packed<T, WIDTH> &packed) {
    Lanes<WIDTH> lanes;
    if constexpr (WIDTH == 1) {
        lanes.at[0] = widen(packed);
    } else if constexpr (sizeof(T) == 4) {
#pragma unroll
        for (int i = 0; i < WIDTH; i++) lanes.at[i] = __uint_as_float(packed.word[i]);
    } else {
#pragma unroll
        for (int i = 0; i < WIDTH / 2; i++) {
            lanes.at[2 * i] = widen(T{static_cast<unsigned short>(packed.word[i] & 0xffff)});
            lanes.at[2 * i + 1] = widen(T{static_cast<unsigned short>(packed.word[i] >> 16)});
        }
    }
    return lanes;
}

// Rounded to T.
template <typename T, int WIDTH> __device__ __forceinline__ Packed<T, WIDTH> pack(const Lanes<WIDTH> &lanes) {
    if constexpr (WIDTH == 1) {
        return narrow<T>(lanes.at[0]);
    } else {
        Words words;
        if constexpr (sizeof(T) == 4) {
#pragma unroll
            for (int i = 0; i < WIDTH; i++) words.word[i] = __float_as_uint(lanes.at[i]);
        } else {
#pragma unroll
            for (int i = 0; i < WIDTH / 2; i++) words.word[i] = narrow_pair<T>(lanes.at[2 * i], lanes.at[2 * i + 1]);
        }
        return words;
    }
}

template <int WIDTH, typename T> __device__ __forceinline__ Lanes<WIDTH> load(const T *from) {
    return unpack<T, WIDTH>(load_packed<WIDTH>(from));
}

template <int WIDTH, typename T> __device__ __forceinline__ void store(T *to, const Lanes<WIDTH> &lanes) {
    store_packed<WIDTH>(to, pack<T, WIDTH>(lanes));
}

// The sum over a warp's 32 lanes, in every lane. Always in the same order.
__device__ __forceinline__ float warp_sum(float x) {
#pragma unroll
    for (int mask = 16; mask > 0; mask /= 2) x += __shfl_xor_sync(0xffffffffu, x, mask);
    return x;
}
