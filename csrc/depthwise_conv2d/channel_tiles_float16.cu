#include "depthwise_conv2d/channel_tiles.cuh"

namespace dwswap::channel_tiles {
template DWSWAP_LAUNCH_TYPED(__half);
}
