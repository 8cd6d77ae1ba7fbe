"""Activations that are written out, beside depthwise convolutions, as the one call that they are.

Pattern:
    ``x * sigmoid(x)``, ``relu6(x + 3) / 6`` and ``x * relu6(x + 3) / 6``, as functions, methods or
    aten operators, with whatever clamps to 0 and 6; what ``run_decompositions`` of an exported
    program makes of silu, hardsigmoid and hardswish.
Reason:
    ``absorb_activation`` then takes them for what they are.
Limits:
    Nothing else reads what is in between, nothing changes the input meanwhile, and the operator is
    just before or after; elsewhere a compiler may have use for the parts.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx

from dwswap.passes.activation_call import activation_call
from dwswap.passes.affine_call import affine_call
from dwswap.passes.aliasing import changes_between
from dwswap.passes.context import Context

__all__ = ["recompose_activation"]

aten = torch.ops.aten

_SUMS = (operator.add, torch.add, aten.add.Tensor, "add")
_PRODUCTS = (operator.mul, torch.mul, aten.mul.Tensor, "mul")
_QUOTIENTS = (operator.truediv, torch.div, aten.div.Tensor, "div")
# ``x * gate(x)``
_GATED: dict[str | None, Any] = {"sigmoid": F.silu, "hardsigmoid": F.hardswish}
_CLAMPS = (aten.clamp.default, aten.clamp_max.default)


def recompose_activation(graph_module: fx.GraphModule, context: Context) -> None:
    """Rewrite in place."""
    graph = graph_module.graph
    gone: set[fx.Node] = set()
    for node in reversed(list(graph.nodes)):  # hardsigmoid is a part of hardswish
        found = None if node in gone else _find(graph_module, node)
        if found is None:
            continue
        function, input, parts = found
        beside = [affine_call(graph_module, n) for n in (input, *node.users)]
        inside = [part for part in parts if part is not node]
        if not any(call is not None and call.depthwise for call in beside):
            continue
        if any(len(part.users) > 1 for part in inside):
            continue
        # The new call reads the input where the last part is, not where the first one did.
        if changes_between(graph_module, parts[-1], node, apart=inside):
            continue
        with graph.inserting_before(node):
            new = graph.call_function(function, (input,))
        new.meta = dict(node.meta)
        context.replaced(node, new)
        node.replace_all_uses_with(new)
        for part in (node, *inside):
            graph.erase_node(part)
            context.release(part)
            gone.add(part)


Found = tuple[Callable[..., Any], fx.Node, list[fx.Node]]


def _find(graph_module: fx.GraphModule, node: fx.Node) -> Found | None:
    """The activation that ends in ``node``, its input, and its parts, users first."""
    for one, other in _operands(node, _PRODUCTS):
        found = activation_call(graph_module, other)
        plain = found is not None and not found.in_place and found.refusal is None
        if found is not None and plain and found.input is one and found.name in _GATED:
            return _GATED[found.name], one, [node, other]
        gate = _gate(graph_module, other)
        if gate is not None and gate[0] is one:
            return F.hardswish, one, [node, *gate[1]]
    gate = _gate(graph_module, node)
    if gate is not None:
        return F.hardsigmoid, *gate
    if _is_call(node, _QUOTIENTS, 6):
        for one, other in _operands(node.args[0], _PRODUCTS):
            bounded = _bounded(graph_module, other)
            if bounded is not None and bounded[0] is one:
                return F.hardswish, one, [node, node.all_input_nodes[0], *bounded[1]]
    return None


def _gate(graph_module: fx.GraphModule, node: fx.Node) -> tuple[fx.Node, list[fx.Node]] | None:
    """``x`` and the parts, where ``node`` is ``relu6(x + 3) / 6``."""
    if not _is_call(node, _QUOTIENTS, 6):
        return None
    found = _bounded(graph_module, node.all_input_nodes[0])
    return None if found is None else (found[0], [node, *found[1]])


def _bounded(graph_module: fx.GraphModule, node: fx.Node) -> tuple[fx.Node, list[fx.Node]] | None:
    """``x`` and the parts, where ``node`` is ``relu6(x + 3)``."""
    parts = [node]
    name = "relu6"
    if node.target in _CLAMPS and node.args[1:] in ((None, 6), (6,)) and not node.kwargs:
        parts += node.all_input_nodes
        name = "relu"
    found = activation_call(graph_module, parts[-1])
    if found is None or found.name != name or found.refusal is not None:
        return None
    for input, three in _operands(found.input, _SUMS, numbers=True):
        if three == 3 and isinstance(input, fx.Node):
            return input, [*parts, found.input]
    return None


def _operands(node: Any, targets: tuple[Any, ...], numbers: bool = False) -> Iterator[Any]:
    """Both operands of a call of one of ``targets``, in both orders."""
    if not isinstance(node, fx.Node) or node.op not in ("call_function", "call_method"):
        return
    if node.target not in targets or len(node.args) != 2 or node.kwargs:
        return
    one, other = node.args
    for pair in ((one, other), (other, one)):
        if numbers or all(isinstance(value, fx.Node) for value in pair):
            yield pair


def _is_call(node: fx.Node, targets: tuple[Any, ...], number: int) -> bool:
    pairs = _operands(node, targets, numbers=True)
    return any(isinstance(one, fx.Node) and other == number for one, other in list(pairs)[:1])
