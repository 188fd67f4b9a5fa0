// The exception barrier of the shim: no C++ exception may cross into Rust.
#pragma once

#include <c10/util/Exception.h>

#include <cstdio>
#include <exception>

extern "C" {

// The text of a failure, in memory that the caller owns. Long texts are truncated.
struct potstill_error {
  char text[2048];
};

}

namespace potstill {

inline void say(potstill_error* error, const char* text) {
  std::snprintf(error->text, sizeof error->text, "%s", text);
}

// Runs `body`; true when it threw, with the text in `error`.
template <class Body>
bool failed(potstill_error* error, Body body) noexcept {
  try {
    body();
    return false;
  } catch (const c10::Error& e) {
    say(error, e.what_without_backtrace());
  } catch (const std::exception& e) {
    say(error, e.what());
  } catch (...) {
    say(error, "an exception of unknown type");
  }
  return true;
}

}  // namespace potstill
