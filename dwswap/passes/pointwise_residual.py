"""Pointwise convolutions: the sum with a residual as part of the matrix product.

Pattern:
    ``x + conv(h)`` with a 1 x 1 convolution without bias, stride, padding and groups, whose output
    nothing else reads. ``push_bias`` has removed the bias of most.
Reason:
    In channels_last the convolution is a matrix product of views, and BLAS adds to what its output
    holds for the time of reading it; a sum of its own reads both, writes, and is a launch.
Limits:
    Where the graph computes ``x`` itself and nothing reads it later: the product takes its place.
    BLAS would copy another ``x`` first, which costs what the sum does. In half precision on CUDA:
    in float32 convolutions may round to TF32 and products may not.
"""

from __future__ import annotations

import operator

import torch
from torch import fx

from dwswap.passes.affine_call import AffineCall, affine_call
from dwswap.passes.aliasing import changes_between
from dwswap.passes.context import Context
from dwswap.passes.pointwise_call import product_weight
from dwswap.pointwise import pointwise_residual

__all__ = ["fuse_residual"]

_SUMS = (operator.add, torch.add, torch.ops.aten.add.Tensor)
_FUSED = pointwise_residual


def fuse_residual(graph_module: fx.GraphModule, context: Context) -> None:
    """Fuse in place."""
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
            if not _is_spare(graph_module, other, node):
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
    alone = call.bias is None and len(call.node.users) == 1
    return alone and product_weight(graph_module, call) is not None


def _is_spare(graph_module: fx.GraphModule, value: fx.Node, last: fx.Node) -> bool:
    """Whether ``value`` is memory of its own that nothing reads after ``last``."""
    is_new = affine_call(graph_module, value) is not None
    if not is_new and not (value.op == "call_function" and value.target in (*_SUMS, _FUSED)):
        return False
    # A convolution's output is no view of its input.
    return all(
        user is last or (user < last and affine_call(graph_module, user) is not None)
        for user in value.users
    )
