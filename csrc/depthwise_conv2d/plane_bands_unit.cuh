// What a block of plane_bands computes, and how it does without the tensor cores.
#pragma once

#include "common/numeric.cuh"
#include "depthwise_conv2d/exact.cuh"
#include "depthwise_conv2d/form.h"
#include "depthwise_conv2d/plane_bands_cut.h"

namespace dwswap {
namespace plane_bands {

template <typename T_, int K_, int STRIDE_, Form FORM_, int COPIES_, int COUNTERS_>
struct Traits {
  using T = T_;
  static constexpr Form kForm = FORM_;  // kPlain or kClamp
  static constexpr int kKernel = K_;
  static constexpr int kStride = STRIDE_;
  static constexpr int kRing = ring_rows(K_, STRIDE_);
  // Rows of input: their places in the ring and their copy of the bands are known.
  static constexpr int kUnroll = COPIES_ == 1 && STRIDE_ == 1 ? kRing : 2 * kRing;
  static constexpr int kParts = window_parts(STRIDE_);
  static constexpr int kCopies = COPIES_;  // of the bands: one where has_even_rows()
  // Of rows and addresses: one where shares_counters(), or each walk of a lane has its own.
  static constexpr int kCounters = COUNTERS_;
};

struct Arguments {
  const void* input;
  const void* weight;
  const void* bias;
  const void* input_bias;
  void* output;
  int64_t in_elements;  // of the whole input
  int batch, channels, in_h, in_w, out_h, out_w, padding_h, padding_w;
  int images, segments, planes, rows, segment_rows;
  int share, longer_shares;  // units of a block, and blocks that have one more
  int in_pitch, out_pitch;   // bytes
  int in_apart, out_apart;   // bytes from a walk to walk + 8, where they share counters
  Divisor by_strips, by_groups, by_tiles, by_segments;
  bool transforms_input, reversed_taps;
  Activation input_activation, activation;
};

// A unit: where it lies, and the rows of input that it sees.
struct Unit {
  int channel, planes, image, images;  // the first ones, and how many
  int row, rows;                       // of output, of a plane
  int in_first, in_rows;

  __device__ __forceinline__ Unit(const Arguments& a, int index, int kernel, int stride) {
    uint32_t strip, group;
    const uint32_t chunk = a.by_groups.divide(a.by_strips.divide(index, &strip), &group);
    channel = static_cast<int>(chunk) * a.planes;
    planes = min(a.planes, a.channels - channel);
    image = static_cast<int>(group) * a.images;
    images = min(a.images, a.batch - image);
    row = static_cast<int>(strip) * a.rows;
    rows = min(a.rows, a.out_h - row);
    const bool whole = a.rows == a.out_h;
    const int top = row * stride - a.padding_h;
    in_first = whole ? 0 : min(max(top, 0), a.in_h);
    const int in_end = whole ? a.in_h : min(top + (rows - 1) * stride + kernel, a.in_h);
    in_rows = max(in_end - in_first, 0);
  }

  // Elements in front of the piece of image i.
  __device__ __forceinline__ int64_t source(const Arguments& a, int i) const {
    return ((static_cast<int64_t>(image + i) * a.channels + channel) * a.in_h + in_first) * a.in_w;
  }
  __device__ __forceinline__ int64_t target(const Arguments& a, int i) const {
    return ((static_cast<int64_t>(image + i) * a.channels + channel) * a.out_h + row) * a.out_w;
  }
};

// input_activation(x + input_bias) of two elements, rounded as it would be in a tensor.
template <typename T>
struct Transform {
  uint32_t input_bias, low, high;
  uint32_t outside;  // becomes zero

  __device__ __forceinline__ Transform(const Arguments& a, int channel) {
    const float b =
        a.input_bias == nullptr ? 0.0f : widen(static_cast<const T*>(a.input_bias)[channel]);
    const float l = low_of(a.input_activation), h = high_of(a.input_activation);
    input_bias = narrow_pair<T>(b, b), low = narrow_pair<T>(l, l), high = narrow_pair<T>(h, h);
    outside = narrow_pair<T>(-b, -b);
  }
  __device__ __forceinline__ uint32_t operator()(uint32_t x) const {
    return minimum_word<T>(maximum_word<T>(sum_word<T>(x, input_bias), low), high);
  }
};

// Computes a block's units without the tensor cores.
template <typename Traits>
__device__ __noinline__ void recompute(const Arguments& a, int first_unit, int end_unit) {
  using T = typename Traits::T;
  constexpr int K = Traits::kKernel, S = Traits::kStride;
  for (int index = first_unit; index < end_unit; ++index) {
    const Unit u(a, index, K, S);
    const int plane = u.rows * a.out_w, image = u.planes * plane;
    for (int i = threadIdx.x; i < u.images * image; i += blockDim.x) {
      const int n = i / image, p = i % image / plane, at = i % plane;
      const int c = u.channel + p, y = u.row + at / a.out_w, x = at % a.out_w;
      const auto* first = static_cast<const T*>(a.input) +
                          (static_cast<int64_t>(u.image + n) * a.channels + c) * a.in_h * a.in_w;
      const auto* weight = static_cast<const T*>(a.weight) + static_cast<int64_t>(c) * K * K;
      const Transform<T> transform(a, c);
      const auto multiply = [&](T element, int tap) {
        const auto bits = *reinterpret_cast<const uint16_t*>(&element);
        const float value = widen_pair<T>(a.transforms_input ? transform(bits) : bits).x;
        return value * widen(weight[a.reversed_taps ? K * K - 1 - tap : tap]);
      };
      const Channel<T> channel{first, a.in_w, 1, a.in_h, a.in_w};
      const float bias = a.bias == nullptr ? 0.0f : widen(static_cast<const T*>(a.bias)[c]);
      const float sum =
          bias + sum_window<K>(channel, y * S - a.padding_h, x * S - a.padding_w, multiply);
      static_cast<T*>(a.output)[u.target(a, n) + p * a.out_h * a.out_w + at] =
          narrow<T>(clamp(sum, low_of(a.activation), high_of(a.activation)));
    }
  }
}

}  // namespace plane_bands
}  // namespace dwswap
