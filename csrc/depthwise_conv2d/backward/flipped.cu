// Stride 1: the gradient of the input is the convolution of grad_output with the flipped weight,
//   grad_input[y] = sum_k grad_output[y + padding - dilation k] weight[k],
// whose padding is dilation (kernel - 1) - padding. Any forward family computes it; for those that
// do not reverse the taps themselves the weight is copied.
#include <cstdint>

#include "common/integer.h"
#include "depthwise_conv2d/backward/params.h"

namespace dwswap {
namespace {

constexpr int kThreads = 256;

int64_t element_bytes(DataType type) {
  switch (type) {
    case DataType::kFloat64:
      return 8;
    case DataType::kFloat32:
      return 4;
    case DataType::kFloat16:
    case DataType::kBFloat16:
      break;
  }
  return 2;
}

// Word: any type of the elements' size.
template <typename Word>
__global__ void __launch_bounds__(kThreads)
    flip_kernel(const Word* weight, Word* flipped, int64_t taps, int64_t elements) {
  const int64_t step = static_cast<int64_t>(gridDim.x) * kThreads;
  for (int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x; i < elements;
       i += step) {
    const int64_t tap = i % taps;
    flipped[i] = weight[i - tap + (taps - 1 - tap)];
  }
}

template <typename Word>
cudaError_t flip(const GradientParams& p, cudaStream_t stream) {
  constexpr int64_t kMostBlocks = 1 << 16;
  const int64_t elements = p.channels * p.taps();
  const int64_t blocks = ceil_div(elements, kThreads);
  const auto grid = static_cast<unsigned>(blocks < kMostBlocks ? blocks : kMostBlocks);
  flip_kernel<<<grid, kThreads, 0, stream>>>(static_cast<const Word*>(p.weight),
                                             static_cast<Word*>(p.workspace), p.taps(), elements);
  return cudaGetLastError();
}

}  // namespace

bool covers_flipped(const GradientParams& p) {
  return p.stride_h == 1 && p.stride_w == 1 && p.multiplier == 1 &&
         p.dilation_h * (p.kernel_h - 1) >= p.padding_h &&
         p.dilation_w * (p.kernel_w - 1) >= p.padding_w;
}

DepthwiseConv2dParams flipped_convolution(const GradientParams& p) {
  DepthwiseConv2dParams f = p;
  f.input = p.grad_output, f.weight = p.weight, f.output = p.grad_input;
  f.bias = f.input_bias = nullptr;
  f.in_h = p.out_h, f.in_w = p.out_w, f.in_stride = p.out_stride;
  f.out_h = p.in_h, f.out_w = p.in_w, f.out_stride = p.in_stride;
  f.padding_h = p.dilation_h * (p.kernel_h - 1) - p.padding_h;
  f.padding_w = p.dilation_w * (p.kernel_w - 1) - p.padding_w;
  f.input_activation = f.activation = Activation::kNone;
  f.reversed_taps = true;
  return f;
}

int64_t flipped_workspace_bytes(const GradientParams& p) {
  if (choose_forward(flipped_convolution(p)).reverses_taps) return 0;
  return p.channels * p.taps() * element_bytes(p.dtype);
}

cudaError_t launch_flipped(const GradientParams& p, cudaStream_t stream) {
  DepthwiseConv2dParams convolution = flipped_convolution(p);
  const Choice choice = choose_forward(convolution);
  if (choice.reverses_taps) return choice.launch(convolution, stream);
  const int64_t bytes = element_bytes(p.dtype);
  const cudaError_t status = bytes == 2   ? flip<uint16_t>(p, stream)
                             : bytes == 4 ? flip<uint32_t>(p, stream)
                                          : flip<uint64_t>(p, stream);
  if (status != cudaSuccess) return status;
  convolution.weight = p.workspace;
  return choice.launch(convolution, stream);
}

}  // namespace dwswap
