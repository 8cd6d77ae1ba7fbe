"""The inverse of the swap of calls, for ``restore`` and for layers that fail ``verify``.

Pattern:
    ``call_function`` of ``dwswap.depthwise_conv2d`` or ``torch.ops.dwswap.depthwise_conv2d``.
Reason:
    Without dwswap the same graph runs on ``torch.conv2d``.
Limits:
    A call that has absorbed neighbours has no ``torch.conv2d`` to go back to: ValueError.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import fx

from dwswap.convolution_call import OPERATOR, bind

__all__ = ["swapped_calls", "unswap_call"]

_NEUTRAL = {"input_bias": None, "input_activation": "none", "activation": "none"}
_NAMES = ("input", "weight", "bias", "stride", "padding", "dilation")


def swapped_calls(graph_module: fx.GraphModule) -> Iterator[fx.Node]:
    """The nodes that call the dwswap operator."""
    for node in graph_module.graph.nodes:
        if node.op == "call_function" and node.target in OPERATOR:
            yield node


def unswap_call(graph_module: fx.GraphModule, node: fx.Node) -> None:
    """Replace ``node`` by ``torch.conv2d``; the caller recompiles.

    Raises:
        ValueError: the call has absorbed an activation or an input bias.
    """
    given = bind(node)
    absorbed = [name for name, value in _NEUTRAL.items() if given.get(name, value) != value]
    if absorbed:
        raise ValueError(
            f"model cannot be restored: {node.name} has absorbed its neighbours "
            f"({', '.join(absorbed)}); restore needs the result of a swap alone"
        )
    graph = graph_module.graph
    with graph.inserting_before(node):
        groups = given["groups"]
        if groups is None:
            groups = graph.call_method("size", (given["input"], -3))
        args = (*(given[name] for name in _NAMES), groups)
        new = graph.call_function(torch.conv2d, args)
    new.meta = {k: v for k, v in node.meta.items() if k != "is_wrapped"}
    node.replace_all_uses_with(new)
    graph.erase_node(node)
