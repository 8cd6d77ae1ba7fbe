"""How many operations of a graph launch kernels."""

from __future__ import annotations

import operator
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx, nn

__all__ = ["count_calls", "does_nothing"]

# They return a view of what they are given, or a number.
_VIEW_METHODS = {
    *("view", "view_as", "reshape", "permute", "transpose", "t", "unsqueeze", "squeeze", "flatten"),
    *("unflatten", "expand", "expand_as", "chunk", "split", "unbind", "narrow", "select", "detach"),
    *(
        "size",
        "dim",
        "stride",
        "numel",
        "movedim",
        "moveaxis",
        "swapaxes",
        "mT",
        "is_floating_point",
    ),
}
_VIEWS = {getattr(torch, name) for name in _VIEW_METHODS if hasattr(torch, name)}
_IDENTITIES = (nn.Identity, nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout)
_DROPOUTS = (F.dropout, F.dropout1d, F.dropout2d, F.dropout3d, F.alpha_dropout)
# Function -> where its argument ``training`` is.
_TRAINING: dict[Any, int] = {**dict.fromkeys(_DROPOUTS, 2), torch.ops.aten.dropout.default: 2}


def count_calls(graph_module: fx.GraphModule) -> int:
    """Number of nodes that compute on tensors in one forward.

    That is each call of a module, function or method, but for views (a reshape that must copy is
    taken for a view), arithmetic on sizes, and dropout and its like in eval mode. A call may launch
    more than one kernel.
    """
    numbers: set[fx.Node] = set()
    total = 0
    for node in graph_module.graph.nodes:
        if node.op not in ("call_module", "call_function", "call_method"):
            continue
        if _is_number(node, numbers):
            numbers.add(node)
        elif not _is_free(graph_module, node):
            total += 1
    return total


def does_nothing(graph_module: fx.GraphModule, node: fx.Node) -> bool:
    """Whether ``node`` returns its input as it is: dropout in eval mode, ``nn.Identity``."""
    target: Any = node.target
    if node.op == "call_module":
        module = graph_module.get_submodule(target)
        return type(module) in _IDENTITIES and not module.training
    if node.op != "call_function":
        return False
    is_depth = getattr(target, "__name__", "") == "stochastic_depth"
    position = 3 if is_depth else _TRAINING.get(target)
    if position is None:
        return False
    given = node.kwargs.get("training", node.kwargs.get("train"))
    return (node.args[position] if len(node.args) > position else given) is False


def _is_number(node: fx.Node, numbers: set[fx.Node]) -> bool:
    """Whether ``node`` is a size, or computed from sizes only."""
    if node.op == "call_method" and node.target in ("size", "dim", "numel", "stride"):
        return True
    if node.target is getattr:
        return node.args[1] in ("shape", "ndim", "dtype", "device")
    inputs = node.all_input_nodes
    return node.op == "call_function" and bool(inputs) and all(n in numbers for n in inputs)


def _is_free(graph_module: fx.GraphModule, node: fx.Node) -> bool:
    target: Any = node.target
    if node.op == "call_module":
        module = graph_module.get_submodule(target)
        guards = type(module).__module__.startswith("torch.export")
        return guards or type(module) in (*_IDENTITIES, nn.Flatten, nn.Unflatten)
    if node.op == "call_method":
        return target in _VIEW_METHODS
    if target in (operator.getitem, getattr, torch._assert):
        return True
    if target in _DROPOUTS or getattr(target, "__name__", "") == "stochastic_depth":
        given = node.kwargs.get("training", node.args[-1] if node.args else None)
        return given is False
    if isinstance(target, torch._ops.OpOverload):
        return bool(target.is_view) or target.name() == "aten::dropout"
    return target in _VIEWS
