// How many rows of outputs a thread computes.
#pragma once

namespace dwswap {

// Many rows save loads; one row makes enough threads of a small problem.
enum class Depth { kDeep, kFlat };

}  // namespace dwswap
