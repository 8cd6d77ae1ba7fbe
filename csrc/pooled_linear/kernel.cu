// A linear layer on the means of one image: what ends most networks.
//
// The means and the product of a row are two kernels otherwise, of which each takes longer than its
// bytes. Here the blocks of a cluster divide the channels among them, and tell each other their
// means through shared memory. Each block has 16 outputs of its own, and begins to load its weights
// before it waits for anything. Every cluster reads the whole image, which the layer before has
// just written.
#include <cooperative_groups.h>

#include "common/integer.h"
#include "common/numeric.cuh"
#include "common/sum.cuh"
#include "pooled_linear/params.h"

namespace dwswap {
namespace {

constexpr int kThreads = 512;
constexpr int kCluster = 8;  // blocks
constexpr int kVector = 8;   // elements, 16 bytes
constexpr int kColumns = 2;  // vectors of outputs of a block: 32 bytes of each channel's weights
constexpr int kOutputs = kColumns * kVector;
constexpr int kMostChannels = 2048;
constexpr int kMostPixels = 256;

// Sums over the pixels of the block's channels, `share` vectors from `first` on: `lanes` threads
// next to each other along the pixels have parts[lane][channel].
template <typename T>
__device__ __forceinline__ void sum_pixels(const PooledLinearParams& p, int first, int share,
                                           int lanes, float* parts) {
  constexpr int kUnroll = 4;
  const int column = static_cast<int>(threadIdx.x) % share;
  const int lane = static_cast<int>(threadIdx.x) / share;
  const int channel = (first + column) * kVector;
  if (lane >= lanes || channel >= p.channels) return;
  Words<T, kVector> bias{};
  if (p.input_bias != nullptr)
    bias = load_words<kVector>(static_cast<const T*>(p.input_bias) + channel);
  const T* const source = static_cast<const T*>(p.input) + channel;
  float sums[kVector] = {};
  for (int pixel = lane; pixel < p.pixels; pixel += kUnroll * lanes) {
    Words<T, kVector> words[kUnroll];
#pragma unroll
    for (int i = 0; i < kUnroll; ++i) {
      const int at = pixel + i * lanes;
      load_where(at < p.pixels, source + at * p.channels, words[i]);
    }
#pragma unroll
    for (int i = 0; i < kUnroll; ++i) {
      if (pixel + i * lanes >= p.pixels) break;
      float x[kVector], added[kVector];
      widen_all(words[i], x), widen_all(bias, added);
#pragma unroll
      for (int j = 0; j < kVector; ++j) x[j] += added[j];
      activate(x, p.input_activation);
#pragma unroll
      for (int j = 0; j < kVector; ++j) sums[j] += x[j];
    }
  }
#pragma unroll
  for (int j = 0; j < kVector; ++j) parts[(lane * share + column) * kVector + j] = sums[j];
}

#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900
#define DWSWAP_CLUSTER __cluster_dims__(kCluster, 1, 1)
#else  // never launched there
#define DWSWAP_CLUSTER
#endif

template <typename T>
__global__ void DWSWAP_CLUSTER __launch_bounds__(kThreads)
    pooled_linear_kernel(const __grid_constant__ PooledLinearParams p) {
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900
  namespace cg = cooperative_groups;
  constexpr int kWarp = 32;
  constexpr int kLanes = kThreads / kColumns;  // threads along the channels
  constexpr int kLoads = kMostChannels / kLanes;
  __shared__ float means[kMostChannels];
  __shared__ float parts[kThreads * kVector];
  const cg::cluster_group cluster = cg::this_cluster();
  cluster.barrier_arrive();

  const auto thread = static_cast<int>(threadIdx.x);
  const int column = thread % kColumns, lane = thread / kColumns;
  const int first_output = static_cast<int>(blockIdx.x) * kOutputs;
  const int output = first_output + column * kVector;
  const T* const weight = static_cast<const T*>(p.weight) + output;
  Words<T, kVector> weights[kLoads];
#pragma unroll
  for (int i = 0; i < kLoads; ++i) {
    const int channel = i * kLanes + lane;
    weights[i] = {};
    load_where(channel < p.channels && output < p.outputs, weight + int64_t{channel} * p.outputs,
               weights[i]);
  }
  // Of the output that the thread finishes.
  const bool finishes = thread < kOutputs && first_output + thread < p.outputs;
  float start = 0.0f;
  if (finishes && p.bias != nullptr)
    start = widen(static_cast<const T*>(p.bias)[first_output + thread]);

  const int vectors = p.channels / kVector, share = (vectors + kCluster - 1) / kCluster;
  const int first = static_cast<int>(cluster.block_rank()) * share, lanes = kThreads / share;
  sum_pixels<T>(p, first, share, lanes, parts);
  __syncthreads();
  cluster.barrier_wait();  // until all blocks have begun, and have shared memory
  for (int i = thread; i < share * kVector && first * kVector + i < p.channels; i += kThreads) {
    float total = 0.0f;
    for (int l = 0; l < lanes && l < p.pixels; ++l) total += parts[l * share * kVector + i];
    const float mean = total / static_cast<float>(p.pixels);
#pragma unroll
    for (int block = 0; block < kCluster; ++block)
      cluster.map_shared_rank(means, block)[first * kVector + i] = mean;
  }
  cluster.sync();

  float sums[kVector] = {};
#pragma unroll
  for (int i = 0; i < kLoads; ++i) {
    const int channel = i * kLanes + lane;
    if (channel >= p.channels) break;
    float w[kVector];
    widen_all(weights[i], w);
#pragma unroll
    for (int j = 0; j < kVector; ++j) sums[j] += w[j] * means[channel];
  }
#pragma unroll
  for (int j = 0; j < kVector; ++j)
    sums[j] = sum_over_lanes(PlainSum<float>{sums[j]}, kWarp, kColumns);
  // Nobody reads `parts` any more.
  if (thread % kWarp < kColumns) {
#pragma unroll
    for (int j = 0; j < kVector; ++j)
      parts[thread / kWarp * kOutputs + column * kVector + j] = sums[j];
  }
  __syncthreads();
  if (!finishes) return;
  float y[1] = {start};
#pragma unroll
  for (int warp = 0; warp < kThreads / kWarp; ++warp) y[0] += parts[warp * kOutputs + thread];
  activate(y, p.activation);
  static_cast<T*>(p.output)[first_output + thread] = narrow<T>(y[0]);
#endif
}

}  // namespace

bool covers_pooled_linear(const PooledLinearParams& p, const Device& device) {
  const bool has_clusters = device.major >= 9 && !portable_only();
  if (!has_clusters || !is_half(p.dtype)) return false;
  const auto places = reinterpret_cast<uintptr_t>(p.input) | reinterpret_cast<uintptr_t>(p.weight) |
                      reinterpret_cast<uintptr_t>(p.input_bias);
  return places % 16 == 0 && p.channels > 0 && p.channels <= kMostChannels &&
         p.channels % kVector == 0 && p.outputs > 0 && p.outputs % kVector == 0 && p.pixels > 0 &&
         p.pixels <= kMostPixels;
}

cudaError_t launch_pooled_linear(const PooledLinearParams& p, cudaStream_t stream) {
  const auto clusters = static_cast<unsigned>(ceil_div(p.outputs, kCluster * kOutputs));
  const auto kernel = p.dtype == DataType::kFloat16 ? pooled_linear_kernel<__half>
                                                    : pooled_linear_kernel<__nv_bfloat16>;
  kernel<<<clusters * kCluster, kThreads, 0, stream>>>(p);
  return cudaGetLastError();
}

}  // namespace dwswap
