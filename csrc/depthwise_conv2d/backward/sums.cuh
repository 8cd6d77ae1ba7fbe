// Where the sums of a share go.
#pragma once

#include "common/numeric.cuh"
#include "depthwise_conv2d/backward/sums.h"

namespace dwswap {

// A gradient that is null is not wanted.
template <typename T>
struct Gradients {
  T* weight;
  T* bias;
  int64_t taps;

  __device__ __forceinline__ void set(int64_t channel, int64_t value, accumulator_t<T> sum) const {
    if (value < taps) {
      if (weight != nullptr) weight[channel * taps + value] = narrow<T>(sum);
    } else if (bias != nullptr) {
      bias[channel] = narrow<T>(sum);
    }
  }
};

// The sums of all shares, or the gradients where there is one share.
template <typename T>
struct Sums {
  using A = accumulator_t<T>;
  A* shares;  // [share][value][channel], or null
  int64_t channels;
  Gradients<T> gradients;

  Sums(const GradientParams& p, int64_t count)
      : shares(count == 1 ? nullptr : static_cast<A*>(p.workspace)),
        channels(p.out_channels()),
        gradients{static_cast<T*>(p.grad_weight), static_cast<T*>(p.grad_bias), p.taps()} {}

  __device__ __forceinline__ void set(int64_t share, int64_t channel, int64_t value, A sum) const {
    if (shares == nullptr) {
      gradients.set(channel, value, sum);
    } else {
      shares[(share * (gradients.taps + 1) + value) * channels + channel] = sum;
    }
  }
};

}  // namespace dwswap
