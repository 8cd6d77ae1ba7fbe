#include "depthwise_conv2d/channel_direct.cuh"

namespace dwswap::channel_direct {
template DWSWAP_LAUNCH_TYPED(__half);
}
