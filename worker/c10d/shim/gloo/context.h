// Stands in for gloo's header of this name, which torch's wheels leave out.
//
// The five files in this folder declare only what ProcessGroupGloo.hpp and the shim call. Everything declared
// here is defined in libtorch_cpu.so and called by its symbol, never through a virtual table; the shim never
// creates, copies or measures a gloo object. So neither layouts nor tables need to be known. Result types
// must be right all the same: the linker does not see them.
#pragma once

#include <gloo/transport/device.h>

#include <chrono>
#include <memory>

namespace gloo {

class Context {
 public:
  void setTimeout(std::chrono::milliseconds timeout);
  // The connection to one peer; empty for one's own rank.
  std::unique_ptr<transport::Pair>& getPair(int rank);
};

}  // namespace gloo
