// Descriptions of images for the copy engine.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "common/device.h"
#include "common/tma.cuh"
#include "depthwise_conv2d/params.h"

namespace dwswap {

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

// The channels_last input as boxes of so many channels, columns and rows. False: it was refused.
template <typename T>
bool encode_image(CUtensorMap* map, const DepthwiseConv2dParams& p, int channels, int columns,
                  int rows) {
  const cuuint64_t sizes[4] = {static_cast<cuuint64_t>(p.channels), static_cast<cuuint64_t>(p.in_w),
                               static_cast<cuuint64_t>(p.in_h), static_cast<cuuint64_t>(p.batch)};
  const cuuint64_t pitches[3] = {sizes[0] * sizeof(T), sizes[0] * sizes[1] * sizeof(T),
                                 sizes[0] * sizes[1] * sizes[2] * sizeof(T)};
  const cuuint32_t box[4] = {static_cast<cuuint32_t>(channels), static_cast<cuuint32_t>(columns),
                             static_cast<cuuint32_t>(rows), 1};
  const cuuint32_t steps[4] = {1, 1, 1, 1};
  return tensor_map_encoder()(map, kTensorMapType<T>, 4, const_cast<void*>(p.input), sizes, pitches,
                              box, steps, CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_NONE,
                              CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
                              CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE) == CUDA_SUCCESS;
}

}  // namespace dwswap
