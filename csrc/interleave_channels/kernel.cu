// A concatenation of two images with its channels shuffled in two groups, in one pass:
//   y[n, 2 c + i] = activation_i(x_i[n, c] + bias_i[c])
//
// It moves each byte once, so loads in flight are what it needs: bandwidth times latency is about
// 22 KiB for a multiprocessor (4.2 TB/s, 700 ns, 132 of them), and 2048 threads with kUnroll
// accesses of 2 images of 8 bytes have 128 KiB under way.
#include <algorithm>
#include <limits>

#include "common/device.h"
#include "common/integer.h"
#include "common/numeric.cuh"
#include "interleave_channels/params.h"

namespace dwswap {
namespace {

constexpr int kThreads = 256;
constexpr int kUnroll = 4;
constexpr int kMostBytes = 8;  // of an access of an image: both go out as 16 bytes

struct Arguments {
  InterleavedImage images[2];
  void* output;
  uint32_t accesses;  // of an image
  Divisor by_vectors, by_rows;
};

template <typename T, int V>
__device__ __forceinline__ void transform(float (&x)[V], const InterleavedImage& image, int at,
                                          bool per_element) {
  if (image.bias != nullptr) {
    const T* const bias = static_cast<const T*>(image.bias);
    float added[V];
    if (per_element) {
      load(bias + at * V, added);
    } else {
      const float one = widen(bias[at]);
#pragma unroll
      for (int i = 0; i < V; ++i) added[i] = one;
    }
#pragma unroll
    for (int i = 0; i < V; ++i) x[i] += added[i];
  }
  activate(x, image.activation);
}

template <typename T, int V, bool kChannelsLast>
__global__ void __launch_bounds__(kThreads) interleave_kernel(const Arguments a) {
  uint32_t vectors[kUnroll], rows[kUnroll];
  uint32_t samples[kUnroll];
  Words<T, V> words[2][kUnroll];
  const uint32_t first = blockIdx.x * kThreads + threadIdx.x, step = gridDim.x * kThreads;
#pragma unroll
  for (int u = 0; u < kUnroll; ++u) {
    const uint32_t index = first + u * step;
    samples[u] = a.by_rows.divide(a.by_vectors.divide(index, &vectors[u]), &rows[u]);
    if (index >= a.accesses) continue;
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const InterleavedImage& image = a.images[i];
      words[i][u] =
          load_words<V>(static_cast<const T*>(image.data) + samples[u] * image.image_pitch +
                        rows[u] * image.row_pitch + vectors[u] * V);
    }
  }
#pragma unroll
  for (int u = 0; u < kUnroll; ++u) {
    if (first + u * step >= a.accesses) return;
    float x[2][V];
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      widen_all(words[i][u], x[i]);
      transform<T>(x[i], a.images[i], kChannelsLast ? vectors[u] : rows[u], kChannelsLast);
    }
    // Rows of the output: twice as long, or twice as many.
    const int64_t row = static_cast<int64_t>(samples[u]) * a.by_rows.value + rows[u];
    T* const output = static_cast<T*>(a.output);
    if constexpr (kChannelsLast) {
      float pairs[2 * V];
#pragma unroll
      for (int i = 0; i < 2 * V; ++i) pairs[i] = x[i % 2][i / 2];
      store(output + (row * a.by_vectors.value + vectors[u]) * (2 * V), pairs);
    } else {
#pragma unroll
      for (int i = 0; i < 2; ++i)
        store(output + ((2 * row + i) * a.by_vectors.value + vectors[u]) * V, x[i]);
    }
  }
}

// Elements that an access of every tensor can hold.
int aligned_elements(const InterleaveParams& p, int element_bytes) {
  uint64_t places = static_cast<uint64_t>(p.row_elements()) * element_bytes;
  for (const InterleavedImage& image : p.images) {
    places |= reinterpret_cast<uintptr_t>(image.data) |
              static_cast<uint64_t>(image.row_pitch) * element_bytes |
              static_cast<uint64_t>(image.image_pitch) * element_bytes;
    if (p.channels_last()) places |= reinterpret_cast<uintptr_t>(image.bias);
  }
  // In channels_last the output, which is as dense, takes twice as many at once.
  places |= reinterpret_cast<uintptr_t>(p.output) >> (p.channels_last() ? 1 : 0);
  int elements = kMostBytes / element_bytes;
  while (elements > 1 && places % (elements * element_bytes) != 0) elements /= 2;
  return elements;
}

template <typename T, int V>
cudaError_t launch(const InterleaveParams& p, cudaStream_t stream) {
  Arguments a{};
  a.images[0] = p.images[0], a.images[1] = p.images[1];
  a.output = p.output;
  const auto vectors = static_cast<uint32_t>(p.row_elements() / V);
  a.by_vectors = Divisor(vectors), a.by_rows = Divisor(static_cast<uint32_t>(p.rows()));
  a.accesses = static_cast<uint32_t>(p.batch * p.rows() * vectors);
  // Of a small image a thread has one: the next would only be waited for as well.
  constexpr int64_t kEnoughBlocks = 4;  // of a multiprocessor
  const int64_t enough = kEnoughBlocks * kThreads * current_device().multiprocessors;
  const int64_t own = std::clamp<int64_t>(a.accesses / enough, 1, kUnroll);
  const auto blocks = static_cast<unsigned>(ceil_div(a.accesses, kThreads * own));
  if (p.channels_last()) {
    interleave_kernel<T, V, true><<<blocks, kThreads, 0, stream>>>(a);
  } else {
    interleave_kernel<T, V, false><<<blocks, kThreads, 0, stream>>>(a);
  }
  return cudaGetLastError();
}

}  // namespace

bool covers_interleave(const InterleaveParams& p) {
  constexpr int64_t kLimit = std::numeric_limits<int32_t>::max() - 2 * kThreads * kUnroll;
  return p.dtype != DataType::kFloat64 && p.batch * p.channels * p.pixels <= kLimit;
}

cudaError_t launch_interleave(const InterleaveParams& p, cudaStream_t stream) {
  return visit_fast_type(p.dtype, [&]<typename T>() {
    const int elements = aligned_elements(p, sizeof(T));
    if constexpr (sizeof(T) == 2) {
      if (elements == 4) return launch<T, 4>(p, stream);
    }
    return elements == 2 ? launch<T, 2>(p, stream) : launch<T, 1>(p, stream);
  });
}

}  // namespace dwswap
