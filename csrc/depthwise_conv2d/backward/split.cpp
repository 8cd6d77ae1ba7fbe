#include "depthwise_conv2d/backward/split.h"

#include <algorithm>
#include <array>
#include <cmath>
#include <limits>

#include "common/integer.h"
#include "common/memo.h"

namespace dwswap {

int64_t most_strips(const Walks& w) {
  constexpr int64_t kMostStrips = 16, kLeastRows = 4;
  return std::clamp<int64_t>(w.height / kLeastRows, 1, kMostStrips);
}

BestSplit search_shares(const Walks& w, int64_t strips) {
  constexpr int64_t kMostRounds = 16, kMostShares = 2048;
  constexpr double kStart = 3.0;  // of a walk, in rows: what it waits for first
  const double least_fill = static_cast<double>(w.enough_blocks) / 100.0;
  const int64_t rows = ceil_div(w.height, strips);
  const int64_t units = ceil_div(w.columns * ceil_div(w.height, rows), w.walkers);
  const int64_t least_rounds = ceil_div(units, kMostShares);
  BestSplit best{{}, std::numeric_limits<double>::infinity()};
  for (int64_t i = 0; i <= kMostRounds; ++i) {
    // The last one: a single share.
    const int64_t rounds = i == kMostRounds ? units : std::min(units, least_rounds + i);
    const int64_t shares = ceil_div(units, rounds);
    const double fill = static_cast<double>(shares * w.blocks) / static_cast<double>(w.resident);
    const double waves = fill < 1.0 ? std::max(fill, least_fill) : 0.5 * (fill + std::ceil(fill));
    const double walk = static_cast<double>(rows + w.more_rows) + kStart;
    const double time = waves * static_cast<double>(rounds) * walk +
                        (shares == 1 ? 0.0 : static_cast<double>(w.reduction));
    if (time < best.time) best = {{rows, rounds * w.walkers, shares}, time};
  }
  return best;
}

static Split search_split(const Walks& w) {
  BestSplit best = search_shares(w, 1);
  for (int64_t strips = 2; strips <= most_strips(w); ++strips) {
    const BestSplit other = search_shares(w, strips);
    if (other.time < best.time) best = other;
  }
  return best.split;
}

Split choose_split(const Walks& w) {
  const std::array<int64_t, 8> key{w.columns, w.height,   w.more_rows, w.walkers,
                                   w.blocks,  w.resident, w.reduction, w.enough_blocks};
  return memoized(key, [&] { return search_split(w); });
}

}  // namespace dwswap
