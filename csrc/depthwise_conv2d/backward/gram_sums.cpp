#include <limits>

#include "common/alignment.h"
#include "depthwise_conv2d/backward/gram_sums_cut.h"

namespace dwswap {

bool covers_gram_sums(const GradientParams& p) {
  constexpr int64_t kLimit = std::numeric_limits<int32_t>::max() / 4;
  if (!is_half(p.dtype)) return false;
  if (p.channels_last() || !sums_squares(p) || p.multiplier != 1 || p.is_dilated()) return false;
  if (p.channels % gram_sums::kChannels != 0 || !uses_bulk_copies(current_device())) return false;
  if (!aligned_to(gram_sums::kCopyBytes, 0, {p.grad_output, p.input})) return false;
  // Units, and elements of 8 planes with padding, are counted in 32 bits.
  const int64_t plane = (p.in_h + 4 * p.kernel_h) * (p.in_w + 2 * p.padding_w + 4 * p.kernel_w);
  if (gram_sums::kChannels * plane > kLimit || p.batch * p.out_h > kLimit || p.channels > kLimit)
    return false;
  const gram_sums::Cut cut = gram_sums::choose_cut(p, current_device());
  return cut.slots > 0 && cut.shares * p.channels <= kLimit;
}

// Where plane_sums, whose work grows with the taps, took longer on an H200 (64 images). It has no
// tiles whose last columns are in vain, and a warp of this spreads rows of an odd number of columns
// in twice as many instructions.
bool suits_gram_sums(const GradientParams& p) {
  constexpr int64_t kWide = 32, kTile = gram_sums::kTile;
  if (p.kernel_w == 7 || (p.kernel_w == 5 && p.stride_w == 1)) return true;
  if (p.in_w > kWide) return false;
  if (p.kernel_w == 5) return true;
  const int64_t least_eighths = p.in_w % 2 != 0 || p.stride_w == 2 ? 7 : 6;
  const int64_t columns = ceil_div(p.out_w, kTile) * kTile;
  return p.out_w >= kTile && 8 * p.out_w >= least_eighths * columns;
}

int64_t gram_sums_workspace_bytes(const GradientParams& p) {
  return sums_bytes(p, gram_sums::choose_cut(p, current_device()).shares);
}

cudaError_t launch_gram_sums(const GradientParams& p, cudaStream_t stream) {
  const Device device = current_device();
  return visit_half_type(
      p.dtype, [&]<typename T>() { return gram_sums::launch_typed<T>(p, device, stream); });
}

}  // namespace dwswap
