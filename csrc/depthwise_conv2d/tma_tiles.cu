#include "depthwise_conv2d/tma_tiles.cuh"

#include <algorithm>
#include <limits>

namespace dwswap {
namespace {

// Attributes of the current device; asked once per device.
struct Device {
  int major = 0;
  int multiprocessors = 1;
};

Device current_device() {
  constexpr int kDevices = 64;
  static Device devices[kDevices];
  static bool known[kDevices];
  int index = 0;
  Device device;
  if (cudaGetDevice(&index) != cudaSuccess) return device;
  if (index < kDevices && known[index]) return devices[index];
  cudaDeviceGetAttribute(&device.major, cudaDevAttrComputeCapabilityMajor, index);
  cudaDeviceGetAttribute(&device.multiprocessors, cudaDevAttrMultiProcessorCount, index);
  if (index < kDevices) {
    devices[index] = device;
    known[index] = true;
  }
  return device;
}

int element_bytes(DataType type) {
  return type == DataType::kFloat32 ? 4 : 2;
}

}  // namespace

namespace tma_tiles {

Tile choose_tile(const DepthwiseConv2dParams& p, int kernel, int stride, int columns, int rows,
                 int element_bytes, int multiprocessors) {
  constexpr int kThreads = 128;        // per block, where the image is large enough
  constexpr int kTileBytes = 40960;    // several blocks per SM
  const int step = 16 / element_bytes / 2;  // a box is a multiple of 16 bytes wide
  const auto up = [](int64_t value, int64_t unit) { return (value + unit - 1) / unit; };
  const auto wide = static_cast<int>(up(p.out_w, columns));
  const auto high = static_cast<int>(up(p.out_h, rows));
  const auto all_pairs = static_cast<int>(p.channels / 2);
  Tile best{};
  double best_cost = std::numeric_limits<double>::infinity();
  for (int pairs = step; pairs <= std::min(64, all_pairs); pairs += step) {
    for (int groups_w = 1; groups_w <= std::min(wide, kMaxThreads / pairs); ++groups_w) {
      for (int groups_h = 1; groups_h <= std::min(high, kMaxThreads / (pairs * groups_w));
           ++groups_h) {
        const int tile_w = (groups_w * columns - 1) * stride + kernel;
        const int tile_h = (groups_h * rows - 1) * stride + kernel;
        if (tile_w > 256 || tile_h > 256) continue;
        if (2 * pairs * tile_w * tile_h * element_bytes > kTileBytes) continue;
        const int threads = pairs * groups_w * groups_h;
        const double tiles = static_cast<double>(up(all_pairs, pairs)) * up(wide, groups_w) *
                             up(high, groups_h);
        // Threads that are launched, idle ones included, over threads with work.
        const double idle = tiles * up(threads, 32) * 32 / (static_cast<double>(all_pairs) * wide * high);
        // Elements that are copied over elements of the image that the outputs advance by.
        const double halo = static_cast<double>(tile_w) * tile_h /
                            (static_cast<double>(groups_w * columns * stride) * (groups_h * rows * stride));
        // Short runs of channels make short memory transactions.
        const double runs = 1.0 + 16.0 / (2 * pairs * element_bytes);
        const double waves = tiles * p.batch / multiprocessors;
        const double size = 1.0 + std::abs(threads - kThreads) / 512.0;
        const double starved = waves < 2.0 ? 2.0 - waves / 2.0 : 1.0;
        const double cost = idle * (0.5 + 0.5 * halo * runs) * size * starved;
        if (cost < best_cost) {
          best_cost = cost;
          best = {pairs, groups_w, groups_h};
        }
      }
    }
  }
  return best;
}

}  // namespace tma_tiles

bool covers_tma_tiles(const DepthwiseConv2dParams& p) {
  constexpr int64_t kLimit = std::numeric_limits<int32_t>::max();
  if (p.dtype == DataType::kFloat64) return false;
  if (p.in_layout != Layout::kChannelsLast || p.out_layout != Layout::kChannelsLast) return false;
  if (p.multiplier != 1 || p.dilation_h != 1 || p.dilation_w != 1) return false;
  if (p.kernel_h != p.kernel_w || (p.kernel_h != 3 && p.kernel_h != 5 && p.kernel_h != 7)) return false;
  if (p.stride_h != p.stride_w || p.stride_h > 2) return false;
  // The copy engine wants 16-byte addresses and pitches; its coordinates are 32-bit.
  const int bytes = element_bytes(p.dtype);
  const auto addresses = reinterpret_cast<uintptr_t>(p.input) | reinterpret_cast<uintptr_t>(p.weight);
  if (p.channels * bytes % 16 != 0 || addresses % 16 != 0) return false;
  const auto pairs = reinterpret_cast<uintptr_t>(p.output) | reinterpret_cast<uintptr_t>(p.bias) |
                     reinterpret_cast<uintptr_t>(p.input_bias);
  if (pairs % (2 * bytes) != 0) return false;
  const int64_t blocks = p.batch * p.channels * p.out_h * p.out_w / 8;
  if (blocks > kLimit || p.channels > kLimit / 64) return false;
  if (p.in_h + 2 * p.padding_h > kLimit / 2 || p.in_w + 2 * p.padding_w > kLimit / 2) return false;
  return current_device().major >= 9 && tensor_map_encoder() != nullptr;
}

cudaError_t launch_tma_tiles(const DepthwiseConv2dParams& p, cudaStream_t stream) {
  const int multiprocessors = current_device().multiprocessors;
  switch (p.dtype) {
    case DataType::kFloat32:
      return tma_tiles::launch_typed<float>(p, CU_TENSOR_MAP_DATA_TYPE_FLOAT32, multiprocessors,
                                            stream);
    case DataType::kFloat16:
      return tma_tiles::launch_typed<__half>(p, CU_TENSOR_MAP_DATA_TYPE_FLOAT16, multiprocessors,
                                             stream);
    case DataType::kBFloat16:
      return tma_tiles::launch_typed<__nv_bfloat16>(p, CU_TENSOR_MAP_DATA_TYPE_BFLOAT16,
                                                    multiprocessors, stream);
    case DataType::kFloat64:
      break;
  }
  return cudaErrorInvalidValue;
}

}  // namespace dwswap
