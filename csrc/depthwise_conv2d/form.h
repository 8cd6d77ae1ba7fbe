// The activations of a problem as kernels are compiled for them. A run-time switch between the rows
// of a kernel costs more than the usual activations do.
#pragma once

#include <type_traits>

#include "common/activation.h"
#include "depthwise_conv2d/params.h"

namespace dwswap {

// Both sides alike: nothing; none or relu; none, relu or relu6; hardswish; silu; whatever else.
enum class Form { kPlain, kRelu, kClamp, kHardswish, kSilu, kAny };

inline Form form_of(const DepthwiseConv2dParams& p) {
  if (p.is_plain()) return Form::kPlain;
  const Activation most = p.input_activation > p.activation ? p.input_activation : p.activation;
  if (most <= Activation::kRelu) return Form::kRelu;
  if (most <= Activation::kRelu6) return Form::kClamp;
  if (p.input_activation != p.activation) return Form::kAny;
  if (most == Activation::kHardswish) return Form::kHardswish;
  return most == Activation::kSilu ? Form::kSilu : Form::kAny;
}

// visit(std::integral_constant<Form, FORM>()) for a run-time form.
template <typename Visit>
auto visit_form(Form form, Visit&& visit) {
  switch (form) {
    case Form::kPlain:
      return visit(std::integral_constant<Form, Form::kPlain>());
    case Form::kRelu:
      return visit(std::integral_constant<Form, Form::kRelu>());
    case Form::kClamp:
      return visit(std::integral_constant<Form, Form::kClamp>());
    case Form::kHardswish:
      return visit(std::integral_constant<Form, Form::kHardswish>());
    case Form::kSilu:
      return visit(std::integral_constant<Form, Form::kSilu>());
    case Form::kAny:
      break;
  }
  return visit(std::integral_constant<Form, Form::kAny>());
}

constexpr bool clamps(Form form) { return form == Form::kRelu || form == Form::kClamp; }
// The form of kernels that have none of its own for kRelu.
constexpr Form relu_as_clamp(Form form) { return form == Form::kRelu ? Form::kClamp : form; }

}  // namespace dwswap
