// By what cuts are remembered.
#pragma once

#include <array>
#include <cstdint>

#include "common/device.h"
#include "depthwise_conv2d/params.h"

namespace dwswap {

// The same for all problems of one shape on GPUs of one kind. The layout is the input's.
inline std::array<int64_t, 18> problem_key(const DepthwiseConv2dParams& p, const Device& device) {
  return {p.batch,
          p.channels,
          p.in_h,
          p.in_w,
          p.out_h,
          p.out_w,
          p.kernel_h,
          p.kernel_w,
          p.stride_h,
          p.stride_w,
          p.padding_h,
          p.padding_w,
          p.dilation_h,
          p.dilation_w,
          p.in_layout == Layout::kChannelsLast,
          device.multiprocessors,
          device.shared_per_multiprocessor,
          device.shared_per_block};
}

}  // namespace dwswap
