// How the squeeze_excitation kernels cut a tensor: host code.
#include <algorithm>
#include <cstdint>
#include <limits>

#include "common/integer.h"
#include "squeeze_excitation/params.h"

namespace dwswap {
namespace {

using Tile = ExcitationTile;

constexpr int kAccessBytes = 16;
// So many blocks per multiprocessor make up for blocks that end early, ...
constexpr int64_t kBlocks = 8;
// ... but a block that has this much to read pays for the weights that it goes through.
constexpr int64_t kBlockBytes = 32 * 1024;
constexpr int64_t kMostChunks = 256;  // each adds to what every block of excite_kernel sums up
constexpr int64_t kMostGridY = 65535;

// The two launches go through both layers for each sample by itself: on an H200 about 2 us per
// million of weights that they multiply. Products over all samples come with three launches more.
constexpr int64_t kMostWeights = int64_t{4} << 20;
// In those a warp reads all pixels of 128 bytes of channels: it takes small planes, or many warps.
constexpr int32_t kSmallPlane = 256;
constexpr int64_t kEnoughWarps = 8;  // per multiprocessor

bool aligned(const void* pointer) {
  return reinterpret_cast<uintptr_t>(pointer) % kAccessBytes == 0;
}

}  // namespace

bool reads_vectors(const SqueezeExcitationParams& p) {
  const int32_t run = p.layout == Layout::kChannelsLast ? p.channels : p.pixels;
  return aligned(p.input) && aligned(p.output) && run % (kAccessBytes / bytes_of(p.dtype)) == 0;
}

bool prefers_products(const SqueezeExcitationParams& p, int multiprocessors) {
  const int64_t planes = int64_t{p.batch} * p.channels;
  const int64_t warps = planes * bytes_of(p.dtype) / 128;
  return planes * p.hidden > kMostWeights &&
         (p.pixels <= kSmallPlane || warps >= kEnoughWarps * multiprocessors);
}

bool covers_squeeze_excitation(const SqueezeExcitationParams& p) {
  // Elements of a sample, with those of a step past its end, weights and parts are counted in 32
  // bits.
  constexpr int64_t kLimit = std::numeric_limits<int32_t>::max() / 2;
  return p.dtype != DataType::kFloat64 && p.hidden <= kMostHidden &&
         int64_t{p.channels} * p.pixels <= kLimit && int64_t{p.channels} * p.hidden <= kLimit;
}

ExcitationCut cut_squeeze_excitation(const SqueezeExcitationParams& p, int multiprocessors) {
  const int bytes = bytes_of(p.dtype), wide = kAccessBytes / bytes;
  const bool channels_last = p.layout == Layout::kChannelsLast;
  ExcitationCut cut{};
  cut.wide = reads_vectors(p);
  const int vector = cut.wide ? wide : 1;
  int step = 0;  // pixels that a block reads at a time
  if (channels_last) {
    // 128 bytes of a pixel: whole cache lines, and slices as equal as vectors allow.
    const int64_t slices = ceil_div(p.channels, 128 / bytes);
    cut.slice = static_cast<int32_t>(ceil_div(ceil_div(p.channels, slices), vector) * vector);
    cut.lanes = 1;
    step = Tile::kThreads / (cut.slice / vector) * Tile::kUnroll;
  } else {
    // A warp per plane, or less where the planes are small: then a block has more of them.
    constexpr int kSmallPlane = 256;
    cut.lanes = p.pixels <= kSmallPlane ? 8 : 32;
    cut.slice = std::min(Tile::kThreads / cut.lanes, p.channels);
    step = cut.lanes * vector * Tile::kUnroll;
  }
  cut.slices = static_cast<int32_t>(ceil_div(p.channels, cut.slice));
  cut.wide_weights = aligned(p.reduce_weight) && p.channels % wide == 0 && cut.slice % wide == 0;

  const int64_t enough = kBlocks * multiprocessors, whole = int64_t{p.batch} * cut.slices;
  const int64_t chunks = std::clamp<int64_t>(
      ceil_div(enough, whole), 1, std::min<int64_t>(kMostChunks, ceil_div(p.pixels, step)));
  cut.chunk = static_cast<int32_t>(ceil_div(ceil_div(p.pixels, chunks), vector) * vector);
  cut.chunks = static_cast<int32_t>(ceil_div(p.pixels, cut.chunk));

  const int64_t block_bytes = int64_t{cut.slice} * cut.chunk * bytes;
  const int64_t spare = whole * cut.chunks / enough;
  const int64_t samples =
      std::clamp<int64_t>(spare, 1, std::max<int64_t>(1, kBlockBytes / block_bytes));
  cut.samples = static_cast<int32_t>(std::max(samples, ceil_div(p.batch, kMostGridY)));
  return cut;
}

}  // namespace dwswap
