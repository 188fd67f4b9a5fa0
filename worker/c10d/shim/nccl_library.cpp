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
    // The flight recorder is on by default. The watchdog's own dump of it holds up the abort, and may end the process after
    // it; potstill_nccl_record writes it instead.
    setenv("TORCH_NCCL_DUMP_ON_TIMEOUT", "0", /*overwrite=*/0);
    auto options = c10d::ProcessGroupNCCL::Options::create();
    options->timeout = std::chrono::milliseconds(timeout_ms);
    auto backend = c10::make_intrusive<c10d::ProcessGroupNCCL>(store, rank, world, options);
    backend->setBoundDeviceId(at::Device(at::kCUDA, static_cast<c10::DeviceIndex>(device)));
    *out = backend;
  });
}

// What the flight recorder holds of NCCL's operations, without stacks: to symbolize them may block.
extern "C" __attribute__((visibility("default"))) bool potstill_nccl_record(std::string* out, potstill_error* error) {
  return potstill::failed(error, [&] { *out = c10d::dump_nccl_trace(true, false, false); });
}
