// torch.ops.dwswap._depthwise_conv2d_recorded: the convolution as part of a graph of autograd.
// Schema: dwswap/schema.py. Who calls it, and when: dwswap/registration.py.
#include <array>
#include <cstdint>
#include <tuple>
#include <vector>

#include "autograd/node.h"

namespace dwswap::autograd {

// Stride, padding and dilation, each of height and width.
using Geometry = std::array<int64_t, 6>;

struct DepthwiseConv2d : Function<DepthwiseConv2d> {
  static constexpr bool is_traceable = true;

  static Tensor forward(AutogradContext* ctx, const Tensor& input, const Tensor& weight,
                        const OptionalTensor& bias, const Geometry& geometry) {
    using Forward = Tensor(const Tensor&, const Tensor&, const OptionalTensor&, int64_t, int64_t,
                           int64_t, int64_t, int64_t, int64_t, const OptionalTensor&, int64_t);
    static const auto op = find_operator<Forward>("dwswap::_depthwise_conv2d_direct");
    ctx->save_for_backward({input, weight});
    ctx->saved_data["has_bias"] = bias.has_value();
    ctx->saved_data["geometry"] = std::vector<int64_t>(geometry.begin(), geometry.end());
    const auto [stride_h, stride_w, padding_h, padding_w, dilation_h, dilation_w] = geometry;
    return call(op, input, weight, bias, stride_h, stride_w, padding_h, padding_w, dilation_h,
                dilation_w, std::nullopt, 0);
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    using Backward = std::tuple<Tensor, Tensor, Tensor>(const Tensor&, const Tensor&, const Tensor&,
                                                        c10::SymIntArrayRef, c10::SymIntArrayRef,
                                                        c10::SymIntArrayRef, std::array<bool, 3>);
    static const auto op = find_operator<Backward>("dwswap::_depthwise_conv2d_backward");
    const variable_list saved = ctx->get_saved_variables();
    const std::vector<int64_t> geometry = ctx->saved_data["geometry"].toIntVector();
    const auto pair = [&](size_t first) {
      return c10::fromIntArrayRefSlow(c10::IntArrayRef(geometry).slice(first, 2));
    };
    const std::array<bool, 3> wanted{
        ctx->needs_input_grad(0), ctx->needs_input_grad(1),
        ctx->saved_data["has_bias"].toBool() && ctx->needs_input_grad(2)};
    const auto [grad_input, grad_weight, grad_bias] =
        call(op, grads[0], saved[0], saved[1], pair(0), pair(2), pair(4), wanted);
    return {grad_input, grad_weight, grad_bias, Tensor()};
  }
};

namespace {

Tensor depthwise_conv2d_recorded(const Tensor& input, const Tensor& weight,
                                 const OptionalTensor& bias, int64_t stride_h, int64_t stride_w,
                                 int64_t padding_h, int64_t padding_w, int64_t dilation_h,
                                 int64_t dilation_w) {
  const Geometry geometry{stride_h, stride_w, padding_h, padding_w, dilation_h, dilation_w};
  const c10::DeviceType device = input.device().type();
  if (!at::autocast::is_autocast_enabled(device))
    return DepthwiseConv2d::apply(input, weight, bias, geometry);
  // As aten's autocast casts for conv2d, but without its cache of cast weights: that is stale where
  // a weight changes inside a region, and of the wrong dtype in a region inside another.
  const auto cast = [device,
                     dtype = at::autocast::get_autocast_dtype(device)](const Tensor& given) {
    return at::autocast::is_eligible(given, device) ? given.to(dtype) : given;
  };
  return DepthwiseConv2d::apply(cast(input), cast(weight),
                                bias.has_value() ? OptionalTensor(cast(*bias)) : std::nullopt,
                                geometry);
}

}  // namespace

TORCH_LIBRARY_IMPL(dwswap, CompositeImplicitAutograd, m) {
  m.impl("_depthwise_conv2d_recorded", &depthwise_conv2d_recorded);
}

}  // namespace dwswap::autograd
