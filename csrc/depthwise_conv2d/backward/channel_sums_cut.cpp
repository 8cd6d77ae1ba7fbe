#include "depthwise_conv2d/backward/channel_sums_cut.h"

#include "common/alignment.h"
#include "common/integer.h"

namespace dwswap {
namespace channel_sums {
namespace {

constexpr int kSectorBytes = 32;

}  // namespace

Cut choose_cut(const GradientParams& p, int multiprocessors) {
  Cut cut{};
  const int element_bytes = bytes_of(p.dtype);
  const bool pairs =
      aligned_to(2 * element_bytes, p.channels * element_bytes, {p.grad_output, p.input});
  cut.channels = pairs ? most_channels(p.kernel_h, element_bytes) : 1;
  const int64_t vectors = p.channels / cut.channels;
  cut.slices = static_cast<int>(ceil_div(vectors, kMostVectors));
  cut.vectors = static_cast<int>(ceil_div(vectors, cut.slices));
  // Slices that begin within a sector of the cache would read it twice.
  const int sector = kSectorBytes / (cut.channels * element_bytes);
  if (vectors % sector == 0) cut.vectors = static_cast<int>(ceil_div(cut.vectors, sector)) * sector;
  cut.groups = kThreads / cut.vectors;
  Walks walks{};
  walks.columns = p.batch * p.dilation_h * p.dilation_w *
                  ceil_div(ceil_div(p.out_w, p.dilation_w), columns_of(p.kernel_h, p.stride_h));
  walks.height = ceil_div(p.out_h, p.dilation_h);
  walks.more_rows = (p.kernel_h - 1) / p.stride_h;
  walks.walkers = cut.groups;
  walks.blocks = cut.slices;
  walks.resident = resident_blocks(p.kernel_h, p.stride_h, cut.channels, element_bytes) *
                   int64_t{multiprocessors};
  walks.reduction = 2;
  walks.enough_blocks = element_bytes == 4 ? 60 : 40;
  cut.split = choose_split(walks);
  return cut;
}

}  // namespace channel_sums
}  // namespace dwswap
