// What the cache reads where blocks have some channels of each pixel (channels_last).
#pragma once

#include <algorithm>
#include <cstdint>

#include "common/integer.h"

namespace dwswap {

// Of bytes that blocks want, those that are read where sectors of 64 bytes are, and where lines of
// 128 are: pixels, and their pieces, need not begin where what is read does.
struct CacheReads {
  double sectors, lines;
};

// Bytes of a pixel, a multiple of 16, and of a block's piece of it.
inline CacheReads cache_reads(int64_t pixel, int64_t piece) {
  constexpr int64_t kPixels = 8;  // a period of 128 bytes
  const auto read = [&](int64_t at_once) {
    int64_t reads = 0;
    for (int64_t begin = 0; begin < kPixels * pixel; begin += pixel) {
      for (int64_t from = begin; from < begin + pixel; from += piece) {
        const int64_t to = std::min(from + piece, begin + pixel);
        reads += ceil_div(to, at_once) - from / at_once;
      }
    }
    return static_cast<double>(reads * at_once) / static_cast<double>(kPixels * pixel);
  };
  return {read(64), read(128)};
}

}  // namespace dwswap
