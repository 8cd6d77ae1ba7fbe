// Integer arithmetic of the host code.
#pragma once

#include <cstdint>

namespace dwswap {

constexpr int64_t ceil_div(int64_t value, int64_t divisor) {
  return (value + divisor - 1) / divisor;
}

}  // namespace dwswap
