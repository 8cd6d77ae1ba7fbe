#include "depthwise_conv2d/plane_strips.cuh"

namespace dwswap::plane_strips {
template DWSWAP_LAUNCH_CUT(__half, kNarrow, false);
template DWSWAP_LAUNCH_CUT(__half, kNarrow, true);
}  // namespace dwswap::plane_strips
