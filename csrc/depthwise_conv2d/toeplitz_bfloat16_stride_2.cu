#include "depthwise_conv2d/toeplitz.cuh"

namespace dwswap::toeplitz {
template DWSWAP_LAUNCH_CUT(__nv_bfloat16, 2);
}
