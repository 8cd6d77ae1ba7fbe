// The channels of each image times a gate of their own, as squeeze-and-excitation has it (Hu, Shen
// and Sun, "Squeeze-and-Excitation Networks", 2018), and the backward:
//
//   y[n, c] = x[n, c] * gate(z[n, c]) + spread[n, c] / pixels              (scale, flat_scale)
//   dz[n, c] = gate'(z[n, c]) * sum over the pixels of dy[n, c] * x[n, c]  (product_sums)
//
// Forward y without spread; of the backward dx, of dy for x and with the gradient of the means for
// spread. They move bytes: a read and a write of each value, or two reads. Every sum has one order,
// so results are the same bit for bit each time.
//
// The pass in front of a scale has read the last images last, so what L2 still has is theirs:
// blocks go from the end to the beginning.
#pragma once

#include "channel_scale/gate.cuh"
#include "channel_scale/launch.h"
#include "channel_scale/share.cuh"
#include "common/device.h"
#include "common/sum.cuh"

namespace dwswap {
namespace channel_scale {

// channels_last: the gates of a thread stay in its registers.
template <typename T, int V>
__global__ void __launch_bounds__(kThreads, 4)
    scale_kernel(const ChannelScaleParams p, const Places places) {
  const Share<V, true> share(p, places, gridDim.x - 1 - blockIdx.x);
  if (!share.active) return;
  const Terms<T, V> terms(p, share.plane);
  const T* const input = static_cast<const T*>(p.input);
  T* const output = static_cast<T*>(p.output);
  share.for_each(
      p, places, [&](int64_t at) { return load_words<V>(input + at); },
      [&](int64_t at, const Words<T, V>& words) {
        float x[V];
        widen_all(words, x);
#pragma unroll
        for (int i = 0; i < V; ++i) x[i] = fmaf(x[i], terms.factor[i], terms.added[i]);
        store(output + at, x);
      });
}

// contiguous: planes one after the other, whose borders no vector minds. Planes have V elements at
// least, so a vector has those of two at most.
template <typename T, int V>
__global__ void __launch_bounds__(kThreads, 4)
    flat_scale_kernel(const ChannelScaleParams p, const Divisor by_pixels, const int64_t vectors) {
  constexpr int kSteps = kUnroll<V>;
  __shared__ int64_t first_plane;
  __shared__ uint32_t first_pixel;
  const int64_t first = (int64_t{gridDim.x} - 1 - blockIdx.x) * (kThreads * kSteps);
  const T* const input = static_cast<const T*>(p.input) + first * V;
  T* const output = static_cast<T*>(p.output) + first * V;
  const auto rest = static_cast<int>(min(vectors - first, int64_t{kThreads * kSteps}));
  Words<T, V> words[kSteps];
#pragma unroll
  for (int i = 0; i < kSteps; ++i) {
    const int vector = i * kThreads + static_cast<int>(threadIdx.x);
    if (vector < rest) words[i] = load_words<V>(input + vector * V);
  }
  if (threadIdx.x == 0) {
    first_plane = first * V / p.pixels;
    first_pixel = static_cast<uint32_t>(first * V - first_plane * p.pixels);
  }
  __syncthreads();
#pragma unroll
  for (int i = 0; i < kSteps; ++i) {
    const int vector = i * kThreads + static_cast<int>(threadIdx.x);
    if (vector >= rest) continue;
    uint32_t pixel;
    const int64_t plane = first_plane + by_pixels.divide(first_pixel + vector * V, &pixel);
    const int own = p.pixels - static_cast<int>(pixel);  // elements of the first plane
    const Terms<T, 1> terms(p, plane);
    float x[V], factor[2] = {terms.factor[0], 0.0f}, added[2] = {terms.added[0], 0.0f};
    if (own < V) {
      const Terms<T, 1> next(p, plane + 1);
      factor[1] = next.factor[0], added[1] = next.added[0];
    }
    widen_all(words[i], x);
#pragma unroll
    for (int j = 0; j < V; ++j)
      x[j] = j < own ? fmaf(x[j], factor[0], added[0]) : fmaf(x[j], factor[1], added[1]);
    store(output + vector * V, x);
  }
}

template <typename T, int V>
struct Pair {
  Words<T, V> x, gradient;
};

// Afterwards the first row of each group has the sums over all of its rows.
template <int N>
__device__ __forceinline__ void sum_over_rows(float (&sums)[N], int row, const Places& places) {
  __shared__ float parts[N][kThreads];
  const auto thread = static_cast<int>(threadIdx.x);
  const bool grouped = thread < places.groups * places.rows * places.lanes;
  for (int rows = places.rows; rows > 1;) {
    const int half = (rows + 1) / 2;
    if (grouped && row >= half && row < rows) {
#pragma unroll
      for (int i = 0; i < N; ++i) parts[i][thread] = sums[i];
    }
    __syncthreads();
    if (grouped && row < rows - half) {
#pragma unroll
      for (int i = 0; i < N; ++i) sums[i] += parts[i][thread + half * places.lanes];
    }
    __syncthreads();
    rows = half;
  }
}

template <typename T, int V, bool LAST>
__global__ void __launch_bounds__(kThreads, 3)
    product_sums_kernel(const ChannelScaleParams p, const Places places) {
  const Share<V, LAST> share(p, places, blockIdx.x);
  constexpr int N = Share<V, LAST>::kColumns;
  const T* const input = static_cast<const T*>(p.input);
  const T* const gradients = static_cast<const T*>(p.output_gradient);
  sum_t<T> sums[N];
  share.for_each(
      p, places,
      [&](int64_t at) {
        return Pair<T, V>{load_words<V>(input + at), load_words<V>(gradients + at)};
      },
      [&](int64_t, const Pair<T, V>& pair) {
        float x[V], gradient[V];
        widen_all(pair.x, x);
        widen_all(pair.gradient, gradient);
#pragma unroll
        for (int i = 0; i < V; ++i) sums[LAST ? i : 0].add(gradient[i] * x[i]);
      });
  float totals[N];
#pragma unroll
  for (int i = 0; i < N; ++i) totals[i] = sums[i].value();
  sum_over_rows(totals, share.row, places);
  if (!share.active || share.row != 0) return;
  if (places.splits > 1) {
    const int64_t planes = int64_t{p.batch} * p.channels;
    float* const target = p.partials + share.split * planes + share.plane;
#pragma unroll
    for (int i = 0; i < N; ++i) target[i] = totals[i];
    return;
  }
  float z[N];
  load_gates<T>(p, share.plane, z);
#pragma unroll
  for (int i = 0; i < N; ++i)
    store_gradient<T>(p, share.plane + i, totals[i] * slope_of<T>(z[i], p.activation));
}

// A thread per plane.
template <typename T>
__global__ void __launch_bounds__(kThreads)
    add_parts_kernel(const ChannelScaleParams p, const int splits) {
  const int64_t planes = int64_t{p.batch} * p.channels;
  const int64_t plane = int64_t{blockIdx.x} * kThreads + threadIdx.x;
  if (plane >= planes) return;
  sum_t<T> sum;
#pragma unroll 8
  for (int i = 0; i < splits; ++i) sum.add(p.partials[i * planes + plane]);
  float z[1];
  load_gates<T>(p, plane, z);
  store_gradient<T>(p, plane, sum.value() * slope_of<T>(z[0], p.activation));
}

template <typename T, typename Launch>
cudaError_t visit_vector(int vector, Launch&& launch) {
  constexpr int kWide = kVectorBytes / static_cast<int>(sizeof(T));
  if (vector == kWide) return launch.template operator()<kWide>();
  if (vector == kWide / 2) return launch.template operator()<kWide / 2>();
  return launch.template operator()<1>();
}

template <typename T>
cudaError_t launch_flat_scale(const ChannelScaleParams& p, cudaStream_t stream) {
  const int64_t elements = int64_t{p.batch} * p.channels * p.pixels;
  int vector = choose_vector(p, elements);
  if (vector > p.pixels) vector = 1;
  const int64_t vectors = elements / vector;
  const auto blocks =
      static_cast<unsigned>(ceil_div(vectors, int64_t{kThreads} * unroll_of(vector)));
  return visit_vector<T>(vector, [&]<int V>() {
    const Divisor by_pixels(static_cast<uint32_t>(p.pixels));
    flat_scale_kernel<T, V><<<blocks, kThreads, 0, stream>>>(p, by_pixels, vectors);
    return cudaGetLastError();
  });
}

// One file per element type instantiates these.
template <typename T>
cudaError_t launch_scale(const ChannelScaleParams& p, cudaStream_t stream) {
  if (p.layout != Layout::kChannelsLast) return launch_flat_scale<T>(p, stream);
  const Cut cut = scale_cut(p, current_device().multiprocessors);
  const auto blocks = static_cast<unsigned>(cut.blocks());
  return visit_vector<T>(cut.vector, [&]<int V>() {
    scale_kernel<T, V><<<blocks, kThreads, 0, stream>>>(p, Places(cut));
    return cudaGetLastError();
  });
}

template <typename T>
cudaError_t launch_sums(const ChannelScaleParams& p, const Cut& cut, cudaStream_t stream) {
  const auto blocks = static_cast<unsigned>(cut.blocks());
  const cudaError_t status = visit_vector<T>(cut.vector, [&]<int V>() {
    if (p.layout == Layout::kChannelsLast) {
      product_sums_kernel<T, V, true><<<blocks, kThreads, 0, stream>>>(p, Places(cut));
    } else {
      product_sums_kernel<T, V, false><<<blocks, kThreads, 0, stream>>>(p, Places(cut));
    }
    return cudaGetLastError();
  });
  if (status != cudaSuccess || cut.splits == 1) return status;
  const int64_t planes = int64_t{p.batch} * p.channels;
  add_parts_kernel<T>
      <<<static_cast<unsigned>(ceil_div(planes, kThreads)), kThreads, 0, stream>>>(p, cut.splits);
  return cudaGetLastError();
}

}  // namespace channel_scale
}  // namespace dwswap
