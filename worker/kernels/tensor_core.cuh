// What attention needs of PTX (inline, as no header of the CUDA toolkit is at hand): products of small matrices by tensor
// cores, their operands out of shared memory, and copies into shared memory that go on while threads compute. All from
// sm_80 on. Titles are those of sections of NVIDIA's "PTX ISA" (9.2; matrices and their fragments are 9.7.14.5).
//
// A warp holds a matrix in fragments. Lane 4g + t has, of an 8×8 matrix of 16-bit values, those at row g and columns 2t and
// 2t+1, the first one in the low half of a register; of an f32 one, those two in two registers.
#pragma once
#include "number.cuh"

#ifndef KERNELS_ON_HOST  // For a CPU, worker/tests/kernels/tensor_core_on_host.h has what lies between this and #endif.
__device__ __forceinline__ unsigned shared_address(const void *pointer) {
    return static_cast<unsigned>(__cvta_generic_to_shared(pointer));
}

// sum (16×8) += a (16×16) · b (16×8). The 8×8 parts of `a` are in the order upper left, lower left, upper right, lower right;
// those of `b`, upper and lower, are held as the transposed: "Matrix Fragments for mma.m16n8k16 with floating point type".
#define MULTIPLY_16(T, NAME)                                                                                                  \
    __device__ __forceinline__ void multiply(T, float (&sum)[4], const unsigned (&a)[4], unsigned b0, unsigned b1) {          \
        asm("mma.sync.aligned.m16n8k16.row.col.f32." NAME "." NAME ".f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, "             \
            "{%0,%1,%2,%3};"                                                                                                  \
            : "+f"(sum[0]), "+f"(sum[1]), "+f"(sum[2]), "+f"(sum[3])                                                          \
            : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));                                                  \
    }
// sum (16×8) += a (16×8) · b (8×8): "Matrix Fragments for mma.m16n8k8".
#define MULTIPLY_8(T, NAME)                                                                                                   \
    __device__ __forceinline__ void multiply(T, float (&sum)[4], const unsigned (&a)[2], unsigned b) {                        \
        asm("mma.sync.aligned.m16n8k8.row.col.f32." NAME "." NAME ".f32 {%0,%1,%2,%3}, {%4,%5}, {%6}, {%0,%1,%2,%3};"         \
            : "+f"(sum[0]), "+f"(sum[1]), "+f"(sum[2]), "+f"(sum[3])                                                          \
            : "r"(a[0]), "r"(a[1]), "r"(b));                                                                                  \
    }
MULTIPLY_16(f16, "f16")
MULTIPLY_16(bf16, "bf16")
MULTIPLY_8(f16, "f16")
MULTIPLY_8(bf16, "bf16")

// Four or two 8×8 matrices of 16-bit values out of shared memory, as fragments: lanes 8i to 8i+7 name the rows of the i-th, 16
// bytes each. `_transposed` gives the fragments of what was transposed: "Warp-level matrix load instruction: ldmatrix".
#define LOAD_MATRICES(NAME, TRANS)                                                                                            \
    __device__ __forceinline__ void NAME(unsigned (&parts)[4], const void *row) {                                             \
        asm volatile("ldmatrix.sync.aligned.m8n8.x4" TRANS ".shared.b16 {%0,%1,%2,%3}, [%4];"                                 \
                     : "=r"(parts[0]), "=r"(parts[1]), "=r"(parts[2]), "=r"(parts[3])                                         \
                     : "r"(shared_address(row))                                                                               \
                     : "memory");                                                                                             \
    }                                                                                                                         \
    __device__ __forceinline__ void NAME(unsigned (&parts)[2], const void *row) {                                             \
        asm volatile("ldmatrix.sync.aligned.m8n8.x2" TRANS ".shared.b16 {%0,%1}, [%2];"                                       \
                     : "=r"(parts[0]), "=r"(parts[1])                                                                         \
                     : "r"(shared_address(row))                                                                               \
                     : "memory");                                                                                             \
    }
LOAD_MATRICES(load_matrices, "")
LOAD_MATRICES(load_matrices_transposed, ".trans")

// Begins to copy 16 bytes from global to shared memory, or to write zeros there, reading nothing: "cp.async".
__device__ __forceinline__ void begin_copy(void *to, const void *from, bool is_copied) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(to)), "l"(__cvta_generic_to_global(from)),
                 "r"(is_copied ? 16 : 0)
                 : "memory");
}
// Waits for all copies that this thread began: "cp.async.wait_all".
__device__ __forceinline__ void end_copies() { asm volatile("cp.async.wait_all;" ::: "memory"); }

// 2^x to 22 bits; 0 far below: "ex2".
__device__ __forceinline__ float power_of_two(float x) {
    float power;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(power) : "f"(x));
    return power;
}
#endif
