#include "depthwise_conv2d/diagonal.cuh"

namespace dwswap::diagonal {
template DWSWAP_LAUNCH_TYPED(__half);
}
