"""The means of an image's channels, of what an activation makes of them, as one pass.

| dispatch key              | kernel of ``_channel_means``                                      |
| ------------------------- | ----------------------------------------------------------------- |
| CUDA                      | ``csrc/``, registered when ``build.load()`` loads the library      |
| CompositeExplicitAutograd | aten                                                              |
| Meta (fake tensors)       | aten                                                              |
| Autograd                  | none: what is differentiated, traced or compiled is aten's alone  |
"""

from __future__ import annotations

import torch
from torch import Tensor

from dwswap import build
from dwswap.activations import PAIRS, pair_of
from dwswap.autograd import preactivated
from dwswap.layouts import memory_format
from dwswap.plain import has_kernels, is_plain, needs_gradient
from dwswap.schema import channel_means as operator
from dwswap.schema import library

__all__ = ["channel_means"]


def channel_means(
    input: Tensor, bias: Tensor | None = None, *, activation: str = "none", keepdim: bool = False
) -> Tensor:
    """The mean of ``activation(input + bias)`` over height and width.

    One pass over the image, where a bias, an activation and the mean are one each. On CUDA a kernel
    of our own: everything is float32, and the mean is rounded once.

    Args:
        input: ``(N, C, H, W)`` or ``(C, H, W)``.
        bias: ``(C,)``, optional.
        activation: a name in ``dwswap.activations.ACTIVATIONS``.
        keepdim: whether the result has a height and a width, of 1.

    Returns:
        ``(N, C)`` or ``(C,)``; with ``keepdim`` ``(N, C, 1, 1)`` or ``(C, 1, 1)``.
    """
    at_once = is_plain(input, input, bias, None) and not needs_gradient(input, bias)
    call = operator if at_once and has_kernels(input) and build.load() else _channel_means_aten
    means = call(input, bias, PAIRS["none", activation])
    if not keepdim:
        return means
    # As the pooling of aten has it, an image in the layout of the input.
    if input.dim() == 4 and memory_format(input) == torch.channels_last:
        return means[:, None, None].movedim(-1, 1)
    return means[..., None, None]


def _channel_means_aten(input: Tensor, bias: Tensor | None, activations: int) -> Tensor:
    # Under autocast an image may have another dtype; a convolution casts its bias as well.
    added = None if bias is None else bias.to(input.dtype)
    return preactivated(input, added, pair_of(activations)[1]).mean((-2, -1))


for _name in ("_channel_means", "_channel_means_aten"):
    library.impl(_name, _channel_means_aten, "CompositeExplicitAutograd")
    library.impl(_name, torch.library.fallthrough_kernel, "Autograd")
