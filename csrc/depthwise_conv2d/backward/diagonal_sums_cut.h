// How diagonal_sums cuts a problem into threads, stages and blocks.
#pragma once

#include "common/device.h"
#include "common/integer.h"
#include "depthwise_conv2d/backward/split.h"
#include "depthwise_conv2d/backward/sums.h"

namespace dwswap {
namespace diagonal_sums {

constexpr int kGroup = 8;  // channels of one product: those of a warp
constexpr int kGroupBytes = 2 * kGroup;
constexpr int kBoxGroups = 8;                // of a copied pixel, where there are more: 128 bytes
constexpr int kProducts = 2;                 // side by side, of a warp: they share the sums
constexpr int kTeamPixels = 16 * kProducts;  // of a row of grad_output
constexpr int kSlots = 3;                    // stages in shared memory
constexpr int kAlignment = 1024;             // of a stage, in bytes: a swizzle's period
constexpr int kMostStageRows = 4;
constexpr int kZerosBytes = 16;
// Behind the stages: what stands for pixels that are not there, and a barrier per slot.
constexpr int kTailBytes = kZerosBytes + kSlots * static_cast<int>(sizeof(uint64_t));

// Warps of a block at most: the sums of a thread take its registers.
constexpr int most_warps(int kernel) { return kernel == 5 ? 16 : 12; }
constexpr int kRegisters = 65536;  // of a multiprocessor
constexpr int registers(int kernel) { return kernel == 5 ? 128 : 168; }
// Rows of grad_output that a row of input is seen from.
constexpr int seen_rows(int kernel, int stride) { return (kernel - 1) / stride + 1; }

constexpr int align(int bytes) {
  return static_cast<int>(ceil_div(bytes, kAlignment) * kAlignment);
}

// A stage: rows of grad_output, of so many columns of so many images, and what they see of the
// input.
struct Cut {
  int kernel, stride;
  int groups, teams;  // of 8 channels; of warps that have all of them
  int columns, images, stage_rows;
  Split split;

  // Pixels of 32, 64 and 128 bytes are copied with a swizzle, so that the same channels of
  // neighbouring pixels lie in different banks; so they do where a pixel has an odd number of
  // groups. The bits of an address, shifted by 3, that are added to those of its 16-byte piece.
  uint32_t swizzle() const {
    return groups % 2 == 1 ? 0 : static_cast<uint32_t>(box_groups() - 1) * kGroupBytes;
  }
  int boxes() const { return groups / box_groups(); }
  int box_groups() const { return groups % kBoxGroups == 0 ? kBoxGroups : groups; }
  int pixel_bytes() const { return box_groups() * kGroupBytes; }
  // Of a plane: with stride 2 there are two, of even and of odd columns.
  int input_columns() const { return columns + (stride == 1 ? kernel - 1 : kernel / 2); }
  int plane_bytes() const {
    return align(images * stage_rows * stride * input_columns() * pixel_bytes());
  }
  int part_bytes() const {
    return stride * plane_bytes() + align(images * stage_rows * columns * pixel_bytes());
  }
  int stage_bytes() const { return boxes() * part_bytes(); }
  int threads() const { return 32 * groups * teams; }
  int shared_bytes() const {
    const int stages = kSlots * stage_bytes() + kTailBytes;
    const int sums = teams * (kernel * kernel + 1) * groups * kGroup * 4;
    return stages > sums ? stages : sums;
  }
};

Cut choose_cut(const GradientParams& params, const Device& device);

// Compiled by a file per element type.
template <typename T>
cudaError_t launch_typed(const GradientParams& params, const Device& device, cudaStream_t stream);

}  // namespace diagonal_sums
}  // namespace dwswap
