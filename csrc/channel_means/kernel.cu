// Means over the pixels of what an activation makes of an image, whose bias is added first:
//   means[n, c] = mean of activation(x[n, c] + bias[c])
// A group of threads has whole planes: in channels_last of 128 bytes of channels.
#include <limits>

#include "channel_means/params.h"
#include "common/device.h"
#include "common/integer.h"
#include "common/planes.cuh"
#include "common/sum.cuh"

namespace dwswap {
namespace {

constexpr int kWarp = 32;

// threads: of a group, a power of 2.
template <typename T, int V, bool kChannelsLast>
__global__ void __launch_bounds__(PlaneTile::kThreads, PlaneTile::kBlocks)
    channel_means_kernel(const ChannelMeansParams p, int threads) {
  constexpr int kThreads = PlaneTile::kThreads, kResults = kChannelsLast ? V : 1;
  const int thread = static_cast<int>(threadIdx.x) % threads;
  const int64_t group = int64_t{blockIdx.x} * (kThreads / threads) + threadIdx.x / threads;
  const PlaneShare<V, kChannelsLast> share(p, group, thread, threads);
  Words<T, kResults> bias{};  // as it is, for fewer registers
  if (p.bias != nullptr && share.active)
    bias = load_words<kResults>(static_cast<const T*>(p.bias) + share.channel);
  sum_t<T> sums[V];
  const T* sample = static_cast<const T*>(p.input) + elements_before(p, share.sample);
  for_each_vector(share, sample, [&](int, const Words<T, V>& words) {
    float x[V], added[kResults];
    widen_all(words, x);
    widen_all(bias, added);
#pragma unroll
    for (int i = 0; i < V; ++i) x[i] += added[kChannelsLast ? i : 0];
    activate(x, p.activation);
#pragma unroll
    for (int i = 0; i < V; ++i) sums[i].add(x[i]);
  });

  const auto pixels = static_cast<float>(p.pixels);
  T* const means = static_cast<T*>(p.means);
  float totals[kResults];
  if constexpr (kChannelsLast) {
#pragma unroll
    for (int i = 0; i < V; ++i) totals[i] = sum_over_lanes(sums[i], kWarp, kColumns<V>);
    if (threads > kWarp) {
      // A thread per channel adds up what the warps of the group have.
      constexpr int kSlice = kColumns<V> * V;
      static_assert(kSlice <= 2 * kWarp, "a group of several warps has as many threads");
      __shared__ float parts[kThreads / kWarp][kSlice];
      const int warp = static_cast<int>(threadIdx.x) / kWarp, lane = threadIdx.x % kWarp;
      if (lane < kColumns<V>) {
#pragma unroll
        for (int i = 0; i < V; ++i) parts[warp][lane * V + i] = totals[i];
      }
      __syncthreads();
      const int channel = share.channel - thread % kColumns<V> * V + thread;
      if (thread >= kSlice || share.sample >= p.batch || channel >= p.channels) return;
      const int first = warp - thread / kWarp, last = first + threads / kWarp;
      sum_t<T> total;
#pragma unroll
      for (int w = 0; w < kThreads / kWarp; ++w) {
        if (first + w < last) total.add(parts[first + w][thread]);
      }
      means[share.sample * p.channels + channel] = narrow<T>(total.value() / pixels);
      return;
    }
  } else {
#pragma unroll
    for (int i = 1; i < V; ++i) sums[0].add(sums[i]);
    totals[0] = sum_over_lanes(sums[0], threads);
  }
  if (!share.active || share.lane != 0) return;
#pragma unroll
  for (int i = 0; i < kResults; ++i) totals[i] /= pixels;
  store(means + share.place(p), totals);
}

// 128 bytes of channels, or a plane, each.
int64_t least_warps(const ChannelMeansParams& p) {
  const int64_t bytes = bytes_of(p.dtype), planes = int64_t{p.batch} * p.channels;
  return p.layout == Layout::kChannelsLast ? ceil_div(planes * bytes, 128)
                                           : ceil_div(planes * group_threads<false>(p), kWarp);
}

template <typename T, int V, bool kChannelsLast>
cudaError_t launch(const ChannelMeansParams& p, cudaStream_t stream) {
  const int64_t groups = plane_groups<V, kChannelsLast>(p);
  int threads = group_threads<kChannelsLast>(p);
  if (kChannelsLast) {
    // So many that all loads of a thread are under way at once; where there are few groups, until
    // each thread has one.
    constexpr int64_t kEnoughWarps = 16;  // of a multiprocessor
    const int64_t enough = kEnoughWarps * current_device().multiprocessors;
    const auto loads = [&] { return ceil_div(p.pixels, threads / kColumns<V>); };
    while (threads < PlaneTile::kThreads &&
           loads() > (groups * threads / kWarp < enough ? 1 : kPlaneUnroll))
      threads *= 2;
  }
  const auto blocks = static_cast<unsigned>(ceil_div(groups, PlaneTile::kThreads / threads));
  channel_means_kernel<T, V, kChannelsLast><<<blocks, PlaneTile::kThreads, 0, stream>>>(p, threads);
  return cudaGetLastError();
}

template <typename T, int V>
cudaError_t launch(const ChannelMeansParams& p, cudaStream_t stream) {
  return p.layout == Layout::kChannelsLast ? launch<T, V, true>(p, stream)
                                           : launch<T, V, false>(p, stream);
}

}  // namespace

bool covers_channel_means(const ChannelMeansParams& p) {
  constexpr int64_t kLimit = std::numeric_limits<int32_t>::max() / 2;
  constexpr int64_t kFewPixels = 4096;
  return p.dtype != DataType::kFloat64 && p.pixels > 0 &&
         int64_t{p.channels} * p.pixels <= kLimit &&
         (p.pixels <= kFewPixels || least_warps(p) >= current_device().multiprocessors);
}

cudaError_t launch_channel_means(const ChannelMeansParams& p, cudaStream_t stream) {
  return visit_fast_type(p.dtype, [&]<typename T>() {
    constexpr int kBytes = 16, kWide = kBytes / static_cast<int>(sizeof(T));
    const bool channels_last = p.layout == Layout::kChannelsLast;
    const auto places =
        reinterpret_cast<uintptr_t>(p.input) |
        (channels_last ? reinterpret_cast<uintptr_t>(p.bias) | reinterpret_cast<uintptr_t>(p.means)
                       : 0);
    const bool wide = places % kBytes == 0 && (channels_last ? p.channels : p.pixels) % kWide == 0;
    return wide ? launch<T, kWide>(p, stream) : launch<T, 1>(p, stream);
  });
}

}  // namespace dwswap
