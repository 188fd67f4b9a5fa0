// Helpers of both shims: finding libtorch's other libraries, and handles of tensors.
#pragma once

#include <ATen/Context.h>
#include <ATen/core/Tensor.h>
#include <c10/util/Exception.h>

#include <dlfcn.h>

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

inline std::vector<at::Tensor> copy_handles(at::Tensor* const* tensors, size_t count) {
  std::vector<at::Tensor> handles;
  handles.reserve(count);
  for (size_t i = 0; i < count; ++i) {
    handles.push_back(*tensors[i]);
  }
  return handles;
}

}  // namespace potstill
