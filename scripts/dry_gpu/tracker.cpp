// Watches libtorch's allocator for tensors that a replay of a graph would overwrite: those that came to lie, after the capture,
// where the graph's own temporaries lay. Those of another graph do not count, which makes them anew.
#include "runtime.h"

#include <c10/cuda/CUDACachingAllocator.h>
#include <dlfcn.h>

#include <atomic>
#include <map>
#include <mutex>
#include <vector>

namespace allocator = c10::cuda::CUDACachingAllocator;

namespace {

using Entry = allocator::TraceEntry;

struct Range {
  size_t first, last;
};

std::mutex lock;
// The end of each live tensor's memory, and in which capture it was allocated.
struct Live {
  size_t last;
  unsigned long long capture;
};
std::map<size_t, Live> live;
std::map<unsigned long long, std::vector<Range>> temporaries;
unsigned long long current = 0;
cudaStream_t captured = nullptr;

void watch(const Entry& entry) {
  std::lock_guard<std::mutex> guard(lock);
  if (entry.action_ == Entry::ALLOC) {
    live[entry.addr_] = {entry.addr_ + entry.size_, entry.stream_ == captured ? current : 0};
  } else if (entry.action_ == Entry::FREE_COMPLETED) {
    auto found = live.find(entry.addr_);
    if (found != live.end()) {
      if (found->second.capture != 0) {
        temporaries[found->second.capture].push_back({found->first, found->second.last});
      }
      live.erase(found);
    }
  }
}

}  // namespace

namespace dry_gpu {

void watch_allocator() {
  static bool done = false;
  // Of libtorch's CUDA half, which may be loaded late, and out of sight of others.
  void* library = done ? nullptr : dlopen("libc10_cuda.so", RTLD_LAZY | RTLD_NOLOAD);
  if (library == nullptr) {
    return;
  }
  auto found = static_cast<std::atomic<allocator::CUDAAllocator*>*>(
      dlsym(library, "_ZN3c104cuda20CUDACachingAllocator9allocatorE"));
  if (found != nullptr && found->load() != nullptr) {
    done = true;
    found->load()->attachAllocatorTraceTracker(watch);
  }
}

void capture_began(unsigned long long capture, cudaStream_t stream) {
  std::lock_guard<std::mutex> guard(lock);
  current = capture;
  captured = stream;
}

void capture_ended() { capture_began(0, nullptr); }

size_t overwritten(unsigned long long capture) {
  std::lock_guard<std::mutex> guard(lock);
  size_t count = 0;
  for (const auto& range : temporaries[capture]) {
    auto next = live.lower_bound(range.first);
    if (next != live.begin() && std::prev(next)->second.last > range.first) {
      --next;
    }
    for (; next != live.end() && next->first < range.last; ++next) {
      count += next->second.capture == 0 ? 1 : 0;
    }
  }
  return count;
}

}  // namespace dry_gpu
