// Which problems of the first layer have a kernel, and the choice of its element type.
#include "stem_conv2d/launch.h"

#include <limits>

#include "stem_conv2d/cut.h"
#include "stem_conv2d/params.h"

namespace dwswap {

bool covers_stem_conv2d(const StemConv2dParams& p) {
  constexpr int64_t kMost = std::numeric_limits<int32_t>::max();
  if (p.dtype == DataType::kFloat64) return false;
  if (p.channels <= 0 || p.channels % 8 != 0 || p.channels > stem::kMostChannels) return false;
  // Offsets inside an image of input have 31 bits.
  if (p.height <= 0 || p.width <= 0 || p.height > kMost / 3 / p.width) return false;
  // A unit has a row of one tile at least, and is counted in 31 bits.
  return p.batch <= kMost / (p.out_h() * ceil_div(p.out_w(), stem::kTile));
}

cudaError_t launch_stem_conv2d(const StemConv2dParams& p, const Device& device,
                               cudaStream_t stream) {
  return visit_fast_type(p.dtype,
                         [&]<typename T>() { return stem::launch_typed<T>(p, device, stream); });
}

}  // namespace dwswap
