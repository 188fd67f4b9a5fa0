#include "nccl_library.h"

#include <torch/csrc/distributed/c10d/ProcessGroupNCCL.hpp>

#include <cstdlib>

extern "C" __attribute__((visibility("default"))) bool potstill_nccl_backend(
    const c10::intrusive_ptr<c10d::Store>& store, int rank, int world, int64_t timeout_ms, int device,
    c10::intrusive_ptr<c10d::Backend>* out, potstill_error* error) {
  return potstill::failed(error, [&] {
    // By default the watchdog ends the whole process when a peer is lost. A worker must outlive its peers, so the
    // watchdog is set to abort the communicators only, and the collective returns the failure.
    setenv("TORCH_NCCL_ASYNC_ERROR_HANDLING", std::to_string(c10d::CleanUpOnly).c_str(), /*overwrite=*/0);
    auto options = c10d::ProcessGroupNCCL::Options::create();
    options->timeout = std::chrono::milliseconds(timeout_ms);
    auto backend = c10::make_intrusive<c10d::ProcessGroupNCCL>(store, rank, world, options);
    backend->setBoundDeviceId(at::Device(at::kCUDA, static_cast<c10::DeviceIndex>(device)));
    *out = backend;
  });
}
