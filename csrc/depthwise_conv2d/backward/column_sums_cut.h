// How column_sums cuts a problem into threads, stages and blocks.
#pragma once

#include "common/device.h"
#include "common/integer.h"
#include "depthwise_conv2d/backward/sums.h"

namespace dwswap {
namespace column_sums {

constexpr int kKernel = 3;
constexpr int kColumns = 4;  // of grad_output, per thread
constexpr int kMaxThreads = 256;
constexpr int kBlocks = 2;  // of so many threads, which the registers of a multiprocessor hold
constexpr int kMostSlots = 4;
constexpr int kAlignment = 128;  // of a box, in bytes
// Behind the stages: a barrier per slot.
constexpr int kBarrierBytes = kMostSlots * static_cast<int>(sizeof(uint64_t));

// Rows of grad_output that a row of input is seen from. A stage has as many, so that each keeps
// its registers from stage to stage.
constexpr int seen_rows(int stride) { return (kKernel - 1) / stride + 1; }

constexpr int align(int bytes) {
  return static_cast<int>(ceil_div(bytes, kAlignment) * kAlignment);
}

// A stage: rows of grad_output, of some channels of some columns of some images, and what they see
// of the input.
struct Cut {
  int stride, element_bytes;
  int pairs;           // of channels, per block
  int groups, images;  // threads of a pair: side by side in an image, and of how many images
  int slots;           // stages in shared memory
  int rows, shares;    // of grad_output, per strip; blocks that share the strips of all images

  int columns() const { return groups * kColumns; }
  int input_columns() const { return (columns() - 1) * stride + kKernel; }
  int pixel_bytes() const { return 2 * pairs * element_bytes; }
  int input_bytes() const {
    return images * seen_rows(stride) * stride * input_columns() * pixel_bytes();
  }
  int grad_bytes() const { return images * seen_rows(stride) * columns() * pixel_bytes(); }
  // Where grad_output begins in a stage.
  int grad_offset() const { return align(input_bytes()); }
  int stage_bytes() const { return grad_offset() + align(grad_bytes()); }
  int busy_threads() const { return pairs * groups * images; }
  int threads() const { return static_cast<int>(ceil_div(busy_threads(), 32)) * 32; }
  int shared_bytes() const {
    const int stages = slots * stage_bytes() + kBarrierBytes;
    const int sums = (kKernel * kKernel + 1) * 8 * busy_threads();
    return stages > sums ? stages : sums;
  }
};

Cut choose_cut(const GradientParams& params, int element_bytes, const Device& device);

// Compiled by a file per element type.
template <typename T>
cudaError_t launch_typed(const GradientParams& params, const Device& device, cudaStream_t stream);

}  // namespace column_sums
}  // namespace dwswap
