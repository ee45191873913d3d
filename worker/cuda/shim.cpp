// What of libtorch's CUDA half has no name in its C API: graphs of launched work, streams, and the flags that kernels are
// chosen by. worker/build.rs compiles it with a plain C++ compiler and puts it into the binary; diffusion/device/shim.rs opens
// it after libtorch_cuda, whose symbols it needs. No exception leaves it: a function gives back null, or what went wrong, in a
// text that is valid until the thread's next call.
#include <cstdint>
#include <exception>
#include <memory>
#include <string>
#include <vector>

#include <ATen/Context.h>
#include <ATen/core/Tensor.h>
#include <ATen/cuda/CUDAGraph.h>
#include <ATen/detail/CUDAHooksInterface.h>
#include <c10/cuda/CUDACachingAllocator.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#include <cuda_runtime_api.h>

namespace {
using c10::cuda::CUDAStream;

// A graph, the stream it is made on, and the stream that was current before.
struct StepGraph {
  explicit StepGraph(CUDAStream side) : side(side), outer(side) {}
  at::cuda::CUDAGraph graph;
  CUDAStream side, outer;
};

// A place in a stream's work.
struct StreamMark {
  cudaEvent_t event;
  c10::DeviceIndex device;
};

template <typename Work>
const char* guarded(Work work) {
  thread_local std::string message;
  try {
    work();
    return nullptr;
  } catch (const std::exception& error) {
    message = error.what();
  } catch (...) {
    message = "an exception without words";
  }
  cudaGetLastError();  // An error that is reported here must not be found again by whoever asks next.
  return message.c_str();
}

// Lets `later` start when all that is in `earlier` is done.
void follow(CUDAStream later, CUDAStream earlier) {
  // An event belongs to the device that is current when it is made, and is only recorded on that device's streams.
  c10::cuda::CUDAGuard device(earlier.device_index());
  cudaEvent_t event = nullptr;
  C10_CUDA_CHECK(cudaEventCreateWithFlags(&event, cudaEventDisableTiming));
  cudaError_t recorded = cudaEventRecord(event, earlier.stream());
  cudaError_t waited = cudaStreamWaitEvent(later.stream(), event, 0);
  C10_CUDA_CHECK(cudaEventDestroy(event));
  C10_CUDA_CHECK(recorded);
  C10_CUDA_CHECK(waited);
}
}  // namespace

extern "C" {
// Kernels that give the same bits each time, chosen by shape and not by timing, with sums in f32; TF32 as asked. A product may
// still be cut along its inner dimension, the parts being added in f32: to forbid that too, cuBLAS, unlike cuBLASLt, refuses
// every product.
const char* darkroom_set_flags(bool deterministic, bool allow_tf32) {
  return guarded([=] {
    at::Context& context = at::globalContext();
    context.setDeterministicCuDNN(deterministic);
    context.setBenchmarkCuDNN(false);
    context.setAllowTF32CuDNN(allow_tf32);
    context.setAllowTF32CuBLAS(allow_tf32);
    context.setAllowFP16ReductionCuBLAS(!deterministic);
    context.setAllowBF16ReductionCuBLAS(!deterministic);
  });
}

// The kernels of attention to try first, as at::SDPBackend numbers them.
const char* darkroom_set_attention_order(const int64_t* backends, size_t count) {
  return guarded([=] { at::globalContext().setSDPPriorityOrder(std::vector<int64_t>(backends, backends + count)); });
}

// cuDNN's version as the library that was really opened tells it, CUDA's that the driver is for, and the GPU's name.
const char* darkroom_describe(int device, int64_t* cudnn, int* driver_cuda, char* name, size_t capacity) {
  return guarded([=] {
    *cudnn = at::detail::getCUDAHooks().versionRuntimeCuDNN();
    C10_CUDA_CHECK(cudaDriverGetVersion(driver_cuda));
    cudaDeviceProp properties;
    C10_CUDA_CHECK(cudaGetDeviceProperties(&properties, device));
    std::string(properties.name).copy(name, capacity);
  });
}

const char* darkroom_synchronize() {
  return guarded([] { C10_CUDA_CHECK(cudaDeviceSynchronize()); });
}

const char* darkroom_graph_new(int device, StepGraph** graph) {
  return guarded([=] { *graph = new StepGraph(c10::cuda::getStreamFromPool(false, static_cast<c10::DeviceIndex>(device))); });
}

// Makes the graph's own stream the current one, after all work before it.
const char* darkroom_graph_enter(StepGraph* graph) {
  return guarded([=] {
    graph->outer = c10::cuda::getCurrentCUDAStream(graph->side.device_index());
    follow(graph->side, graph->outer);
    c10::cuda::setCurrentCUDAStream(graph->side);
  });
}

// Back to the stream before, which waits for what was done meanwhile.
const char* darkroom_graph_leave(StepGraph* graph) {
  return guarded([=] {
    c10::cuda::setCurrentCUDAStream(graph->outer);
    follow(graph->outer, graph->side);
  });
}

// From here on work is written down and not done. Only this thread's calls can spoil it. The graph has memory of its own, so what
// the steps before it used is given up first.
const char* darkroom_graph_begin(StepGraph* graph) {
  return guarded([=] {
    // libtorch captures the current stream of the current device.
    c10::cuda::CUDAGuard device(graph->side.device_index());
    C10_CUDA_CHECK(cudaDeviceSynchronize());
    c10::cuda::CUDACachingAllocator::emptyCache();
    graph->graph.capture_begin({0, 0}, cudaStreamCaptureModeThreadLocal);
  });
}

const char* darkroom_graph_end(StepGraph* graph) {
  const char* error = guarded([=] {
    c10::cuda::CUDAGuard device(graph->side.device_index());
    graph->graph.capture_end();
  });
  if (error != nullptr) {
    // What a failed end leaves undone, as far as it can be done: memory asked for later must not go to the graph's pool.
    std::string first = error;
    guarded([=] { c10::cuda::CUDACachingAllocator::endAllocateToPool(graph->side.device_index(), graph->graph.pool()); });
    return guarded([&] { throw std::runtime_error(first); });
  }
  return nullptr;
}

const char* darkroom_graph_replay(StepGraph* graph) {
  return guarded([=] { graph->graph.replay(); });
}

// The device must be done with the graph.
void darkroom_graph_free(StepGraph* graph) {
  guarded([=] { delete graph; });
}

// Gives the calling thread a stream of its own. Which stream is current "is thread local" (c10/cuda/CUDAStream.h, "Stream pool
// note"), so no other thread notices; libtorch launches on the current stream, and our own kernels ask for it.
//
// From the pool of high priority: graphs take their streams from the other pool, so that this one is never among them ("There
// are three pools per device", the same note; each hands out its 32 streams in turn, over and over). On a graph's
// stream what this thread launches during a capture would be written into the graph. And what is launched here is short, and somebody
// waits for it, while the other thread's work is always there.
//
// Streams of the pools are made with cudaStreamNonBlocking (c10/cuda/CUDAStream.cpp): work on the default stream, where the
// engine's first thread computes, does not hold them up. A capture in cudaStreamCaptureModeThreadLocal, which ours are,
// leaves other threads free to allocate and to wait (CUDA Runtime API, cudaThreadExchangeStreamCaptureMode).
const char* darkroom_use_own_stream(int device) {
  return guarded([=] {
    const auto index = static_cast<c10::DeviceIndex>(device);
    c10::cuda::set_device(index);
    c10::cuda::setCurrentCUDAStream(c10::cuda::getStreamFromPool(/*isHighPriority=*/true, index));
  });
}

// Marks what the calling thread's current stream has been given so far. An event "captures" the work that is in the stream at
// this moment; the stream that waits for it starts nothing before that is done, and the host does not wait (CUDA Runtime
// API, cudaEventRecord and cudaStreamWaitEvent).
const char* darkroom_mark_new(int device, StreamMark** mark) {
  return guarded([=] {
    const auto index = static_cast<c10::DeviceIndex>(device);
    c10::cuda::CUDAGuard guard(index);
    auto made = std::make_unique<StreamMark>(StreamMark{nullptr, index});
    C10_CUDA_CHECK(cudaEventCreateWithFlags(&made->event, cudaEventDisableTiming));
    cudaError_t recorded = cudaEventRecord(made->event, c10::cuda::getCurrentCUDAStream(index).stream());
    if (recorded != cudaSuccess) cudaEventDestroy(made->event);
    C10_CUDA_CHECK(recorded);
    *mark = made.release();
  });
}

const char* darkroom_mark_wait(StreamMark* mark) {
  return guarded([=] {
    c10::cuda::CUDAGuard guard(mark->device);
    C10_CUDA_CHECK(cudaStreamWaitEvent(c10::cuda::getCurrentCUDAStream(mark->device).stream(), mark->event, 0));
  });
}

// The event may be pending: its resources are freed when it is done (CUDA Runtime API, cudaEventDestroy).
void darkroom_mark_free(StreamMark* mark) {
  guarded([=] {
    cudaEventDestroy(mark->event);
    delete mark;
  });
}

// Memory goes back to the stream that it was allocated on as soon as its tensor is gone, whoever else still reads it: "blocks can
// be re-allocated on the same stream", and recordStream "will ensure that the block is not reused before each recorded
// stream completes work" (c10/cuda/CUDACachingAllocator.cpp, at its top).
const char* darkroom_keep_for_current_stream(const at::Tensor* tensor) {
  return guarded([=] {
    c10::cuda::CUDACachingAllocator::recordStream(
        tensor->storage().data_ptr(), c10::cuda::getCurrentCUDAStream(tensor->device().index()));
  });
}
}
