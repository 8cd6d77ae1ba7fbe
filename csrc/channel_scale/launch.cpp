// Which problems have kernels, and the choice of their element type.
#include "channel_scale/launch.h"

#include <algorithm>

namespace dwswap {

bool covers_channel_scale(const ChannelScaleParams& p) {
  // Planes, and the pixels of one, are counted in 32 bits, as are the blocks for the elements.
  constexpr int64_t kMost = int64_t{1} << 30, kMostElements = int64_t{1} << 40;
  const int64_t planes = int64_t{p.batch} * p.channels;
  return p.dtype != DataType::kFloat64 && std::min<int64_t>(planes, p.pixels) > 0 &&
         std::max<int64_t>(planes, p.pixels) <= kMost && planes * p.pixels <= kMostElements;
}

cudaError_t launch_channel_scale(const ChannelScaleParams& p, cudaStream_t stream) {
  return visit_fast_type(p.dtype,
                         [&]<typename T>() { return channel_scale::launch_scale<T>(p, stream); });
}

cudaError_t launch_gate_gradients(const ChannelScaleParams& p, const channel_scale::Cut& cut,
                                  cudaStream_t stream) {
  return visit_fast_type(
      p.dtype, [&]<typename T>() { return channel_scale::launch_sums<T>(p, cut, stream); });
}

}  // namespace dwswap
