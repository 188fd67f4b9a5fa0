// A C interface to the few functions of libtorch that tch lacks. Every function that can fail returns true when it did,
// with the reason in `error`. Objects are passed as owning pointers; tensors as the `at::Tensor*` that tch also uses.
#include "cuda_library.h"
#include "guard.h"
#include "libtorch.h"

#include <ATen/Context.h>
#include <ATen/autocast_mode.h>
#include <c10/core/Allocator.h>
#include <c10/core/CachingDeviceAllocator.h>
#include <c10/util/ThreadLocalDebugInfo.h>
#include <torch/csrc/autograd/autograd.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/csrc/autograd/utils/lambda_post_hook.h>
#include <torch/csrc/autograd/variable.h>

#include <atomic>
#include <memory>
#include <mutex>

using potstill::copy_handles;
using potstill::failed;

namespace {

// Counts the host memory of this thread's tensors.
struct HostMemory final : c10::MemoryReportingInfoBase {
  std::atomic<int64_t> now{0};
  std::atomic<int64_t> peak{0};

  void reportMemoryUsage(void*, int64_t bytes, size_t, size_t, c10::Device device) override {
    if (device.is_cpu()) {
      int64_t total = now += bytes;
      int64_t before = peak;
      while (total > before && !peak.compare_exchange_weak(before, total)) {
      }
    }
  }
  bool memoryProfilingEnabled() const override { return true; }
};

// A function of tensors on the other side of the C interface. After a call in the backward pass it must be left, once
// the gradients of its graph have been computed.
struct Closure {
  void* context;
  at::Tensor* (*call)(void* context, at::Tensor* const* inputs, size_t count, bool backward);
  void (*leave)(void* context);
  void (*drop)(void* context);

  Closure(void* context, at::Tensor* (*call)(void*, at::Tensor* const*, size_t, bool), void (*leave)(void*),
          void (*drop)(void*))
      : context(context), call(call), leave(leave), drop(drop) {}
  Closure(const Closure&) = delete;
  ~Closure() { drop(context); }

  at::Tensor operator()(std::vector<at::Tensor>& inputs, bool backward) const {
    std::vector<at::Tensor*> pointers;
    for (auto& input : inputs) {
      pointers.push_back(&input);
    }
    std::unique_ptr<at::Tensor> output(call(context, pointers.data(), pointers.size(), backward));
    TORCH_CHECK(output != nullptr, "a block failed; its panic says why");
    return std::move(*output);
  }
};

// The calling thread's mixed precision, for a thread that repeats the computation later: a device has one of autograd's own. There
// the cache is on by default, and would keep what weights were cast to for ever, also after they have changed.
struct Precision {
  at::DeviceType device;
  bool on;
  bool cached;
  at::ScalarType kind;

  explicit Precision(at::DeviceType device)
      : device(device),
        on(at::autocast::is_autocast_enabled(device)),
        cached(at::autocast::is_autocast_cache_enabled()),
        kind(at::autocast::get_autocast_dtype(device)) {}

  void enter() const {
    at::autocast::set_autocast_dtype(device, kind);
    at::autocast::set_autocast_cache_enabled(cached);
    at::autocast::set_autocast_enabled(device, on);
  }
};

// Values besides tensors that a block's backward pass needs.
struct Capsule final : torch::CustomClassHolder {
  std::shared_ptr<Closure> closure;
  Precision precision;

  Capsule(std::shared_ptr<Closure> closure, Precision precision)
      : closure(std::move(closure)), precision(precision) {}
};

// A block of which only the inputs are kept: its backward computes the forward again (1604.06174). The parameters are inputs
// of the function too, so that their gradients leave it through the outer graph, whose hooks the Reducer waits for.
struct Recomputed final : torch::autograd::Function<Recomputed> {
  using List = torch::autograd::variable_list;

  static at::Tensor forward(torch::autograd::AutogradContext* context, const std::shared_ptr<Closure>& closure,
                            int64_t inputs, at::TensorList tensors) {
    auto capsule = c10::make_intrusive<Capsule>(closure, Precision(tensors[0].device().type()));
    context->saved_data["capsule"] = c10::IValue::make_capsule(std::move(capsule));
    context->saved_data["inputs"] = inputs;
    context->save_for_backward(tensors.vec());
    std::vector<at::Tensor> given(tensors.begin(), tensors.begin() + inputs);
    return (*closure)(given, false);
  }

  static List backward(torch::autograd::AutogradContext* context, const List& gradients) {
    auto held = context->saved_data["capsule"].toCapsule();
    const auto& capsule = static_cast<const Capsule&>(*held);
    auto count = context->saved_data["inputs"].toInt();
    auto tensors = context->get_saved_variables();
    std::vector<at::Tensor> given;
    List wanted;
    std::vector<size_t> places;
    for (size_t i = 0; i < tensors.size(); ++i) {
      bool wants = tensors[i].requires_grad();
      auto tensor = tensors[i];
      if (i < static_cast<size_t>(count)) {
        tensor = tensor.detach();
        tensor.set_requires_grad(wants);
        given.push_back(tensor);
      }
      if (wants) {
        wanted.push_back(tensor);
        places.push_back(i);
      }
    }
    // Its destructor runs after that of the graph.
    struct Leave {
      const Closure* entered = nullptr;
      ~Leave() {
        if (entered != nullptr) {
          entered->leave(entered->context);
        }
      }
    } leave;
    at::Tensor output;
    {
      at::AutoGradMode on(true);
      Precision now(capsule.precision.device);
      capsule.precision.enter();
      try {
        output = (*capsule.closure)(given, true);
        leave.entered = capsule.closure.get();
      } catch (...) {
        now.enter();
        throw;
      }
      now.enter();
    }
    auto found = torch::autograd::grad({output}, wanted, {gradients[0]}, /*retain_graph=*/false,
                                       /*create_graph=*/false, /*allow_unused=*/true);
    // Two inputs are not tensors.
    List all(2 + tensors.size());
    for (size_t i = 0; i < places.size(); ++i) {
      all[2 + places[i]] = found[i];
    }
    return all;
  }
};

}  // namespace

// Hooks of leaves' gradients, and what they hang on, which nothing else keeps alive.
struct potstill_hooks {
  std::vector<std::pair<std::shared_ptr<torch::autograd::Node>, uintptr_t>> hooks;

  ~potstill_hooks() {
    for (auto& [node, key] : hooks) {
      node->del_post_hook(key);
    }
  }
};

extern "C" {

struct potstill_memory {
  int device;
  // For the host; for a device libtorch counts itself.
  std::shared_ptr<HostMemory> host;
  int64_t before = 0;
};

bool potstill_load_cuda(potstill_error* error) {
  return failed(error, [] { potstill::load_cuda(); });
}

bool potstill_cuda_open(const uint8_t* image, size_t length, const potstill_cuda_functions** out, potstill_error* error) {
  return failed(error, [&] {
    // Opened once, by the first use.
    static const potstill_cuda_functions* const functions = [&] {
      void* library = potstill::open_embedded("potstill-cuda", image, length);
      auto found = reinterpret_cast<potstill_cuda_fn*>(dlsym(library, "potstill_cuda"));
      TORCH_CHECK(found != nullptr, "the CUDA library lacks its entry point");
      return found();
    }();
    *out = functions;
  });
}

// Asks the driver alone, which opens no context and takes no memory of a device.
bool potstill_device_address(int index, char* address, int length, potstill_error* error) {
  return failed(error, [&] {
    static void* const driver = potstill::open_library("libcuda.so.1", RTLD_NOW | RTLD_LOCAL);
    auto call = [](const char* name, auto function, auto... arguments) {
      auto symbol = reinterpret_cast<decltype(function)>(dlsym(driver, name));
      TORCH_CHECK(symbol != nullptr, "the driver has no ", name);
      int result = symbol(arguments...);
      TORCH_CHECK(result == 0, name, " returned ", result);
    };
    int device = 0;
    call("cuInit", static_cast<int (*)(unsigned)>(nullptr), 0U);
    call("cuDeviceGet", static_cast<int (*)(int*, int)>(nullptr), &device, index);
    call("cuDeviceGetPCIBusId", static_cast<int (*)(char*, int, int)>(nullptr), address, length, device);
  });
}

// Calls `call(context, i)` in every backward pass, on autograd's thread, when the gradient of `leaves[i]` has been accumulated.
bool potstill_on_gradients(at::Tensor* const* leaves, size_t count, void* context, void (*call)(void*, size_t),
                           potstill_hooks** out, potstill_error* error) {
  return failed(error, [&] {
    auto hooks = std::make_unique<potstill_hooks>();
    for (size_t i = 0; i < count; ++i) {
      using torch::autograd::variable_list;
      auto node = torch::autograd::impl::grad_accumulator(*leaves[i]);
      TORCH_CHECK(node != nullptr, "tensor ", i, " takes no gradient");
      auto notify = [=](const variable_list& outputs, const variable_list&) {
        call(context, i);
        return outputs;
      };
      auto key = node->add_post_hook(std::make_unique<torch::autograd::utils::LambdaPostHook>(notify));
      hooks->hooks.emplace_back(std::move(node), key);
    }
    *out = hooks.release();
  });
}

void potstill_hooks_free(potstill_hooks* hooks) { delete hooks; }

bool potstill_clear_gradients(at::Tensor* const* params, size_t count, potstill_error* error) {
  return failed(error, [&] {
    for (size_t i = 0; i < count; ++i) {
      params[i]->mutable_grad().reset();
    }
  });
}

// Adam's step of one flat vector. Without a first moment, where its decay is 0, the gradient takes its place: each element
// is read before the same value is written.
bool potstill_adam(const at::Tensor* values, const at::Tensor* gradient, const at::Tensor* first, const at::Tensor* second,
                   uint64_t step, double rate, double beta1, double beta2, double epsilon, potstill_error* error) {
  return failed(error, [&] {
    at::NoGradGuard no_grad;
    auto on = values->device().is_cuda() ? values->device() : at::Device(at::kCPU);
    auto count = at::full({}, static_cast<double>(step), at::TensorOptions().dtype(at::kFloat).device(on));
    at::_fused_adam_({*values}, {*gradient}, {first == nullptr ? *gradient : *first}, {*second}, {}, {count}, rate, beta1,
                     beta2, 0.0, epsilon, false, false, std::nullopt, std::nullopt);
  });
}

// Fills a tensor with ones of this probability and zeros, from a generator of its own with this seed: the device's own one, which
// other threads may use, is not touched.
bool potstill_bernoulli(const at::Tensor* mask, double probability, uint64_t seed, potstill_error* error) {
  return failed(error, [&] {
    at::NoGradGuard no_grad;
    at::Generator shared = at::globalContext().defaultGenerator(mask->device());
    at::Generator own;
    {
      std::lock_guard<std::mutex> lock(shared.mutex());
      own = shared.clone();
    }
    own.set_current_seed(seed);
    mask->bernoulli_(probability, own);
  });
}

// Turns automatic mixed precision on for this thread, or off again. Its cache of cast weights stays off: a cast made
// without gradient would be taken for one with gradient later in the same scope.
bool potstill_autocast(bool cuda, bool on, bool half, potstill_error* error) {
  return failed(error, [&] {
    auto device = cuda ? at::kCUDA : at::kCPU;
    if (on) {
      at::autocast::set_autocast_dtype(device, half ? at::kHalf : at::kBFloat16);
      at::autocast::set_autocast_cache_enabled(false);
    }
    at::autocast::set_autocast_enabled(device, on);
  });
}

// Calls a block now, and again in its backward pass, where it is then left. Owns `context` in all cases.
bool potstill_recompute(at::Tensor* const* tensors, size_t count, size_t inputs, void* context,
                        at::Tensor* (*call)(void*, at::Tensor* const*, size_t, bool), void (*leave)(void*),
                        void (*drop)(void*), at::Tensor** out, potstill_error* error) {
  return failed(error, [&] {
    auto closure = std::make_shared<Closure>(context, call, leave, drop);
    auto all = copy_handles(tensors, count);
    auto output = Recomputed::apply(closure, static_cast<int64_t>(inputs), at::TensorList(all));
    *out = new at::Tensor(std::move(output));
  });
}

// Starts to count this thread's memory on a device; on the host (-1) until it is ended.
bool potstill_memory_begin(int device, potstill_memory** out, potstill_error* error) {
  return failed(error, [&] {
    auto made = std::make_unique<potstill_memory>();
    made->device = device;
    if (device < 0) {
      made->host = std::make_shared<HostMemory>();
      c10::ThreadLocalDebugInfo::_push(c10::DebugInfoKind::PROFILER_STATE, made->host);
    } else {
      // Until then the allocator knows no device.
      at::globalContext().lazyInitDevice(at::kCUDA);
      auto allocator = c10::getDeviceAllocator(at::kCUDA);
      allocator->resetPeakStats(static_cast<c10::DeviceIndex>(device));
      made->before = allocator->getDeviceStats(static_cast<c10::DeviceIndex>(device)).allocated_bytes[0].current;
    }
    *out = made.release();
  });
}

// The peak since the start, beyond the bytes that were allocated then.
bool potstill_memory_peak(const potstill_memory* memory, int64_t* bytes, potstill_error* error) {
  return failed(error, [&] {
    if (memory->host != nullptr) {
      *bytes = memory->host->peak;
    } else {
      auto stats = c10::getDeviceAllocator(at::kCUDA)->getDeviceStats(static_cast<c10::DeviceIndex>(memory->device));
      *bytes = stats.allocated_bytes[0].peak - memory->before;
    }
  });
}

void potstill_memory_end(potstill_memory* memory) {
  potstill_error ignored;
  failed(&ignored, [&] {
    if (memory->host != nullptr) {
      c10::ThreadLocalDebugInfo::_pop(c10::DebugInfoKind::PROFILER_STATE);
    }
    delete memory;
  });
}

}  // extern "C"
