// torch.ops.dwswap._batch_norm_recorded: _batch_norm as part of a graph of autograd.
// Schema: dwswap/schema.py. Who calls it, and when: dwswap/batch_norm.py.
#include <array>
#include <cstdint>
#include <tuple>

#include "autograd/node.h"

namespace dwswap::autograd {

// The arguments of the forward that have no gradients.
struct BatchNormArguments {
  const OptionalTensor &running_mean, &running_var, &batches;
  double momentum, eps;
  int64_t activation;
};

struct BatchNorm : Function<BatchNorm> {
  static constexpr bool is_traceable = true;

  // Weight and bias are both there or neither.
  static Tensor forward(AutogradContext* ctx, const Tensor& input, const OptionalTensor& weight,
                        const OptionalTensor& bias, const BatchNormArguments& others) {
    using Forward = std::tuple<Tensor, Tensor>(
        const Tensor&, const OptionalTensor&, const OptionalTensor&, const OptionalTensor&,
        const OptionalTensor&, const OptionalTensor&, double, double, int64_t);
    static const auto op = find_operator<Forward>("dwswap::_batch_norm");
    auto [output, stats] = call(op, input, weight, bias, others.running_mean, others.running_var,
                                others.batches, others.momentum, others.eps, others.activation);
    ctx->save_for_backward({input, weight.value_or(Tensor()), stats});
    // aten's backward does not need it, so it may change; a second one here does.
    ctx->saved_data["bias"] = bias;
    const bool has_version = bias.has_value() && !bias->is_inference();
    ctx->saved_data["bias_version"] = has_version ? int64_t{bias->_version()} : 0;
    ctx->saved_data["eps"] = others.eps;
    ctx->saved_data["activation"] = others.activation;
    return output;
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    const variable_list saved = ctx->get_saved_variables();
    const Tensor &grad_output = grads[0], &input = saved[0], &stats = saved[2];
    const OptionalTensor weight = optional(saved[1]);
    const int64_t activation = ctx->saved_data["activation"].toInt();
    const std::array<bool, 3> wanted{ctx->needs_input_grad(0),
                                     weight.has_value() && ctx->needs_input_grad(1),
                                     weight.has_value() && ctx->needs_input_grad(2)};
    using Gradients = std::tuple<Tensor, Tensor, Tensor>;
    if (is_transformed(grad_output)) {
      using Transformed =
          Gradients(const Tensor&, const Tensor&, const Tensor&, const OptionalTensor&,
                    const OptionalTensor&, int64_t, double, int64_t, std::array<bool, 3>);
      static const auto op = find_operator<Transformed>("dwswap::_batch_norm_backward_transformed");
      const auto [grad_input, grad_weight, grad_bias] =
          call(op, grad_output, input, stats, weight, ctx->saved_data["bias"].toOptional<Tensor>(),
               ctx->saved_data["bias_version"].toInt(), ctx->saved_data["eps"].toDouble(),
               activation, wanted);
      return {grad_input, grad_weight, grad_bias, Tensor()};
    }
    using Backward = Gradients(const Tensor&, const Tensor&, const Tensor&, const OptionalTensor&,
                               int64_t, std::array<bool, 3>);
    static const auto op = find_operator<Backward>("dwswap::_batch_norm_backward");
    const auto [grad_input, grad_weight, grad_bias] = call(
        op, grad_output.contiguous(layout_of(input)), input, stats, weight, activation, wanted);
    return {grad_input, grad_weight, grad_bias, Tensor()};
  }
};

namespace {

Tensor batch_norm_recorded(const Tensor& input, const OptionalTensor& weight,
                           const OptionalTensor& bias, const OptionalTensor& running_mean,
                           const OptionalTensor& running_var, const OptionalTensor& batches,
                           double momentum, double eps, int64_t activation) {
  const BatchNormArguments others{running_mean, running_var, batches, momentum, eps, activation};
  Tensor output = BatchNorm::apply(input, weight, bias, others);
  // Of the three aten changes only the counter in a way that autograd notices.
  if (batches.has_value() && !batches->is_inference())
    batches->unsafeGetTensorImpl()->bump_version();
  return output;
}

}  // namespace

TORCH_LIBRARY_IMPL(dwswap, CompositeImplicitAutograd, m) {
  m.impl("_batch_norm_recorded", &batch_norm_recorded);
}

}  // namespace dwswap::autograd
