"""Check numbers of dimensions where values come in.

Pattern:
    ``torch._assert(x.ndim == 4, ...)``, as a BatchNorm with a forward of its own has it (timm's).
Reason:
    The check is one more reader of what a layer computes, which would keep BatchNorm and
    activations from becoming part of it. Layers, norms and activations return as many dimensions
    as they take: a check of what the graph gets says the same, once, and tells the other passes
    the number.
Limits:
    A value stays checked where it is when its number does not follow from one of another value.
"""

from __future__ import annotations

import operator
from typing import NamedTuple

import torch
from torch import fx

from dwswap.passes.context import Context
from dwswap.passes.ranks import same_rank

__all__ = ["hoist_rank_checks"]


class _Check(NamedTuple):
    """An assertion, what it is about, and the nodes that it takes."""

    value: fx.Node
    rank: int
    nodes: tuple[fx.Node, ...]  # the last one first


def hoist_rank_checks(graph_module: fx.GraphModule, context: Context) -> None:
    """Move checks in place, and note the numbers of dimensions in ``context.ranks``."""
    graph = graph_module.graph
    checks = [check for node in graph.nodes if (check := _check(node)) is not None]
    if not checks:
        return
    sources = _sources(graph_module)
    checked: set[tuple[fx.Node, int]] = set()
    for value, rank, nodes in checks:
        source = sources[value]
        if (source, rank) not in checked and source is not value:
            _insert(graph, source, rank)
        if (source, rank) in checked or source is not value:
            for node in nodes:
                if not node.users:
                    graph.erase_node(node)
        checked.add((source, rank))
    # For the text of a check its forward may have asked once more.
    for node in list(graph.nodes):
        if node.target is getattr and node.args[1] == "ndim" and not node.users:
            graph.erase_node(node)
    ranks = dict(checked)
    context.ranks |= {node: ranks[source] for node, source in sources.items() if source in ranks}


def _check(node: fx.Node) -> _Check | None:
    if node.target is not torch._assert or node.users:
        return None
    equal = node.args[0]
    if not isinstance(equal, fx.Node) or equal.target is not operator.eq:
        return None
    number, rank = equal.args
    if not isinstance(number, fx.Node) or not isinstance(rank, int):
        return None
    by_attribute = number.target is getattr and number.args[1] == "ndim"
    by_method = number.op == "call_method" and number.target == "dim"
    value = number.args[0] if by_attribute or by_method else None
    return _Check(value, rank, (node, equal, number)) if isinstance(value, fx.Node) else None


def _insert(graph: fx.Graph, value: fx.Node, rank: int) -> None:
    # All that comes in, comes in first.
    last = value
    if value.op == "placeholder":
        last = [node for node in graph.nodes if node.op == "placeholder"][-1]
    with graph.inserting_after(last):
        number = graph.call_function(getattr, (value, "ndim"))
    with graph.inserting_after(number):
        equal = graph.call_function(operator.eq, (number, rank))
    with graph.inserting_after(equal):
        graph.call_function(torch._assert, (equal, f"{value.name} must have {rank} dimensions"))


def _sources(graph_module: fx.GraphModule) -> dict[fx.Node, fx.Node]:
    """Of every node the first value that has as many dimensions as it, whatever that is given."""
    sources: dict[fx.Node, fx.Node] = {}
    for node in graph_module.graph.nodes:
        found = {sources[value] for value in same_rank(graph_module, node)}
        sources[node] = found.pop() if len(found) == 1 else node
    return sources
