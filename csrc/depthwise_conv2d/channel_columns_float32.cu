#include "depthwise_conv2d/channel_columns.cuh"

namespace dwswap::channel_columns {
template DWSWAP_LAUNCH_TYPED(float);
}
