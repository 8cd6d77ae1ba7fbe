// Runs one problem; called by tests/emulated_kernels.py.
#include <cstdio>
#include <cstdlib>
#include <cstring>

#include "depthwise_conv2d/diagonal_cut.h"
#include "depthwise_conv2d/params.h"
#include "depthwise_conv2d/plane_bands_cut.h"
#include "state.h"

extern "C" {

// The fields of Python's _Problem and _Result.
struct Problem {
  const void *input, *weight, *bias, *input_bias;
  void* output;
  int64_t batch, channels, in_h, in_w, out_h, out_w, kernel, stride, padding_h, padding_w;
  int64_t input_activation, activation, reversed_taps, dtype, is_diagonal;
  int64_t weight_offset, bias_offset;  // elements
  int64_t device, timing, rank, seed, executes;
};
struct Result {
  int64_t is_covered, status, errors, recomputed, unwritten, images;
  char kernel[600], messages[4000];
};

static void run(const Problem* q, Result* result) {
  using namespace emulator;
  *result = {};
  report = {};
  clear_tensors();
  recomputed = 0;
  device = static_cast<int>(q->device), timing = static_cast<Timing>(q->timing);
  executes = q->executes != 0;
  random_bits.seed(static_cast<uint32_t>(q->seed));

  dwswap::DepthwiseConv2dParams p{};
  p.batch = q->batch, p.channels = q->channels, p.multiplier = 1;
  p.in_h = q->in_h, p.in_w = q->in_w, p.out_h = q->out_h, p.out_w = q->out_w;
  p.kernel_h = p.kernel_w = q->kernel, p.stride_h = p.stride_w = q->stride;
  p.padding_h = q->padding_h, p.padding_w = q->padding_w, p.dilation_h = p.dilation_w = 1;
  p.input_activation = static_cast<dwswap::Activation>(q->input_activation);
  p.activation = static_cast<dwswap::Activation>(q->activation);
  p.reversed_taps = q->reversed_taps != 0, p.dtype = static_cast<dwswap::DataType>(q->dtype);
  p.in_layout = p.out_layout =
      q->is_diagonal != 0 ? dwswap::Layout::kChannelsLast : dwswap::Layout::kContiguous;
  const auto place = [](const char* name, const void* elements, int64_t count, int64_t offset = 0) {
    return elements == nullptr ? nullptr : place_tensor(name, elements, count, offset, false);
  };
  p.input = place("input", q->input, p.batch * p.channels * p.in_h * p.in_w);
  p.weight = place("weight", q->weight, p.channels * q->kernel * q->kernel, q->weight_offset);
  p.bias = place("bias", q->bias, p.channels, q->bias_offset);
  p.input_bias = place("input_bias", q->input_bias, p.channels, q->bias_offset);
  p.output = place_tensor("output", q->output, p.outputs(), 0, true);
  written.assign(p.outputs(), 0);

  result->is_covered = q->is_diagonal != 0 ? covers_diagonal(p) : covers_plane_bands(p);
  if (result->is_covered == 0) return;
  const dwswap::Device gpu = dwswap::current_device();
  result->images = q->is_diagonal != 0 ? dwswap::diagonal::choose_cut(p, gpu).images
                                       : dwswap::plane_bands::choose_cut(p, gpu).images;
  result->status =
      q->is_diagonal != 0 ? launch_diagonal(p, nullptr) : launch_plane_bands(p, nullptr);
  result->errors = report.errors, result->recomputed = recomputed;
  for (const uint8_t times : written) result->unwritten += times == 0;
  std::memcpy(q->output, p.output, p.outputs() * 2);
  std::snprintf(result->kernel, sizeof result->kernel, "%s", kernel_name.c_str());
  std::snprintf(result->messages, sizeof result->messages, "%s", report.messages.c_str());
}

void run_problem(const Problem* q, Result* result) {
  setenv("DWSWAP_CUT_RANK", std::to_string(q->rank).c_str(), 1);
  run(q, result);
  unsetenv("DWSWAP_CUT_RANK");
}
}
