// The interface to the library of what needs CUDA's headers, which is compiled separately and opened on demand: linking
// libtorch_cuda.so into every process would cost each start 0.1 s and 235 MB.
#pragma once

#include "guard.h"

extern "C" {

struct potstill_stream;
struct potstill_graph;

// What the only function that the library exports gives, `potstill_cuda`. Functions that return bool return true when they failed.
struct potstill_cuda_functions {
  bool (*stream_new)(int device, potstill_stream** out, potstill_error* error);
  // The stream goes on after what was queued in the current one, and becomes the current one.
  bool (*stream_enter)(potstill_stream* stream, potstill_error* error);
  // The other way round.
  bool (*stream_leave)(potstill_stream* stream, potstill_error* error);
  // What is allocated for the stream lies in the memory of its graphs.
  bool (*pool_enter)(potstill_stream* stream, potstill_error* error);
  bool (*pool_leave)(potstill_stream* stream, potstill_error* error);
  void (*stream_free)(potstill_stream* stream);
  // What is queued in this stream from now on is recorded, not done.
  bool (*graph_begin)(potstill_stream* stream, potstill_graph** out, potstill_error* error);
  bool (*graph_end)(potstill_graph* graph, potstill_error* error);
  bool (*graph_replay)(potstill_graph* graph, potstill_error* error);
  void (*graph_free)(potstill_graph* graph);
};

typedef const potstill_cuda_functions* potstill_cuda_fn();

}
