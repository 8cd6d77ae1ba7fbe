#include <cstdlib>
#include <limits>

#include "common/integer.h"
#include "depthwise_conv2d/dispatch.h"
#include "depthwise_conv2d/plane_strips.cuh"

namespace dwswap {

namespace plane_strips {

bool fits(const DepthwiseConv2dParams& p, int columns, int rows, const Strip& strip) {
  const int64_t out_rows = std::min<int64_t>(strip.groups_h * rows, p.out_h);
  const int64_t in_rows = input_rows(p, strip.planes, out_rows);
  return strip.threads() <= kMaxThreads &&
         shared_bytes(strip.planes * std::max(in_rows * p.in_w, out_rows * p.out_w)) <= kMaxShared;
}

Strip choose_strip(const DepthwiseConv2dParams& p, int columns, int rows) {
  constexpr int kThreads = 128;  // per block, about
  const auto groups_w = static_cast<int>(ceil_div(p.out_w, columns));
  const auto high = static_cast<int>(ceil_div(p.out_h, rows));
  Strip best{};
  double best_cost = std::numeric_limits<double>::infinity();
  const auto consider = [&](int planes, int groups_h) {
    const Strip strip{planes, groups_h, groups_w};
    if (!fits(p, columns, rows, strip)) return;
    const double blocks =
        static_cast<double>(ceil_div(p.channels, planes)) * ceil_div(high, groups_h);
    // Threads that are launched over threads with work.
    const double idle = blocks * ceil_div(strip.threads(), 32) * 32 /
                        (static_cast<double>(p.channels) * high * groups_w);
    const double out_rows = std::min<double>(groups_h * rows, p.out_h);
    const auto in_rows = static_cast<double>(input_rows(p, planes, static_cast<int64_t>(out_rows)));
    const double halo = in_rows / std::min<double>(out_rows * p.stride_h, p.in_h);
    const double size = 1.0 + std::abs(strip.threads() - kThreads) / 640.0;
    const double cost = idle * (0.5 + 0.5 * halo) * size;
    if (cost < best_cost) {
      best_cost = cost;
      best = strip;
    }
  };
  for (int groups_h = 1; groups_h <= high && groups_h * groups_w <= kMaxThreads; ++groups_h) {
    consider(1, groups_h);
  }
  for (int planes = 2; planes <= p.channels && planes * high * groups_w <= kMaxThreads; ++planes) {
    consider(planes, high);
  }
  return best;
}

Depth choose_depth(const DepthwiseConv2dParams& p) {
  // Threads of the deep kernel that keep a GPU of about 100 multiprocessors busy.
  constexpr int64_t kEnough = 100 * 256;
  constexpr int64_t kOutputs = 7 * 7;
  return p.batch * p.out_channels() * p.out_h * p.out_w / kOutputs < kEnough ? Depth::kFlat
                                                                             : Depth::kDeep;
}

}  // namespace plane_strips

bool covers_plane_strips(const DepthwiseConv2dParams& p) {
  constexpr int64_t kLimit = std::numeric_limits<int32_t>::max();
  if (p.dtype == DataType::kFloat64 || p.multiplier != 1) return false;
  if (p.in_layout != Layout::kContiguous || p.out_layout != Layout::kContiguous) return false;
  if (p.stride_h != p.stride_w || p.dilation_h != 1 || p.dilation_w != 1) return false;
  if (reinterpret_cast<uintptr_t>(p.input) % kVectorBytes != 0) return false;
  if (p.channels * p.in_h * p.in_w > kLimit || p.channels * p.out_h * p.out_w > kLimit)
    return false;
  if (p.batch * p.channels * p.out_h > kLimit) return false;
  bool covered = false;
  plane_strips::visit<float>(p, plane_strips::choose_depth(p), [&]<typename Traits>() {
    constexpr int kColumns = Traits::kColumns;
    const plane_strips::Strip least{1, 1, static_cast<int>(ceil_div(p.out_w, kColumns))};
    covered = p.out_w >= kColumns && p.padding_w <= Traits::kMaxPaddingW && p.padding_h <= p.in_h &&
              plane_strips::fits(p, kColumns, Traits::kRows, least);
  });
  return covered;
}

cudaError_t launch_plane_strips(const DepthwiseConv2dParams& params, cudaStream_t stream) {
  return visit_fast_type(
      params.dtype, [&]<typename T>() { return plane_strips::launch_typed<T>(params, stream); });
}

}  // namespace dwswap
