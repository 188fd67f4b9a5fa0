// A CUDA runtime that computes nothing. Loaded first (LD_PRELOAD), it takes the place of NVIDIA's, so that all that a program does
// on the host for a GPU happens on a machine without one: the memory that it takes, what it copies and launches, where it
// waits, and whether what it captures in a graph may be captured. Copies are made, kernels are not run. So that the host decides as
// in a run without trouble, it reads a single byte from the device as 1 (true), and up to 4 KiB as 0, unless they were copied
// there just before, as libtorch does to tell other ranks of something.
//
// Device memory lies at addresses that the host may not touch. What CUDA forbids while a stream is captured fails as it does
// there. When the process ends, a line of JSON with counts is appended to the file that DRY_GPU_LOG names; with DRY_GPU_KERNELS it
// names the kernels. It does so too when it gets the signal SIGRTMIN+5. With DRY_GPU_WAITS standard error gets the stack of each
// call that waited, and of each that was forbidden. DRY_GPU_MEMORY is a device's size in bytes. Copies of more than DRY_GPU_COPIES
// bytes are not made, so that memory which nothing is copied to costs none of the host's. A capture of more than DRY_GPU_RECORDS
// operations fails.
#include "runtime.h"

#include <execinfo.h>
#include <signal.h>
#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <map>
#include <memory>
#include <mutex>
#include <set>
#include <string>
#include <thread>
#include <vector>

namespace {

std::recursive_mutex lock;
using Guard = std::lock_guard<std::recursive_mutex>;

size_t number(const char* name, size_t otherwise) {
  const char* text = std::getenv(name);
  return text == nullptr ? otherwise : std::strtoull(text, nullptr, 10);
}

const size_t CAPACITY = number("DRY_GPU_MEMORY", size_t{80} << 30);
const size_t LARGEST_COPY = number("DRY_GPU_COPIES", SIZE_MAX);
const size_t MOST_RECORDED = number("DRY_GPU_RECORDS", SIZE_MAX);

// ---- Counts ---------------------------------------------------------------------------------------------------------

struct Counts {
  std::map<std::string, size_t> of;
  std::map<std::string, size_t> kernels;
  std::map<std::vector<void*>, size_t> waits;

  void write() const {
    const char* path = std::getenv("DRY_GPU_LOG");
    if (path == nullptr || of.empty()) {
      return;
    }
    std::string line = "{\"process\": " + std::to_string(getpid());
    auto add = [&](const char* name, const std::map<std::string, size_t>& counts) {
      line += std::string(", \"") + name + "\": {";
      const char* comma = "";
      for (const auto& [key, count] : counts) {
        line += comma + ("\"" + key + "\": ") + std::to_string(count);
        comma = ", ";
      }
      line += "}";
    };
    add("counts", of);
    add("kernels", kernels);
    line += "}\n";
    if (FILE* file = std::fopen(path, "a")) {
      std::fputs(line.c_str(), file);
      std::fclose(file);
    }
    if (std::getenv("DRY_GPU_WAITS") != nullptr) {
      for (const auto& [stack, count] : waits) {
        std::fprintf(stderr, "dry_gpu: the host waited %zu times here:\n", count);
        backtrace_symbols_fd(stack.data(), static_cast<int>(stack.size()), 2);
      }
    }
  }
};

Counts& counts() {
  // Never destroyed before the program's own destructors have run.
  static Counts* counts = [] {
    auto made = new Counts;
    std::atexit([] { ::counts().write(); });
    return made;
  }();
  return *counts;
}

void count(const std::string& what) {
  Guard guard(lock);
  counts().of[what] += 1;
}

// The host waits for the device.
void wait(const char* what) {
  Guard guard(lock);
  counts().of["waits"] += 1;
  counts().of[std::string("waits: ") + what] += 1;
  if (std::getenv("DRY_GPU_WAITS") != nullptr) {
    std::vector<void*> stack(60);
    stack.resize(static_cast<size_t>(backtrace(stack.data(), 60)));
    counts().waits[stack] += 1;
  }
}

// ---- Errors ---------------------------------------------------------------------------------------------------------

thread_local cudaError_t last = cudaSuccess;

cudaError_t fail(cudaError_t error) {
  last = error;
  return error;
}

// Says where the host touched memory of the device, before the process dies of it.
__attribute__((constructor)) void watch() {
  struct sigaction action = {};
  action.sa_flags = static_cast<int>(SA_SIGINFO | SA_RESETHAND);
  action.sa_sigaction = [](int, siginfo_t* what, void*) {
    dprintf(2, "dry_gpu: the host touched %p, which may be memory of the device:\n", what->si_addr);
    void* stack[60];
    backtrace_symbols_fd(stack, backtrace(stack, 60), 2);
  };
  sigaction(SIGSEGV, &action, nullptr);
  static sigset_t asked;
  sigemptyset(&asked);
  sigaddset(&asked, SIGRTMIN + 5);
  pthread_sigmask(SIG_BLOCK, &asked, nullptr);
  std::thread([] {
    for (int signal; sigwait(&asked, &signal) == 0;) {
      Guard guard(lock);
      counts().write();
    }
  }).detach();
}

// ---- Memory ---------------------------------------------------------------------------------------------------------

struct Block {
  size_t size;
  // The same memory where the host may use it.
  char* host;
};

std::map<char*, Block>& device_memory() {
  static auto blocks = new std::map<char*, Block>;
  return *blocks;
}
std::map<char*, size_t>& pinned_memory() {
  static auto blocks = new std::map<char*, size_t>;
  return *blocks;
}
size_t used = 0;

template <class Map, class Size>
auto find(Map& blocks, const void* address, Size size) {
  auto at = const_cast<char*>(static_cast<const char*>(address));
  auto after = blocks.upper_bound(at);
  if (after == blocks.begin()) {
    return blocks.end();
  }
  auto found = std::prev(after);
  return at < found->first + size(found->second) ? found : blocks.end();
}

auto find_device(const void* address) {
  return find(device_memory(), address, [](const Block& block) { return block.size; });
}

bool is_device(const void* address) { return find_device(address) != device_memory().end(); }

bool is_pinned(const void* address) {
  return find(pinned_memory(), address, [](size_t size) { return size; }) != pinned_memory().end();
}

// Where the host may use the memory of an address, of the device or of the host.
char* usable(const void* address, size_t size) {
  auto at = const_cast<char*>(static_cast<const char*>(address));
  auto found = find_device(address);
  if (found == device_memory().end()) {
    return at;
  }
  size_t offset = static_cast<size_t>(at - found->first);
  return offset + size <= found->second.size ? found->second.host + offset : nullptr;
}

// ---- Streams, events and graphs -------------------------------------------------------------------------------------

struct Capture {
  unsigned long long id;
  cudaStreamCaptureMode mode;
  pthread_t thread;
  cudaStream_t origin;
  bool valid = true;
  std::set<cudaStream_t> streams;
  // Streams that have work which the origin does not wait for yet.
  std::set<cudaStream_t> unjoined;
  std::vector<std::function<void()>> nodes;
};

std::map<cudaStream_t, std::shared_ptr<Capture>> capturing;
unsigned long long captures = 0;

struct Event {
  std::shared_ptr<Capture> capture;
  cudaStream_t stream = nullptr;
};

struct Graph {
  unsigned long long capture;
  std::vector<std::function<void()>> nodes;
};

// Streams that the default stream waits for, and the other way round.
std::set<cudaStream_t> blocking;

thread_local cudaStreamCaptureMode thread_mode = cudaStreamCaptureModeGlobal;

std::shared_ptr<Capture> capture_of(cudaStream_t stream) {
  auto found = capturing.find(stream);
  return found == capturing.end() ? nullptr : found->second;
}

// What breaks a capture, with where.
cudaError_t breaks(const std::shared_ptr<Capture>& capture, cudaError_t error, const char* what) {
  capture->valid = false;
  count(std::string("forbidden in a capture: ") + what);
  if (std::getenv("DRY_GPU_WAITS") != nullptr) {
    std::fprintf(stderr, "dry_gpu: %s is forbidden in a capture:\n", what);
    void* stack[60];
    backtrace_symbols_fd(stack, backtrace(stack, 60), 2);
  }
  return fail(error);
}

}  // namespace

namespace dry_gpu {

cudaError_t unsafe(const char* what) {
  if (thread_mode == cudaStreamCaptureModeRelaxed) {
    return cudaSuccess;
  }
  for (const auto& [stream, capture] : capturing) {
    bool own = pthread_equal(capture->thread, pthread_self());
    bool forbidden = own ? capture->mode != cudaStreamCaptureModeRelaxed
                         : capture->mode == cudaStreamCaptureModeGlobal && thread_mode == cudaStreamCaptureModeGlobal;
    if (forbidden) {
      return breaks(capture, cudaErrorStreamCaptureUnsupported, what);
    }
  }
  return cudaSuccess;
}

cudaError_t enqueue(cudaStream_t stream, const char* what, std::function<void()> work) {
  Guard guard(lock);
  if (auto capture = capture_of(stream)) {
    if (!capture->valid) {
      return fail(cudaErrorStreamCaptureInvalidated);
    }
    if (capture->nodes.size() >= MOST_RECORDED) {
      return breaks(capture, cudaErrorStreamCaptureUnsupported, "more than the dry run records");
    }
    counts().of[std::string("captured: ") + what] += 1;
    if (stream != capture->origin) {
      capture->unjoined.insert(stream);
    }
    capture->nodes.push_back(work ? std::move(work) : [] {});
    return cudaSuccess;
  }
  if (stream == nullptr || stream == cudaStreamLegacy) {
    for (const auto& [other, capture] : capturing) {
      if (blocking.count(other) != 0) {
        return breaks(capture, cudaErrorStreamCaptureImplicit, "work of the default stream");
      }
    }
  }
  counts().of[what] += 1;
  if (work) {
    work();
  }
  return cudaSuccess;
}

namespace {

size_t kernels_launched = 0;
// Where something was copied to from the host, and how many kernels had been launched then.
std::map<const void*, size_t> copied;

bool just_copied(const void* address) {
  constexpr size_t JUST = 16;
  auto found = copied.find(address);
  return found != copied.end() && kernels_launched - found->second < JUST;
}

}  // namespace

cudaError_t copy(void* to, const void* from, size_t size, cudaStream_t stream) {
  Guard guard(lock);
  if (size == 0) {
    return cudaSuccess;
  }
  char* target = usable(to, size);
  const char* source = usable(from, size);
  if (target == nullptr || source == nullptr) {
    count("copies beyond a block of memory");
    return fail(cudaErrorInvalidValue);
  }
  bool up = is_device(to) && !is_device(from), down = !is_device(to) && is_device(from);
  bool pageable = (up && !is_pinned(from)) || (down && !is_pinned(to));
  auto capture = capture_of(stream);
  if (capture != nullptr && pageable) {
    return breaks(capture, cudaErrorStreamCaptureUnsupported, "a copy of pageable memory");
  }
  const char* what = up ? "copies to the device" : down ? "copies to the host" : "copies on the device";
  if (pageable) {
    // The runtime copies through page-locked memory of its own. Who calls it waits for the stream besides.
    count("copies of pageable memory");
  }
  if (up || (is_device(to) && just_copied(from))) {
    copied[to] = kernels_launched;
  }
  if (size > LARGEST_COPY) {
    return enqueue(stream, what);
  }
  return enqueue(stream, what, [=] {
    bool computed = down && !just_copied(from);
    if (down && size == 1) {
      *target = 1;
    } else if (computed && size <= 4096) {
      std::memset(target, 0, size);
    } else {
      std::memmove(target, source, size);
    }
  });
}

}  // namespace dry_gpu

using dry_gpu::copy;
using dry_gpu::enqueue;
using dry_gpu::unsafe;

namespace {

// ---- Kernels --------------------------------------------------------------------------------------------------------

std::map<const void*, std::string>& kernels() {
  static auto kernels = new std::map<const void*, std::string>;
  return *kernels;
}

cudaError_t launch(const void* kernel, cudaStream_t stream) {
  Guard guard(lock);
  if (std::getenv("DRY_GPU_KERNELS") != nullptr) {
    auto found = kernels().find(kernel);
    counts().kernels[found == kernels().end() ? "?" : found->second] += 1;
  }
  dry_gpu::kernels_launched += 1;
  return enqueue(stream, "kernels");
}

}  // namespace

extern "C" {

// ---- Registration of kernels ----------------------------------------------------------------------------------------

void** __cudaRegisterFatBinary(void*) {
  static void* handle = nullptr;
  return &handle;
}
void __cudaRegisterFatBinaryEnd(void**) {}
void __cudaUnregisterFatBinary(void**) {}
void __cudaRegisterFunction(void**, const char* function, char*, const char* name, int, uint3*, uint3*, dim3*, dim3*, int*) {
  Guard guard(lock);
  kernels()[function] = name;
}
void __cudaRegisterVar(void**, char*, char*, const char*, int, size_t, int, int) {}

struct Configuration {
  dim3 grid, block;
  size_t shared;
  cudaStream_t stream;
};
static thread_local std::vector<Configuration> configurations;

unsigned __cudaPushCallConfiguration(dim3 grid, dim3 block, size_t shared, cudaStream_t stream) {
  configurations.push_back({grid, block, shared, stream});
  return 0;
}
cudaError_t __cudaPopCallConfiguration(dim3* grid, dim3* block, size_t* shared, void* stream) {
  if (configurations.empty()) {
    return fail(cudaErrorMissingConfiguration);
  }
  auto& top = configurations.back();
  *grid = top.grid;
  *block = top.block;
  *shared = top.shared;
  *static_cast<cudaStream_t*>(stream) = top.stream;
  configurations.pop_back();
  return cudaSuccess;
}
cudaError_t __cudaGetKernel(cudaKernel_t* kernel, const void* function) {
  *kernel = reinterpret_cast<cudaKernel_t>(const_cast<void*>(function));
  return cudaSuccess;
}
cudaError_t __cudaLaunchKernel(cudaKernel_t kernel, dim3, dim3, void**, size_t, cudaStream_t stream) {
  return launch(kernel, stream);
}
cudaError_t cudaLaunchKernel(const void* function, dim3, dim3, void**, size_t, cudaStream_t stream) {
  return launch(function, stream);
}
cudaError_t cudaLaunchCooperativeKernel(const void* function, dim3, dim3, void**, size_t, cudaStream_t stream) {
  return launch(function, stream);
}
cudaError_t cudaLaunchKernelExC(const cudaLaunchConfig_t* config, const void* function, void**) {
  return launch(function, config->stream);
}
cudaError_t cudaFuncGetAttributes(cudaFuncAttributes* attributes, const void*) {
  *attributes = {};
  attributes->maxThreadsPerBlock = 1024;
  attributes->numRegs = 32;
  attributes->binaryVersion = attributes->ptxVersion = 90;
  attributes->maxDynamicSharedSizeBytes = 227 << 10;
  return cudaSuccess;
}
cudaError_t cudaFuncSetAttribute(const void*, cudaFuncAttribute, int) { return cudaSuccess; }
cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessor(int* blocks, const void*, int, size_t) {
  *blocks = 2;
  return cudaSuccess;
}
cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessorWithFlags(int* blocks, const void*, int, size_t, unsigned) {
  *blocks = 2;
  return cudaSuccess;
}
cudaError_t cudaGetSymbolAddress(void** address, const void*) {
  static void* memory = nullptr;
  if (memory == nullptr && cudaMalloc(&memory, 1 << 16) != cudaSuccess) {
    return last;
  }
  *address = memory;
  return cudaSuccess;
}
cudaError_t cudaMemcpyToSymbol(const void*, const void*, size_t, size_t, cudaMemcpyKind) { return cudaSuccess; }

// ---- Devices --------------------------------------------------------------------------------------------------------

static thread_local int current_device = 0;
static const int DEVICES = static_cast<int>(number("DRY_GPU_DEVICES", 1));

cudaError_t cudaGetDeviceCount(int* devices) {
  *devices = DEVICES;
  return cudaSuccess;
}
cudaError_t cudaGetDevice(int* device) {
  *device = current_device;
  return cudaSuccess;
}
cudaError_t cudaSetDevice(int device) {
  if (device < 0 || device >= DEVICES) {
    return fail(cudaErrorInvalidDevice);
  }
  current_device = device;
  return cudaSuccess;
}
cudaError_t cudaGetDeviceProperties(cudaDeviceProp* found, int) {
  *found = {};
  std::strcpy(found->name, "nothing (dry run)");
  found->totalGlobalMem = CAPACITY;
  found->sharedMemPerBlock = 48 << 10;
  found->sharedMemPerBlockOptin = 227 << 10;
  found->sharedMemPerMultiprocessor = 228 << 10;
  found->regsPerBlock = found->regsPerMultiprocessor = 65536;
  found->warpSize = 32;
  found->maxThreadsPerBlock = 1024;
  found->maxThreadsDim[0] = found->maxThreadsDim[1] = 1024;
  found->maxThreadsDim[2] = 64;
  found->maxGridSize[0] = 2147483647;
  found->maxGridSize[1] = found->maxGridSize[2] = 65535;
  found->totalConstMem = 65536;
  found->major = 9;
  found->multiProcessorCount = 132;
  found->maxThreadsPerMultiProcessor = 2048;
  found->maxBlocksPerMultiProcessor = 32;
  found->concurrentKernels = found->unifiedAddressing = found->canMapHostMemory = 1;
  found->l2CacheSize = 50 << 20;
  found->memoryBusWidth = 6144;
  found->textureAlignment = 512;
  return cudaSuccess;
}
cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int device) {
  cudaDeviceProp found;
  cudaGetDeviceProperties(&found, device);
  switch (attribute) {
    case cudaDevAttrMultiProcessorCount: *value = found.multiProcessorCount; break;
    case cudaDevAttrMaxThreadsPerBlock: *value = found.maxThreadsPerBlock; break;
    case cudaDevAttrMaxSharedMemoryPerBlock: *value = static_cast<int>(found.sharedMemPerBlock); break;
    case cudaDevAttrMaxSharedMemoryPerBlockOptin: *value = static_cast<int>(found.sharedMemPerBlockOptin); break;
    case cudaDevAttrMaxSharedMemoryPerMultiprocessor: *value = static_cast<int>(found.sharedMemPerMultiprocessor); break;
    case cudaDevAttrMaxGridDimX: *value = found.maxGridSize[0]; break;
    case cudaDevAttrMaxGridDimY: *value = found.maxGridSize[1]; break;
    case cudaDevAttrMaxGridDimZ: *value = found.maxGridSize[2]; break;
    case cudaDevAttrWarpSize: *value = found.warpSize; break;
    case cudaDevAttrComputeCapabilityMajor: *value = found.major; break;
    case cudaDevAttrComputeCapabilityMinor: *value = found.minor; break;
    case cudaDevAttrMaxThreadsPerMultiProcessor: *value = found.maxThreadsPerMultiProcessor; break;
    case cudaDevAttrMaxRegistersPerBlock: *value = found.regsPerBlock; break;
    default: *value = 0;
  }
  return cudaSuccess;
}
cudaError_t cudaDeviceGetPCIBusId(char* address, int length, int device) {
  std::snprintf(address, static_cast<size_t>(length), "0000:%02x:00.0", device);
  return cudaSuccess;
}
cudaError_t cudaDeviceGetStreamPriorityRange(int* least, int* greatest) {
  *least = 0;
  *greatest = -5;
  return cudaSuccess;
}
cudaError_t cudaDeviceCanAccessPeer(int* can, int, int) {
  *can = 1;
  return cudaSuccess;
}
cudaError_t cudaDeviceEnablePeerAccess(int, unsigned) { return cudaSuccess; }
cudaError_t cudaDeviceSynchronize() {
  Guard guard(lock);
  if (auto error = unsafe("a wait for the device")) {
    return error;
  }
  wait("device");
  return cudaSuccess;
}
cudaError_t cudaDriverGetVersion(int* version) {
  *version = 13000;
  return cudaSuccess;
}
cudaError_t cudaRuntimeGetVersion(int* version) {
  *version = 13000;
  return cudaSuccess;
}
cudaError_t cudaGetDriverEntryPointByVersion(const char* name, void** function, unsigned, unsigned long long,
                                             cudaDriverEntryPointQueryResult* status) {
  *function = nullptr;
  if (status != nullptr) {
    *status = cudaDriverEntryPointSymbolNotFound;
  }
  count(std::string("asked of the driver: ") + name);
  return fail(cudaErrorNotSupported);
}

// ---- Errors ---------------------------------------------------------------------------------------------------------

cudaError_t cudaGetLastError() {
  auto error = last;
  last = cudaSuccess;
  return error;
}
cudaError_t cudaPeekAtLastError() { return last; }
const char* cudaGetErrorName(cudaError_t) { return "cudaError"; }
const char* cudaGetErrorString(cudaError_t error) {
  switch (error) {
    case cudaSuccess: return "no error";
    case cudaErrorMemoryAllocation: return "out of memory";
    case cudaErrorNotReady: return "device not ready";
    case cudaErrorInvalidValue: return "invalid argument";
    case cudaErrorStreamCaptureUnsupported: return "operation not permitted when stream is capturing";
    case cudaErrorStreamCaptureInvalidated: return "operation failed due to a previous error during capture";
    case cudaErrorStreamCaptureUnjoined: return "capturing stream has unjoined work";
    case cudaErrorStreamCaptureImplicit:
      return "operation would make the legacy stream depend on a capturing blocking stream";
    default: {
      static thread_local char text[64];
      std::snprintf(text, sizeof text, "error %d of the dry run", static_cast<int>(error));
      return text;
    }
  }
}

// ---- Memory ---------------------------------------------------------------------------------------------------------

cudaError_t cudaMalloc(void** address, size_t size) {
  Guard guard(lock);
  if (auto error = unsafe("cudaMalloc")) {
    return error;
  }
  dry_gpu::watch_allocator();
  size = (std::max<size_t>(size, 1) + 4095) / 4096 * 4096;
  if (used + size > CAPACITY) {
    return fail(cudaErrorMemoryAllocation);
  }
  int file = memfd_create("dry_gpu", MFD_CLOEXEC);
  if (file < 0 || ftruncate(file, static_cast<off_t>(size)) != 0) {
    return fail(cudaErrorMemoryAllocation);
  }
  void* device = mmap(nullptr, size, PROT_NONE, MAP_SHARED, file, 0);
  void* host = mmap(nullptr, size, PROT_READ | PROT_WRITE, MAP_SHARED, file, 0);
  close(file);
  if (device == MAP_FAILED || host == MAP_FAILED) {
    return fail(cudaErrorMemoryAllocation);
  }
  device_memory()[static_cast<char*>(device)] = {size, static_cast<char*>(host)};
  used += size;
  counts().of["bytes at most"] = std::max(counts().of["bytes at most"], used);
  counts().of["cudaMalloc"] += 1;
  *address = device;
  return cudaSuccess;
}
cudaError_t cudaFree(void* address) {
  Guard guard(lock);
  if (address == nullptr) {
    return cudaSuccess;
  }
  if (auto error = unsafe("cudaFree")) {
    return error;
  }
  auto found = device_memory().find(static_cast<char*>(address));
  if (found == device_memory().end()) {
    return fail(cudaErrorInvalidValue);
  }
  wait("cudaFree");
  used -= found->second.size;
  munmap(found->first, found->second.size);
  munmap(found->second.host, found->second.size);
  device_memory().erase(found);
  return cudaSuccess;
}
cudaError_t cudaMemGetInfo(size_t* free, size_t* total) {
  Guard guard(lock);
  *free = CAPACITY - used;
  *total = CAPACITY;
  return cudaSuccess;
}
cudaError_t cudaHostAlloc(void** address, size_t size, unsigned) {
  Guard guard(lock);
  if (auto error = unsafe("cudaHostAlloc")) {
    return error;
  }
  *address = std::aligned_alloc(4096, (std::max<size_t>(size, 1) + 4095) / 4096 * 4096);
  if (*address == nullptr) {
    return fail(cudaErrorMemoryAllocation);
  }
  pinned_memory()[static_cast<char*>(*address)] = size;
  counts().of["cudaHostAlloc"] += 1;
  return cudaSuccess;
}
cudaError_t cudaFreeHost(void* address) {
  Guard guard(lock);
  pinned_memory().erase(static_cast<char*>(address));
  std::free(address);
  return cudaSuccess;
}
cudaError_t cudaHostRegister(void* address, size_t size, unsigned) {
  Guard guard(lock);
  pinned_memory()[static_cast<char*>(address)] = size;
  return cudaSuccess;
}
cudaError_t cudaHostUnregister(void* address) {
  Guard guard(lock);
  pinned_memory().erase(static_cast<char*>(address));
  return cudaSuccess;
}
cudaError_t cudaPointerGetAttributes(cudaPointerAttributes* attributes, const void* address) {
  Guard guard(lock);
  *attributes = {};
  auto pointer = const_cast<void*>(address);
  if (is_device(address)) {
    attributes->type = cudaMemoryTypeDevice;
    attributes->devicePointer = pointer;
  } else if (is_pinned(address)) {
    attributes->type = cudaMemoryTypeHost;
    attributes->devicePointer = attributes->hostPointer = pointer;
  } else {
    attributes->type = cudaMemoryTypeUnregistered;
    attributes->device = cudaInvalidDeviceId;
  }
  return cudaSuccess;
}
cudaError_t cudaMemcpy(void* to, const void* from, size_t size, cudaMemcpyKind) {
  Guard guard(lock);
  if (auto error = unsafe("cudaMemcpy")) {
    return error;
  }
  wait("cudaMemcpy");
  return copy(to, from, size, nullptr);
}
cudaError_t cudaMemcpyAsync(void* to, const void* from, size_t size, cudaMemcpyKind, cudaStream_t stream) {
  return copy(to, from, size, stream);
}
cudaError_t cudaMemcpyPeerAsync(void* to, int, const void* from, int, size_t size, cudaStream_t stream) {
  return copy(to, from, size, stream);
}
cudaError_t cudaMemsetAsync(void* address, int value, size_t size, cudaStream_t stream) {
  Guard guard(lock);
  char* target = usable(address, size);
  if (target == nullptr) {
    return fail(cudaErrorInvalidValue);
  }
  return enqueue(stream, "fills", [=] { std::memset(target, value, size); });
}
cudaError_t cudaMemset(void* address, int value, size_t size) { return cudaMemsetAsync(address, value, size, nullptr); }

// ---- Streams --------------------------------------------------------------------------------------------------------

cudaError_t cudaStreamCreateWithPriority(cudaStream_t* stream, unsigned flags, int) {
  Guard guard(lock);
  *stream = reinterpret_cast<cudaStream_t>(new char);
  if ((flags & cudaStreamNonBlocking) == 0) {
    blocking.insert(*stream);
  }
  return cudaSuccess;
}
cudaError_t cudaStreamDestroy(cudaStream_t) { return cudaSuccess; }
cudaError_t cudaStreamSynchronize(cudaStream_t stream) {
  Guard guard(lock);
  if (auto capture = capture_of(stream)) {
    return breaks(capture, cudaErrorStreamCaptureUnsupported, "a wait for its stream");
  }
  if (auto error = unsafe("a wait for a stream")) {
    return error;
  }
  wait("stream");
  return cudaSuccess;
}
cudaError_t cudaStreamQuery(cudaStream_t stream) {
  Guard guard(lock);
  if (auto capture = capture_of(stream)) {
    return breaks(capture, cudaErrorStreamCaptureUnsupported, "a question to its stream");
  }
  return cudaSuccess;
}
cudaError_t cudaStreamAddCallback(cudaStream_t stream, cudaStreamCallback_t callback, void* data, unsigned) {
  Guard guard(lock);
  if (auto capture = capture_of(stream)) {
    return breaks(capture, cudaErrorStreamCaptureUnsupported, "a callback");
  }
  callback(stream, cudaSuccess, data);
  return cudaSuccess;
}
cudaError_t cudaStreamWaitEvent(cudaStream_t stream, cudaEvent_t handle, unsigned) {
  Guard guard(lock);
  auto event = reinterpret_cast<Event*>(handle);
  auto capture = event->capture;
  auto own = capture_of(stream);
  if (capture == nullptr) {
    // An event from before the capture is no part of it.
    return own == nullptr ? cudaSuccess : breaks(own, cudaErrorStreamCaptureIsolation, "a wait for an event of before");
  }
  if (capturing.count(capture->origin) == 0 || capturing[capture->origin] != capture) {
    return fail(cudaErrorCapturedEvent);
  }
  if (own != nullptr && own != capture) {
    return breaks(own, cudaErrorStreamCaptureMerge, "another capture");
  }
  capturing[stream] = capture;
  capture->streams.insert(stream);
  if (stream == capture->origin) {
    capture->unjoined.erase(event->stream);
  } else {
    capture->unjoined.insert(stream);
  }
  return cudaSuccess;
}
cudaError_t cudaThreadExchangeStreamCaptureMode(cudaStreamCaptureMode* mode) {
  std::swap(*mode, thread_mode);
  return cudaSuccess;
}
cudaError_t cudaStreamIsCapturing(cudaStream_t stream, cudaStreamCaptureStatus* status) {
  Guard guard(lock);
  auto capture = capture_of(stream);
  *status = !capture          ? cudaStreamCaptureStatusNone
            : !capture->valid ? cudaStreamCaptureStatusInvalidated
                              : cudaStreamCaptureStatusActive;
  return cudaSuccess;
}
cudaError_t cudaStreamGetCaptureInfo(cudaStream_t stream, cudaStreamCaptureStatus* status, unsigned long long* id,
                                     cudaGraph_t* graph, const cudaGraphNode_t** nodes, const cudaGraphEdgeData** edges,
                                     size_t* count) {
  Guard guard(lock);
  cudaStreamIsCapturing(stream, status);
  auto capture = capture_of(stream);
  auto set = [](auto* out, auto value) {
    if (out != nullptr) {
      *out = value;
    }
  };
  set(id, capture ? capture->id : 0ULL);
  set(graph, cudaGraph_t{});
  set(nodes, static_cast<const cudaGraphNode_t*>(nullptr));
  set(edges, static_cast<const cudaGraphEdgeData*>(nullptr));
  set(count, size_t{0});
  return cudaSuccess;
}
cudaError_t cudaStreamBeginCapture(cudaStream_t stream, cudaStreamCaptureMode mode) {
  Guard guard(lock);
  if (stream == nullptr || capture_of(stream) != nullptr) {
    return fail(cudaErrorStreamCaptureUnsupported);
  }
  auto capture = std::make_shared<Capture>();
  capture->id = ++captures;
  capture->mode = mode;
  capture->thread = pthread_self();
  capture->origin = stream;
  capture->streams.insert(stream);
  capturing[stream] = capture;
  counts().of["captures"] += 1;
  dry_gpu::capture_began(capture->id, stream);
  return cudaSuccess;
}
cudaError_t cudaStreamEndCapture(cudaStream_t stream, cudaGraph_t* graph) {
  Guard guard(lock);
  *graph = nullptr;
  auto capture = capture_of(stream);
  if (capture == nullptr || capture->origin != stream) {
    return fail(cudaErrorIllegalState);
  }
  dry_gpu::capture_ended();
  for (auto member : capture->streams) {
    capturing.erase(member);
  }
  if (!capture->valid) {
    return fail(cudaErrorStreamCaptureInvalidated);
  }
  if (!capture->unjoined.empty()) {
    count("captures with streams that were not joined");
    return fail(cudaErrorStreamCaptureUnjoined);
  }
  if (capture->mode != cudaStreamCaptureModeRelaxed && !pthread_equal(capture->thread, pthread_self())) {
    return fail(cudaErrorStreamCaptureWrongThread);
  }
  *graph = reinterpret_cast<cudaGraph_t>(new Graph{capture->id, std::move(capture->nodes)});
  return cudaSuccess;
}
cudaError_t cudaGraphInstantiateWithFlags(cudaGraphExec_t* made, cudaGraph_t graph, unsigned long long) {
  *made = reinterpret_cast<cudaGraphExec_t>(new Graph(*reinterpret_cast<Graph*>(graph)));
  return cudaSuccess;
}
cudaError_t cudaGraphGetNodes(cudaGraph_t graph, cudaGraphNode_t*, size_t* nodes) {
  *nodes = reinterpret_cast<Graph*>(graph)->nodes.size();
  return cudaSuccess;
}
cudaError_t cudaGraphDestroy(cudaGraph_t graph) {
  delete reinterpret_cast<Graph*>(graph);
  return cudaSuccess;
}
cudaError_t cudaGraphExecDestroy(cudaGraphExec_t graph) {
  delete reinterpret_cast<Graph*>(graph);
  return cudaSuccess;
}
cudaError_t cudaGraphLaunch(cudaGraphExec_t graph, cudaStream_t stream) {
  Guard guard(lock);
  if (auto capture = capture_of(stream)) {
    return breaks(capture, cudaErrorNotSupported, "a graph in a graph");
  }
  counts().of["graph launches"] += 1;
  if (size_t lost = dry_gpu::overwritten(reinterpret_cast<Graph*>(graph)->capture)) {
    counts().of["tensors that a replay overwrites"] += lost;
  }
  for (const auto& node : reinterpret_cast<Graph*>(graph)->nodes) {
    node();
  }
  return cudaSuccess;
}

// ---- Events ---------------------------------------------------------------------------------------------------------

cudaError_t cudaEventCreateWithFlags(cudaEvent_t* event, unsigned) {
  *event = reinterpret_cast<cudaEvent_t>(new Event);
  return cudaSuccess;
}
cudaError_t cudaEventCreate(cudaEvent_t* event) { return cudaEventCreateWithFlags(event, 0); }
cudaError_t cudaEventDestroy(cudaEvent_t event) {
  delete reinterpret_cast<Event*>(event);
  return cudaSuccess;
}
cudaError_t cudaEventRecordWithFlags(cudaEvent_t handle, cudaStream_t stream, unsigned) {
  Guard guard(lock);
  auto event = reinterpret_cast<Event*>(handle);
  event->capture = capture_of(stream);
  event->stream = stream;
  return cudaSuccess;
}
cudaError_t cudaEventRecord(cudaEvent_t event, cudaStream_t stream) { return cudaEventRecordWithFlags(event, stream, 0); }
cudaError_t cudaEventQuery(cudaEvent_t handle) {
  Guard guard(lock);
  auto event = reinterpret_cast<Event*>(handle);
  if (event->capture != nullptr) {
    return breaks(event->capture, cudaErrorCapturedEvent, "a question to an event");
  }
  return unsafe("a question to an event");
}
cudaError_t cudaEventSynchronize(cudaEvent_t handle) {
  Guard guard(lock);
  auto event = reinterpret_cast<Event*>(handle);
  if (event->capture != nullptr) {
    return breaks(event->capture, cudaErrorCapturedEvent, "a wait for an event");
  }
  wait("event");
  return cudaSuccess;
}
cudaError_t cudaEventElapsedTime(float* milliseconds, cudaEvent_t, cudaEvent_t) {
  *milliseconds = 1;
  return cudaSuccess;
}

}  // extern "C"
