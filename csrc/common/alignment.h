// Where tensors begin.
#pragma once

#include <cstdint>
#include <initializer_list>

namespace dwswap {

// Whether every place, null or not, and every pixel of `pixel_bytes` is at a multiple of `step`.
inline bool aligned_to(uint64_t step, uint64_t pixel_bytes,
                       std::initializer_list<const void*> places) {
  uint64_t bits = pixel_bytes;
  for (const void* place : places) bits |= reinterpret_cast<uintptr_t>(place);
  return bits % step == 0;
}

}  // namespace dwswap
