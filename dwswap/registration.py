"""Every kernel of the operator that is not CUDA C++.

| dispatch key              | kernel                                                           |
| ------------------------- | ---------------------------------------------------------------- |
| CUDA                      | ``csrc/``, registered when ``build.load()`` loads the library     |
| CompositeExplicitAutograd | aten; on CUDA tensors it first loads the library and calls again |
| Meta (fake tensors)       | shapes and layout                                                |
| Autograd                  | autograd; aten where forward AD or functorch's grad is active    |
| AutogradCUDA              | ``csrc/autograd/``: below it, or to Autograd what is recorded    |
| Autocast                  | the user's autocast dtype, with aten's rules for ``conv2d``      |
| FuncTorchBatched (vmap)   | the batch folded into N, or into C where weights are batched     |

A plain call (``plain.py``) comes past these keys: with gradients, on CUDA, to a node of autograd in
C++ (``csrc/autograd/``).
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from dwswap import build
from dwswap.activations import ACTIVATIONS, PAIRS, pair_of
from dwswap.autograd import preactivated, recorded
from dwswap.backward import backward_aten, backward_autograd, backward_composite, backward_fake
from dwswap.checks import check_arguments, check_dense, geometry, output_size, raise_typed
from dwswap.inductor_layouts import prefer_channels_last
from dwswap.layouts import empty_image, laid_out, output_memory_format
from dwswap.plain import any_autocast, differentiated_elsewhere, needs_gradient
from dwswap.schema import (
    depthwise_conv2d,
    depthwise_conv2d_backward,
    depthwise_conv2d_recorded,
    direct,
    library,
)
from dwswap.transforms import AUTOCAST_KEYS, autocast_kernel, forward_vmap

__all__ = ["apply", "decomposed", "depthwise_conv2d", "depthwise_conv2d_backward", "kernel_family"]

Ints = Sequence[int]


# --- forward on every device ------------------------------------------------------------------


def decomposed(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: Ints,
    padding: Ints,
    dilation: Ints,
    input_bias: Tensor | None = None,
    input_activation: str = "none",
    activation: str = "none",
    *,
    in_place: bool = False,
) -> Tensor:
    """The operator made of aten's: what it means, on every device and in every trace.

    Args:
        in_place: whether to change temporaries, where nothing is recorded or traced.
    """
    stride, padding, dilation = geometry(stride, padding, dilation)
    check_arguments(
        input, weight, bias, stride, padding, dilation, input_bias, input_activation, activation
    )
    hidden = preactivated(input, input_bias, input_activation, in_place=in_place)
    groups = int(input.shape[-3])  # as many as the weight has, however a trace computes it
    output = torch.conv2d(hidden, weight, bias, stride, padding, dilation, groups)
    activate = ACTIVATIONS[activation]
    return activate.in_place(output) if in_place else activate.forward(output)


def _forward_aten(input: Tensor, weight: Tensor, *args: Any) -> Tensor:
    # Activations may make floats of integers, and give an empty tensor other strides.
    in_place = input.is_floating_point() and input.numel() > 0
    output = decomposed(input, weight, *args, in_place=in_place)
    return laid_out(output, output_memory_format(input, weight))


def _forward(input: Tensor, weight: Tensor, *args: Any) -> Tensor:
    if input.is_cuda and build.load():
        # Dense tensors have a CUDA kernel from now on; others would come back here for ever.
        check_dense(input, weight, args[0], *args[4:5])
        return depthwise_conv2d(input, weight, *args)
    return _forward_aten(input, weight, *args)


def _forward_direct(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride_h: int,
    stride_w: int,
    padding_h: int,
    padding_w: int,
    dilation_h: int,
    dilation_w: int,
    input_bias: Tensor | None,
    activations: int,
) -> Tensor:
    return depthwise_conv2d(
        input,
        weight,
        bias,
        (stride_h, stride_w),
        (padding_h, padding_w),
        (dilation_h, dilation_w),
        input_bias,
        *pair_of(activations),
    )


def _forward_fake(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: Ints,
    padding: Ints,
    dilation: Ints,
    input_bias: Tensor | None = None,
    input_activation: str = "none",
    activation: str = "none",
) -> Tensor:
    stride, padding, dilation = geometry(stride, padding, dilation)
    check_arguments(
        input, weight, bias, stride, padding, dilation, input_bias, input_activation, activation
    )
    prefer_channels_last()
    size = output_size(input, weight, stride, padding, dilation)
    return empty_image(size, input, output_memory_format(input, weight))


# --- autograd ---------------------------------------------------------------------------------


def _below_autograd(*args: Any) -> Tensor:
    try:
        with torch._C._AutoDispatchBelowAutograd():
            return depthwise_conv2d(*args)
    except RuntimeError as error:
        raise_typed(error)


def _at_once(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: Ints,
    padding: Ints,
    dilation: Ints,
    input_bias: Tensor | None,
    input_activation: str,
    activation: str,
) -> Tensor:
    """The kernel of a plain call without a gradient, by the shortest way."""
    index = PAIRS.get((input_activation, activation))
    if index is None or not (input.is_cuda and build.status().loaded):
        return _forward(
            input,
            weight,
            bias,
            stride,
            padding,
            dilation,
            input_bias,
            input_activation,
            activation,
        )
    try:
        return direct(input, weight, bias, *stride, *padding, *dilation, input_bias, index)
    except RuntimeError as error:
        raise_typed(error)


def _forward_autograd(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: Ints,
    padding: Ints,
    dilation: Ints,
    input_bias: Tensor | None = None,
    input_activation: str = "none",
    activation: str = "none",
) -> Tensor:
    args = (
        input,
        weight,
        bias,
        stride,
        padding,
        dilation,
        input_bias,
        input_activation,
        activation,
    )
    # aten differentiates a complex convolution as real ones, which convolution_backward does not.
    if differentiated_elsewhere() or input.is_complex():
        return decomposed(*args)
    if needs_gradient(input, weight, bias, input_bias):
        pairs = geometry(stride, padding, dilation)
        return recorded(
            _below_autograd,
            input,
            weight,
            bias,
            *pairs,
            input_bias,
            input_activation,
            activation,
        )
    return _below_autograd(*args)


def _apply_plain(input: Tensor, weight: Tensor, bias: Tensor | None, *args: Any) -> Tensor:
    """``args``: the other six of the operator, in its order."""
    if not needs_gradient(input, weight, bias, args[3]):
        return _at_once(input, weight, bias, *args)
    if _has_node(input, *args[3:]):
        return _recorded_by_node(input, weight, bias, *args[:3])
    if not input.is_complex():
        return recorded(_at_once, input, weight, bias, *args)
    return depthwise_conv2d(input, weight, bias, *args)


def _has_node(
    input: Tensor, input_bias: Tensor | None, input_activation: str, activation: str
) -> bool:
    """Whether a node in C++ can record the call: on CUDA, the kernels loaded, the dtype real, and
    neither an input_bias nor an activation, which the node has no arguments for."""
    return (
        input.is_cuda
        and input_bias is None
        and input_activation == activation == "none"
        and build.status().loaded
        and not input.is_complex()
    )


def _recorded_by_node(
    input: Tensor, weight: Tensor, bias: Tensor | None, stride: Ints, padding: Ints, dilation: Ints
) -> Tensor:
    """See :func:`_has_node`; under autocast the node casts."""
    return depthwise_conv2d_recorded(input, weight, bias, *stride, *padding, *dilation)


# Device type -> what its Autocast key calls, past that key and those below.
_PLAIN_AUTOCAST = {
    device_type: autocast_kernel(_apply_plain, device_type, key)
    for device_type, key in AUTOCAST_KEYS.items()
}


def apply(plain: bool, input: Tensor, weight: Tensor, bias: Tensor | None, *args: Any) -> Tensor:
    """Call the operator; a plain call past its dispatch keys.

    Some of their kernels are Python, and those microseconds count at batch 1, and in every step of
    a training whose host is busy.

    Args:
        plain: what ``is_plain_but_for_autocast`` says of the tensors.
        args: the other six of the operator, in its order.
    """
    if plain:
        if any_autocast():
            device_type = input.device.type
            if device_type in _PLAIN_AUTOCAST and torch.is_autocast_enabled(device_type):
                if needs_gradient(input, weight, bias) and _has_node(input, *args[3:]):
                    return _recorded_by_node(input, weight, bias, *args[:3])
                return _PLAIN_AUTOCAST[device_type](input, weight, bias, *args)
        return _apply_plain(input, weight, bias, *args)
    if (
        torch.compiler.is_compiling()
        or needs_gradient(input, weight, bias, args[3])
        or differentiated_elsewhere()
    ):
        return depthwise_conv2d(input, weight, bias, *args)
    return _below_autograd(input, weight, bias, *args)


def kernel_family(input: Tensor, weight: Tensor, bias: Tensor | None, *args: Any) -> str:
    """Name the family of CUDA kernels that would run; ``"aten"`` where none would.

    Args:
        args: stride, padding, dilation and, optionally, input_bias, input_activation, activation.
    """
    if not (input.is_cuda and build.load()):
        return "aten"
    return torch.ops.dwswap._depthwise_conv2d_family.default(input, weight, bias, *args)


# --- registration -----------------------------------------------------------------------------

library.impl("depthwise_conv2d", _forward, "CompositeExplicitAutograd")
library.impl("_depthwise_conv2d_aten", _forward_aten, "CompositeExplicitAutograd")
# The CUDA keys are those of dense tensors; for the others depthwise_conv2d has words.
library.impl("_depthwise_conv2d_direct", _forward_direct, "CompositeExplicitAutograd")
library.impl("_depthwise_conv2d_direct", torch.library.fallthrough_kernel, "Autograd")
library.impl("_depthwise_conv2d_backward", backward_composite, "CompositeExplicitAutograd")
library.impl("_depthwise_conv2d_backward_aten", backward_aten, "CompositeExplicitAutograd")
torch.library.register_fake("dwswap::depthwise_conv2d", _forward_fake, lib=library)
torch.library.register_fake("dwswap::_depthwise_conv2d_aten", _forward_fake, lib=library)
for _name in ("_depthwise_conv2d_backward", "_depthwise_conv2d_backward_aten"):
    torch.library.register_fake(f"dwswap::{_name}", backward_fake, lib=library)
library.impl("depthwise_conv2d", _forward_autograd, "Autograd")
library.impl("_depthwise_conv2d_backward", backward_autograd, "Autograd")
for _device_type, _key in AUTOCAST_KEYS.items():
    _kernel = autocast_kernel(depthwise_conv2d, _device_type, _key)
    library.impl("depthwise_conv2d", _kernel, _key)
torch.library.register_vmap(
    "dwswap::depthwise_conv2d", functools.partial(forward_vmap, depthwise_conv2d), lib=library
)
