"""A concatenation of two images and a shuffle of its channels as one copy."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["interleaved"]


def interleaved(first: Tensor, second: Tensor, channels_last: bool = False) -> Tensor:
    """``cat((first, second), 1)`` with its channels shuffled in two groups, as ShuffleNet does.

    Channel ``2 c`` is ``first[:, c]``, channel ``2 c + 1`` is ``second[:, c]``: a stack along a
    new dimension behind the channels, which is one copy, where a concatenation and a shuffle are
    two. Images of different channels are concatenated first.

    Args:
        first, second: ``(N, C, H, W)``.
        channels_last: the layout of the result; contiguous otherwise.

    Returns:
        ``(N, 2 C, H, W)``.
    """
    if first.shape != second.shape:
        first, second = torch.cat((first, second), 1).chunk(2, 1)
    if not channels_last:
        return torch.stack((first, second), 2).flatten(1, 2).contiguous()
    # Pixels as rows: what has three dimensions is stacked by one kernel.
    rows = [image.permute(0, 2, 3, 1).flatten(0, 2) for image in (first, second)]
    pixels = (first.shape[0], *first.shape[2:])
    return torch.stack(rows, 2).flatten(1).unflatten(0, pixels).permute(0, 3, 1, 2)
