// What the libraries of a dry run share.
#pragma once

#include <cuda_runtime_api.h>

#include <functional>

namespace dry_gpu {

// Before a call that may wait for the device: the modes of captures forbid it while something is captured.
cudaError_t unsafe(const char* what);

// Work in a stream's queue: done now, or recorded where the stream is captured.
cudaError_t enqueue(cudaStream_t stream, const char* what, std::function<void()> work = nullptr);

// A copy between any two addresses, in a stream's queue.
cudaError_t copy(void* to, const void* from, size_t size, cudaStream_t stream);

// tracker.cpp: tensors that lie where a graph's temporaries lay, when it is replayed.
void watch_allocator();
void capture_began(unsigned long long capture, cudaStream_t stream);
void capture_ended();
size_t overwritten(unsigned long long capture);

}  // namespace dry_gpu
