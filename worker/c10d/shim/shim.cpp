// A C interface to the part of c10d that Potstill uses. Every function that can fail returns true when it did, with the
// reason in `error`. Objects are passed as owning pointers; tensors as the `at::Tensor*` that tch also uses.
#include "guard.h"
#include "libtorch.h"
#include "nccl_library.h"

#include <c10/util/Logging.h>
#include <torch/csrc/autograd/autograd.h>
#include <torch/csrc/autograd/variable.h>
#include <torch/csrc/distributed/c10d/FileStore.hpp>
#include <torch/csrc/distributed/c10d/FlightRecorder.hpp>
#include <torch/csrc/distributed/c10d/HashStore.hpp>
#include <torch/csrc/distributed/c10d/PrefixStore.hpp>
#include <torch/csrc/distributed/c10d/ProcessGroup.hpp>
#include <torch/csrc/distributed/c10d/ProcessGroupGloo.hpp>
#include <torch/csrc/distributed/c10d/reducer.hpp>

#include <dirent.h>
#include <dlfcn.h>
#include <linux/filter.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <unistd.h>

#include <atomic>
#include <chrono>
#include <cstdlib>
#include <fstream>
#include <memory>
#include <mutex>
#include <set>
#include <string_view>
#include <thread>

using potstill::copy_handles;
using potstill::failed;
using std::chrono::milliseconds;

extern "C" {

struct potstill_bytes {
  const uint8_t* data;
  size_t length;
};

// One operation on a store that Rust implements. Which fields count depends on the operation: see `ffi.rs`.
struct potstill_store_call {
  uint8_t operation;
  const potstill_bytes* keys;
  size_t key_count;
  potstill_bytes value;
  potstill_bytes expected;
  int64_t amount;
  int64_t timeout_ms;
};

// Where Rust leaves the bytes that an operation returns.
struct potstill_sink {
  std::vector<uint8_t> bytes;
};

typedef bool potstill_store_call_fn(const void* context, const potstill_store_call* call, int64_t* number,
                                    potstill_sink* sink, potstill_error* error);
typedef void potstill_store_end_fn(const void* context);
}

namespace {

// A store that Rust implements. Its copies share what is behind it, which Rust guards.
class CallbackStore final : public c10d::Store {
 public:
  CallbackStore(potstill_store_call_fn* call, std::shared_ptr<const void> context, milliseconds timeout)
      : Store(timeout), call_(call), context_(std::move(context)) {}

  c10::intrusive_ptr<Store> clone() override {
    return c10::make_intrusive<CallbackStore>(call_, context_, timeout_);
  }

  void set(const std::string& key, const std::vector<uint8_t>& value) override {
    potstill_store_call call = about(SET);
    call.value = bytes(value);
    ask({key}, call);
  }

  std::vector<uint8_t> get(const std::string& key) override { return ask({key}, about(GET)).second; }

  int64_t add(const std::string& key, int64_t value) override {
    potstill_store_call call = about(ADD);
    call.amount = value;
    return ask({key}, call).first;
  }

  std::vector<uint8_t> compareSet(const std::string& key, const std::vector<uint8_t>& expected,
                                  const std::vector<uint8_t>& desired) override {
    potstill_store_call call = about(COMPARE_SET);
    call.expected = bytes(expected);
    call.value = bytes(desired);
    return ask({key}, call).second;
  }

  bool deleteKey(const std::string& key) override { return ask({key}, about(DELETE)).first != 0; }

  bool check(const std::vector<std::string>& keys) override { return ask(keys, about(CHECK)).first != 0; }

  int64_t getNumKeys() override { return ask({}, about(COUNT)).first; }

  void wait(const std::vector<std::string>& keys) override { ask(keys, about(WAIT)); }

  void wait(const std::vector<std::string>& keys, const milliseconds& timeout) override {
    potstill_store_call call = about(WAIT);
    call.timeout_ms = timeout.count();
    ask(keys, call);
  }

 private:
  enum Operation : uint8_t { SET, GET, ADD, COMPARE_SET, DELETE, CHECK, WAIT, COUNT };

  potstill_store_call about(Operation operation) const {
    return {operation, nullptr, 0, {nullptr, 0}, {nullptr, 0}, 0, timeout_.count()};
  }

  static potstill_bytes bytes(const std::vector<uint8_t>& value) { return {value.data(), value.size()}; }

  std::pair<int64_t, std::vector<uint8_t>> ask(const std::vector<std::string>& keys, potstill_store_call call) const {
    std::vector<potstill_bytes> views;
    for (const auto& key : keys) {
      views.push_back({reinterpret_cast<const uint8_t*>(key.data()), key.size()});
    }
    call.keys = views.data();
    call.key_count = views.size();
    int64_t number = 0;
    potstill_sink sink;
    potstill_error error{};
    TORCH_CHECK(!call_(context_.get(), &call, &number, &sink, &error), error.text);
    return {number, std::move(sink.bytes)};
  }

  potstill_store_call_fn* call_;
  std::shared_ptr<const void> context_;
};

// c10d's own Gloo group ignores abort(): a peer that is stopped, not dead, holds a collective until its
// timeout. Failing the connections, as gloo itself does after a timeout, ends every operation on them at
// once.
class AbortableGloo final : public c10d::ProcessGroupGloo {
 public:
  using ProcessGroupGloo::ProcessGroupGloo;
  using Clock = std::chrono::steady_clock;

  c10::intrusive_ptr<c10d::Work> allreduce(std::vector<at::Tensor>& tensors,
                                           const c10d::AllreduceOptions& options) override {
    last_all_reduce_ = Clock::now();
    return ProcessGroupGloo::allreduce(tensors, options);
  }

  // When the newest all-reduce was issued: in a backward, when the last gradient was computed.
  Clock::time_point last_all_reduce() const { return last_all_reduce_; }

  void abort() override {
    for (const auto& context : contexts_) {
      for (int peer = 0; peer < getSize(); ++peer) {
        auto pair = reinterpret_cast<gloo::transport::tcp::Pair*>(context->getPair(peer).get());
        if (pair != nullptr) {
          pair->signalExceptionExternal("the group was aborted");
        }
      }
    }
  }

 private:
  std::atomic<Clock::time_point> last_all_reduce_{Clock::time_point{}};
};

// The sockets of this process that listen: their descriptors, and what tells a socket from another one that has had the same
// descriptor.
std::set<std::pair<int, ino_t>> listening() {
  std::set<std::pair<int, ino_t>> found;
  if (DIR* folder = opendir("/proc/self/fd")) {
    while (const dirent* entry = readdir(folder)) {
      int descriptor = std::atoi(entry->d_name);
      int listens = 0;
      socklen_t length = sizeof listens;
      struct stat status;
      if (getsockopt(descriptor, SOL_SOCKET, SO_ACCEPTCONN, &listens, &length) == 0 && listens != 0 &&
          fstat(descriptor, &status) == 0) {
        found.insert({descriptor, status.st_ino});
      }
    }
    closedir(folder);
  }
  return found;
}

// A Gloo device and the socket on which it listens. Gloo accepts whatever connects for as long as the device lives, and
// keeps a descriptor of each.
struct Device {
  std::shared_ptr<gloo::transport::Device> device;
  std::set<int> sockets;

  static Device create(const char* host) {
    // One at a time, so that the socket that is new is the device's.
    static std::mutex one;
    std::lock_guard<std::mutex> guard(one);
    auto before = listening();
    Device made{c10d::ProcessGroupGloo::createDeviceForHostname(host), {}};
    for (const auto& socket : listening()) {
      if (before.count(socket) == 0) {
        made.sockets.insert(socket.first);
      }
    }
    return made;
  }

  // Once all peers are connected nothing else may connect: the kernel drops what arrives. Where it does not support that,
  // strangers cost descriptors.
  void close_door() const {
    sock_filter nothing = BPF_STMT(BPF_RET | BPF_K, 0);
    sock_fprog filter{1, &nothing};
    for (int descriptor : sockets) {
      setsockopt(descriptor, SOL_SOCKET, SO_ATTACH_FILTER, &filter, sizeof filter);
    }
  }
};

struct Nccl {
  potstill_nccl_backend_fn* backend;
  potstill_nccl_record_fn* record;
};

Nccl open_nccl(const uint8_t* image, size_t length) {
  void* library = potstill::open_embedded("potstill-nccl", image, length);
  Nccl nccl{reinterpret_cast<potstill_nccl_backend_fn*>(dlsym(library, "potstill_nccl_backend")),
            reinterpret_cast<potstill_nccl_record_fn*>(dlsym(library, "potstill_nccl_record"))};
  TORCH_CHECK(nccl.backend != nullptr && nccl.record != nullptr, "unavailable: the NCCL library lacks an entry point");
  return nccl;
}

// Opened once, by the first use.
const Nccl& nccl(const uint8_t* image, size_t length) {
  static const Nccl opened = open_nccl(image, length);
  return opened;
}

}  // namespace

extern "C" {

struct potstill_store {
  c10::intrusive_ptr<c10d::Store> store;
};

struct potstill_group {
  c10::intrusive_ptr<c10d::ProcessGroup> group;
  // The same backend that `group` dispatches to: called directly, it needs no dispatcher and has an abort.
  c10::intrusive_ptr<c10d::Backend> backend;
};

struct potstill_work {
  c10::intrusive_ptr<c10d::Work> work;
  // Held until the operation is over, whatever the backend itself holds.
  std::vector<at::Tensor> tensors;
  bool on_device;
};

struct potstill_reducer {
  std::vector<at::Tensor> params;
  c10::intrusive_ptr<c10d::Backend> backend;
  c10d::Reducer reducer;
};

bool potstill_store_alone(int64_t timeout_ms, potstill_store** out, potstill_error* error) {
  return failed(error, [&] {
    // Every use starts with a store. Without this, libtorch would ignore TORCH_CPP_LOG_LEVEL.
    c10::initLogging();
    auto store = c10::make_intrusive<c10d::HashStore>();
    store->setTimeout(milliseconds(timeout_ms));
    *out = new potstill_store{std::move(store)};
  });
}

bool potstill_store_file(const char* path, int64_t timeout_ms, potstill_store** out, potstill_error* error) {
  return failed(error, [&] {
    c10::initLogging();
    // No number of processes: who made the file removes it.
    auto store = c10::make_intrusive<c10d::FileStore>(path, -1);
    store->setTimeout(milliseconds(timeout_ms));
    *out = new potstill_store{std::move(store)};
  });
}

bool potstill_store_of(potstill_store_call_fn* call, potstill_store_end_fn* end, const void* context, int64_t timeout_ms,
                       potstill_store** out, potstill_error* error) {
  return failed(error, [&] {
    std::shared_ptr<const void> held(context, end);
    c10::initLogging();
    *out = new potstill_store{
        c10::make_intrusive<CallbackStore>(call, std::move(held), milliseconds(timeout_ms))};
  });
}

bool potstill_sink_write(potstill_sink* sink, const uint8_t* bytes, size_t length, potstill_error* error) {
  return failed(error, [&] { sink->bytes.assign(bytes, bytes + length); });
}

bool potstill_store_prefix(const potstill_store* store, const char* prefix, potstill_store** out, potstill_error* error) {
  return failed(error, [&] {
    // A copy of its own: a group that still waits for its peers may hold its store's lock, and must not block the next
    // generation.
    auto copy = store->store->clone();
    copy->setTimeout(store->store->getTimeout());
    *out = new potstill_store{c10::make_intrusive<c10d::PrefixStore>(prefix, std::move(copy))};
  });
}

void potstill_store_free(potstill_store* store) {
  potstill_error ignored;
  failed(&ignored, [&] { delete store; });
}

bool potstill_group_gloo(const potstill_store* store, int rank, int world, int64_t timeout_ms, const char* host,
                         potstill_group** out, potstill_error* error) {
  return failed(error, [&] {
    // gloo reads this variable too. Other transports do not have the connections that AbortableGloo fails. With TCP_TLS
    // libtorch 2.11 loads the certificates and then sends everything in the clear, to peers whose certificates it does not check.
    const char* transport = std::getenv("GLOO_DEVICE_TRANSPORT");
    TORCH_CHECK(transport == nullptr || std::string_view(transport) == "TCP",
                "unavailable: GLOO_DEVICE_TRANSPORT is ", transport,
                ", and only TCP is supported: with TCP_TLS this libtorch sends everything in the clear. Unset it, and encrypt the "
                "network between the ranks, as with WireGuard or IPsec");
    auto options = c10d::ProcessGroupGloo::Options::create(milliseconds(timeout_ms));
    Device device = Device::create(host);
    options->devices.push_back(device.device);
    auto backend = c10::make_intrusive<AbortableGloo>(store->store, rank, world, options);
    device.close_door();
    auto group = c10::make_intrusive<c10d::ProcessGroup>(store->store, rank, world);
    group->setDefaultBackend(c10d::ProcessGroup::BackendType::GLOO);
    group->setBackend(at::kCPU, c10d::ProcessGroup::BackendType::GLOO, backend);
    *out = new potstill_group{std::move(group), std::move(backend)};
  });
}

bool potstill_group_nccl(const uint8_t* image, size_t length, const potstill_store* store, int rank, int world,
                         int64_t timeout_ms, int device, potstill_group** out, potstill_error* error) {
  return failed(error, [&] {
    c10::intrusive_ptr<c10d::Backend> backend;
    if (potstill_error inner; nccl(image, length).backend(store->store, rank, world, timeout_ms, device, &backend, &inner)) {
      TORCH_CHECK(false, inner.text);
    }
    auto group = c10::make_intrusive<c10d::ProcessGroup>(store->store, rank, world);
    group->setDefaultBackend(c10d::ProcessGroup::BackendType::NCCL);
    group->setBackend(at::kCUDA, c10d::ProcessGroup::BackendType::NCCL, backend);
    *out = new potstill_group{std::move(group), std::move(backend)};
  });
}

bool potstill_group_set_timeout(const potstill_group* group, int64_t timeout_ms, potstill_error* error) {
  return failed(error, [&] { group->backend->setTimeout(milliseconds(timeout_ms)); });
}

bool potstill_group_abort(const potstill_group* group, potstill_error* error) {
  return failed(error, [&] { group->backend->abort(); });
}

// Writes what c10d's flight recorder holds of this process's newest operations: those of NCCL where its library is given,
// else those of Gloo.
bool potstill_flight_record(const uint8_t* image, size_t length, const char* path, potstill_error* error) {
  return failed(error, [&] {
    std::string record;
    if (length == 0) {
      record = c10d::dump_fr_trace(true, false, false);
    } else if (potstill_error inner; nccl(image, length).record(&record, &inner)) {
      TORCH_CHECK(false, inner.text);
    }
    std::ofstream file(path, std::ios::binary | std::ios::trunc);
    file << record;
    file.close();
    TORCH_CHECK(file.good(), "cannot write ", path);
  });
}

// Without a failure it waits for operations in flight.
void potstill_group_free(potstill_group* group, bool orderly) {
  potstill_error ignored;
  failed(&ignored, [&] { orderly ? group->backend->shutdown() : group->backend->abort(); });
  failed(&ignored, [&] { delete group; });
}

bool potstill_all_reduce(const potstill_group* group, at::Tensor* tensor, uint8_t op, potstill_work** out,
                         potstill_error* error) {
  return failed(error, [&] {
    std::vector<at::Tensor> tensors{*tensor};
    c10d::AllreduceOptions options;
    options.reduceOp = static_cast<c10d::ReduceOp::RedOpType>(op);
    auto work = group->backend->allreduce(tensors, options);
    *out = new potstill_work{std::move(work), std::move(tensors), tensor->is_cuda()};
  });
}

bool potstill_broadcast(const potstill_group* group, at::Tensor* tensor, int root, potstill_work** out,
                        potstill_error* error) {
  return failed(error, [&] {
    std::vector<at::Tensor> tensors{*tensor};
    c10d::BroadcastOptions options;
    options.rootRank = root;
    auto work = group->backend->broadcast(tensors, options);
    *out = new potstill_work{std::move(work), std::move(tensors), tensor->is_cuda()};
  });
}

bool potstill_reduce(const potstill_group* group, at::Tensor* tensor, int root, potstill_work** out,
                     potstill_error* error) {
  return failed(error, [&] {
    std::vector<at::Tensor> tensors{*tensor};
    c10d::ReduceOptions options;
    options.reduceOp = c10d::ReduceOp::SUM;
    options.rootRank = root;
    auto work = group->backend->reduce(tensors, options);
    *out = new potstill_work{std::move(work), std::move(tensors), tensor->is_cuda()};
  });
}

bool potstill_all_gather(const potstill_group* group, at::Tensor* tensor, at::Tensor* const* outputs, size_t count,
                         potstill_work** out, potstill_error* error) {
  return failed(error, [&] {
    std::vector<at::Tensor> inputs{*tensor};
    std::vector<std::vector<at::Tensor>> gathered{copy_handles(outputs, count)};
    auto work = group->backend->allgather(gathered, inputs);
    auto tensors = std::move(gathered[0]);
    tensors.push_back(*tensor);
    *out = new potstill_work{std::move(work), std::move(tensors), tensor->is_cuda()};
  });
}

bool potstill_all_gather_into(const potstill_group* group, at::Tensor* output, at::Tensor* input, potstill_work** out,
                              potstill_error* error) {
  return failed(error, [&] {
    auto work = group->backend->_allgather_base(*output, *input);
    *out = new potstill_work{std::move(work), {*output, *input}, input->is_cuda()};
  });
}

// Sends `input` to rank `to` and receives `output` from rank `from`.
bool potstill_exchange(const potstill_group* group, at::Tensor* output, at::Tensor* input, int to, int from,
                       potstill_work** out, potstill_error* error) {
  return failed(error, [&] {
    std::vector<int64_t> received(group->backend->getSize(), 0), sent(group->backend->getSize(), 0);
    received.at(from) = output->numel();
    sent.at(to) = input->numel();
    auto work = group->backend->alltoall_base(*output, *input, received, sent);
    *out = new potstill_work{std::move(work), {*output, *input}, input->is_cuda()};
  });
}

bool potstill_barrier(const potstill_group* group, potstill_work** out, potstill_error* error) {
  return failed(error, [&] {
    auto work = group->backend->barrier();
    *out = new potstill_work{std::move(work), {}, group->backend->getBoundDeviceId().has_value()};
  });
}

bool potstill_work_is_completed(const potstill_work* work, bool* completed, potstill_error* error) {
  return failed(error, [&] { *completed = work->work->isCompleted(); });
}

// Without a timeout (0): until the operation is over, or on a device, until the current stream is ordered
// after it.
bool potstill_work_wait(const potstill_work* work, int64_t timeout_ms, bool* completed, potstill_error* error) {
  return failed(error, [&] {
    *completed = true;
    if (timeout_ms == 0) {
      work->work->wait();
    } else if (work->on_device) {
      // NCCL's own wait(timeout) marks the operation as failed when the time is up, so that a second wait
      // could not succeed. Hence this loop.
      auto deadline = std::chrono::steady_clock::now() + milliseconds(timeout_ms);
      while (!work->work->isCompleted()) {
        if (std::chrono::steady_clock::now() >= deadline) {
          *completed = false;
          return;
        }
        std::this_thread::sleep_for(std::chrono::microseconds(20));
      }
      work->work->wait();
      // An operation that was aborted completes too: only its exception tells.
      if (auto exception = work->work->exception()) {
        std::rethrow_exception(exception);
      }
    } else {
      try {
        work->work->wait(milliseconds(timeout_ms));
      } catch (...) {
        // Either the timeout is over or the operation failed; the operation itself tells which.
        *completed = work->work->isCompleted();
        if (*completed) {
          work->work->wait();
        }
      }
    }
  });
}

void potstill_work_free(potstill_work* work) {
  potstill_error ignored;
  failed(&ignored, [&] { delete work; });
}

bool potstill_reducer_new(const potstill_group* group, at::Tensor* const* params, size_t count, int64_t first_bucket_bytes,
                          int64_t bucket_bytes, bool gradient_as_bucket_view, potstill_reducer** out,
                          potstill_error* error) {
  return failed(error, [&] {
    auto handles = copy_handles(params, count);
    c10d::verify_params_across_processes(group->group, handles, std::nullopt);
    // Backward makes the last parameters' gradients first, so this order lets the first bucket leave early.
    std::vector<at::Tensor> reversed(handles.rbegin(), handles.rend());
    std::vector<size_t> limits{static_cast<size_t>(first_bucket_bytes), static_cast<size_t>(bucket_bytes)};
    auto buckets = std::get<0>(c10d::compute_bucket_assignment_by_size(reversed, limits));
    std::unique_ptr<potstill_reducer> made(new potstill_reducer{
        std::move(handles), group->backend,
        c10d::Reducer(std::move(reversed), std::move(buckets), group->group, std::vector<bool>(count, false), bucket_bytes,
                      /*find_unused_parameters=*/false, gradient_as_bucket_view, /*param_names=*/{}, first_bucket_bytes,
                      /*skip_all_reduce_unused_params=*/false, /*use_python_reducer=*/false,
                      /*bucket_bytes_cap_list=*/{})});
    // After its first iteration c10d would lay out the buckets again, in the order in which gradients arrived. The
    // layout decides the order of the sums, so a run resumed from a checkpoint would differ in the last bits. Fixing
    // the layout now gives the same order in every iteration.
    made->reducer.push_rebuilt_params_for_all_indices();
    made->reducer.rebuild_buckets();
    *out = made.release();
  });
}

bool potstill_reducer_backward(potstill_reducer* reducer, const at::Tensor* loss, int64_t* exposed_ns,
                               potstill_error* error) {
  return failed(error, [&] {
    reducer->reducer.prepare_for_backward({});
    torch::autograd::backward({*loss}, {});
    *exposed_ns = 0;
    if (auto gloo = dynamic_cast<AbortableGloo*>(reducer->backend.get())) {
      auto waited = AbortableGloo::Clock::now() - gloo->last_all_reduce();
      *exposed_ns = std::chrono::duration_cast<std::chrono::nanoseconds>(waited).count();
    }
    // A parameter without a gradient leaves its bucket waiting. It is reported now rather than in the next iteration.
    if (potstill_error ignored; failed(&ignored, [&] { reducer->reducer.check_finalized(); })) {
      std::string missing;
      for (size_t i = 0; i < reducer->params.size(); ++i) {
        missing += reducer->params[i].grad().defined() ? "" : " " + std::to_string(i);
      }
      TORCH_CHECK(false, "not every parameter got a gradient in this backward; without any:", missing);
    }
  });
}

void potstill_reducer_free(potstill_reducer* reducer) {
  potstill_error ignored;
  failed(&ignored, [&] { delete reducer; });
}

bool potstill_reduce_scatter(const potstill_group* group, at::Tensor* output, at::Tensor* input, potstill_work** out,
                             potstill_error* error) {
  return failed(error, [&] {
    auto work = group->backend->_reduce_scatter_base(*output, *input);
    *out = new potstill_work{std::move(work), {*output, *input}, input->is_cuda()};
  });
}

}  // extern "C"
