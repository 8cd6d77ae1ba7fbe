"""How many dimensions a value has, as far as the graph tells."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx, nn

from dwswap.passes.affine_call import affine_call
from dwswap.passes.context import Context
from dwswap.passes.permutation import permutation

__all__ = ["known_rank"]

# These take one number of dimensions only, and return as many.
_FIXED: dict[type, int] = {nn.BatchNorm2d: 4, nn.BatchNorm3d: 5}
_ELEMENTWISE = (nn.Identity, nn.Dropout, nn.BatchNorm1d)


def known_rank(graph_module: fx.GraphModule, node: object, context: Context) -> int | None:
    """Number of dimensions of ``node``; None where another input could make it another."""
    if not isinstance(node, fx.Node):
        return None
    rank = context.rank(node)
    if rank is not None:
        return rank
    call = affine_call(graph_module, node)
    if call is not None:
        return known_rank(graph_module, call.input, context)
    order = permutation(node)
    if order is not None:
        return len(order)
    target: Any = node.target
    if node.op == "call_module":
        module = graph_module.get_submodule(str(target))
        if type(module) is nn.Flatten:
            return 2 if (module.start_dim, module.end_dim) == (1, -1) else None
        elementwise = type(module) in _ELEMENTWISE
        elementwise = elementwise or type(module).__module__ == nn.ReLU.__module__
        if elementwise and node.args:
            return known_rank(graph_module, node.args[0], context)
        return _FIXED.get(type(module))
    given = (*node.args[1:], *node.kwargs.values())
    if target in (torch.flatten, "flatten"):
        return 2 if given in ((1,), (1, -1)) else None
    if target in ("view", "reshape") and all(isinstance(size, (int, fx.Node)) for size in given):
        return len(given) if len(given) > 1 else None
    return None
