// What the squeeze_excitation kernels get, and how they cut a tensor into blocks.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "common/activation.h"
#include "common/data_type.h"
#include "common/planes.h"

namespace dwswap {

// y = x * gate(expand(activation(reduce(mean of x over the pixels)))), reduce and expand linear.
struct SqueezeExcitationParams : Planes {
  const void* input;          // the planes
  const void* reduce_weight;  // (hidden, channels), dense
  const void* reduce_bias;    // (hidden) or null
  const void* expand_weight;  // (channels, hidden), dense
  const void* expand_bias;    // (channels) or null
  void* output;               // laid out as the input
  float* partials;            // (batch, parts of the cut, hidden)

  int32_t hidden;
  Activation activation, gate;
  DataType dtype;
  Layout layout;
};

struct ExcitationTile {
  static constexpr int kThreads = 256;
  // Loads that a thread has under way, and blocks of a multiprocessor: 3 x 256 threads x 4 x 16
  // bytes = 48 KiB. Bandwidth times latency is about 22 KiB (4.2 TB/s, 700 ns, 132 of them).
  static constexpr int kUnroll = kPlaneUnroll;
  static constexpr int kBlocks = 3;
  static constexpr int kMostSlice = 64;   // channels
  static constexpr int kReduceLanes = 8;  // threads per hidden unit: 8 x 16 bytes of weights
  static constexpr int kExpandLanes = kThreads / kMostSlice;  // threads per channel
  static_assert(kMostSlice * kExpandLanes == kThreads, "each channel has its threads");
  static_assert(32 % kReduceLanes == 0 && 32 % kExpandLanes == 0, "shuffles stay within a warp");
};

// A block takes `slice` channels and `chunk` pixels of `samples` samples, one after another.
struct ExcitationCut {
  int32_t slice, slices;  // channels of a block, blocks along the channels
  int32_t chunk, chunks;  // pixels of a block, blocks along the pixels
  int32_t samples;        // of a block
  int32_t lanes;          // contiguous: threads that share a plane
  bool wide;              // the tensor is read and written by 16 bytes
  bool wide_weights;      // and the rows of reduce_weight are read by 16 bytes

  // Each writes its sum for every hidden unit.
  __host__ __device__ int32_t parts() const { return slices * chunks; }
};

// The kernels keep this many hidden units in shared memory.
constexpr int32_t kMostHidden = 1024;

// Whether the tensors are read and written by 16 bytes.
bool reads_vectors(const SqueezeExcitationParams& params);
bool covers_squeeze_excitation(const SqueezeExcitationParams& params);
ExcitationCut cut_squeeze_excitation(const SqueezeExcitationParams& params, int multiprocessors);
// Returns the CUDA status of the launches.
cudaError_t launch_squeeze_excitation(const SqueezeExcitationParams& params,
                                      const ExcitationCut& cut, cudaStream_t stream);

// Whether the layers are better matrix products over all samples, between the kernels below. They
// have `means` and `gate_inputs` of (batch, channels) and `hidden` of (batch, hidden), all of the
// input's dtype, and return the CUDA status of their launch.
bool prefers_products(const SqueezeExcitationParams& params, int multiprocessors);
cudaError_t launch_means(const SqueezeExcitationParams& params, void* means, cudaStream_t stream);
// In place.
cudaError_t launch_activation(const SqueezeExcitationParams& params, void* hidden,
                              cudaStream_t stream);
cudaError_t launch_scaling(const SqueezeExcitationParams& params, const void* gate_inputs,
                           cudaStream_t stream);

}  // namespace dwswap
