"""A pointwise convolution and a residual sum as one matrix product."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["pointwise_residual"]


def pointwise_residual(input: Tensor, weight: Tensor, residual: Tensor) -> Tensor:
    """``residual + conv2d(input, weight)`` for a weight ``(K, C, 1, 1)``; may change ``residual``.

    In channels_last, pixels are rows: ``(N H W, C) @ (C, K)``, and the product is added to what the
    rows of ``residual`` hold (``beta * C`` in BLAS). Rounded once, not twice. In any other layout,
    where shapes or dtypes differ, and where gradients are recorded, it is the convolution and the
    sum.

    Args:
        input: ``(N, C, H, W)``, of other memory than ``residual``.
        residual: ``(N, K, H, W)``.
    """
    if not _is_product(input, weight, residual):
        return residual + F.conv2d(input, weight)
    rows, sums = (t.permute(0, 2, 3, 1).flatten(0, 2) for t in (input, residual))
    sums.addmm_(rows, weight.flatten(1).t())
    return residual


def _is_product(input: Tensor, weight: Tensor, residual: Tensor) -> bool:
    """Whether views of them can be multiplied, with the result that the convolution has."""
    if input.dim() != 4 or residual.dim() != 4 or input.numel() == 0:
        return False
    fits = (input.shape[0], *input.shape[2:]) == (residual.shape[0], *residual.shape[2:])
    if not fits or residual.shape[1] != weight.shape[0]:
        return False
    if not input.dtype == weight.dtype == residual.dtype:
        return False
    if torch.is_autocast_enabled(input.device.type):
        return False
    if torch.is_grad_enabled() and any(t.requires_grad for t in (input, weight, residual)):
        return False
    return all(t.is_contiguous(memory_format=torch.channels_last) for t in (input, residual))
