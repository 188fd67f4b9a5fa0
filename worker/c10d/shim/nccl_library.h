// The interface to the NCCL library, which is compiled separately and opened on demand: linking libtorch_cuda.so into
// every process would cost each start 0.13 s and 235 MB.
#pragma once

#include <torch/csrc/distributed/c10d/Backend.hpp>
#include <torch/csrc/distributed/c10d/Store.hpp>

#include "guard.h"

#include <string>

extern "C" {

// The types of `potstill_nccl_backend` and `potstill_nccl_record`, the symbols that the library exports. True when they failed.
typedef bool potstill_nccl_backend_fn(const c10::intrusive_ptr<c10d::Store>& store, int rank, int world, int64_t timeout_ms,
                                      int device, c10::intrusive_ptr<c10d::Backend>* out, potstill_error* error);
typedef bool potstill_nccl_record_fn(std::string* out, potstill_error* error);

}
