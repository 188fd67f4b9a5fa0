#include "cuda_library.h"

#include <ATen/core/CachingHostAllocator.h>
#include <ATen/core/grad_mode.h>
#include <ATen/cuda/CUDAContext.h>
#include <ATen/cuda/CUDAEvent.h>
#include <ATen/cuda/CUDAGeneratorImpl.h>
#include <ATen/cuda/CUDAGraph.h>
#include <ATen/cuda/MemPool.h>
#include <c10/cuda/CUDACachingAllocator.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>

#include <map>
#include <memory>
#include <mutex>

using at::cuda::CUDAEvent;
using c10::cuda::CUDAStream;
using potstill::failed;

namespace allocator = c10::cuda::CUDACachingAllocator;

// The stream's graphs take their memory from one pool: they are never replayed at once. What is computed without a graph can
// take its memory there too, and then needs none besides; but a replay overwrites it.
struct potstill_stream {
  CUDAStream own;
  CUDAStream former;
  c10::DeviceIndex former_device = 0;
  at::cuda::MemPool pool;

  c10::DeviceIndex device() const { return own.device_index(); }
};

struct potstill_graph {
  at::cuda::CUDAGraph graph;
  potstill_stream* stream;
  // Where what is recorded panics within tch's no_grad, gradients would stay off.
  bool gradients = at::GradMode::is_enabled();
  // The ends of the last two replays.
  CUDAEvent ends[2];
  size_t replays = 0;
};

namespace {

// `second` goes on after what `first` has queued.
void follow(const CUDAStream& first, const CUDAStream& second) {
  CUDAEvent event;
  event.record(first);
  event.block(second);
}

bool stream_new(int device, potstill_stream** out, potstill_error* error) {
  return failed(error, [&] {
    at::globalContext().lazyInitDevice(at::kCUDA);
    auto index = static_cast<c10::DeviceIndex>(device);
    c10::cuda::CUDAGuard guard(index);
    // One for each device: libtorch keeps memory for each stream that has been used.
    static std::mutex mutex;
    static std::map<int, CUDAStream> streams;
    std::lock_guard<std::mutex> lock(mutex);
    auto own = streams.try_emplace(device, c10::cuda::getStreamFromPool(/*isHighPriority=*/false, index)).first->second;
    *out = new potstill_stream{own, c10::cuda::getCurrentCUDAStream(index)};
  });
}

bool stream_enter(potstill_stream* stream, potstill_error* error) {
  return failed(error, [&] {
    stream->former_device = c10::cuda::current_device();
    c10::cuda::set_device(stream->device());
    stream->former = c10::cuda::getCurrentCUDAStream();
    follow(stream->former, stream->own);
    c10::cuda::setCurrentCUDAStream(stream->own);
  });
}

bool stream_leave(potstill_stream* stream, potstill_error* error) {
  return failed(error, [&] {
    c10::cuda::setCurrentCUDAStream(stream->former);
    follow(stream->own, stream->former);
    c10::cuda::set_device(stream->former_device);
  });
}

bool pool_enter(potstill_stream* stream, potstill_error* error) {
  return failed(error, [&] {
    auto own = stream->own.stream();
    allocator::beginAllocateToPool(stream->device(), stream->pool.id(), [own](cudaStream_t other) { return other == own; });
  });
}

bool pool_leave(potstill_stream* stream, potstill_error* error) {
  return failed(error, [&] {
    allocator::endAllocateToPool(stream->device(), stream->pool.id());
    allocator::releasePool(stream->device(), stream->pool.id());
  });
}

void stream_free(potstill_stream* stream) {
  potstill_error ignored;
  failed(&ignored, [&] {
    // cuBLAS keeps memory for each stream that it has been used in, which would keep that of the pool.
    at::cuda::clearCublasWorkspaces();
    delete stream;
  });
}

// After a capture that was not ended well libtorch leaves its allocators, and its generator of random numbers, as they are
// while something is captured.
void end_capture(potstill_stream* stream) {
  cudaGetLastError();
  auto id = stream->pool.id();
  auto host = at::getHostAllocator(at::kCUDA);
  host->end_allocate_to_pool(id);
  host->release_pool(id);
  allocator::endAllocateToPool(stream->device(), id);
  allocator::releasePool(stream->device(), id);
  auto generator = at::cuda::detail::getDefaultCUDAGenerator(stream->device());
  std::lock_guard<std::mutex> lock(generator.mutex());
  generator.graphsafe_set_state(generator.clone());
}

bool graph_begin(potstill_stream* stream, potstill_graph** out, potstill_error* error) {
  return failed(error, [&] {
    auto made = std::make_unique<potstill_graph>();
    made->stream = stream;
    // Other threads may go on to allocate and to wait: one writes checkpoints, and NCCL's watches collectives.
    try {
      made->graph.capture_begin(stream->pool.id(), cudaStreamCaptureModeThreadLocal);
    } catch (...) {
      end_capture(stream);
      throw;
    }
    *out = made.release();
  });
}

bool graph_end(potstill_graph* graph, potstill_error* error) {
  auto stream = graph->stream;
  at::GradMode::set_enabled(graph->gradients);
  return failed(error, [&] {
    try {
      graph->graph.capture_end();
    } catch (...) {
      end_capture(stream);
      throw;
    }
  });
}

bool graph_replay(potstill_graph* graph, potstill_error* error) {
  return failed(error, [&] {
    // The host goes no further ahead than this: what watches it takes each replay for progress.
    auto& end = graph->ends[graph->replays++ % 2];
    end.synchronize();
    graph->graph.replay();
    end.record();
  });
}

void graph_free(potstill_graph* graph) {
  potstill_error ignored;
  failed(&ignored, [&] {
    for (auto& end : graph->ends) {
      end.synchronize();
    }
    delete graph;
  });
}

}  // namespace

extern "C" __attribute__((visibility("default"))) const potstill_cuda_functions* potstill_cuda() {
  static constexpr potstill_cuda_functions functions = {
      stream_new, stream_enter, stream_leave, pool_enter, pool_leave, stream_free, graph_begin, graph_end, graph_replay, graph_free,
  };
  return &functions;
}
