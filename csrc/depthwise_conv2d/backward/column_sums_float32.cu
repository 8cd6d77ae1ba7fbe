#include "depthwise_conv2d/backward/column_sums.cuh"

namespace dwswap::column_sums {
template DWSWAP_LAUNCH_TYPED(float);
}
