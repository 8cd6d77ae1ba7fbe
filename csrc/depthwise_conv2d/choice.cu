// The launch choice: from a problem to the family of kernels that runs it.
#include <cstdlib>
#include <string_view>

#include "depthwise_conv2d/params.h"

namespace dwswap {
namespace {

bool portable_only() {
  const char* value = std::getenv("DWSWAP_PORTABLE");
  return value != nullptr && std::string_view(value) == "1";
}

}  // namespace

Choice choose_forward(const DepthwiseConv2dParams& params) {
  if (!portable_only() && covers_tma_tiles(params)) return {"tma_tiles", launch_tma_tiles};
  if (covers_plane_strips(params)) return {"plane_strips", launch_plane_strips};
  if (covers_rolling_rows(params)) return {"rolling_rows", launch_rolling_rows};
  return {"general", launch_general};
}

}  // namespace dwswap
