"""A linear layer on the means of an image's channels: what ends most networks.

| dispatch key              | kernel of ``_pooled_linear``                                      |
| ------------------------- | ----------------------------------------------------------------- |
| CUDA                      | ``csrc/``, registered when ``build.load()`` loads the library      |
| CompositeExplicitAutograd | ``channel_means``, and the layer by aten                          |
| Meta (fake tensors)       | the same                                                          |
| Autograd                  | none: what is differentiated, traced or compiled is the second    |
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from dwswap import build
from dwswap.activations import ACTIVATIONS, PAIRS, pair_of
from dwswap.means import channel_means
from dwswap.plain import is_plain, needs_gradient
from dwswap.pointwise import suits
from dwswap.schema import library
from dwswap.schema import pooled_linear as operator

__all__ = ["fits", "pooled_linear"]

MOST_CHANNELS = 2048


def pooled_linear(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    input_bias: Tensor | None = None,
    input_activation: str = "none",
    activation: str = "none",
) -> Tensor:
    """``activation(linear(means, weight, bias))``, means being those of
    ``input_activation(input + input_bias)`` over height and width.

    On CUDA, of one image in channels_last in half precision, one kernel of our own: everything is
    float32, and the result is rounded once. Otherwise :func:`dwswap.means.channel_means` and a
    matrix product.

    Args:
        input: ``(N, C, H, W)``.
        weight: ``(K, C)``; the kernel has those with strides ``(1, K)``, C and K multiples of 8, C
            up to 2048, and of up to 256 pixels.
        bias: ``(K,)``, optional, of the input's dtype, as ``input_bias``, ``(C,)``.
        input_activation, activation: names in ``dwswap.activations.ACTIVATIONS``.

    Returns:
        ``(N, K)``.

    Raises:
        RuntimeError: an argument does not fit, as aten or the CUDA operator finds; it says which.
    """
    at_once = is_plain(input, weight, bias, input_bias) and not needs_gradient(
        input, weight, bias, input_bias
    )
    is_one = at_once and suits(input) and input.dim() == 4 and input.shape[0] == 1
    call = operator if is_one and build.load() else _pooled_linear_apart
    return call(input, weight, bias, input_bias, PAIRS[input_activation, activation])


def fits(weight: Tensor) -> bool:
    """Whether the kernel takes weights of this shape."""
    outputs, channels = weight.shape
    return channels <= MOST_CHANNELS and channels % 8 == 0 and outputs % 8 == 0


def _pooled_linear_apart(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    input_bias: Tensor | None,
    activations: int,
) -> Tensor:
    before, behind = pair_of(activations)
    means = channel_means(input, input_bias, activation=before)
    return ACTIVATIONS[behind].forward(F.linear(means, weight, bias))


for _name in ("_pooled_linear", "_pooled_linear_apart"):
    library.impl(_name, _pooled_linear_apart, "CompositeExplicitAutograd")
    library.impl(_name, torch.library.fallthrough_kernel, "Autograd")
