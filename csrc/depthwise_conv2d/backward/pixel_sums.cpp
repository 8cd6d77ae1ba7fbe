#include "depthwise_conv2d/backward/pixel_sums.h"

#include <limits>

#include "common/data_type.h"

namespace dwswap {
namespace {

int64_t pixels_of(const GradientParams& p) { return p.batch * p.out_h * p.out_w; }

}  // namespace

bool covers_pixel_sums(const GradientParams& p) {
  constexpr int64_t kLimit = std::numeric_limits<int32_t>::max();
  if (!p.channels_last() || p.dtype == DataType::kFloat64 || p.multiplier != 1) return false;
  if (!p.wants_weight || p.kernel_h != p.kernel_w) return false;
  if (p.kernel_w != 3 && p.kernel_w != 5 && p.kernel_w != 7) return false;
  if (pixels_of(p) > pixel_sums::kMostPixels) return false;
  // Places in images, of which one may begin in the padding.
  return p.is_padded_within(kLimit) && pixel_sums::kMostPixels <= kLimit / p.channels;
}

// Where other families took longer for a second kernel and for stages of zeros.
bool suits_pixel_sums(const GradientParams& p) {
  constexpr int64_t kFewPixels = 768;  // 6 per thread
  return pixels_of(p) <= kFewPixels;
}

cudaError_t launch_pixel_sums(const GradientParams& p, cudaStream_t stream) {
  return visit_fast_type(p.dtype,
                         [&]<typename T>() { return pixel_sums::launch_typed<T>(p, stream); });
}

}  // namespace dwswap
