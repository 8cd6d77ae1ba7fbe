"""Channel shuffles that keep the layout, for ``memory_format``.

Pattern:
    ``x.view(n, g, c // g, h, w).transpose(1, 2).contiguous().view(n, c, h, w)``, as in ShuffleNet.
Reason:
    Its result is contiguous, whatever ``x`` is, and so would be all that follows.
Limits:
    The sizes must be the same values; nothing else reads what is in between.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

__all__ = ["keep_layout", "shuffle_input"]

_VIEWS = ("view", "reshape", torch.reshape)


def shuffle_input(node: fx.Node) -> fx.Node | None:
    """The value whose channels ``node``, the last of such a chain, shuffles."""
    found = _chain(node)
    return None if found is None else found[0]


def keep_layout(graph: fx.Graph) -> list[fx.Node]:
    """Rewrite every shuffle of ``graph`` to give a channels_last result; returns the results."""
    results = []
    for node in list(graph.nodes):
        found = _chain(node)
        if found is None:
            continue
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
        results.append(new)
    return results


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
