// Stands in for gloo's header of this name, which torch's wheels leave out. See context.h.
#pragma once

#include <exception>
#include <string>

namespace gloo::transport {

class Device;

class Pair;

// Complete because ProcessGroupGloo.hpp holds it in a unique_ptr. Nothing here destroys one.
class UnboundBuffer {
 public:
  virtual ~UnboundBuffer();
};

namespace tcp {

// What every `transport::Pair` of a TCP device is; `transport::Pair` is its first base.
class Pair {
 public:
  // Fails all that waits on this connection, closes it, and returns what it failed with.
  std::exception_ptr signalExceptionExternal(const std::string& reason);
};

}  // namespace tcp

}  // namespace gloo::transport
