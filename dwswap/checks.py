"""Argument checks; those of the operator are the Python half of what ``csrc`` checks."""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

import torch
from torch import Tensor

from dwswap.activations import ACTIVATIONS

__all__ = [
    "check_arguments",
    "check_choice",
    "check_dense",
    "check_extents",
    "check_flags",
    "check_rank",
    "check_same",
    "check_vector",
    "geometry",
    "output_size",
    "pair",
    "raise_typed",
    "whole",
]

NAME = "dwswap.depthwise_conv2d"
NAMES = ("input", "weight", "bias", "input_bias")

MOST_ELEMENTS = 1 << 60
"""The bytes of so many elements still fit 63 bits; aten may wrap around beyond that."""


def type_check(condition: bool | torch.SymBool, message: Callable[[], str]) -> None:
    # torch._check_type is for symbols: it takes half a microsecond, and a call has twenty checks.
    if condition is not True:
        torch._check_type(condition, message)


def value_check(condition: bool | torch.SymBool, message: Callable[[], str]) -> None:
    if condition is not True:
        torch._check_value(condition, message)


def whole(value: Any) -> Any:
    """``value`` with an int for each integer of NumPy or the like, lists as tuples."""
    if isinstance(value, (tuple, list)):
        return tuple(map(whole, value))
    if isinstance(value, (int, torch.SymInt, str, Tensor)):
        return value
    try:
        return operator.index(value)
    except TypeError:
        return value


def pair(name: str, value: int | Sequence[int], minimum: int) -> tuple[int, int]:
    """``value`` as (height, width): an int or a sequence of one is broadcast, as aten does.

    Raises:
        TypeError: ``value`` is no int and no sequence of ints.
        ValueError: its length is not 1 or 2, or an element is below ``minimum``.
    """
    # The common case first: it is on the path of every call.
    if type(value) is tuple and len(value) == 2:
        height, width = value
        if type(height) is type(width) is int and height >= minimum and width >= minimum:
            return height, width
    value = whole(value)
    if isinstance(value, (int, torch.SymInt)) and not isinstance(value, bool):
        value = (value, value)
    if not isinstance(value, tuple) or any(
        isinstance(item, bool) or not isinstance(item, (int, torch.SymInt)) for item in value
    ):
        raise TypeError(f"{NAME}: {name} must be an int or a pair of ints, got {value!r}")
    if len(value) == 1:
        value = (value[0], value[0])
    if len(value) != 2:
        raise ValueError(
            f"{NAME}: {name} must be an int or a pair of ints (height, width), "
            f"got {len(value)} values: {tuple(value)}"
        )
    # Not torch._check: Dynamo of torch 2.11 cannot trace the closure of its message.
    if value[0] < minimum or value[1] < minimum:
        raise ValueError(f"{NAME}: {name} must be at least {minimum}, got {tuple(value)}")
    return value[0], value[1]


def geometry(
    stride: Sequence[int], padding: Sequence[int], dilation: Sequence[int]
) -> tuple[Sequence[int], Sequence[int], Sequence[int]]:
    """``stride``, ``padding`` and ``dilation`` of the operator as pairs, checked."""
    return (
        pair("stride", tuple(stride), 1),
        pair("padding", tuple(padding), 0),
        pair("dilation", tuple(dilation), 1),
    )


def output_size(
    input: Tensor,
    weight: Tensor,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
) -> list[int]:
    """Shape of the output, for arguments that :func:`check_arguments` has accepted."""
    shape, kernel = input.shape, weight.shape
    spatial = [
        (shape[i - 2] + 2 * padding[i] - dilation[i] * (kernel[i - 2] - 1) - 1) // stride[i] + 1
        for i in range(2)
    ]
    return [*shape[:-3], kernel[0], *spatial]


def check_flags(**flags: Any) -> None:
    """Refuse what is no bool: a string such as "no" would count as True.

    Raises:
        TypeError: naming the first one.
    """
    for name, flag in flags.items():
        if not isinstance(flag, bool):
            raise TypeError(f"{name} must be True or False, got {flag!r}")


def check_dense(*tensors: Tensor | None, op: str = NAME, names: Sequence[str] = NAMES) -> None:
    """Refuse sparse, nested and quantized tensors, called ``names`` in their order.

    Raises:
        TypeError: naming the first one.
    """
    for name, tensor in zip(names, tensors, strict=False):
        if tensor is not None:
            _check_kind(name, tensor, op)


def check_arguments(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    input_bias: Tensor | None,
    input_activation: str,
    activation: str,
) -> None:
    """Refuse what the operator cannot compute, in words that name argument, rule and value.

    Raises:
        TypeError: layouts, dtypes that differ.
        ValueError: everything else.
    """
    tensors = dict(zip(NAMES, (input, weight, bias, input_bias), strict=True))
    check_dense(*tensors.values())
    check_rank(input, NAME)
    value_check(
        weight.dim() == 4,
        lambda: f"{NAME}: weight must be 4-D (C * m, 1, kH, kW), got shape {_shape(weight)}",
    )
    shape, kernel = input.shape, weight.shape
    channels = shape[-3]
    check_extents(input, NAME)
    value_check(
        kernel[1] == 1,
        lambda: (
            f"{NAME}: weight must have one input channel per group, shape (C * m, 1, kH, kW), "
            f"got shape {_shape(weight)}"
        ),
    )
    value_check(
        kernel[0] > 0 and kernel[0] % channels == 0,
        lambda: (
            f"{NAME}: weight.shape[0] must be a multiple of the input's {channels} channels, "
            f"got {kernel[0]}"
        ),
    )
    value_check(
        kernel[2] > 0 and kernel[3] > 0,
        lambda: f"{NAME}: weight must have a kernel of at least 1 x 1, got shape {_shape(weight)}",
    )
    check_vector("bias", bias, kernel[0])
    check_vector("input_bias", input_bias, channels)
    for name, tensor in tensors.items():
        if tensor is not None:
            check_same(name, tensor, input)
    for name, value in (("input_activation", input_activation), ("activation", activation)):
        check_choice(name, value)
    for i, axis in enumerate(("height", "width")):
        padded = shape[i - 2] + 2 * padding[i]
        _check_extent(axis, dilation[i] * (kernel[i - 2] - 1) + 1, dilation[i], padded)
    size = output_size(input, weight, stride, padding, dilation)
    # Sizes that are still symbols are checked when they are numbers.
    value_check(
        any(type(extent) is not int for extent in size) or math.prod(size) < MOST_ELEMENTS,
        lambda: f"{NAME}: the output must have fewer than 2^60 elements, got shape {size}",
    )


def _check_extent(axis: str, extent: int, dilation: int, padded: int) -> None:
    value_check(
        extent <= padded,
        lambda: (
            f"{NAME}: the kernel must fit into the padded input; along the {axis} it covers "
            f"{extent} elements (dilation {dilation}), the padded input has {padded}"
        ),
    )


def _check_kind(name: str, tensor: Tensor, op: str) -> None:
    type_check(
        tensor.layout == torch.strided and not tensor.is_nested and not tensor.is_quantized,
        lambda: (
            f"{op}: {name} must be a dense strided tensor, got "
            f"{'a nested tensor' if tensor.is_nested else tensor.layout}"
            f"{' (quantized)' if tensor.is_quantized else ''}"
        ),
    )


def check_rank(input: Tensor, op: str) -> None:
    value_check(
        input.dim() in (3, 4),
        lambda: f"{op}: input must be 4-D (N, C, H, W) or 3-D (C, H, W), got shape {_shape(input)}",
    )


def check_extents(input: Tensor, op: str) -> None:
    channels, height, width = input.shape[-3:]
    value_check(
        channels > 0 and height > 0 and width > 0,
        lambda: f"{op}: input must have C, H and W of at least 1, got shape {_shape(input)}",
    )


def check_choice(name: str, value: str, op: str = NAME) -> None:
    if value not in ACTIVATIONS:
        raise ValueError(f"{op}: {name} must be one of {', '.join(ACTIVATIONS)}, got {value!r}")


def check_vector(name: str, tensor: Tensor | None, length: int, op: str = NAME) -> None:
    if tensor is not None:
        value_check(
            tensor.dim() == 1 and tensor.shape[0] == length,
            lambda: f"{op}: {name} must be 1-D of length {length}, got shape {_shape(tensor)}",
        )


def check_same(name: str, tensor: Tensor, input: Tensor, op: str = NAME) -> None:
    type_check(
        tensor.dtype == input.dtype,
        lambda: f"{op}: {name} must have the input's dtype {input.dtype}, got {tensor.dtype}",
    )
    value_check(
        tensor.device == input.device,
        lambda: f"{op}: {name} must be on the input's device {input.device}, got {tensor.device}",
    )


def _shape(tensor: Tensor) -> list[int]:
    return list(tensor.shape)


def raise_typed(error: RuntimeError) -> NoReturn:
    """Raise a kernel's ``error`` with the type that it lost on its way through the stable ABI.

    Raises:
        torch.OutOfMemoryError: it says that memory ran out.
        RuntimeError: whatever else.
    """
    if type(error) is RuntimeError and "CUDA out of memory." in str(error):
        raise torch.OutOfMemoryError(str(error)) from None
    raise error
