// Outputs without the tensor cores, for families whose products have zeros that no window holds:
// there, 0 * infinity is NaN.
#pragma once

#include "common/numeric.cuh"

namespace dwswap {

template <typename T>
__device__ __forceinline__ bool has_nan(uint32_t pair) {
  const float2 both = widen_pair<T>(pair);
  return isnan(both.x) || isnan(both.y);
}

// One channel of an image, `row_step` and `column_step` elements from pixel to pixel.
template <typename T>
struct Channel {
  const T* first;
  int64_t row_step, column_step;
  int height, width;
};

// The sum of multiply(element, tap) over those taps of a K x K window that lie in the image; its
// first pixel is at (top, left).
template <int K, typename T, typename Multiply>
__device__ __forceinline__ float sum_window(const Channel<T>& channel, int top, int left,
                                            Multiply&& multiply) {
  float sum = 0.0f;
  for (int h = 0; h < K; ++h) {
    const int row = top + h;
    for (int w = 0; w < K; ++w) {
      const int column = left + w;
      if (row < 0 || row >= channel.height || column < 0 || column >= channel.width) continue;
      sum +=
          multiply(channel.first[row * channel.row_step + column * channel.column_step], h * K + w);
    }
  }
  return sum;
}

}  // namespace dwswap
