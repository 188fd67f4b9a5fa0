// Helpers of both shims: finding libtorch's other libraries, and handles of tensors.
#pragma once

#include <ATen/Context.h>
#include <ATen/core/Tensor.h>
#include <c10/util/Exception.h>

#include <dlfcn.h>
#include <sys/mman.h>
#include <unistd.h>

#include <cstdint>
#include <string>
#include <vector>

namespace potstill {

// Finds the library `name` in the folder from which libtorch itself was loaded.
inline std::string beside_libtorch(const char* name) {
  Dl_info info{};
  auto symbol = reinterpret_cast<const void*>(&at::globalContext);
  TORCH_CHECK(dladdr(symbol, &info) != 0, "cannot tell where libtorch was loaded from");
  std::string path(info.dli_fname);
  return path.substr(0, path.rfind('/') + 1) + name;
}

inline void* open_library(const std::string& path, int flags) {
  void* library = dlopen(path.c_str(), flags);
  if (library == nullptr) {
    const char* reason = dlerror();
    TORCH_CHECK(false, "unavailable: ", reason == nullptr ? path.c_str() : reason);
  }
  return library;
}

inline void load_cuda() {
  // Never closed: libtorch registers kernels and devices from it for the life of the process.
  open_library(beside_libtorch("libtorch_cuda.so"), RTLD_NOW | RTLD_GLOBAL);
}

// Opens a library that is linked to libtorch's CUDA half. It is embedded in the executable, so that there is no second file to
// install; an anonymous file gives the loader the path that it needs. Empty where it could not be built.
inline void* open_embedded(const char* name, const uint8_t* image, size_t length) {
  TORCH_CHECK(length > 0, "unavailable: this program was built without CUDA's headers, so without ", name);
  load_cuda();
  // Never closed: the loader knows libraries by their paths, and would take the next file with this number for this one.
  int file = memfd_create(name, MFD_CLOEXEC);
  for (size_t written = 0; written < length;) {
    ssize_t n = write(file, image + written, length - written);
    TORCH_CHECK(n > 0, "unavailable: cannot unpack ", name, " into memory");
    written += static_cast<size_t>(n);
  }
  return open_library("/proc/self/fd/" + std::to_string(file), RTLD_NOW | RTLD_LOCAL);
}

inline std::vector<at::Tensor> copy_handles(at::Tensor* const* tensors, size_t count) {
  std::vector<at::Tensor> handles;
  handles.reserve(count);
  for (size_t i = 0; i < count; ++i) {
    handles.push_back(*tensors[i]);
  }
  return handles;
}

}  // namespace potstill
