#include "depthwise_conv2d/backward/gram_sums.cuh"

namespace dwswap::gram_sums {
template DWSWAP_LAUNCH_TYPED(__half);
}
