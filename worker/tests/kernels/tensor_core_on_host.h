// What worker/kernels/tensor_core.cuh leaves to a CPU: the operations of PTX that a warp does together, by the layouts that
// NVIDIA's "PTX ISA" (9.2) documents. Part of on_host.h.
//
// Sums are not a tensor core's, whose order and rounding are not documented: they are taken in f64 here. Strict where a GPU is
// slow or undefined: rows of shared memory that are askew or share banks are faults, and so is a copy that is not waited for. It
// lands at once in the one order of threads, and as late as it may in the other.
#pragma once

namespace host {
// Has the warp do `what` once all of its lanes are here, each with its own operands.
inline void together(void (*what)(void *const *), void *operands) {
    fibers[running].together = what;
    fibers[running].operands = operands;
    pause(State::Together);
}

inline bool is_shared(const void *pointer) {
    const auto address = reinterpret_cast<uintptr_t>(pointer), start = reinterpret_cast<uintptr_t>(shared);
    return address % 16 == 0 && address >= start && address + 16 <= start + sizeof shared;
}

struct Product {
    float *sum;
    const unsigned *a;
    unsigned b[2];
};
// One of two 16-bit values.
template <typename T> float widened(unsigned pair, int which) {
    return widen(T{static_cast<unsigned short>(which ? pair >> 16 : pair & 0xffffu)});
}
// "Matrix Fragments for mma.m16n8k16 with floating point type", and for K = 8 "Matrix Fragments for mma.m16n8k8", whose formulas
// are the same for as many elements as it has.
template <typename T, int K> void multiply(void *const *lanes) {
    double a[16][K], b[K][8];
    for (int lane = 0; lane < 32; lane++) {
        const Product &own = *static_cast<const Product *>(lanes[lane]);
        const int group = lane >> 2, in_group = lane % 4;
        for (int i = 0; i < K / 2; i++) {
            const int row = i < 2 || (4 <= i && i < 6) ? group : group + 8;
            a[row][in_group * 2 + (i & 1) + (i >= 4 ? 8 : 0)] = widened<T>(own.a[i / 2], i % 2);
        }
        for (int i = 0; i < K / 4; i++) b[in_group * 2 + (i & 1) + (i >= 2 ? 8 : 0)][group] = widened<T>(own.b[i / 2], i % 2);
    }
    for (int lane = 0; lane < 32; lane++) {
        const Product &own = *static_cast<const Product *>(lanes[lane]);
        for (int i = 0; i < 4; i++) {
            const int row = i < 2 ? lane >> 2 : (lane >> 2) + 8, column = lane % 4 * 2 + (i & 1);
            double sum = own.sum[i];
            for (int k = 0; k < K; k++) sum += a[row][k] * b[k][column];
            own.sum[i] = static_cast<float>(sum);
        }
    }
}

struct Matrices {
    unsigned *parts;
    const void *row;
};
// "Warp-level matrix load instruction: ldmatrix", of COUNT matrices.
template <int COUNT, bool TRANSPOSED> void load_matrices(void *const *lanes) {
    for (int matrix = 0; matrix < COUNT; matrix++) {
        unsigned short at[8][8];
        unsigned banks = 0;
        for (int row = 0; row < 8; row++) {
            const void *from = static_cast<const Matrices *>(lanes[matrix * 8 + row])->row;
            if (!is_shared(from)) return fault("a matrix's row does not lie in shared memory, or askew");
            banks |= 1u << reinterpret_cast<uintptr_t>(from) / 16 % 8;
            std::memcpy(at[row], from, 16);
        }
        // 32 banks of 4 bytes.
        if (banks != 0xffu) return fault("rows of a matrix share banks");
        for (int lane = 0; lane < 32; lane++) {
            const int row = lane / 4, column = lane % 4 * 2;
            const unsigned low = TRANSPOSED ? at[column][row] : at[row][column];
            const unsigned high = TRANSPOSED ? at[column + 1][row] : at[row][column + 1];
            static_cast<const Matrices *>(lanes[lane])->parts[matrix] = low | high << 16;
        }
    }
}
}  // namespace host

template <typename T> void multiply(T, float (&sum)[4], const unsigned (&a)[4], unsigned b0, unsigned b1) {
    host::Product own{sum, a, {b0, b1}};
    host::together(host::multiply<T, 16>, &own);
}
template <typename T> void multiply(T, float (&sum)[4], const unsigned (&a)[2], unsigned b) {
    host::Product own{sum, a, {b, 0}};
    host::together(host::multiply<T, 8>, &own);
}
template <int COUNT> void load_matrices(unsigned (&parts)[COUNT], const void *row) {
    host::Matrices own{parts, row};
    host::together(host::load_matrices<COUNT, false>, &own);
}
template <int COUNT> void load_matrices_transposed(unsigned (&parts)[COUNT], const void *row) {
    host::Matrices own{parts, row};
    host::together(host::load_matrices<COUNT, true>, &own);
}

// "cp.async", with fewer bytes of the source than are written.
inline void begin_copy(void *to, const void *from, bool is_copied) {
    const bool is_aligned = reinterpret_cast<uintptr_t>(from) % 16 == 0;
    if (!host::is_shared(to) || !is_aligned) return host::fault("a copy is not to shared memory, or askew");
    const auto copy = [=] { is_copied ? std::memcpy(to, from, 16) : std::memset(to, 0, 16); };
    if (host::is_reversed) host::fibers[host::running].copies.push_back(copy);
    else copy();
}
inline void end_copies() {
    for (const auto &copy : host::fibers[host::running].copies) copy();
    host::fibers[host::running].copies.clear();
}

// Results below the smallest normal number are 0, as ".ftz" says.
inline float power_of_two(float x) { return x < -126.f ? 0.f : std::exp2(x); }
