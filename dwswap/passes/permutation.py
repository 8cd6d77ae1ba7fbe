"""Permutations of dimensions in a graph."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

__all__ = ["TO_IMAGE", "moved", "permutation"]

TO_IMAGE = (0, 3, 1, 2)
"""``(N, H, W, C)`` to ``(N, C, H, W)``."""

aten = torch.ops.aten
_PERMUTES = (torch.permute, aten.permute, aten.permute.default)


def permutation(node: fx.Node) -> tuple[int, ...] | None:
    """Which dimension of its input each of the output's is, from 0; None where it is no permute.

    The input is ``node.args[0]``.
    """
    is_function = node.op == "call_function" and node.target in _PERMUTES
    is_method = node.op == "call_method" and node.target == "permute"
    if not (is_function or is_method) or not node.args:
        return None
    given: Any = node.args[1:]
    dims: Any = node.kwargs["dims"] if set(node.kwargs) == {"dims"} else given
    if node.kwargs and (given or dims is given):
        return None
    if len(dims) == 1 and isinstance(dims[0], (list, tuple)):
        dims = dims[0]
    if not all(type(dim) is int for dim in dims):
        return None
    positions = tuple(dim % len(dims) for dim in dims)
    return positions if sorted(positions) == list(range(len(dims))) else None


def moved(dim: int, order: tuple[int, ...]) -> int:
    """Where ``dim``, counted from the end, is in a value that is permuted by ``order``."""
    return order.index(len(order) + dim) - len(order)
