#include "depthwise_conv2d/channel_direct_cut.h"

#include <algorithm>

namespace dwswap {
namespace channel_direct {
namespace {

// Channels that one access of every tensor can hold.
int aligned_channels(const DepthwiseConv2dParams& p, int element_bytes) {
  uint64_t places = static_cast<uint64_t>(p.channels) * element_bytes;
  for (const void* tensor :
       {p.input, p.weight, p.bias, p.input_bias, const_cast<const void*>(p.output)}) {
    places |= reinterpret_cast<uintptr_t>(tensor);
  }
  int channels = kMostChannels;
  while (channels > 1 && places % (channels * element_bytes) != 0) channels /= 2;
  return channels;
}

}  // namespace

Cut choose_cut(const DepthwiseConv2dParams& p, int element_bytes, int multiprocessors) {
  // Threads of a multiprocessor: that keep it busy, and below which one wants narrower accesses.
  constexpr int64_t kBusy = 384, kFew = 192;
  // A strip reads 3 - stride rows that the next one reads too, and waits for its first two; short
  // strips end at different times. Half precision has half the bytes under way.
  int most = (p.stride_h == 1 ? 14 : 8) / (element_bytes / 2);
  Cut cut{aligned_channels(p, element_bytes), 0};
  const auto enough = [&](int64_t threads) { return cut.threads(p) >= threads * multiprocessors; };
  for (;; most /= 2) {
    cut.rows = static_cast<int>(ceil_div(p.out_h, ceil_div(p.out_h, most)));
    if (most == 1 || enough(kBusy)) break;
  }
  while (cut.channels > 1 && !enough(kFew)) cut.channels /= 2;
  return cut;
}

}  // namespace channel_direct
}  // namespace dwswap
