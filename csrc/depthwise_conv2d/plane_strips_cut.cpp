#include "depthwise_conv2d/plane_strips_cut.h"

#include <algorithm>
#include <array>
#include <cmath>
#include <limits>
#include <utility>

#include "common/memo.h"
#include "depthwise_conv2d/problem_key.h"

namespace dwswap {
namespace plane_strips {

namespace {

// How many accesses to shared memory one access of a warp becomes: lanes that want different words
// of one bank wait for each other.
int bank_conflicts(const DepthwiseConv2dParams& p, const Cut& cut, int element_bytes) {
  constexpr int kBanks = 32, kBankBytes = 4, kLanes = 32;
  const auto stride = static_cast<int>(p.stride_h);
  const int columns = cut.wide ? kWideColumns : 1, rows = ceil_div(cut.rows, cut.groups);
  const int64_t plane_bytes = cut.in_bytes / cut.planes;
  std::array<std::array<int64_t, kLanes>, kBanks> words;
  std::array<int, kBanks> count{};
  int most = 1;
  for (int t = 0; t < kLanes; ++t) {
    const int lane = t % cut.lanes, group = t / cut.lanes % cut.groups;
    const int plane = t / cut.lanes / cut.groups;
    const int64_t element = (int64_t{group} * rows * p.in_w + lane * columns) * stride;
    const int64_t word = (plane * plane_bytes + element * element_bytes) / kBankBytes;
    auto& others = words[word % kBanks];
    int& n = count[word % kBanks];
    if (std::find(others.begin(), others.begin() + n, word) == others.begin() + n) {
      others[n++] = word;
    }
    most = std::max(most, n);
  }
  return most;
}

// Time in clocks of a multiprocessor, up to a constant. Fitted to some 1500 measurements on an
// H200: within 12 % of those near the best one of their problem.
double estimate(const DepthwiseConv2dParams& p, const Cut& cut, int conflicts, int element_bytes,
                const Device& device) {
  constexpr double kUnitInstructions = 130.0;  // of a warp, around those that compute
  constexpr double kClocksPerInstruction = 1.55;
  constexpr double kInstructionsPerClock = 2.9;         // of all warps together
  constexpr double kLatency = 1600.0, kHidden = 450.0;  // of a copy, with one stage and with two
  constexpr double kWarpClocks = 270.0;                 // to wait for another warp of the block
  constexpr double kSharedClocks = 0.65;                // per access to shared memory
  constexpr double kBytesPerClock = 18.0;               // in a copy
  constexpr double kBlockBytes = 1024;                  // of shared memory, that every block takes
  constexpr double kRegisters = 64 * 1024;
  const int columns = cut.wide ? kWideColumns : 1;
  const auto kernel_h = static_cast<int>(p.kernel_h), kernel_w = static_cast<int>(p.kernel_w);
  const auto stride = static_cast<int>(p.stride_h);
  const int taps = kernel_h * kernel_w, open = ceil_div(kernel_h, stride);
  const int warps = ceil_div(cut.threads(), 32), rows = ceil_div(cut.rows, cut.groups);
  const int segments = static_cast<int>(ceil_div(p.out_w, int64_t{cut.lanes} * columns));

  // Loads, conversions (of half precision) and multiply-adds; the rows above the first one of a
  // thread contribute to fewer.
  const int convert = element_bytes == 2 ? 2 : 1;
  const int in_columns = (columns - 1) * stride + kernel_w;
  const double load = in_columns * convert + 4.0;
  const double instructions =
      kUnitInstructions +
      segments * ((rows + open - 1) * stride * load + (rows + 0.5 * (open - 1)) * columns * taps +
                  rows * (6.0 + columns * convert));

  const double registers = cut.wide ? (taps <= 9    ? 80
                                       : taps <= 25 ? 128
                                                    : 168)
                                    : (taps <= 9    ? 64
                                       : taps <= 25 ? 80
                                                    : 112);
  const double shared = static_cast<double>(cut.shared_bytes()) + kBlockBytes;
  const double resident =
      std::floor(std::min({32.0, device.shared_per_multiprocessor / shared,
                           kRegisters / (registers * 32 * warps), 64.0 / warps}));
  const double units =
      static_cast<double>(ceil_div(p.channels, cut.planes)) * p.batch * ceil_div(p.out_h, cut.rows);
  const double blocks = std::min(units, std::max(resident, 1.0) * device.multiprocessors);
  const double share = std::ceil(units / blocks);
  const double together = std::ceil(blocks / device.multiprocessors);

  const double chain = share * ((cut.stages == 1 ? kLatency : kHidden) + kWarpClocks * (warps - 1) +
                                instructions * kClocksPerInstruction);
  const double issue = share * together * warps * instructions / kInstructionsPerClock;
  const double memory = units * static_cast<double>(cut.in_bytes + cut.out_bytes) /
                        device.multiprocessors / kBytesPerClock;
  const double accesses = segments * ((rows + open - 1) * stride * in_columns + rows * columns) *
                          static_cast<double>(conflicts);
  const double banks = share * together * warps * accesses * kSharedClocks;
  return std::sqrt(chain * chain + issue * issue + banks * banks + memory * memory);
}

Cut search_cut(const DepthwiseConv2dParams& p, int element_bytes, const Device& device) {
  const auto stride = static_cast<int>(p.stride_h), out_h = static_cast<int>(p.out_h);
  const auto kernel_h = static_cast<int>(p.kernel_h);
  Cut best{};
  double best_estimate = std::numeric_limits<double>::infinity();
  const auto consider = [&](Cut cut) {
    const int64_t in_rows =
        cut.planes > 1 ? p.in_h : std::min(int64_t{cut.rows - 1} * stride + kernel_h, p.in_h);
    cut.in_bytes = cut.planes * in_rows * p.in_w * element_bytes;
    cut.out_bytes = int64_t{cut.planes} * cut.rows * p.out_w * element_bytes;
    if (std::max(cut.in_bytes, cut.out_bytes) > kStageBytes) return;
    const int conflicts = bank_conflicts(p, cut, element_bytes);
    constexpr int kCopies[][2] = {{1, 1}, {2, 1}, {2, 2}};
    for (const auto& [stages, buffers] : kCopies) {
      cut.stages = stages, cut.buffers = buffers;
      if (cut.shared_bytes() + kStaticBytes > device.shared_per_block) continue;
      const double time = estimate(p, cut, conflicts, element_bytes, device);
      if (time < best_estimate) best_estimate = time, best = cut;
    }
  };
  for (const bool wide : {true, false}) {
    if (wide && p.out_w < kWideColumns) continue;
    const int most_threads = max_threads(p.kernel_h, p.kernel_w, stride, wide);
    const auto all_lanes = static_cast<int>(ceil_div(p.out_w, wide ? kWideColumns : 1));
    const int lanes = ceil_div(all_lanes, ceil_div(all_lanes, most_threads));
    // Finer steps change little where there are many.
    for (int groups = 1; groups * lanes <= most_threads && groups <= out_h;
         groups += 1 + groups / 32) {
      for (int64_t strips = 1, last = 0; strips <= out_h; strips += 1 + strips / 64) {
        const auto rows = static_cast<int>(ceil_div(int64_t{out_h}, strips));
        if (rows < groups) break;
        if (rows != last) consider({wide, 1, rows, lanes, groups});
        last = rows;
      }
      if (groups == 1) consider({wide, 1, 1, lanes, 1});  // what fits if nothing else does
      for (int planes = 2; planes <= p.channels && planes * groups * lanes <= most_threads;
           ++planes) {
        consider({wide, planes, out_h, lanes, groups});
      }
    }
  }
  return best;
}

}  // namespace

Cut choose_cut(const DepthwiseConv2dParams& p, int element_bytes, const Device& device) {
  return memoized(std::pair(problem_key(p, device), element_bytes),
                  [&] { return search_cut(p, element_bytes, device); });
}

}  // namespace plane_strips
}  // namespace dwswap
