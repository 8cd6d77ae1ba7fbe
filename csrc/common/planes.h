// Images as planes of pixels.
#pragma once

#include <cstdint>

namespace dwswap {

// Loads of a thread that are under way.
constexpr int kPlaneUnroll = 4;

// (batch, channels, pixels), dense, contiguous or channels_last. Elements of a sample are counted
// in 32 bits.
struct Planes {
  int32_t batch, channels, pixels;
};

}  // namespace dwswap
