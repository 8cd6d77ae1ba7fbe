#include "depthwise_conv2d/plane_strips.cuh"

namespace dwswap::plane_strips {
template DWSWAP_LAUNCH_CUT(float, false, false);
template DWSWAP_LAUNCH_CUT(float, false, true);
}  // namespace dwswap::plane_strips
