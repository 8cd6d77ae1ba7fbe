#include "depthwise_conv2d/plane_bands.cuh"

namespace dwswap::plane_bands {
template DWSWAP_LAUNCH_TYPED(__nv_bfloat16);
}
