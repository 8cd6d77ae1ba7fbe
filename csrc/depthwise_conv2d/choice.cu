// The launch choice: from a problem to the family of kernels that runs it.
#include "depthwise_conv2d/params.h"

namespace dwswap {

Choice choose_forward(const DepthwiseConv2dParams& params) {
  if (covers_channel_tiles(params)) return {"channel_tiles", launch_channel_tiles};
  if (covers_plane_strips(params)) return {"plane_strips", launch_plane_strips};
  if (covers_rolling_rows(params)) return {"rolling_rows", launch_rolling_rows};
  return {"general", launch_general};
}

}  // namespace dwswap
