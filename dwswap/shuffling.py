"""A concatenation of two images and a shuffle of its channels as one pass over them.

| dispatch key              | kernel of ``_interleave_channels``                                |
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
from dwswap.plain import has_kernels, is_plain, needs_gradient
from dwswap.schema import interleave_channels, library

__all__ = ["interleaved"]


def interleaved(
    first: Tensor,
    second: Tensor,
    channels_last: bool = False,
    *,
    first_bias: Tensor | None = None,
    second_bias: Tensor | None = None,
    first_activation: str = "none",
    second_activation: str = "none",
) -> Tensor:
    """``cat((first, second), 1)`` with its channels shuffled in two groups, as ShuffleNet does.

    Channel ``2 c`` is ``first_activation(first[:, c] + first_bias[c])``, and channel ``2 c + 1``
    the same of ``second``: one pass, where a concatenation, a shuffle, biases and activations are
    one each. On CUDA a kernel of our own, with float32 arithmetic, rounded once.

    Args:
        first, second: ``(N, C, H, W)``; also some of the channels of a wider image, which are read
            where they are. Images of different channels are concatenated first.
        channels_last: the layout of the result; contiguous otherwise.
        first_bias, second_bias: ``(C,)``, optional.
        first_activation, second_activation: a name in ``dwswap.activations.ACTIVATIONS``.

    Returns:
        ``(N, 2 C, H, W)``.
    """
    tensors = (first, second, first_bias, second_bias)
    activations = PAIRS[first_activation, second_activation]
    at_once = is_plain(*tensors) and not needs_gradient(*tensors) and has_kernels(first)
    call = interleave_channels if at_once and build.load() else _interleaved_aten
    return call(*tensors, activations, channels_last)


def _interleaved_aten(
    first: Tensor,
    second: Tensor,
    first_bias: Tensor | None,
    second_bias: Tensor | None,
    activations: int,
    channels_last: bool,
) -> Tensor:
    names = pair_of(activations)
    # Under autocast an image may have another dtype; a convolution casts its bias as well.
    first, second = (
        preactivated(image, None if bias is None else bias.to(image.dtype), name)
        for image, bias, name in zip((first, second), (first_bias, second_bias), names, strict=True)
    )
    if first.shape != second.shape:
        first, second = torch.cat((first, second), 1).chunk(2, 1)
    if not channels_last:
        return torch.stack((first, second), 2).flatten(1, 2).contiguous()
    # Pixels as rows: what has three dimensions is stacked by one kernel.
    rows = [image.permute(0, 2, 3, 1).flatten(0, 2) for image in (first, second)]
    pixels = (first.shape[0], *first.shape[2:])
    return torch.stack(rows, 2).flatten(1).unflatten(0, pixels).permute(0, 3, 1, 2)


for _name in ("_interleave_channels", "_interleave_channels_aten"):
    library.impl(_name, _interleaved_aten, "CompositeExplicitAutograd")
    library.impl(_name, torch.library.fallthrough_kernel, "Autograd")
