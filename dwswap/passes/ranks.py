"""How many dimensions a value has, as far as the graph tells."""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import fx, nn

from dwswap.eligibility import reason_not_plain
from dwswap.passes.activation_call import ActivationCall, activation_call
from dwswap.passes.affine_call import AffineCall, affine_call, value_of
from dwswap.passes.context import Context
from dwswap.passes.count_calls import does_nothing
from dwswap.passes.layout_kinds import name_of
from dwswap.passes.norm_call import NormCall, norm_call
from dwswap.passes.permutation import permutation
from dwswap.passes.pooling import pooled

__all__ = ["is_image", "known_rank", "same_rank"]

# These take one number of dimensions only, and return as many.
_FIXED: dict[type, int] = {nn.BatchNorm2d: 4, nn.BatchNorm3d: 5}
_ELEMENTWISE = (nn.Identity, nn.Dropout, nn.BatchNorm1d)
_ARITHMETIC = (operator.add, operator.iadd, operator.mul, operator.imul, torch.add, torch.mul)
_IDENTITIES = (nn.Identity, nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d)
# These take images alone.
_OF_IMAGES = {"max_pool2d", "avg_pool2d", "adaptive_avg_pool2d", "adaptive_max_pool2d"}
_OF_IMAGES |= {"squeeze_excitation"}
_MODULES_OF_IMAGES = (nn.MaxPool2d, nn.AvgPool2d, nn.AdaptiveAvgPool2d, nn.AdaptiveMaxPool2d)
# These return as many dimensions as the first tensor has that they are given.
_COPIES = {"clone", "contiguous", "float", "half", "interpolate", "to", "type_as"}


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


def is_image(graph_module: fx.GraphModule, node: object, context: Context) -> bool:
    """Whether ``node`` has no more dimensions than a batch of images, whatever the graph is
    given."""
    if not isinstance(node, fx.Node):
        return False
    value = value_of(graph_module, node)
    rank = context.rank(node) if value is None else value.dim()
    if rank is not None:
        return rank <= 4
    call = affine_call(graph_module, node)
    if call is not None and call.spatial == 2:
        return call.module is None or reason_not_plain(call.module) is None
    if name_of(node) in _OF_IMAGES:
        return True
    if node.op == "call_module":
        module = graph_module.get_submodule(str(node.target))
        if type(module) in _MODULES_OF_IMAGES and reason_not_plain(module) is None:
            return True
    if name_of(node) == "cat":  # all have as many
        return any(is_image(graph_module, value, context) for value in node.all_input_nodes)
    values = same_rank(graph_module, node)
    if name_of(node) in _COPIES or does_nothing(graph_module, node):
        values = node.all_input_nodes[:1]
    if values and all(is_image(graph_module, value, context) for value in values):
        return True
    rank = known_rank(graph_module, node, context)
    return rank is not None and rank <= 4


def same_rank(graph_module: fx.GraphModule, node: fx.Node) -> list[fx.Node]:
    """Values that have as many dimensions as ``node``, if all of them have the same."""
    call: AffineCall | NormCall | ActivationCall | None = affine_call(graph_module, node)
    call = call or norm_call(graph_module, node) or activation_call(graph_module, node)
    if call is not None:
        return [call.input] if isinstance(call.input, fx.Node) else []
    means = pooled(graph_module, node)
    if means is not None:
        return [means[0]] if means[1] else []
    if node.op == "call_module":
        module = graph_module.get_submodule(str(node.target))
        values = node.args if type(module) in _IDENTITIES else ()
    else:
        values = node.args if node.target in _ARITHMETIC and len(node.args) == 2 else ()
    return [value for value in values if isinstance(value, fx.Node)]
