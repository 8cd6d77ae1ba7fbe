"""The operators of ``torch.ops.dwswap``: their schemas and their names in Python."""

from __future__ import annotations

import torch

__all__ = [
    "batch_norm",
    "batch_norm_backward",
    "channel_means",
    "channel_norm",
    "channel_scale",
    "channel_scale_backward",
    "depthwise_conv2d",
    "depthwise_conv2d_backward",
    "direct",
    "interleave_channels",
    "library",
    "pointwise_product",
    "pointwise_residual_",
    "pooled_linear",
    "separable_conv2d",
    "squeeze_excitation",
    "stem_conv2d",
]

_GEOMETRY = "SymInt[2] stride, SymInt[2] padding, SymInt[2] dilation"
# input_bias is not keyword-only: torch.library.register_vmap refuses keyword-only tensors.
_FORWARD_ARGUMENTS = (
    f"(Tensor input, Tensor weight, Tensor? bias, {_GEOMETRY}, Tensor? input_bias=None, "
    'str input_activation="none", str activation="none")'
)

_EXCITATION = (
    "(Tensor input, Tensor reduce_weight, Tensor? reduce_bias, Tensor expand_weight, "
    "Tensor? expand_bias, str activation, str gate) -> Tensor"
)

library = torch.library.Library("dwswap", "DEF")
# Kernels and fake kernels take any strides, so Inductor need not copy tensors to those it traced.
_tags = (torch.Tag.pt2_compliant_tag, torch.Tag.flexible_layout)
# csrc/standalone.cpp has those of inference too, for processes without Python.
try:
    library.define(f"depthwise_conv2d{_FORWARD_ARGUMENTS} -> Tensor", tags=_tags)
except RuntimeError as error:
    raise ImportError(
        "dwswap cannot be imported where its standalone operator library has been loaded before: "
        "import dwswap first, or not at all"
    ) from error
# What the CUDA kernels do not cover (integer and complex dtypes) they send here.
library.define(f"_depthwise_conv2d_aten{_FORWARD_ARGUMENTS} -> Tensor", tags=_tags)
# depthwise_conv2d for plain calls without a gradient: lists, strings and a kernel of autograd cost
# microseconds. activations: the index of input_activation, times 16, and that of activation.
library.define(
    "_depthwise_conv2d_direct(Tensor input, Tensor weight, Tensor? bias, int stride_h, "
    "int stride_w, int padding_h, int padding_w, int dilation_h, int dilation_w, "
    "Tensor? input_bias, int activations) -> Tensor"
)
library.define(f"_depthwise_conv2d_family{_FORWARD_ARGUMENTS} -> str", tags=_tags)
_BACKWARD_ARGUMENTS = (
    f"(Tensor grad_output, Tensor input, Tensor weight, {_GEOMETRY}, bool[3] output_mask)"
)
for _name in ("_depthwise_conv2d_backward", "_depthwise_conv2d_backward_aten"):
    library.define(f"{_name}{_BACKWARD_ARGUMENTS} -> (Tensor, Tensor, Tensor)", tags=_tags)
library.define(f"_depthwise_conv2d_backward_family{_BACKWARD_ARGUMENTS} -> str", tags=_tags)
library.define(f"squeeze_excitation{_EXCITATION}", tags=_tags)
# float64, and what is too large for the CUDA kernels.
library.define(f"_squeeze_excitation_aten{_EXCITATION}", tags=_tags)
# What has no kernel the first sends to the second. activations: as above, of first and second.
for _name in ("_interleave_channels", "_interleave_channels_aten"):
    library.define(
        f"{_name}(Tensor first, Tensor second, Tensor? first_bias, Tensor? second_bias, "
        "int activations, bool channels_last) -> Tensor",
        tags=_tags,
    )

# activations: as above, of none and of the one behind the bias.
for _name in ("_channel_means", "_channel_means_aten"):
    library.define(f"{_name}(Tensor input, Tensor? bias, int activations) -> Tensor", tags=_tags)

# What has no kernel the first sends to the second.
for _name in ("_channel_norm", "_channel_norm_aten"):
    library.define(
        f"{_name}(Tensor input, Tensor? weight, Tensor? bias, float eps, bool last) -> Tensor",
        tags=_tags,
    )

# activations: as above, of none and of the one behind the convolution.
for _name in ("_stem_conv2d", "_stem_conv2d_aten"):
    library.define(
        f"{_name}(Tensor input, Tensor weight, Tensor? bias, int activations) -> Tensor",
        tags=_tags,
    )

# activations: as above, in front of the means and behind the layer. The second: by two operators.
for _name in ("_pooled_linear", "_pooled_linear_apart"):
    library.define(
        f"{_name}(Tensor input, Tensor weight, Tensor? bias, Tensor? input_bias, int activations) "
        "-> Tensor",
        tags=_tags,
    )

# activations: as above, in front of and behind the depthwise convolution. pixels, slices: how the
# kernel cuts the problem. The second: by an operator for each convolution.
for _name in ("_separable_conv2d", "_separable_conv2d_apart"):
    library.define(
        f"{_name}(Tensor input, Tensor weight, Tensor? bias, Tensor? input_bias, int stride, "
        "int padding, int activations, Tensor point_weight, Tensor? point_bias, Tensor? residual, "
        "int pixels, int slices) -> Tensor",
        tags=_tags,
    )

# What has no product the first sends to the second.
for _name in ("_pointwise_product", "_pointwise_product_aten"):
    library.define(f"{_name}(Tensor input, Tensor weight, Tensor? bias) -> Tensor", tags=_tags)

# Batch normalization in training. activation: as above, of none and of the one behind it. The
# second result are the statistics that the backward takes: rows of mean, 1 / deviation, that times
# weight, and bias.
library.define(
    "_batch_norm(Tensor input, Tensor? weight, Tensor? bias, Tensor(a!)? running_mean, "
    "Tensor(b!)? running_var, Tensor(c!)? batches, float momentum, float eps, int activation) "
    "-> (Tensor, Tensor)"
)
library.define(
    "_batch_norm_backward(Tensor grad_output, Tensor input, Tensor stats, Tensor? weight, "
    "int activation, bool[3] output_mask) -> (Tensor, Tensor, Tensor)"
)

# The channels of an image times gates, (N, C) or (N, C, 1, 1), whose activation is `activation`, as
# above of none and of it; plus `spread`, of as many values, spread evenly over the pixels. And the
# gradient of the gates.
library.define(
    "_channel_scale(Tensor input, Tensor gates, Tensor? spread, int activation) -> Tensor"
)
library.define(
    "_channel_scale_backward(Tensor grad_output, Tensor input, Tensor gates, int activation) "
    "-> Tensor"
)

# Whether the residual is the sum now; if not, it is as it was. No tags: what changes an argument
# and returns no tensor cannot be made functional.
library.define("_pointwise_residual_(Tensor input, Tensor weight, Tensor(a!) residual) -> bool")

batch_norm = torch.ops.dwswap._batch_norm.default
batch_norm_backward = torch.ops.dwswap._batch_norm_backward.default
channel_means = torch.ops.dwswap._channel_means.default
channel_norm = torch.ops.dwswap._channel_norm.default
channel_scale = torch.ops.dwswap._channel_scale.default
channel_scale_backward = torch.ops.dwswap._channel_scale_backward.default
depthwise_conv2d = torch.ops.dwswap.depthwise_conv2d.default
depthwise_conv2d_backward = torch.ops.dwswap._depthwise_conv2d_backward.default
direct = torch.ops.dwswap._depthwise_conv2d_direct.default
interleave_channels = torch.ops.dwswap._interleave_channels.default
pointwise_product = torch.ops.dwswap._pointwise_product.default
pointwise_residual_ = torch.ops.dwswap._pointwise_residual_.default
pooled_linear = torch.ops.dwswap._pooled_linear.default
separable_conv2d = torch.ops.dwswap._separable_conv2d.default
squeeze_excitation = torch.ops.dwswap.squeeze_excitation.default
stem_conv2d = torch.ops.dwswap._stem_conv2d.default
