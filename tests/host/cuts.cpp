// Prints the cuts that the launch choice makes, for tests without a GPU. Reads lines of
//   family batch channels in_h in_w kernel_h kernel_w stride element_bytes
//   multiprocessors shared_per_multiprocessor shared_per_block
// with padding kernel / 2, and prints a line for each, with the microseconds that the search took.
// batch_norm takes channels_last for stride 1.
// squeeze_excitation takes kernel_h for its hidden units, and channels_last for stride 1.
// separable_conv2d takes kernel_w for its outputs, and multiprocessors and
// shared_per_multiprocessor for the pixels of a block and the slices.
#include <chrono>
#include <cstdio>
#include <ctime>
#include <iostream>
#include <string>

#include "batch_norm/cut.h"
#include "channel_scale/cut.h"
#include "depthwise_conv2d/backward/column_sums_cut.h"
#include "depthwise_conv2d/backward/diagonal_sums_cut.h"
#include "depthwise_conv2d/backward/gram_sums_cut.h"
#include "depthwise_conv2d/channel_columns_cut.h"
#include "depthwise_conv2d/channel_direct_cut.h"
#include "depthwise_conv2d/channel_tiles_cut.h"
#include "depthwise_conv2d/diagonal_cut.h"
#include "depthwise_conv2d/plane_bands_cut.h"
#include "depthwise_conv2d/plane_strips_cut.h"
#include "depthwise_conv2d/rolling_rows_cut.h"
#include "depthwise_conv2d/toeplitz_cut.h"
#include "separable_conv2d/cut.h"
#include "squeeze_excitation/params.h"
#include "stem_conv2d/cut.h"

// Of this process: what else the machine does while a search runs does not count.
struct Clock {
  static std::chrono::duration<double, std::micro> now() {
    return std::chrono::duration<double>(static_cast<double>(std::clock()) / CLOCKS_PER_SEC);
  }
};

int main() {
  using namespace dwswap;
  std::string family;
  DepthwiseConv2dParams p{};
  int element_bytes = 0;
  Device device;
  while (std::cin >> family >> p.batch >> p.channels >> p.in_h >> p.in_w >> p.kernel_h >>
         p.kernel_w >> p.stride_h >> element_bytes >> device.multiprocessors >>
         device.shared_per_multiprocessor >> device.shared_per_block) {
    p.multiplier = p.dilation_h = p.dilation_w = 1;
    p.stride_w = p.stride_h;
    p.padding_h = p.kernel_h / 2, p.padding_w = p.kernel_w / 2;
    p.out_h = (p.in_h + 2 * p.padding_h - p.kernel_h) / p.stride_h + 1;
    p.out_w = (p.in_w + 2 * p.padding_w - p.kernel_w) / p.stride_w + 1;
    const auto start = Clock::now();
    if (family == "plane_strips") {
      const auto cut = plane_strips::choose_cut(p, element_bytes, device);
      const std::chrono::duration<double, std::micro> took = Clock::now() - start;
      std::printf("%d %d %d %d %d %d %d %d %lld %lld %lld %d %.0f\n", cut.columns, cut.holds,
                  cut.planes, cut.rows, cut.lanes, cut.groups, cut.stages, cut.buffers,
                  static_cast<long long>(cut.in_bytes), static_cast<long long>(cut.out_bytes),
                  static_cast<long long>(cut.shared_bytes()),
                  static_cast<int>(plane_strips::order_of(p, cut)), took.count());
    } else if (family == "rolling_rows") {
      const auto cut = rolling_rows::cut_of(p, element_bytes, device.multiprocessors);
      const std::chrono::duration<double, std::micro> took = Clock::now() - start;
      std::printf("%d %d %.0f\n", cut.rows, cut.columns, took.count());
    } else if (family == "toeplitz") {
      p.in_layout = p.out_layout = element_bytes == 2 ? Layout::kChannelsLast : Layout::kContiguous;
      const auto cut = toeplitz::choose_cut(p, device);
      const std::chrono::duration<double, std::micro> took = Clock::now() - start;
      const auto stride = static_cast<int>(p.stride_w);
      const long long shared = cut.rows == 0 ? 0 : cut.shared_bytes(stride, p.kernel_h);
      std::printf("%d %d %d %d %d %d %d %lld %.0f\n", cut.steps, cut.tiles, cut.channels,
                  cut.images, cut.rows, cut.in_rows, cut.threads, shared, took.count());
    } else if (family == "plane_bands") {
      const auto cut = plane_bands::choose_cut(p, device);
      const std::chrono::duration<double, std::micro> took = Clock::now() - start;
      std::printf("%d %d %d %d %d %d %d %d %d %.0f\n", cut.images, cut.segments, cut.planes,
                  cut.rows, cut.segment_rows, cut.warps, cut.in_pitch, cut.out_pitch,
                  cut.rows == 0 ? 0 : cut.shared_bytes(), took.count());
    } else if (family == "channel_tiles") {
      const int64_t pixel = p.channels * element_bytes;
      const int vector = pixel % 16 == 0 ? 16 : pixel % 8 == 0 ? 8 : 4;
      const channel_tiles::Reader reader{vector == 16, vector};
      const auto depth = channel_tiles::choose_depth(p, device.multiprocessors);
      const int rows = depth == channel_tiles::Depth::kFlat ? 1 : p.kernel_h == 7 ? 2 : 4;
      const auto tile = channel_tiles::choose_tile(p, reader, channel_tiles::kColumns, rows,
                                                   element_bytes, device.multiprocessors);
      const std::chrono::duration<double, std::micro> took = Clock::now() - start;
      std::printf("%d %d %d %d %.0f\n", tile.pairs, tile.groups_w, tile.groups_h, rows,
                  took.count());
    } else if (family == "squeeze_excitation") {
      SqueezeExcitationParams q{};
      q.batch = static_cast<int32_t>(p.batch), q.channels = static_cast<int32_t>(p.channels);
      q.pixels = static_cast<int32_t>(p.in_h * p.in_w), q.hidden = static_cast<int32_t>(p.kernel_h);
      q.dtype = element_bytes == 4 ? DataType::kFloat32 : DataType::kFloat16;
      q.layout = p.stride_h == 1 ? Layout::kChannelsLast : Layout::kContiguous;
      const auto cut = cut_squeeze_excitation(q, device.multiprocessors);
      std::printf("%d %d %d %d %d %d %d %d %d %d\n", covers_squeeze_excitation(q), cut.slice,
                  cut.slices, cut.chunk, cut.chunks, cut.samples, cut.lanes, cut.wide,
                  cut.wide_weights, prefers_products(q, device.multiprocessors));
    } else if (family == "separable_conv2d") {
      SeparableConv2dParams q{};
      q.outputs = p.kernel_w, q.pixels = device.multiprocessors;
      q.slices = device.shared_per_multiprocessor;
      p.padding_w = p.kernel_h / 2;
      p.out_w = (p.in_w + 2 * p.padding_w - p.kernel_h) / p.stride_w + 1;
      q.depthwise = p;
      const auto cut = separable::cut_of(q);
      std::printf("%lld %d %d %d %d %lld\n", static_cast<long long>(cut.tiles), cut.slices,
                  cut.channels, cut.padded(), cut.pitch(),
                  static_cast<long long>(cut.bytes(q.outputs, p.kernel_h * p.kernel_h)));
    } else if (family == "batch_norm") {
      BatchNormParams q{};
      q.batch = static_cast<int32_t>(p.batch), q.channels = static_cast<int32_t>(p.channels);
      q.pixels = static_cast<int32_t>(p.in_h * p.in_w);
      q.dtype = element_bytes == 4 ? DataType::kFloat32 : DataType::kFloat16;
      q.layout = p.stride_h == 1 ? Layout::kChannelsLast : Layout::kContiguous;
      const auto cut = batch_norm::choose_cut(q, device.multiprocessors);
      const std::chrono::duration<double, std::micro> took = Clock::now() - start;
      std::printf("%d %d %lld %d %d %d %d %d %lld %.0f\n", cut.matrix, cut.vector,
                  static_cast<long long>(cut.columns), cut.columns_of_channel, cut.lanes, cut.rows,
                  cut.chunks, cut.splits, static_cast<long long>(cut.positions), took.count());
    } else if (family == "channel_scale") {
      ChannelScaleParams q{};
      q.batch = static_cast<int32_t>(p.batch), q.channels = static_cast<int32_t>(p.channels);
      q.pixels = static_cast<int32_t>(p.in_h * p.in_w);
      q.dtype = element_bytes == 4 ? DataType::kFloat32 : DataType::kFloat16;
      q.layout = p.stride_h == 1 ? Layout::kChannelsLast : Layout::kContiguous;
      const auto cut = p.kernel_h == 1 ? channel_scale::scale_cut(q, device.multiprocessors)
                                       : channel_scale::sums_cut(q, device.multiprocessors);
      const std::chrono::duration<double, std::micro> took = Clock::now() - start;
      std::printf("%d %d %d %d %d %d %d %d %lld %.0f\n", cut.vector, cut.lanes, cut.rows,
                  cut.groups, cut.chunks, cut.splits, cut.positions, cut.span,
                  static_cast<long long>(cut.units), took.count());
    } else if (family == "column_sums") {
      GradientParams q{};
      static_cast<DepthwiseConv2dParams&>(q) = p;
      const auto cut = column_sums::choose_cut(q, element_bytes, device);
      const std::chrono::duration<double, std::micro> took = Clock::now() - start;
      std::printf("%d %d %d %d %d %d %d %d %d %.0f\n", cut.pairs, cut.groups, cut.images, cut.slots,
                  cut.rows, cut.shares, cut.input_columns(), cut.threads(), cut.shared_bytes(),
                  took.count());
    } else if (family == "diagonal_sums") {
      GradientParams q{};
      static_cast<DepthwiseConv2dParams&>(q) = p;
      const auto cut = diagonal_sums::choose_cut(q, device);
      const std::chrono::duration<double, std::micro> took = Clock::now() - start;
      std::printf("%d %d %d %d %d %d %d %d %d %d %lld %lld %lld %.0f\n", cut.groups, cut.teams,
                  cut.box_groups(), cut.swizzle(), cut.columns, cut.images, cut.stage_rows,
                  cut.input_columns(), cut.threads(), cut.shared_bytes(),
                  static_cast<long long>(cut.split.rows), static_cast<long long>(cut.split.share),
                  static_cast<long long>(cut.split.shares), took.count());
    } else if (family == "diagonal") {
      const auto cut = diagonal::choose_cut(p, device);
      const std::chrono::duration<double, std::micro> took = Clock::now() - start;
      const auto kernel = static_cast<int>(p.kernel_h), stride = static_cast<int>(p.stride_h);
      std::printf("%d %d %d %d %d %d %d %d %d %d %.0f\n", cut.teams, cut.columns, cut.images,
                  cut.rows, cut.stages, cut.units, cut.chunks, cut.parts,
                  diagonal::tile_columns(cut.columns, kernel, stride),
                  cut.shared_bytes(kernel, stride), took.count());
    } else if (family == "gram_sums") {
      GradientParams q{};
      static_cast<DepthwiseConv2dParams&>(q) = p;
      const auto cut = gram_sums::choose_cut(q, device);
      const std::chrono::duration<double, std::micro> took = Clock::now() - start;
      std::printf("%d %d %d %d %lld %lld", cut.images, cut.strips, cut.rows, cut.together,
                  static_cast<long long>(cut.input_bytes), static_cast<long long>(cut.grad_bytes));
      for (const auto& rows : {cut.input, cut.grad})
        std::printf(" %d %d %d %d %d %d", rows.count, rows.piece, rows.is_aligned, rows.lead,
                    rows.pitch, rows.image_bytes);
      std::printf(" %lld %d %d %.0f\n",
                  static_cast<long long>(cut.slots == 0 ? 0 : cut.shared_bytes()), cut.slots,
                  cut.shares, took.count());
    } else if (family == "stem_conv2d") {
      StemConv2dParams q{};
      q.batch = p.batch, q.channels = p.channels, q.height = p.in_h, q.width = p.in_w;
      const auto cut = stem::choose_cut(q, device.multiprocessors);
      std::printf("%d %d %lld %lld %lld\n", cut.rows, cut.tiles, static_cast<long long>(cut.groups),
                  static_cast<long long>(cut.pieces), static_cast<long long>(cut.units));
    } else if (family == "channel_direct") {
      const auto cut = channel_direct::choose_cut(p, element_bytes, device.multiprocessors);
      const std::chrono::duration<double, std::micro> took = Clock::now() - start;
      std::printf("%d %d %d %lld %.0f\n", cut.channels, cut.columns, cut.rows,
                  static_cast<long long>(cut.threads(p)), took.count());
    } else {
      const auto cut = channel_columns::choose_cut(p, element_bytes, device.multiprocessors);
      const std::chrono::duration<double, std::micro> took = Clock::now() - start;
      std::printf("%d %d %d %d %d %.0f\n", cut.columns, cut.pairs, cut.groups, cut.rows, cut.stages,
                  took.count());
    }
  }
}
