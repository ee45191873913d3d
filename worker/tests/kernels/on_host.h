// Runs the kernels of worker/kernels on a CPU, so that tests can compare what they compute: `g++ -include on_host.h
// kernels.cu`. A block's threads are fibers, which take turns at barriers and shuffles. Strict where a GPU is lenient or
// undefined: a thread that ends while its block waits at a barrier, a shuffle that not all of a warp take part in, and
// shared memory written beyond what was asked for are faults; shared memory is full of NaN at first. Fibers can be run
// in either order, a warp as far as it gets before the next one, and a result that depends on it is a race.
#pragma once
#define KERNELS_ON_HOST
#include <ucontext.h>

#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <functional>
#include <map>
#include <memory>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#define __global__
#define __device__
#define __shared__
#define __forceinline__ inline

struct float2 {
    float x, y;
};
inline float2 make_float2(float x, float y) { return {x, y}; }
inline int min(int a, int b) { return a < b ? a : b; }
inline float rsqrtf(float x) { return 1.f / std::sqrt(x); }
inline float __expf(float x) { return std::exp(x); }
inline float __fdividef(float a, float b) { return a / b; }
inline float __fadd_rn(float a, float b) { return a + b; }
inline float __fsub_rn(float a, float b) { return a - b; }
inline float __fmul_rn(float a, float b) { return a * b; }
inline unsigned __float_as_uint(float x) {
    unsigned bits;
    std::memcpy(&bits, &x, sizeof bits);
    return bits;
}
inline float __uint_as_float(unsigned bits) {
    float x;
    std::memcpy(&x, &bits, sizeof x);
    return x;
}

// What number.cuh leaves to this file.
struct f16 {
    unsigned short bits;
};
struct bf16 {
    unsigned short bits;
};
inline float widen(bf16 x) { return __uint_as_float(static_cast<unsigned>(x.bits) << 16); }
inline float widen(f16 x) {
    const unsigned sign = (x.bits & 0x8000u) << 16, exponent = x.bits >> 10 & 0x1f, fraction = x.bits & 0x3ff;
    if (exponent == 0x1f) return __uint_as_float(sign | 0x7f800000u | fraction << 13);
    const float size = exponent ? std::ldexp(1024.f + fraction, static_cast<int>(exponent) - 25) : std::ldexp(static_cast<float>(fraction), -24);
    return sign ? -size : size;
}
// To nearest, ties to even, as the default rounding mode of the arithmetic below does it.
inline unsigned short round_f16(float x) {
    const unsigned sign = __float_as_uint(x) >> 16 & 0x8000u;
    const float size = std::fabs(x);
    if (std::isnan(x)) return 0x7fff;
    if (size >= 65520.f) return static_cast<unsigned short>(sign | 0x7c00u);
    int exponent;
    std::frexp(size, &exponent);
    // frexp gives 0 for 0.
    if (exponent < -13 || size == 0.f) exponent = -13;
    // In units of the last place, between 1024 and 2048 if normal; 2048 carries into the exponent by itself.
    const unsigned units = static_cast<unsigned>(std::nearbyint(std::ldexp(size, 11 - exponent)));
    return static_cast<unsigned short>(sign | (units + (static_cast<unsigned>(exponent + 13) << 10)));
}
inline unsigned short round_bf16(float x) {
    const unsigned bits = __float_as_uint(x);
    if (std::isnan(x)) return 0x7fff;
    return static_cast<unsigned short>((bits + 0x7fffu + (bits >> 16 & 1)) >> 16);
}
template <typename T> unsigned narrow_pair(float low, float high);
template <> inline unsigned narrow_pair<f16>(float low, float high) {
    return round_f16(low) | static_cast<unsigned>(round_f16(high)) << 16;
}
template <> inline unsigned narrow_pair<bf16>(float low, float high) {
    return round_bf16(low) | static_cast<unsigned>(round_bf16(high)) << 16;
}

namespace host {
constexpr size_t STACK = 64 << 10, SHARED = 48 << 10, WARP = 32;

struct Index {
    unsigned x = 0, y = 0, z = 0;
};
enum class State { Ready, AtBarrier, AtShuffle, Together, Ended };
struct Fiber {
    ucontext_t context;
    std::unique_ptr<char[]> stack{new char[STACK]};
    State state = State::Ended;
    float given = 0, received = 0;
    int mask = 0;
    // What the warp does together, and this lane's operands of it; copies that the lane has not waited for.
    void (*together)(void *const *) = nullptr;
    void *operands = nullptr;
    std::vector<std::function<void()>> copies;
};

// A launch at a time: the caller sees to it.
inline std::vector<Fiber> fibers;
inline ucontext_t scheduler;
inline size_t running = 0;
inline bool is_reversed = false;
inline std::function<void()> body;

inline void pause(State state) {
    fibers[running].state = state;
    swapcontext(&fibers[running].context, &scheduler);
}
// What a thread did that it must not; the first such thing.
inline const char *found_fault = nullptr;
inline void fault(const char *what) { found_fault = found_fault ? found_fault : what; }
inline void run_body() {
    body();
    pause(State::Ended);
}
}  // namespace host

inline host::Index threadIdx, blockIdx, blockDim, gridDim;
alignas(16) inline float shared[host::SHARED / sizeof(float)];

inline void __syncthreads() { host::pause(host::State::AtBarrier); }
inline float __shfl_xor_sync(unsigned lanes, float x, int mask) {
    if (lanes != 0xffffffffu) return NAN;
    host::Fiber &own = host::fibers[host::running];
    own.given = x;
    own.mask = mask;
    host::pause(host::State::AtShuffle);
    return host::fibers[host::running].received;
}

#include "tensor_core_on_host.h"

namespace host {
// Lets the warp that begins with fiber `first` do what its lanes wait for; false if they do not all wait for the same.
inline bool meet(unsigned first) {
    const Fiber &any = fibers[first];
    void *operands[WARP];
    for (unsigned i = 0; i < WARP; i++) {
        const Fiber &fiber = fibers[first + i];
        if (fiber.state != any.state || fiber.mask != any.mask || fiber.together != any.together) return false;
        operands[i] = fiber.operands;
    }
    if (any.state == State::Together) {
        any.together(operands);
    } else if (any.state == State::AtShuffle) {
        for (unsigned i = first; i < first + WARP; i++) fibers[i].received = fibers[i ^ fibers[i].mask].given;
    } else {
        return false;
    }
    for (unsigned i = first; i < first + WARP; i++) fibers[i].state = State::Ready;
    return true;
}

// Runs a warp until all of its lanes have ended or wait for more than each other; whether any of them moved.
inline bool run_warp(unsigned first) {
    for (bool moved = false;; moved = true) {
        bool ran = false;
        for (unsigned i = 0; i < WARP; i++) {
            running = first + (is_reversed ? WARP - 1 - i : i);
            if (fibers[running].state != State::Ready) continue;
            threadIdx.x = static_cast<unsigned>(running);
            swapcontext(&scheduler, &fibers[running].context);
            ran = true;
        }
        if (!meet(first) && !ran) return moved;
    }
}

// Runs one block; why it could not be, or nullptr.
inline const char *run_block(unsigned threads, bool reversed) {
    is_reversed = reversed;
    found_fault = nullptr;
    if (fibers.size() < threads) fibers.resize(threads);
    for (unsigned i = 0; i < threads; i++) {
        getcontext(&fibers[i].context);
        fibers[i].context.uc_stack.ss_sp = fibers[i].stack.get();
        fibers[i].context.uc_stack.ss_size = STACK;
        fibers[i].context.uc_link = nullptr;
        makecontext(&fibers[i].context, run_body, 0);
        fibers[i].state = State::Ready;
        fibers[i].mask = 0;
        fibers[i].together = nullptr;
        fibers[i].copies.clear();
    }
    for (;;) {
        bool moved = false;
        for (unsigned warp = 0; warp < threads; warp += WARP) moved |= run_warp(reversed ? threads - WARP - warp : warp);
        size_t ended = 0, waiting = 0;
        for (unsigned i = 0; i < threads; i++) {
            ended += fibers[i].state == State::Ended;
            waiting += fibers[i].state == State::AtBarrier;
            if (fibers[i].state == State::Ended && !fibers[i].copies.empty()) fault("it did not wait for a copy");
        }
        if (found_fault) return found_fault;
        if (ended == threads) return nullptr;
        if (waiting == threads) {
            for (unsigned i = 0; i < threads; i++) fibers[i].state = State::Ready;
            continue;
        }
        if (!moved) return ended ? "threads ended while others wait" : "threads wait for different things";
    }
}

// A parameter's kind, as the launcher names it.
template <typename T> constexpr char kind() {
    if (std::is_pointer_v<T>) return 'p';
    if (std::is_same_v<T, float>) return 'f';
    static_assert(std::is_pointer_v<T> || sizeof(T) == 4);
    return 'i';
}

struct Kernel {
    unsigned most_threads;
    std::string kinds;
    std::function<void(void **)> call;
};
inline std::map<std::string, Kernel> &kernels() {
    static std::map<std::string, Kernel> all;
    return all;
}

template <typename... P, size_t... I>
void call(void (*kernel)(P...), void **arguments, std::index_sequence<I...>) {
    kernel(*static_cast<P *>(arguments[I])...);
}
template <typename... P> bool add(const char *name, unsigned most_threads, void (*kernel)(P...)) {
    auto unpack = [kernel](void **arguments) { call(kernel, arguments, std::index_sequence_for<P...>()); };
    kernels()[name] = {most_threads, std::string{kind<P>()...}, unpack};
    return true;
}
}  // namespace host

#define BLOCKS(THREADS, COUNT) THREADS
#define KERNEL(NAME, THREADS, BODY, PARAMETERS, ARGUMENTS) \
    void NAME PARAMETERS { BODY ARGUMENTS; }             \
    static const bool NAME##_is_added = host::add(#NAME, THREADS, &NAME);

// Runs a kernel to its end. `kinds` has a letter for each argument: p for an address, i and f for 32 bits. What was wrong
// is written to `message`; nothing, if all was well.
extern "C" void run_kernel(const char *name, const unsigned *grid, unsigned threads, unsigned shared_bytes, int reversed,
                           const char *kinds, void **arguments, char *message, size_t message_size) {
    const auto found = host::kernels().find(name);
    const auto fault = [&](const char *what) { std::snprintf(message, message_size, "%s: %s", name, what); };
    if (found == host::kernels().end()) return fault("there is no such kernel");
    const host::Kernel &kernel = found->second;
    if (kernel.kinds != kinds) return fault(("its parameters are " + kernel.kinds + ", not " + kinds).c_str());
    if (threads == 0 || threads > kernel.most_threads || threads % host::WARP != 0) return fault("a block has too many threads, or parts of warps");
    if (shared_bytes > host::SHARED) return fault("too much shared memory");
    gridDim = {grid[0], grid[1], grid[2]};
    blockDim = {threads, 1, 1};
    host::body = [&] { kernel.call(arguments); };
    for (blockIdx.z = 0; blockIdx.z < grid[2]; blockIdx.z++)
        for (blockIdx.y = 0; blockIdx.y < grid[1]; blockIdx.y++)
            for (blockIdx.x = 0; blockIdx.x < grid[0]; blockIdx.x++) {
                std::memset(shared, 0xff, sizeof shared);
                if (const char *what = host::run_block(threads, reversed)) return fault(what);
                const char *bytes = reinterpret_cast<const char *>(shared);
                for (size_t i = shared_bytes; i < sizeof shared; i++)
                    if (bytes[i] != '\xff') return fault("it wrote beyond its shared memory");
            }
}
