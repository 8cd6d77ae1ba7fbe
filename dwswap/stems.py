"""The first layer of a network: 3 x 3 taps on the 3 channels of an image, stride 2.

| dispatch key              | kernel of ``_stem_conv2d``                                        |
| ------------------------- | ----------------------------------------------------------------- |
| CUDA                      | ``csrc/``, registered when ``build.load()`` loads the library      |
| CompositeExplicitAutograd | aten                                                              |
| Meta (fake tensors)       | aten's shape, with the strides of a new image in channels_last     |
| Autograd                  | none: what is differentiated, traced or compiled is aten's alone  |
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from dwswap import build
from dwswap.activations import ACTIVATIONS, PAIRS, pair_of
from dwswap.checks import check_rank, check_vector, value_check
from dwswap.layouts import empty_image
from dwswap.plain import has_kernels, is_plain, needs_gradient
from dwswap.schema import library
from dwswap.schema import stem_conv2d as operator

__all__ = ["fits", "stem_conv2d"]

NAME = "dwswap._stem_conv2d"
MOST_CHANNELS = 64


def stem_conv2d(
    input: Tensor, weight: Tensor, bias: Tensor | None = None, *, activation: str = "none"
) -> Tensor:
    """``activation(conv2d(input, weight, bias, stride=2, padding=1))``, in channels_last.

    On CUDA a kernel of our own for float32 and half precision, which reads images of either layout:
    products and sums are float32, without TF32, and rounded once behind the activation.

    Args:
        input: ``(N, 3, H, W)`` or ``(3, H, W)``.
        weight: ``(K, 3, 3, 3)``; the kernel has multiples of 8 up to 64.
        bias: ``(K,)``, optional, of the input's dtype.
        activation: a name in ``dwswap.activations.ACTIVATIONS``.

    Returns:
        ``(N, K, (H + 1) // 2, (W + 1) // 2)``, or without N, channels_last whatever the input is.

    Raises:
        ValueError: naming the argument, the rule and the value (RuntimeError when the CUDA operator
            or aten finds it).
    """
    at_once = is_plain(input, weight, bias, None) and not needs_gradient(input, weight, bias)
    call = operator if at_once and has_kernels(input) and build.load() else _stem_conv2d_aten
    return call(input, weight, bias, PAIRS["none", activation])


def fits(weight: Tensor) -> bool:
    """Whether the kernel takes weights of this shape."""
    outputs, *rest = weight.shape
    return rest == [3, 3, 3] and 0 < outputs <= MOST_CHANNELS and outputs % 8 == 0


def _stem_conv2d_aten(
    input: Tensor, weight: Tensor, bias: Tensor | None, activations: int
) -> Tensor:
    # Not proxies of a symbolic trace; Dynamo cannot trace the messages, and aten has its own.
    if isinstance(input, Tensor) and not torch.compiler.is_compiling():
        _check_arguments(input, weight, bias)
    activation = ACTIVATIONS[pair_of(activations)[1]].forward
    image = activation(F.conv2d(input, weight, bias, 2, 1))
    # channels_last in words that vmap knows.
    return image.movedim(-3, -1).contiguous().movedim(-1, -3)


def _check_arguments(input: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    check_rank(input, NAME)
    value_check(
        weight.dim() == 4 and tuple(weight.shape[1:]) == (3, 3, 3),
        lambda: f"{NAME}: weight must be (K, 3, 3, 3), got shape {list(weight.shape)}",
    )
    value_check(
        input.shape[-3] == 3,
        lambda: f"{NAME}: input must have 3 channels, got shape {list(input.shape)}",
    )
    check_vector("bias", bias, weight.shape[0], NAME)


def _stem_conv2d_fake(
    input: Tensor, weight: Tensor, bias: Tensor | None, activations: int
) -> Tensor:
    # aten's own keeps strides of dimensions of size 1 that the result does not have.
    result = _stem_conv2d_aten(input, weight, bias, activations)
    return empty_image(result.shape, result, torch.channels_last)


for _name in ("_stem_conv2d", "_stem_conv2d_aten"):
    library.impl(_name, _stem_conv2d_aten, "CompositeExplicitAutograd")
    torch.library.register_fake(f"dwswap::{_name}", _stem_conv2d_fake, lib=library)
    library.impl(_name, torch.library.fallthrough_kernel, "Autograd")
