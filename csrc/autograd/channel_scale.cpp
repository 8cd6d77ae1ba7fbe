// torch.ops.dwswap._squeeze_recorded and _excite_recorded: the two ends of squeeze-and-excitation
// as parts of a graph of autograd, and what they hand each other.
// Schema: dwswap/schema.py. Who calls them, and when: dwswap/channel_scale.py.
#include <cstdint>
#include <tuple>
#include <vector>

#include "autograd/node.h"

namespace dwswap::autograd {

using ScaleSignature = Tensor(const Tensor&, const Tensor&, const OptionalTensor&, int64_t);
using ScaleBackwardSignature = Tensor(const Tensor&, const Tensor&, const Tensor&, int64_t);

inline Tensor scale(const Tensor& input, const Tensor& gates, const OptionalTensor& spread,
                    int64_t activation) {
  static const auto op = find_operator<ScaleSignature>("dwswap::_channel_scale");
  return call(op, input, gates, spread, activation);
}

struct Squeeze : Function<Squeeze> {
  static constexpr bool is_traceable = true;

  // The means, (N, C), and the carriers, of the shapes of the image and of the gates.
  static variable_list forward(AutogradContext* ctx, const Tensor& input, int64_t activation) {
    using Means = Tensor(const Tensor&, const OptionalTensor&, int64_t);
    static const auto op = find_operator<Means>("dwswap::_channel_means");
    ctx->set_materialize_grads(false);
    ctx->saved_data["sizes"] = input.sizes();
    ctx->saved_data["activation"] = activation;
    return {call(op, input, std::nullopt, 0), input,
            input.new_empty({input.size(0), input.size(1), 1, 1})};
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    // The carriers bring no gradients of theirs: that of the output, and the gates (see Excite).
    const Tensor &grad_means = grads[0], &grad_output = grads[1], &gates = grads[2];
    const int64_t activation = ctx->saved_data["activation"].toInt();
    // The image was not scaled, or without gradient.
    if (!grad_output.defined() || !gates.defined()) {
      if (!grad_means.defined()) return {Tensor(), Tensor()};
      const std::vector<int64_t> sizes = ctx->saved_data["sizes"].toIntVector();
      const Tensor each = grad_means.reshape({sizes[0], sizes[1], 1, 1}).expand(sizes);
      return {each.div(sizes[2] * sizes[3]), Tensor()};  // dense
    }
    if (is_transformed(grad_output) || is_transformed(gates) ||
        (grad_means.defined() && is_transformed(grad_means))) {
      static const auto op = find_operator<ScaleSignature>("dwswap::_channel_scale_aten");
      return {call(op, grad_output, gates, optional(grad_means), activation), Tensor()};
    }
    const Tensor spread = grad_means.defined() ? grad_means.contiguous() : grad_means;
    return {scale(grad_output, gates, optional(spread), activation), Tensor()};
  }
};

// The input in a struct, as its gradient is not for this node to give. It is what is saved, and
// not its image, so that gradients of gradients find its own graph.
struct ExciteArguments {
  const Tensor& input;
  int64_t activation;
};

struct Excite : Function<Excite> {
  static constexpr bool is_traceable = true;

  // Image and carrier: those of Squeeze, neither where it did not record.
  static Tensor forward(AutogradContext* ctx, const OptionalTensor& image,
                        const OptionalTensor& /* carrier */, const Tensor& gates,
                        const ExciteArguments& arguments) {
    ctx->saved_data["has_image"] = image.has_value();
    ctx->saved_data["layout"] = static_cast<int64_t>(layout_of(arguments.input));
    ctx->saved_data["activation"] = arguments.activation;
    ctx->save_for_backward({gates.requires_grad() ? arguments.input : Tensor(), gates});
    return scale(arguments.input, gates, std::nullopt, arguments.activation);
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    const variable_list saved = ctx->get_saved_variables();
    const Tensor &input = saved[0], &gates = saved[1];
    const int64_t activation = ctx->saved_data["activation"].toInt();
    const bool has_image = ctx->saved_data["has_image"].toBool();
    // The tensors that were given are counted: without image and carrier the gates are first.
    const bool needs_gates = ctx->needs_input_grad(has_image ? 2 : 0);
    Tensor grad_output = grads[0], grad_gates;
    if (is_transformed(grad_output)) {
      static const auto op =
          find_operator<ScaleBackwardSignature>("dwswap::_channel_scale_backward_aten");
      if (needs_gates) grad_gates = call(op, grad_output, input, gates, activation);
    } else {
      static const auto op =
          find_operator<ScaleBackwardSignature>("dwswap::_channel_scale_backward");
      const auto layout = static_cast<at::MemoryFormat>(ctx->saved_data["layout"].toInt());
      grad_output = grad_output.contiguous(layout);
      if (needs_gates) grad_gates = call(op, grad_output, input, gates, activation);
    }
    if (!has_image || !ctx->needs_input_grad(0)) return {Tensor(), Tensor(), grad_gates, Tensor()};
    return {grad_output, gates.to(grad_output.scalar_type()), grad_gates, Tensor()};
  }
};

namespace {

std::tuple<Tensor, Tensor, Tensor> squeeze_recorded(const Tensor& input, int64_t activation) {
  const variable_list outputs = Squeeze::apply(input, activation);
  return {outputs[0], outputs[1], outputs[2]};
}

Tensor excite_recorded(const OptionalTensor& image, const OptionalTensor& carrier,
                       const Tensor& gates, const Tensor& input, int64_t activation) {
  return Excite::apply(image, carrier, gates, ExciteArguments{input, activation});
}

}  // namespace

TORCH_LIBRARY_IMPL(dwswap, CompositeImplicitAutograd, m) {
  m.impl("_squeeze_recorded", &squeeze_recorded);
  m.impl("_excite_recorded", &excite_recorded);
}

}  // namespace dwswap::autograd
