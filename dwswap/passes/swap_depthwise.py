"""Swap depthwise convolutions for the dwswap operator.

Pattern:
    ``call_module`` of an eligible ``nn.Conv2d``, and ``call_function`` of a 2-D convolution
    (``torch.conv2d``, ``aten.conv2d``, its ``.padding`` overload, ``aten.convolution``,
    ``aten._conv_depthwise2d``) whose groups are static and whose weight is ``(C * m, 1, kh, kw)``
    with ``groups == C > 1``.
Reason:
    The operator computes the same, faster, and later passes absorb its neighbours into it.
Limits:
    A module stays a ``call_module`` node at its path; its Parameters and keys stay. A call stays
    where groups or the shape of the weight are not known before it runs.
"""

from __future__ import annotations

from typing import Any

from torch import fx

from dwswap.convolution_call import ConvolutionCall, bind, find_calls
from dwswap.ops import depthwise_conv2d
from dwswap.passes.context import Context
from dwswap.passes.substitution import swap_modules

__all__ = ["swap_depthwise"]


def swap_depthwise(graph_module: fx.GraphModule, context: Context) -> None:
    """Swap in place; adds a layer per functional convolution to ``context.layers``."""
    swap_modules(graph_module, context.layers, context.prefix)
    calls = find_calls(
        graph_module, prefix=context.prefix, shapes=context.shapes, skip=context.skip
    )
    for call in list(calls):
        # A convolution module that was traced into is described by the call that it makes.
        context.layers.pop(call.owner, None)
        context.layers[call.layer.path] = call.layer
        context.keep_path(call.node, call.layer.path)
        if call.layer.reason == "depthwise":
            context.replaced(call.node, _swap_call(graph_module.graph, call))


def _swap_call(graph: fx.Graph, call: ConvolutionCall) -> fx.Node:
    node = call.node
    arguments = bind(node)  # as they are now: an input may have been swapped since
    with graph.inserting_before(node):
        new = graph.call_function(
            depthwise_conv2d,
            (arguments["input"], arguments["weight"], arguments["bias"]),
            {
                "stride": _tuple(arguments["stride"]),
                "padding": _tuple(arguments["padding"]),
                "dilation": _tuple(arguments["dilation"]),
                "groups": call.arguments["groups"],
            },
        )
    # torch.fx traces the generated code when it unpickles; is_wrapped keeps the call one node.
    new.meta = {**node.meta, "is_wrapped": True}
    node.replace_all_uses_with(new)
    graph.erase_node(node)
    return new


def _tuple(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value
