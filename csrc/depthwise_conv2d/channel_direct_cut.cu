#include <algorithm>

#include "depthwise_conv2d/channel_direct_cut.h"

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

Cut search_cut(const DepthwiseConv2dParams& p, int aligned, int multiprocessors) {
  // Threads of a multiprocessor: that end at different times, that hide each other's waits, and
  // below which one wants narrower accesses.
  constexpr int64_t kSeveralWaves = 2048, kOneWave = 512, kFew = 128;
  const auto enough = [&](const Cut& cut, int64_t threads) {
    return cut.threads(p) >= threads * multiprocessors;
  };
  // Strips of about the same number of rows.
  const auto strips = [&](int64_t most) {
    return static_cast<int>(ceil_div(p.out_h, ceil_div(p.out_h, most)));
  };
  Cut cut{aligned, wide_columns(aligned), 1};
  if (ceil_div(p.out_w, cut.columns) * cut.columns >= 2 * p.out_w) cut.columns = 1;
  // A strip reads 3 - stride rows that the next one reads too, and waits for its first two.
  for (const int most : {16, 8, 4}) {
    cut.rows = strips(most);
    if (enough(cut, kSeveralWaves)) return cut;
  }
  for (const int most : {4, 2, 1}) {
    cut.rows = strips(most);
    if (enough(cut, kOneWave)) return cut;
  }
  cut.columns = 1;
  while (cut.channels > 1 && !enough(cut, kFew)) cut.channels /= 2;
  return cut;
}

}  // namespace

Cut choose_cut(const DepthwiseConv2dParams& p, int element_bytes, int multiprocessors) {
  return search_cut(p, aligned_channels(p, element_bytes), multiprocessors);
}

}  // namespace channel_direct
}  // namespace dwswap
