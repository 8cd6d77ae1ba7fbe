"""The operators of ``torch.ops.dwswap``: their schemas and their names in Python."""

from __future__ import annotations

import torch

__all__ = [
    "batch_norm",
    "batch_norm_backward",
    "batch_norm_recorded",
    "channel_means",
    "channel_norm",
    "channel_scale",
    "channel_scale_backward",
    "depthwise_conv2d",
    "depthwise_conv2d_backward",
    "depthwise_conv2d_recorded",
    "direct",
    "excite_recorded",
    "interleave_channels",
    "library",
    "pointwise_product",
    "pointwise_residual_",
    "pooled_linear",
    "separable_conv2d",
    "squeeze_excitation",
    "squeeze_recorded",
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
# depthwise_conv2d for plain calls: lists, strings and a kernel of autograd cost microseconds.
# activations: the index of input_activation, times 16, and that of activation.
library.define(
    "_depthwise_conv2d_direct(Tensor input, Tensor weight, Tensor? bias, int stride_h, "
    "int stride_w, int padding_h, int padding_w, int dilation_h, int dilation_w, "
    "Tensor? input_bias, int activations) -> Tensor"
)
# The convolution alone as part of a graph of autograd, in C++; for plain calls as well.
library.define(
    "_depthwise_conv2d_recorded(Tensor input, Tensor weight, Tensor? bias, int stride_h, "
    "int stride_w, int padding_h, int padding_w, int dilation_h, int dilation_w) -> Tensor"
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
_BATCH_NORM_ARGUMENTS = (
    "(Tensor input, Tensor? weight, Tensor? bias, Tensor(a!)? running_mean, "
    "Tensor(b!)? running_var, Tensor(c!)? batches, float momentum, float eps, int activation)"
)
library.define(f"_batch_norm{_BATCH_NORM_ARGUMENTS} -> (Tensor, Tensor)")
library.define(
    "_batch_norm_backward(Tensor grad_output, Tensor input, Tensor stats, Tensor? weight, "
    "int activation, bool[3] output_mask) -> (Tensor, Tensor, Tensor)"
)
# The first as part of a graph of autograd, in C++; the second is its backward where that is
# differentiated or mapped itself.
library.define(f"_batch_norm_recorded{_BATCH_NORM_ARGUMENTS} -> Tensor")
library.define(
    "_batch_norm_backward_transformed(Tensor grad_output, Tensor input, Tensor stats, "
    "Tensor? weight, Tensor? bias, int bias_version, float eps, int activation, "
    "bool[3] output_mask) -> (Tensor, Tensor, Tensor)"
)

# The channels of an image times gates, (N, C) or (N, C, 1, 1), whose activation is `activation`, as
# above of none and of it; plus `spread`, of as many values, spread evenly over the pixels. And the
# gradient of the gates. What is differentiated or mapped itself is computed by the second of each.
for _name in ("_channel_scale", "_channel_scale_aten"):
    library.define(f"{_name}(Tensor input, Tensor gates, Tensor? spread, int activation) -> Tensor")
for _name in ("_channel_scale_backward", "_channel_scale_backward_aten"):
    library.define(
        f"{_name}(Tensor grad_output, Tensor input, Tensor gates, int activation) -> Tensor"
    )
# The means of the channels, and that scale with gates made of them, as parts of a graph of
# autograd, in C++: the second takes two outputs of the first, image and carrier.
library.define("_squeeze_recorded(Tensor input, int activation) -> (Tensor, Tensor, Tensor)")
library.define(
    "_excite_recorded(Tensor? image, Tensor? carrier, Tensor gates, Tensor input, int activation) "
    "-> Tensor"
)

# Whether the residual is the sum now; if not, it is as it was. No tags: what changes an argument
# and returns no tensor cannot be made functional.
library.define("_pointwise_residual_(Tensor input, Tensor weight, Tensor(a!) residual) -> bool")

batch_norm = torch.ops.dwswap._batch_norm.default
batch_norm_backward = torch.ops.dwswap._batch_norm_backward.default
batch_norm_recorded = torch.ops.dwswap._batch_norm_recorded.default
channel_means = torch.ops.dwswap._channel_means.default
channel_norm = torch.ops.dwswap._channel_norm.default
channel_scale = torch.ops.dwswap._channel_scale.default
channel_scale_backward = torch.ops.dwswap._channel_scale_backward.default
depthwise_conv2d = torch.ops.dwswap.depthwise_conv2d.default
depthwise_conv2d_backward = torch.ops.dwswap._depthwise_conv2d_backward.default
depthwise_conv2d_recorded = torch.ops.dwswap._depthwise_conv2d_recorded.default
direct = torch.ops.dwswap._depthwise_conv2d_direct.default
excite_recorded = torch.ops.dwswap._excite_recorded.default
interleave_channels = torch.ops.dwswap._interleave_channels.default
pointwise_product = torch.ops.dwswap._pointwise_product.default
pointwise_residual_ = torch.ops.dwswap._pointwise_residual_.default
pooled_linear = torch.ops.dwswap._pooled_linear.default
separable_conv2d = torch.ops.dwswap._separable_conv2d.default
squeeze_excitation = torch.ops.dwswap.squeeze_excitation.default
squeeze_recorded = torch.ops.dwswap._squeeze_recorded.default
stem_conv2d = torch.ops.dwswap._stem_conv2d.default
