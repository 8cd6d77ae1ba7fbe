// Descriptions of images for the copy engine.
#pragma once

#include <cuda.h>
#include <cudaTypedefs.h>
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include "common/device.h"
#include "depthwise_conv2d/params.h"

namespace dwswap {

// cuTensorMapEncodeTiled, found through the runtime, so that nothing links libcuda. Null where the
// driver lacks it.
inline PFN_cuTensorMapEncodeTiled_v12000 tensor_map_encoder() {
  static const auto encoder = [] {
    void* function = nullptr;
    cudaDriverEntryPointQueryResult found = cudaDriverEntryPointSymbolNotFound;
    const cudaError_t status = cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &function,
                                                                12000, cudaEnableDefault, &found);
    const bool usable = status == cudaSuccess && found == cudaDriverEntryPointSuccess;
    return reinterpret_cast<PFN_cuTensorMapEncodeTiled_v12000>(usable ? function : nullptr);
  }();
  return encoder;
}

template <typename T>
constexpr CUtensorMapDataType kTensorMapType = CU_TENSOR_MAP_DATA_TYPE_FLOAT32;
template <>
inline constexpr CUtensorMapDataType kTensorMapType<__half> = CU_TENSOR_MAP_DATA_TYPE_FLOAT16;
template <>
inline constexpr CUtensorMapDataType kTensorMapType<__nv_bfloat16> =
    CU_TENSOR_MAP_DATA_TYPE_BFLOAT16;

constexpr int kMostBoxElements = 256;  // of a box, along any axis

inline bool reads_boxes(const Device& device) {
  return uses_bulk_copies(device) && tensor_map_encoder() != nullptr;
}

// Whether the copy engine can read the channels_last input and the weights: it wants addresses and
// pitches of 16 bytes.
inline bool readable_in_boxes(const DepthwiseConv2dParams& p, int element_bytes) {
  const auto pixel_bytes = static_cast<uint64_t>(p.channels) * element_bytes;
  const uint64_t alignment =
      reinterpret_cast<uintptr_t>(p.input) | reinterpret_cast<uintptr_t>(p.weight) | pixel_bytes;
  return alignment % 16 == 0;
}

// What one copy brings, and whether 16-byte pieces change places so that the same channels of
// neighbouring pixels lie in different banks. Swizzled, a box has 16, 32 or 64 halves of channels.
// Of columns and rows it may bring one in so many.
struct Box {
  int channels, columns, rows, images;
  bool swizzled = false;
  int column_step = 1, row_step = 1;
  // Bytes that the cache reads where one is missing.
  CUtensorMapL2promotion promotion = CU_TENSOR_MAP_L2_PROMOTION_L2_256B;

  static constexpr int extent(int count, int step) { return (count - 1) * step + 1; }
};

// Of a channels_last tensor, every `step`-th column from `first` on, as boxes. False: it was
// refused.
template <typename T>
bool encode_columns(CUtensorMap* map, const void* pixels, int64_t batch, int64_t height,
                    int64_t width, int64_t channels, int64_t first, int64_t step, const Box& box) {
  const cuuint64_t sizes[4] = {static_cast<cuuint64_t>(channels),
                               static_cast<cuuint64_t>((width - first + step - 1) / step),
                               static_cast<cuuint64_t>(height), static_cast<cuuint64_t>(batch)};
  const cuuint64_t pixel = sizes[0] * sizeof(T), row = static_cast<cuuint64_t>(width) * pixel;
  const cuuint64_t pitches[3] = {static_cast<cuuint64_t>(step) * pixel, row, row * sizes[2]};
  const cuuint32_t extents[4] = {static_cast<cuuint32_t>(box.channels),
                                 static_cast<cuuint32_t>(Box::extent(box.columns, box.column_step)),
                                 static_cast<cuuint32_t>(Box::extent(box.rows, box.row_step)),
                                 static_cast<cuuint32_t>(box.images)};
  const cuuint32_t steps[4] = {1, static_cast<cuuint32_t>(box.column_step),
                               static_cast<cuuint32_t>(box.row_step), 1};
  const size_t bytes = box.channels * sizeof(T);
  const auto swizzle = !box.swizzled ? CU_TENSOR_MAP_SWIZZLE_NONE
                       : bytes == 32 ? CU_TENSOR_MAP_SWIZZLE_32B
                       : bytes == 64 ? CU_TENSOR_MAP_SWIZZLE_64B
                                     : CU_TENSOR_MAP_SWIZZLE_128B;
  auto* const start =
      const_cast<T*>(static_cast<const T*>(pixels)) + static_cast<int64_t>(first) * channels;
  return tensor_map_encoder()(map, kTensorMapType<T>, 4, start, sizes, pitches, extents, steps,
                              CU_TENSOR_MAP_INTERLEAVE_NONE, swizzle, box.promotion,
                              CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE) == CUDA_SUCCESS;
}

// All of its columns.
template <typename T>
bool encode_pixels(CUtensorMap* map, const void* pixels, int64_t batch, int64_t height,
                   int64_t width, int64_t channels, const Box& box) {
  return encode_columns<T>(map, pixels, batch, height, width, channels, 0, 1, box);
}

template <typename T>
bool encode_input(CUtensorMap* map, const DepthwiseConv2dParams& p, const Box& box) {
  return encode_pixels<T>(map, p.input, p.batch, p.in_h, p.in_w, p.channels, box);
}

template <typename T>
bool encode_output(CUtensorMap* map, const DepthwiseConv2dParams& p, const Box& box) {
  return encode_pixels<T>(map, p.output, p.batch, p.out_h, p.out_w, p.channels, box);
}

}  // namespace dwswap
