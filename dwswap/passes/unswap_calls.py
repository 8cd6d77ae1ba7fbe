"""The inverse of the swap of calls, for ``restore`` and for layers that fail ``verify``.

Pattern:
    ``call_function`` of ``dwswap.depthwise_conv2d`` or ``torch.ops.dwswap.depthwise_conv2d``, or of
    what ``fuse_separable`` made of one.
Reason:
    Without dwswap the same graph runs on ``torch.conv2d``.
Limits:
    A call that has absorbed neighbours has no ``torch.conv2d`` to go back to: ValueError, or, on
    request, these become calls of their own again.
"""

from __future__ import annotations

import operator
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx

from dwswap.convolution_call import SWAPPED, bind, example_of
from dwswap.ops import depthwise_conv2d
from dwswap.passes.affine_call import value_of
from dwswap.passes.fuse_separable import POINTWISE
from dwswap.pointwise import pointwise_product, pointwise_residual
from dwswap.separable import separable_conv2d

__all__ = ["swapped_calls", "unswap_call"]

_NEUTRAL = {"input_bias": None, "input_activation": "none", "activation": "none"}
_FUNCTIONS: dict[str, tuple[Any, dict[str, Any]]] = {
    "relu": (F.relu, {}),
    "relu6": (F.relu6, {}),
    "hardswish": (F.hardswish, {}),
    "silu": (F.silu, {}),
    "gelu": (F.gelu, {}),
    "gelu_tanh": (F.gelu, {"approximate": "tanh"}),
    "hardsigmoid": (F.hardsigmoid, {}),
    "sigmoid": (torch.sigmoid, {}),
}
_NAMES = ("input", "weight", "bias", "stride", "padding", "dilation")


def swapped_calls(graph_module: fx.GraphModule) -> Iterator[fx.Node]:
    """The nodes that call the dwswap operator."""
    for node in graph_module.graph.nodes:
        if node.op == "call_function" and node.target in SWAPPED:
            yield node


def unswap_call(graph_module: fx.GraphModule, node: fx.Node, *, expand: bool = False) -> None:
    """Replace ``node`` by ``torch.conv2d``; the caller recompiles.

    Args:
        expand: make calls of what ``node`` has absorbed.

    Raises:
        ValueError: without ``expand``, the call has absorbed an activation or an input bias.
    """
    if node.target is separable_conv2d:
        node = _apart(graph_module, node)
    given = {**_NEUTRAL, **bind(node)}
    absorbed = [name for name, value in _NEUTRAL.items() if given[name] != value]
    if absorbed and not expand:
        raise ValueError(
            f"model cannot be restored: {node.name} has absorbed its neighbours "
            f"({', '.join(absorbed)}); restore needs the result of a swap alone"
        )
    graph = graph_module.graph
    with graph.inserting_before(node):
        groups, hidden = given["groups"], given["input"]
        if groups is None:
            example = example_of(hidden)
            known = isinstance(example, Tensor)
            groups = int(example.shape[-3]) if known else graph.call_method("size", (hidden, -3))
        if given["input_bias"] is not None:
            column = graph.call_method("view", (given["input_bias"], -1, 1, 1))
            hidden = graph.call_function(operator.add, (hidden, column))
        hidden = _activated(graph, hidden, given["input_activation"])
        args = (hidden, *(given[name] for name in _NAMES[1:]), groups)
        conv = graph.call_function(torch.conv2d, args)
        conv.meta = {k: v for k, v in node.meta.items() if k != "is_wrapped"}
        new = _activated(graph, conv, given["activation"])
        if "val" in conv.meta:  # of an exported program
            new.meta["val"] = conv.meta["val"]
    node.replace_all_uses_with(new)
    graph.erase_node(node)


def _apart(graph_module: fx.GraphModule, node: fx.Node) -> fx.Node:
    """Make two calls of one of ``separable_conv2d``; the depthwise convolution."""
    graph = graph_module.graph
    input, weight, bias, point_weight, point_bias, residual = node.args
    value = value_of(graph_module, weight)
    assert value is not None
    options = {"dilation": 1, "groups": len(value), **node.kwargs}
    with graph.inserting_before(node):
        depthwise = graph.call_function(depthwise_conv2d, (input, weight, bias), options)
        if residual is not None:
            new = graph.call_function(pointwise_residual, (depthwise, point_weight, residual))
        elif point_bias is not None:
            new = graph.call_function(pointwise_product, (depthwise, point_weight, point_bias))
        else:
            new = graph.call_function(torch.conv2d, (depthwise, point_weight))
    meta = {key: value for key, value in node.meta.items() if key != POINTWISE}
    # A graph from a file has no such key.
    depthwise.meta, new.meta = meta, dict(node.meta.get(POINTWISE, {}))
    if residual is not None or point_bias is not None:
        new.meta["is_wrapped"] = True
    node.replace_all_uses_with(new)
    graph.erase_node(node)
    return depthwise


def _activated(graph: fx.Graph, value: fx.Node, activation: str) -> fx.Node:
    if activation == "none":
        return value
    function, options = _FUNCTIONS[activation]
    return graph.call_function(function, (value,), options)
