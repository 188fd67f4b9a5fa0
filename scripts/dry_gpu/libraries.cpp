// cuBLAS, cuDNN and NCCL that compute nothing, on the runtime that computes nothing. Their headers are not used: most arguments are
// not looked at, and in C's calling convention need not be named. Functions that are missing here are NVIDIA's own, which
// fail without a device.
#include "runtime.h"

#include <algorithm>
#include <cstdint>
#include <cstring>

using dry_gpu::enqueue;

namespace {

// Status codes: 0 is success everywhere.
constexpr int BLAS_NOT_INITIALIZED = 1, BLAS_FAILED = 13, DNN_FAILED = 5000, NCCL_FAILED = 1;

struct Handle {
  cudaStream_t stream = nullptr;
  int math = 0;
  int pointers = 0;
};

int work(cudaStream_t stream, const char* what, int otherwise) {
  if (enqueue(stream, what) == cudaSuccess) {
    return 0;
  }
  // The libraries have runtimes of their own, whose last error is not the caller's.
  cudaGetLastError();
  return otherwise;
}

}  // namespace

extern "C" {

// ---- The driver, as libcuda.so.1 ------------------------------------------------------------------------------------

int cuInit(unsigned) { return 0; }
int cuDeviceGet(int* device, int index) {
  *device = index;
  return 0;
}
int cuDeviceGetPCIBusId(char* address, int length, int device) {
  return cudaDeviceGetPCIBusId(address, length, device);
}
int cuDeviceGetAttribute(int* value, int attribute, int device) {
  return cudaDeviceGetAttribute(value, static_cast<cudaDeviceAttr>(attribute), device);
}
int cuDevicePrimaryCtxGetState(int, unsigned* flags, int* active) {
  *flags = 0;
  *active = 1;
  return 0;
}
int cuDevicePrimaryCtxRetain(void** context, int) {
  static char made;
  *context = &made;
  return 0;
}
int cuCtxGetCurrent(void** context) { return cuDevicePrimaryCtxRetain(context, 0); }
int cuCtxSetCurrent(void*) { return 0; }
int cuGetErrorString(int, const char** text) {
  *text = "an error of the dry run";
  return 0;
}

// ---- cuBLAS ---------------------------------------------------------------------------------------------------------

int cublasCreate_v2(Handle** handle) {
  if (dry_gpu::unsafe("cublasCreate") != cudaSuccess) {
    return BLAS_NOT_INITIALIZED;
  }
  *handle = new Handle;
  return 0;
}
int cublasDestroy_v2(Handle* handle) {
  delete handle;
  return 0;
}
int cublasSetStream_v2(Handle* handle, cudaStream_t stream) {
  handle->stream = stream;
  return 0;
}
int cublasSetWorkspace_v2(Handle*, void*, size_t) { return 0; }
int cublasSetMathMode(Handle* handle, int math) {
  handle->math = math;
  return 0;
}
int cublasGetMathMode(Handle* handle, int* math) {
  *math = handle->math;
  return 0;
}
int cublasSetPointerMode_v2(Handle* handle, int pointers) {
  handle->pointers = pointers;
  return 0;
}
int cublasGetPointerMode_v2(Handle* handle, int* pointers) {
  *pointers = handle->pointers;
  return 0;
}

#define PRODUCT(name) \
  int name(Handle* handle) { return work(handle->stream, "matrix products", BLAS_FAILED); }
PRODUCT(cublasCdotc_v2)
PRODUCT(cublasCdotu_v2)
PRODUCT(cublasCgemmStridedBatched)
PRODUCT(cublasCgemm_v2)
PRODUCT(cublasCgemv_v2)
PRODUCT(cublasCtrsm_v2)
PRODUCT(cublasDdot_v2)
PRODUCT(cublasDgemmStridedBatched)
PRODUCT(cublasDgemm_v2)
PRODUCT(cublasDgemv_v2)
PRODUCT(cublasDotEx)
PRODUCT(cublasDtrsm_v2)
PRODUCT(cublasGemmEx)
PRODUCT(cublasGemmStridedBatchedEx)
PRODUCT(cublasSdot_v2)
PRODUCT(cublasSgemmEx)
PRODUCT(cublasSgemmStridedBatched)
PRODUCT(cublasSgemm_v2)
PRODUCT(cublasSgemv_v2)
PRODUCT(cublasStrsm_v2)
PRODUCT(cublasZdotc_v2)
PRODUCT(cublasZdotu_v2)
PRODUCT(cublasZgemmStridedBatched)
PRODUCT(cublasZgemm_v2)
PRODUCT(cublasZgemv_v2)
PRODUCT(cublasZtrsm_v2)
#undef PRODUCT

// Descriptors are opaque structs of the caller's.
int cublasLtMatmulDescCreate(void** descriptor) {
  *descriptor = new char;
  return 0;
}
int cublasLtMatmulDescDestroy(void*) { return 0; }
int cublasLtMatmulDescSetAttribute() { return 0; }
int cublasLtMatrixLayoutCreate(void** descriptor) {
  *descriptor = new char;
  return 0;
}
int cublasLtMatrixLayoutDestroy(void*) { return 0; }
int cublasLtMatrixLayoutSetAttribute() { return 0; }
int cublasLtMatmulPreferenceCreate(void** descriptor) {
  *descriptor = new char;
  return 0;
}
int cublasLtMatmulPreferenceDestroy(void*) { return 0; }
int cublasLtMatmulPreferenceSetAttribute() { return 0; }
int cublasLtMatmulAlgoGetHeuristic(void*, void*, void*, void*, void*, void*, void*, int, void* results, int* found) {
  // cublasLtMatmulHeuristicResult_t: an algorithm (64 bytes), the size of its workspace, a status.
  std::memset(results, 0, 64 + sizeof(size_t) + sizeof(int));
  *found = 1;
  return 0;
}
int cublasLtMatmul(void*, void*, const void*, const void*, void*, const void*, void*, const void*, const void*, void*,
                   void*, void*, const void*, void*, size_t, cudaStream_t stream) {
  return work(stream, "matrix products", BLAS_FAILED);
}

// ---- cuDNN ----------------------------------------------------------------------------------------------------------

int cudnnCreate(Handle** handle) {
  if (dry_gpu::unsafe("cudnnCreate") != cudaSuccess) {
    return DNN_FAILED;
  }
  *handle = new Handle;
  return 0;
}
int cudnnSetStream(Handle* handle, cudaStream_t stream) {
  handle->stream = stream;
  return 0;
}
int cudnnGetStream(Handle* handle, cudaStream_t* stream) {
  *stream = handle->stream;
  return 0;
}
int cudnnBackendCreateDescriptor(int, void** descriptor) {
  *descriptor = new char;
  return 0;
}
int cudnnBackendDestroyDescriptor(void* descriptor) {
  delete static_cast<char*>(descriptor);
  return 0;
}
int cudnnBackendFinalize(void*) { return 0; }
int cudnnBackendSetAttribute(void*, int, int, int64_t, const void*) { return 0; }
// A search finds one way to compute, with one engine that has index 0, no notes, and needs no memory.
int cudnnBackendGetAttribute(void*, int, int type, int64_t wanted, int64_t* found, void* values) {
  constexpr int INT64 = 3, DESCRIPTOR = 15, INT32 = 23;
  bool number = type == INT64 || type == INT32;
  if (found != nullptr) {
    // Wanted 0: how many are there?
    *found = type == DESCRIPTOR ? 1 : number ? std::min<int64_t>(wanted, 1) : 0;
  }
  if (number && values != nullptr && wanted > 0) {
    std::memset(values, 0, type == INT64 ? 8 : 4);
  }
  return 0;
}
int cudnnBackendExecute(Handle* handle, void*, void*) { return work(handle->stream, "convolutions", DNN_FAILED); }

// ---- NCCL -----------------------------------------------------------------------------------------------------------

struct Identifier {
  char bytes[128];
};
struct Communicator {
  int rank, ranks;
  bool aborted = false;
};

int ncclGetUniqueId(Identifier* identifier) {
  *identifier = {};
  return 0;
}
int ncclCommInitRankConfig(Communicator** communicator, int ranks, Identifier, int rank, void*) {
  *communicator = new Communicator{rank, ranks};
  return 0;
}
int ncclCommInitRank(Communicator** communicator, int ranks, Identifier identifier, int rank) {
  return ncclCommInitRankConfig(communicator, ranks, identifier, rank, nullptr);
}
int ncclCommInitRankScalable(Communicator** communicator, int ranks, int rank, int, Identifier*, void*) {
  return ncclCommInitRankConfig(communicator, ranks, {}, rank, nullptr);
}
// Aborted while its operations may still look at it.
int ncclCommAbort(Communicator* communicator) {
  if (communicator != nullptr) {
    communicator->aborted = true;
  }
  return 0;
}
int ncclCommDestroy(Communicator*) { return 0; }
int ncclCommFinalize(Communicator*) { return 0; }
int ncclCommCount(Communicator* communicator, int* ranks) {
  *ranks = communicator->ranks;
  return 0;
}
int ncclCommUserRank(Communicator* communicator, int* rank) {
  *rank = communicator->rank;
  return 0;
}
int ncclCommGetAsyncError(Communicator*, int* error) {
  *error = 0;
  return 0;
}
int ncclCommRegister(Communicator*, void*, size_t, void** handle) {
  *handle = nullptr;
  return 0;
}
int ncclCommDeregister(Communicator*, void*) { return 0; }
int ncclGroupStart() { return 0; }
int ncclGroupEnd() { return 0; }
const char* ncclGetLastError(Communicator*) { return ""; }

// As if all ranks had the same: what this rank sends is what it gets of each.
static int collective(Communicator* communicator, const void* from, void* to, size_t count, int type, int times,
                      cudaStream_t stream) {
  static const size_t BYTES[] = {1, 1, 4, 4, 8, 8, 2, 4, 8, 2, 1, 1};
  size_t bytes = count * BYTES[type];
  if (communicator->aborted || enqueue(stream, "collectives") != cudaSuccess) {
    return NCCL_FAILED;
  }
  for (int i = 0; i < times && bytes > 0; ++i) {
    char* target = static_cast<char*>(to) + i * bytes;
    if (target != from && dry_gpu::copy(target, from, bytes, stream) != cudaSuccess) {
      return NCCL_FAILED;
    }
  }
  return 0;
}
int ncclAllReduce(const void* from, void* to, size_t count, int type, int, Communicator* communicator,
                  cudaStream_t stream) {
  return collective(communicator, from, to, count, type, 1, stream);
}
int ncclBroadcast(const void* from, void* to, size_t count, int type, int, Communicator* communicator,
                  cudaStream_t stream) {
  return collective(communicator, from, to, count, type, 1, stream);
}
int ncclBcast(void* buffer, size_t count, int type, int, Communicator* communicator, cudaStream_t stream) {
  return collective(communicator, buffer, buffer, count, type, 1, stream);
}
int ncclReduce(const void* from, void* to, size_t count, int type, int, int root, Communicator* communicator,
               cudaStream_t stream) {
  return collective(communicator, from, to, count, type, communicator->rank == root ? 1 : 0, stream);
}
int ncclAllGather(const void* from, void* to, size_t count, int type, Communicator* communicator, cudaStream_t stream) {
  return collective(communicator, from, to, count, type, communicator->ranks, stream);
}
int ncclReduceScatter(const void* from, void* to, size_t count, int type, int, Communicator* communicator,
                      cudaStream_t stream) {
  return collective(communicator, from, to, count, type, 1, stream);
}
int ncclSend(const void* from, size_t count, int type, int, Communicator* communicator, cudaStream_t stream) {
  return collective(communicator, from, nullptr, count, type, 0, stream);
}
int ncclRecv(void* to, size_t count, int type, int, Communicator* communicator, cudaStream_t stream) {
  return collective(communicator, nullptr, to, count, type, 0, stream);
}

}  // extern "C"
