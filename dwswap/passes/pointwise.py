"""Pointwise convolutions: the sum with a residual as part of the matrix product.

Pattern:
    ``x + conv(h)`` with a 1 x 1 convolution without bias, stride, padding and groups, whose output
    nothing else reads. ``push_bias`` has removed the bias of most.
Reason:
    In channels_last the convolution is a matrix product of views, and BLAS adds what it starts
    from for the time of reading it; a sum of its own reads both and writes once more.
Limits:
    Off until it is measured (:data:`FUSE_RESIDUAL`). All other pointwise convolutions stay as they
    are: without a bias and in channels_last, cuDNN's take the time of the matrix product.
"""

from __future__ import annotations

import operator

import torch
from torch import fx

from dwswap.passes.affine_call import AffineCall, affine_call, value_of
from dwswap.passes.aliasing import changes_between
from dwswap.passes.context import Context
from dwswap.passes.padding import is_unpadded
from dwswap.residual import pointwise_residual

__all__ = ["FUSE_RESIDUAL", "fuse_residual"]

FUSE_RESIDUAL = False
"""Whether :func:`fuse_residual` does anything."""

_SUMS = (operator.add, torch.add, torch.ops.aten.add.Tensor)


def fuse_residual(graph_module: fx.GraphModule, context: Context) -> None:
    """Fuse in place."""
    if not FUSE_RESIDUAL:
        return
    graph = graph_module.graph
    for node in list(graph.nodes):
        if node.op != "call_function" or node.target not in _SUMS:
            continue
        if node.kwargs or len(node.args) != 2 or node.args[0] is node.args[1]:
            continue
        for i in (1, 0):
            call, other = affine_call(graph_module, node.args[i]), node.args[1 - i]
            if call is None or not isinstance(other, fx.Node) or not _is_plain(graph_module, call):
                continue
            if changes_between(graph_module, call.node, node):
                continue  # the product comes later than the convolution did
            path = context.path_of(call.node)
            with graph.inserting_before(node):
                weight = call.weight
                weight = graph.get_attr(weight) if isinstance(weight, str) else weight
                new = graph.call_function(pointwise_residual, (call.input, weight, other))
            new.meta = {**node.meta, "is_wrapped": True}
            context.keep_path(new, path)
            context.replaced(node, new)
            node.replace_all_uses_with(new)
            graph.erase_node(node)
            graph.erase_node(call.node)
            context.release(call.node)
            break


def _is_plain(graph_module: fx.GraphModule, call: AffineCall) -> bool:
    if call.spatial != 2 or call.transposed or call.depthwise or call.refusal is not None:
        return False
    weight = value_of(graph_module, call.weight)
    if weight is None or weight.shape[2:] != (1, 1) or len(call.node.users) > 1:
        return False
    strides = call.option("stride")
    ones = all(s == 1 for s in (strides if isinstance(strides, (list, tuple)) else [strides]))
    return ones and call.option("groups") == 1 and call.bias is None and is_unpadded(call, weight)
