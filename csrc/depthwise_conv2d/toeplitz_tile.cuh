// The tile of input that a block of toeplitz holds in shared memory, and the ways in and out of it.
//
// Element (channel, image, row, column) lies at
//   channel / 8 * group + (image * in_rows + row) * kRow + channel % 8 * kColumns + column,
// so steps along rows and channels are known at compile time. Column `lead` is that of the first
// output. Outputs take the place of inputs, from row 0 and column `shift` on.
#pragma once

#include "common/numeric.cuh"
#include "depthwise_conv2d/params.h"
#include "depthwise_conv2d/toeplitz_cut.h"

namespace dwswap {
namespace toeplitz {

template <typename T_, int STEPS_, int STRIDE_, int TILES_>
struct Traits {
  using T = T_;
  static constexpr int kSteps = STEPS_;
  static constexpr int kStride = STRIDE_;  // along a row
  static constexpr int kTiles = TILES_;
  static constexpr int kColumns = input_columns(STEPS_, STRIDE_, TILES_);
  static constexpr int kRow = row_elements(kColumns);
  static constexpr int kBandWords = band_words(STEPS_, STRIDE_);
};

// How a tensor is copied. Rows: by pieces of 4, 2 or 1 elements. Planes: whole ones, by vectors
// whose elements go (in pairs, where rows are even) each to its place. Pixels: channels_last.
enum class Mover { kPixels, kPlanePairs, kPlanes, kRows4, kRows2, kRows1 };

struct Arguments {
  const void* input;
  const void* weight;
  const void* bias;
  const void* input_bias;
  void* output;
  int batch, channels, in_h, in_w, out_h, out_w;
  int kernel_h, kernel_w, stride_h, padding_h, padding_w, dilation_h, dilation_w;
  int lead, shift;
  int first_column, columns;  // of the tile that inputs are copied to; zeros beside them stay
  int unit_channels, unit_images, unit_rows, in_rows;
  int group;                 // elements of the tile
  int chunks, parts, units;  // of channels; blocks and units of a chunk
  Divisor by_columns, by_strips, by_in_rows, by_rows, by_images;
  Divisor by_in_plane, by_in_width, by_out_plane, by_out_width;
  Mover in_mover, out_mover;
  bool transforms_input;
  Activation input_activation, activation;
};

// What a block works on.
struct Unit {
  int channel, channels, image, images;
  int row, column;  // of output, the first ones
  int top, left;    // of input
};

template <typename Traits>
__device__ __forceinline__ Unit unit_at(const Arguments& a, int index, int chunk) {
  uint32_t column, strip;
  const int images = a.by_strips.divide(a.by_columns.divide(index, &column), &strip);
  Unit u;
  u.channel = chunk * a.unit_channels;
  u.channels = min(a.unit_channels, a.channels - u.channel);
  u.image = images * a.unit_images;
  u.images = min(a.unit_images, a.batch - u.image);
  u.row = strip * a.unit_rows;
  u.column = column * (Traits::kTiles * kTile);
  u.top = u.row * a.stride_h - a.padding_h;
  u.left = u.column * Traits::kStride - a.lead;
  return u;
}

// Where the rows of a channel begin.
template <typename Traits>
__device__ __forceinline__ int channel_at(int channel, const Arguments& a) {
  return channel / kGroup * a.group + channel % kGroup * Traits::kColumns;
}

__device__ __forceinline__ bool within(int index, int size) {
  return static_cast<unsigned>(index) < static_cast<unsigned>(size);
}

// The larger of the magnitudes of two pairs, element by element; NaN wins.
template <typename T>
__device__ __forceinline__ uint32_t largest(uint32_t pair, uint32_t magnitudes);
template <>
__device__ __forceinline__ uint32_t largest<__half>(uint32_t pair, uint32_t magnitudes) {
  const __half2 result = __hmax2_nan(__habs2(*reinterpret_cast<const __half2*>(&pair)),
                                     *reinterpret_cast<const __half2*>(&magnitudes));
  return *reinterpret_cast<const uint32_t*>(&result);
}
template <>
__device__ __forceinline__ uint32_t largest<__nv_bfloat16>(uint32_t pair, uint32_t magnitudes) {
  const __nv_bfloat162 result =
      __hmax2_nan(__habs2(*reinterpret_cast<const __nv_bfloat162*>(&pair)),
                  *reinterpret_cast<const __nv_bfloat162*>(&magnitudes));
  return *reinterpret_cast<const uint32_t*>(&result);
}

template <typename T>
__device__ __forceinline__ bool finite(uint32_t magnitudes) {
  const float2 pair = widen_pair<T>(magnitudes);
  return pair.x < INFINITY && pair.y < INFINITY;
}

// input_activation(input + input_bias) of pairs of elements in place, rounded to T as they would be
// in a tensor; an element that is outside the image stays zero. The thread that copied them calls
// it. Returns magnitudes as `largest`.
template <typename T, int N>
__device__ __forceinline__ uint32_t transform(uint32_t* words, int distance,
                                              const float (&input_bias)[N], bool left_inside,
                                              bool right_inside, Activation activation) {
  float x[2 * N];
#pragma unroll
  for (int i = 0; i < N; ++i) {
    const float2 pair = widen_pair<T>(words[i * distance]);
    x[2 * i] = pair.x + input_bias[i], x[2 * i + 1] = pair.y + input_bias[i];
  }
  activate_by_calls(x, activation);
  const uint32_t mask = (left_inside ? 0xffffu : 0u) | (right_inside ? 0xffff0000u : 0u);
  uint32_t magnitudes = 0;
#pragma unroll
  for (int i = 0; i < N; ++i) {
    const uint32_t pair = narrow_pair<T>(x[2 * i], x[2 * i + 1]) & mask;
    words[i * distance] = pair;
    magnitudes = largest<T>(pair, magnitudes);
  }
  return magnitudes;
}

// A thread has this many copies under way at once.
constexpr int kBatch = 4;

// channels_last: a thread takes 8 channels of two neighbouring pixels of every step-th row to 8
// rows of the tile.
template <typename Traits>
__device__ __forceinline__ uint32_t load_pixels(typename Traits::T* tile, const Unit& u,
                                                const Arguments& a) {
  using T = typename Traits::T;
  const int groups = a.unit_channels / kGroup, pairs = a.columns / 2;
  const int group = threadIdx.x % groups;
  const int pair = threadIdx.x / groups % pairs;
  const int first = threadIdx.x / groups / pairs;
  const int step = blockDim.x / groups / pairs;
  if (first >= step || group * kGroup >= u.channels) return 0;
  const int column = a.first_column + 2 * pair;
  const int x = u.left + column;
  const bool left_inside = within(x, a.in_w), right_inside = within(x + 1, a.in_w);
  const int channel = u.channel + group * kGroup;
  const int row_pixels = a.in_w * a.channels;
  const T* const source = static_cast<const T*>(a.input) +
                          (static_cast<int64_t>(u.image) * a.in_h * a.in_w + x) * a.channels +
                          channel;
  T* const target = tile + group * a.group + column;

  uint32_t magnitudes = 0;
  const int rows = a.unit_images * a.in_rows;
  for (int from = first; from < rows; from += kBatch * step) {
    Words<T, kGroup> left[kBatch], right[kBatch];
#pragma unroll
    for (int b = 0; b < kBatch; ++b) {
      uint32_t r;
      const int image = a.by_in_rows.divide(from + b * step, &r);
      const int y = u.top + static_cast<int>(r);
      const bool inside = image < u.images && within(y, a.in_h);
      const T* const at = source + (image * a.in_h + y) * row_pixels;
      left[b] = right[b] = {};
      if (inside && left_inside) left[b] = load_words<kGroup>(at);
      if (inside && right_inside) right[b] = load_words<kGroup>(at + a.channels);
    }
#pragma unroll
    for (int b = 0; b < kBatch; ++b) {
      const int row = from + b * step;
      if (row >= rows) break;
      T* const words = target + row * Traits::kRow;
#pragma unroll
      for (int i = 0; i < kGroup / 2; ++i) {
        const uint32_t l = left[b].data[i], r = right[b].data[i];
        magnitudes = largest<T>(l, largest<T>(r, magnitudes));
        *reinterpret_cast<uint32_t*>(words + 2 * i * Traits::kColumns) = __byte_perm(l, r, 0x5410);
        *reinterpret_cast<uint32_t*>(words + (2 * i + 1) * Traits::kColumns) =
            __byte_perm(l, r, 0x7632);
      }
    }
  }
  if (!a.transforms_input) return magnitudes;
  float input_bias[kGroup] = {};
  if (a.input_bias != nullptr) load(static_cast<const T*>(a.input_bias) + channel, input_bias);
  for (int row = first; row < rows; row += step) {
    uint32_t r;
    const int image = a.by_in_rows.divide(row, &r);
    if (image >= u.images || !within(u.top + static_cast<int>(r), a.in_h)) continue;
    auto* const words = reinterpret_cast<uint32_t*>(target + row * Traits::kRow);
    magnitudes = largest<T>(transform<T>(words, Traits::kColumns / 2, input_bias, left_inside,
                                         right_inside, a.input_activation),
                            magnitudes);
  }
  return magnitudes;
}

template <typename Traits>
__device__ __forceinline__ void store_pixels(const typename Traits::T* tile, const Unit& u,
                                             const Arguments& a) {
  using T = typename Traits::T;
  const int groups = a.unit_channels / kGroup;
  const int pairs = min(Traits::kTiles * kTile, (a.out_w + 1) & ~1) / 2;
  const int group = threadIdx.x % groups;
  const int pair = threadIdx.x / groups % pairs;
  const int first = threadIdx.x / groups / pairs;
  const int step = blockDim.x / groups / pairs;
  const int x = u.column + 2 * pair;
  if (first >= step || group * kGroup >= u.channels || x >= a.out_w) return;
  const bool both = x + 1 < a.out_w;
  const int row_pixels = a.out_w * a.channels;
  const T* const source = tile + group * a.group + a.shift + 2 * pair;
  T* const target = static_cast<T*>(a.output) +
                    (static_cast<int64_t>(u.image) * a.out_h * a.out_w + x) * a.channels +
                    u.channel + group * kGroup;
  const int rows = u.images * a.unit_rows;
  for (int row = first; row < rows; row += step) {
    uint32_t r;
    const int image = a.by_rows.divide(row, &r);
    const int y = u.row + static_cast<int>(r);
    if (y >= a.out_h) continue;
    const T* const words = source + (image * a.in_rows + static_cast<int>(r)) * Traits::kRow;
    Words<T, kGroup> left, right;
#pragma unroll
    for (int i = 0; i < kGroup / 2; ++i) {
      const auto even = *reinterpret_cast<const uint32_t*>(words + 2 * i * Traits::kColumns);
      const auto odd = *reinterpret_cast<const uint32_t*>(words + (2 * i + 1) * Traits::kColumns);
      left.data[i] = __byte_perm(even, odd, 0x5410);
      right.data[i] = __byte_perm(even, odd, 0x7632);
    }
    T* const at = target + (image * a.out_h + y) * row_pixels;
    store_words<kGroup>(at, left);
    if (both) store_words<kGroup>(at + a.channels, right);
  }
}

// Elements of the planes of a tensor and of the tile, N at a time, in the order of the tensor.
template <typename Traits, int N>
struct PlaneWalk {
  int width, height, image_row;
  int channel, row, column, at;

  __device__ __forceinline__ PlaneWalk(int element, int width_, int height_, int image_row_,
                                       const Divisor& by_plane, const Divisor& by_width,
                                       const Arguments& a)
      : width(width_), height(height_), image_row(image_row_) {
    uint32_t rest, c;
    channel = by_plane.divide(element, &rest);
    row = by_width.divide(rest, &c);
    column = c;
    seek(a);
  }
  __device__ __forceinline__ void seek(const Arguments& a) {
    at = channel_at<Traits>(channel, a) + (image_row + row) * Traits::kRow + column;
  }
  __device__ __forceinline__ void next(const Arguments& a) {
    column += N, at += N;
    if (column < width) return;
    column = 0;
    if (++row == height) row = 0, ++channel;
    seek(a);
  }
};

// The same of neighbouring elements of planes, the first of which is element `element` of
// `channel`.
template <typename T>
__device__ __forceinline__ void transform_planes(Words<T, kGroup>& vector, int channel, int element,
                                                 const Arguments& a) {
  float x[kGroup];
  widen_all(vector, x);
  if (a.input_bias != nullptr) {
    uint32_t rest;
    const T* input_bias =
        static_cast<const T*>(a.input_bias) + channel + a.by_in_plane.divide(element, &rest);
#pragma unroll
    for (int i = 0; i < kGroup; ++i) {
      x[i] += widen(*input_bias);
      if (++rest == a.by_in_plane.value) rest = 0, ++input_bias;
    }
  }
  activate_by_calls(x, a.input_activation);
#pragma unroll
  for (int i = 0; i < kGroup; i += 2) vector.data[i / 2] = narrow_pair<T>(x[i], x[i + 1]);
}

// NCHW, whole planes, C a multiple of 8: the planes of an image's channels are one piece of memory.
template <typename Traits, int N>
__device__ __forceinline__ uint32_t load_planes(typename Traits::T* tile, const Unit& u,
                                                const Arguments& a) {
  using T = typename Traits::T;
  constexpr int WORDS = kGroup / 2;
  const int count = u.channels * a.in_h * a.in_w;  // of an image
  const int64_t image_elements = static_cast<int64_t>(a.channels) * a.in_h * a.in_w;
  T* const origin = tile + a.lead;
  // The rows above the image: outputs were there.
  const int vectors = a.padding_h * Traits::kRow / kGroup;
  for (int i = threadIdx.x; i < a.unit_channels / kGroup * a.unit_images * vectors;
       i += blockDim.x) {
    const int rows = i / vectors;
    *reinterpret_cast<uint4*>(tile + rows / a.unit_images * a.group +
                              rows % a.unit_images * a.in_rows * Traits::kRow +
                              i % vectors * kGroup) = {};
  }
  uint32_t magnitudes = 0;
  const T* source = static_cast<const T*>(a.input) + u.image * image_elements +
                    static_cast<int64_t>(u.channel) * a.in_h * a.in_w;
  for (int image = 0; image < u.images; ++image, source += image_elements) {
    const int image_row = image * a.in_rows - u.top;
    for (int from = threadIdx.x * kGroup; from < count; from += kBatch * blockDim.x * kGroup) {
      Words<T, kGroup> vector[kBatch];
#pragma unroll
      for (int b = 0; b < kBatch; ++b) {
        const int element = from + b * blockDim.x * kGroup;
        if (element < count) vector[b] = load_words<kGroup>(source + element);
      }
#pragma unroll
      for (int b = 0; b < kBatch; ++b) {
        const int element = from + b * blockDim.x * kGroup;
        if (element >= count) break;
        if (a.transforms_input) transform_planes(vector[b], u.channel, element, a);
        PlaneWalk<Traits, N> walk(element, a.in_w, a.in_h, image_row, a.by_in_plane, a.by_in_width,
                                  a);
#pragma unroll
        for (int i = 0; i < WORDS; ++i) {
          const uint32_t pair = vector[b].data[i];
          magnitudes = largest<T>(pair, magnitudes);
          if constexpr (N == 2) {
            *reinterpret_cast<uint32_t*>(origin + walk.at) = pair;
            walk.next(a);
          } else {
            auto* const halves = reinterpret_cast<uint16_t*>(origin);
            halves[walk.at] = static_cast<uint16_t>(pair);
            walk.next(a);
            halves[walk.at] = static_cast<uint16_t>(pair >> 16);
            walk.next(a);
          }
        }
      }
    }
  }
  return magnitudes;
}

template <typename Traits, int N>
__device__ __forceinline__ void store_planes(const typename Traits::T* tile, const Unit& u,
                                             const Arguments& a) {
  using T = typename Traits::T;
  const int count = u.channels * a.out_h * a.out_w;
  const int64_t image_elements = static_cast<int64_t>(a.channels) * a.out_h * a.out_w;
  const T* const origin = tile + a.shift;
  T* target = static_cast<T*>(a.output) + u.image * image_elements +
              static_cast<int64_t>(u.channel) * a.out_h * a.out_w;
  for (int image = 0; image < u.images; ++image, target += image_elements) {
    for (int element = threadIdx.x * kGroup; element < count; element += blockDim.x * kGroup) {
      PlaneWalk<Traits, N> walk(element, a.out_w, a.out_h, image * a.in_rows, a.by_out_plane,
                                a.by_out_width, a);
      Words<T, kGroup> vector;
#pragma unroll
      for (int i = 0; i < kGroup / 2; ++i) {
        if constexpr (N == 2) {
          vector.data[i] = *reinterpret_cast<const uint32_t*>(origin + walk.at);
          walk.next(a);
        } else {
          const auto* const halves = reinterpret_cast<const uint16_t*>(origin);
          const uint32_t low = halves[walk.at];
          walk.next(a);
          const uint32_t high = halves[walk.at];
          walk.next(a);
          vector.data[i] = low | high << 16;
        }
      }
      store_words<kGroup>(target + element, vector);
    }
  }
}

// N elements of a row.
template <typename T, int N>
struct Piece {
  uint32_t words[N == 4 ? 2 : 1] = {};

  __device__ __forceinline__ void load(const T* source) {
    if constexpr (N == 1) {
      words[0] = *reinterpret_cast<const uint16_t*>(source);
    } else {
      const Words<T, N> found = load_words<N>(source);
#pragma unroll
      for (int i = 0; i < N / 2; ++i) words[i] = found.data[i];
    }
  }
  __device__ __forceinline__ void store(T* target) const {
    if constexpr (N == 1) {
      *reinterpret_cast<uint16_t*>(target) = static_cast<uint16_t>(words[0]);
    } else {
      Words<T, N> all;
#pragma unroll
      for (int i = 0; i < N / 2; ++i) all.data[i] = words[i];
      store_words<N>(target, all);
    }
  }
};

// NCHW: a thread copies N neighbouring elements of every step-th row, of all channels and images.
template <typename Traits, int N>
__device__ __forceinline__ uint32_t load_rows(typename Traits::T* tile, const Unit& u,
                                              const Arguments& a) {
  using T = typename Traits::T;
  constexpr int WORDS = N == 4 ? 2 : 1;
  const int pieces = a.columns / N;
  const int piece = threadIdx.x % pieces;
  const int first = threadIdx.x / pieces, step = blockDim.x / pieces;
  if (first >= step) return 0;
  const int column = a.first_column + piece * N;
  const int x = u.left + column;
  const bool column_inside = within(x, a.in_w);
  const int area = a.in_h * a.in_w;
  const T* const source = static_cast<const T*>(a.input) + x +
                          (static_cast<int64_t>(u.image) * a.channels + u.channel) * area;
  T* const target = tile + column;
  uint32_t magnitudes = 0;
  const int rows = u.channels * a.unit_images * a.in_rows;
  for (int from = first; from < rows; from += kBatch * step) {
    Piece<T, N> pieces_found[kBatch];
    int targets[kBatch];
    float input_bias[kBatch][1];
    bool inside[kBatch];
#pragma unroll
    for (int b = 0; b < kBatch; ++b) {
      const int row = from + b * step;
      uint32_t r, image;
      const int channel = a.by_images.divide(a.by_in_rows.divide(row, &r), &image);
      const int y = u.top + static_cast<int>(r);
      inside[b] =
          column_inside && row < rows && static_cast<int>(image) < u.images && within(y, a.in_h);
      targets[b] = channel_at<Traits>(channel, a) +
                   (static_cast<int>(image) * a.in_rows + static_cast<int>(r)) * Traits::kRow;
      if (inside[b])
        pieces_found[b].load(source + (static_cast<int>(image) * a.channels + channel) * area +
                             y * a.in_w);
      input_bias[b][0] = a.input_bias == nullptr || !inside[b]
                             ? 0.0f
                             : widen(static_cast<const T*>(a.input_bias)[u.channel + channel]);
    }
#pragma unroll
    for (int b = 0; b < kBatch; ++b) {
      if (from + b * step >= rows) break;
#pragma unroll
      for (int i = 0; i < WORDS; ++i) {
        uint32_t& pair = pieces_found[b].words[i];
        if (a.transforms_input && inside[b])
          transform<T>(&pair, 0, input_bias[b], true, N > 1, a.input_activation);
        magnitudes = largest<T>(pair, magnitudes);
      }
      pieces_found[b].store(target + targets[b]);
    }
  }
  return magnitudes;
}

template <typename Traits, int N>
__device__ __forceinline__ void store_rows(const typename Traits::T* tile, const Unit& u,
                                           const Arguments& a) {
  using T = typename Traits::T;
  const int pieces = ceil_div(min(Traits::kTiles * kTile, a.out_w), N);
  const int piece = threadIdx.x % pieces;
  const int first = threadIdx.x / pieces, step = blockDim.x / pieces;
  const int x = u.column + piece * N;
  if (first >= step || x >= a.out_w) return;
  const int area = a.out_h * a.out_w;
  const T* const source = tile + a.shift + piece * N;
  T* const target = static_cast<T*>(a.output) + x +
                    (static_cast<int64_t>(u.image) * a.channels + u.channel) * area;
  const int rows = u.channels * a.unit_images * a.unit_rows;
  for (int row = first; row < rows; row += step) {
    uint32_t r, image;
    const int channel = a.by_images.divide(a.by_rows.divide(row, &r), &image);
    const int y = u.row + static_cast<int>(r);
    if (y >= a.out_h || static_cast<int>(image) >= u.images) continue;
    Piece<T, N> found;
    found.load(source + channel_at<Traits>(channel, a) +
               (static_cast<int>(image) * a.in_rows + static_cast<int>(r)) * Traits::kRow);
    found.store(target + (static_cast<int>(image) * a.channels + channel) * area + y * a.out_w);
  }
}

// Returns whether all that this thread copied is finite.
template <typename Traits>
__device__ __forceinline__ bool load_unit(typename Traits::T* tile, const Unit& u,
                                          const Arguments& a) {
  uint32_t magnitudes = 0;
  switch (a.in_mover) {
    case Mover::kPixels:
      magnitudes = load_pixels<Traits>(tile, u, a);
      break;
    case Mover::kPlanePairs:
      magnitudes = load_planes<Traits, 2>(tile, u, a);
      break;
    case Mover::kPlanes:
      magnitudes = load_planes<Traits, 1>(tile, u, a);
      break;
    case Mover::kRows4:
      magnitudes = load_rows<Traits, 4>(tile, u, a);
      break;
    case Mover::kRows2:
      magnitudes = load_rows<Traits, 2>(tile, u, a);
      break;
    case Mover::kRows1:
      magnitudes = load_rows<Traits, 1>(tile, u, a);
      break;
  }
  return finite<typename Traits::T>(magnitudes);
}

template <typename Traits>
__device__ __forceinline__ void store_unit(const typename Traits::T* tile, const Unit& u,
                                           const Arguments& a) {
  switch (a.out_mover) {
    case Mover::kPixels:
      return store_pixels<Traits>(tile, u, a);
    case Mover::kPlanePairs:
      return store_planes<Traits, 2>(tile, u, a);
    case Mover::kPlanes:
      return store_planes<Traits, 1>(tile, u, a);
    case Mover::kRows4:
      return store_rows<Traits, 4>(tile, u, a);
    case Mover::kRows2:
      return store_rows<Traits, 2>(tile, u, a);
    case Mover::kRows1:
      return store_rows<Traits, 1>(tile, u, a);
  }
}

}  // namespace toeplitz
}  // namespace dwswap
