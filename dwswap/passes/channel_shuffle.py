"""Channel shuffles: one copy instead of two where that is possible, and in the layout of the graph.

Pattern:
    ``x.view(n, g, c // g, h, w).transpose(1, 2).contiguous().view(n, c, h, w)``, as in ShuffleNet;
    with ``x = cat((a, b), 1)`` and two groups it interleaves the channels of ``a`` and ``b``.
Reason:
    The concatenation and the shuffle are a copy each; interleaving is one. And the result of the
    shuffle is contiguous, whatever ``x`` is, and so would be all that follows.
Limits:
    The sizes must be the same values; nothing else reads what is in between.
"""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import fx

from dwswap.passes.aliasing import changes_between
from dwswap.passes.context import Context
from dwswap.shuffling import interleaved

__all__ = ["fuse_shuffle", "keep_layout", "shuffle_groups", "shuffle_input"]

_VIEWS = ("view", "reshape", torch.reshape)
_NUMBERS = (operator.getitem, operator.floordiv)


def shuffle_input(node: fx.Node) -> fx.Node | None:
    """The value whose channels ``node``, the last of such a chain, shuffles."""
    found = _chain(node)
    return None if found is None else found[0]


def shuffle_groups(node: fx.Node) -> int | None:
    """In how many groups ``node`` shuffles, where it does and that is a number."""
    found = _chain(node)
    split = None if found is None else found[1].args[0]
    sizes = _sizes(split) if isinstance(split, fx.Node) else None
    return sizes[1] if sizes is not None and isinstance(sizes[1], int) else None


def fuse_shuffle(graph_module: fx.GraphModule, context: Context) -> None:
    """Interleave in place what is concatenated to be shuffled."""
    for node in list(graph_module.graph.nodes):
        pair = _pair(graph_module, node)
        if pair is not None:
            context.replaced(node, _interleave(graph_module.graph, node, *pair))


def keep_layout(graph_module: fx.GraphModule) -> dict[fx.Node, fx.Node]:
    """Rewrite every shuffle of the graph to give a channels_last result; old node -> new node."""
    graph = graph_module.graph
    replaced: dict[fx.Node, fx.Node] = {}
    for node in list(graph.nodes):
        pair, found = _pair(graph_module, node), _chain(node)
        if pair is not None:
            replaced[node] = _interleave(graph, node, *pair, True)
        elif found is not None:
            _, transposed = found
            with graph.inserting_before(node):
                last = graph.call_method("permute", (transposed, 0, 3, 4, 1, 2))
                flat = graph.call_method("flatten", (last, 3))
                new = graph.call_method("permute", (flat, 0, 3, 1, 2))
            new.meta = dict(node.meta)
            contiguous = node.args[0]
            node.replace_all_uses_with(new)
            graph.erase_node(node)
            assert isinstance(contiguous, fx.Node)
            graph.erase_node(contiguous)
            replaced[node] = new
    return replaced


def _interleave(
    graph: fx.Graph,
    node: fx.Node,
    pair: tuple[fx.Node, fx.Node],
    dead: list[fx.Node],
    *options: Any,
) -> fx.Node:
    with graph.inserting_before(node):
        new = graph.call_function(interleaved, (*pair, *options))
    # torch.fx traces the generated code when it unpickles; is_wrapped keeps the call one node.
    new.meta = {**node.meta, "is_wrapped": True}
    node.replace_all_uses_with(new)
    for unused in dead:
        graph.erase_node(unused)
    return new


def _pair(
    graph_module: fx.GraphModule, node: fx.Node
) -> tuple[tuple[fx.Node, fx.Node], list[fx.Node]] | None:
    """The two images whose concatenation ``node`` shuffles in two groups, and what needs not run
    when they are interleaved, the last one first."""
    found = _chain(node)
    if found is None:
        return None
    joined, transposed = found
    split = transposed.args[0]
    assert isinstance(split, fx.Node)
    sizes, images = _sizes(split), _concatenated(joined)
    if images is None or sizes is None or sizes[1] != 2:
        return None
    if changes_between(graph_module, joined, node):
        return None
    chain = {node, node.args[0], transposed, split, joined}
    numbers = _sizes_of(graph_module.graph, joined)
    dead: list[fx.Node] = []
    for other in reversed(graph_module.graph.nodes):
        if other in chain or (other in numbers and all(user in dead for user in other.users)):
            dead.append(other)
    return (images, dead) if all(user in dead for user in joined.users) else None


def _concatenated(node: fx.Node) -> tuple[fx.Node, fx.Node] | None:
    """The images, where ``node`` concatenates the channels of two."""
    if node.target is not torch.cat:
        return None
    given = dict(zip(("tensors", "dim"), node.args, strict=False)) | node.kwargs
    if given.keys() != {"tensors", "dim"} or given["dim"] != 1:
        return None
    images = given["tensors"]
    if not isinstance(images, (list, tuple)) or len(images) != 2:
        return None
    first, second = images
    if not isinstance(first, fx.Node) or not isinstance(second, fx.Node):
        return None
    return first, second


def _sizes_of(graph: fx.Graph, value: fx.Node) -> set[fx.Node]:
    """The nodes that compute from the sizes of ``value`` and from nothing else."""
    numbers: set[fx.Node] = set()
    for user in value.users:
        shape = user.target is getattr and user.args[1] == "shape"
        if shape or (user.op == "call_method" and user.target == "size"):
            numbers.add(user)
    for node in graph.nodes:
        inputs = node.all_input_nodes
        if node.target in _NUMBERS and inputs and numbers.issuperset(inputs):
            numbers.add(node)
    return numbers


def _chain(node: fx.Node) -> tuple[fx.Node, fx.Node] | None:
    """What is shuffled, and the transposed view of it."""
    if not _is(node, *_VIEWS) or node.kwargs:
        return None
    merged, copied = _sizes(node), _only_input(node, "contiguous")
    if merged is None or len(merged) != 4 or copied is None or copied.kwargs:
        return None
    transposed = _only_input(copied, "transpose", torch.transpose)
    if transposed is None or transposed.args[1:] not in ((1, 2), (2, 1)):
        return None
    split = _only_input(transposed, *_VIEWS)
    sizes = None if split is None or split.kwargs else _sizes(split)
    if split is None or sizes is None or len(sizes) != 5 or not isinstance(split.args[0], fx.Node):
        return None
    same = merged[0] is sizes[0] and merged[2] is sizes[3] and merged[3] is sizes[4]
    return (split.args[0], transposed) if same else None


def _only_input(node: fx.Node, *targets: object) -> fx.Node | None:
    """The first argument of ``node``, where that calls one of ``targets`` and has no other user."""
    found = node.args[0]
    alone = isinstance(found, fx.Node) and len(found.users) == 1
    return found if alone and isinstance(found, fx.Node) and _is(found, *targets) else None


def _is(node: fx.Node, *targets: object) -> bool:
    return node.op in ("call_function", "call_method") and node.target in targets


def _sizes(node: fx.Node) -> tuple[object, ...] | None:
    sizes: tuple[Any, ...] = node.args[1:]
    if len(sizes) == 1 and isinstance(sizes[0], (list, tuple)):
        sizes = tuple(sizes[0])
    return sizes if all(isinstance(size, (int, fx.Node)) for size in sizes) else None
