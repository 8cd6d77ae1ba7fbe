// What kernels do with the forms of form.h.
#pragma once

#include "common/numeric.cuh"
#include "depthwise_conv2d/form.h"
#include "depthwise_conv2d/params.h"

namespace dwswap {

// Element by element, in the type of the elements; NaN stays NaN.
template <typename T, int N>
__device__ __forceinline__ Words<T, N> maximum(Words<T, N> x, const Words<T, N>& low) {
#pragma unroll
  for (int i = 0; i < Words<T, N>::kWords; ++i) x.data[i] = maximum_word<T>(x.data[i], low.data[i]);
  return x;
}
template <typename T, int N>
__device__ __forceinline__ Words<T, N> minimum(Words<T, N> x, const Words<T, N>& high) {
#pragma unroll
  for (int i = 0; i < Words<T, N>::kWords; ++i)
    x.data[i] = minimum_word<T>(x.data[i], high.data[i]);
  return x;
}

template <typename T, int N>
__device__ __forceinline__ Words<T, N> sum(Words<T, N> x, const Words<T, N>& y) {
#pragma unroll
  for (int i = 0; i < Words<T, N>::kWords; ++i) x.data[i] = sum_word<T>(x.data[i], y.data[i]);
  return x;
}

// input_activation(input + b) of N neighbouring channels while they are read.
//
// Where it is a clamp, clamp(x + b) = max(x, low - b) + b, of which the lower bound is exact and in
// half precision takes a pair of channels at once; the sums get b times all taps instead of an
// addition per element. What lies outside the image, zero after the activation, is -b before it:
// the activation of 0 is 0, but for those of kAny.
template <Form FORM, typename T, int N>
class InputForm {
  Words<T, N> low, outside_;
  float high[N], bias[N];

 public:
  __device__ __forceinline__ InputForm(const float (&input_bias)[N], Activation activation) {
    float lows[N], outsides[N];
#pragma unroll
    for (int i = 0; i < N; ++i) {
      bias[i] = input_bias[i];
      outsides[i] = -input_bias[i];
      lows[i] = low_of(activation) - input_bias[i];
      high[i] = high_of(activation) - input_bias[i];
    }
    low = narrow_all<T>(lows), outside_ = narrow_all<T>(outsides);
  }

  // Not for kAny.
  __device__ __forceinline__ const Words<T, N>& outside() const { return outside_; }

  // What a sum of channel i begins with.
  template <int TAPS>
  __device__ __forceinline__ float start(int i, float output_bias,
                                         const float (&taps)[TAPS]) const {
    float sum = 0.0f;
#pragma unroll
    for (int t = 0; t < TAPS; ++t) sum += taps[t];
    // Of an infinite tap 0 times it would be NaN.
    return clamps(FORM) && bias[i] != 0.0f ? output_bias + bias[i] * sum : output_bias;
  }

  // Pixels of a row: x[pixel * N + channel] of what read(pixel) returns. MASKED: bit i of `inside`
  // says that pixel i lies in the image; else all do.
  template <int PIXELS, bool MASKED, typename Read>
  __device__ __forceinline__ void apply(Read&& read, uint32_t inside, Activation activation,
                                        float (&x)[PIXELS * N]) const {
#pragma unroll
    for (int i = 0; i < PIXELS; ++i) {
      Words<T, N> words = read(i);
      if constexpr (MASKED && FORM != Form::kAny) {
#pragma unroll
        for (int w = 0; w < Words<T, N>::kWords; ++w)
          words.data[w] = (inside >> i & 1) != 0 ? words.data[w] : outside_.data[w];
      }
      if constexpr (clamps(FORM)) words = maximum(words, low);
      float pixel[N];
      widen_all(words, pixel);
#pragma unroll
      for (int e = 0; e < N; ++e) x[i * N + e] = transform(pixel[e], e);
    }
    if constexpr (FORM == Form::kAny) {
      activate(x, activation);
      if constexpr (MASKED) {
#pragma unroll
        for (int i = 0; i < PIXELS * N; ++i) x[i] = (inside >> i / N & 1) != 0 ? x[i] : 0.0f;
      }
    }
  }

 private:
  __device__ __forceinline__ float transform(float x, int i) const {
    if constexpr (FORM == Form::kClamp) return minimum(x, high[i]);
    if constexpr (FORM == Form::kHardswish) return hardswish_of(x + bias[i]);
    if constexpr (FORM == Form::kSilu) return silu_of(x + bias[i]);
    if constexpr (FORM == Form::kAny) return x + bias[i];
    return x;
  }
};

// activation(sums) of N neighbouring channels, rounded to T; of kAny it is taken before, for many
// pixels at once.
template <Form FORM, typename T, int N>
struct OutputForm {
  Words<T, N> low, high;

  __device__ __forceinline__ explicit OutputForm(Activation activation) {
    float lows[N], highs[N];
#pragma unroll
    for (int i = 0; i < N; ++i) lows[i] = low_of(activation), highs[i] = high_of(activation);
    low = narrow_all<T>(lows), high = narrow_all<T>(highs);
  }

  __device__ __forceinline__ Words<T, N> apply(float (&sums)[N]) const {
    if constexpr (FORM == Form::kHardswish) {
#pragma unroll
      for (int i = 0; i < N; ++i) sums[i] = hardswish_of(sums[i]);
    }
    if constexpr (FORM == Form::kSilu) {
#pragma unroll
      for (int i = 0; i < N; ++i) sums[i] = silu_of(sums[i]);
    }
    return clamp(narrow_all<T>(sums));
  }

  // Of sums that are rounded already, for the forms that are a clamp.
  __device__ __forceinline__ Words<T, N> clamp(Words<T, N> words) const {
    if constexpr (clamps(FORM)) words = maximum(words, low);
    if constexpr (FORM == Form::kClamp) words = minimum(words, high);
    return words;
  }
};

}  // namespace dwswap
