"""Pointwise convolutions and linear layers: the sum with a residual as part of the product.

Pattern:
    ``x + conv(h)`` with a 1 x 1 convolution without bias, stride, padding and groups, or ``x`` and
    a linear layer on ``(N, H, W, C)`` whose result is permuted to ``(N, C, H, W)``, as ConvNeXt
    has it; in place or not; nothing else reads the output. ``push_bias`` has removed the bias of
    most.
Reason:
    In channels_last the convolution is a matrix product of views, and BLAS adds to what its output
    holds for the time of reading it; a sum of its own reads both, writes, and is a launch.
Limits:
    Where the graph computes ``x`` itself and nothing reads it later, nor does the layer: the
    product takes its place. BLAS would copy another ``x`` first, which costs what the sum does. In
    half precision on CUDA: in float32 convolutions may round to TF32 and products may not.
"""

from __future__ import annotations

import operator

import torch
from torch import fx

from dwswap.passes.affine_call import AffineCall, affine_call
from dwswap.passes.aliasing import changes_between
from dwswap.passes.context import Context
from dwswap.passes.layer_norm_call import layer_norm_call
from dwswap.passes.permutation import TO_IMAGE, permutation
from dwswap.passes.pointwise_call import linear_weight, product_weight
from dwswap.pointwise import pointwise_residual

__all__ = ["fuse_residual"]

_SUMS = (operator.add, operator.iadd, torch.add, torch.ops.aten.add.Tensor)
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
            call, other = _product(graph_module, node.args[i]), node.args[1 - i]
            if call is None or not isinstance(other, fx.Node):
                continue
            if call.input is other or not _is_spare(graph_module, other, node):
                continue  # a product cannot write what it reads
            if changes_between(graph_module, call.node, node):
                continue  # the product comes later than the layer did
            _rewrite(graph, context, node, call, other)
            break


def _rewrite(
    graph: fx.Graph, context: Context, node: fx.Node, call: AffineCall, other: fx.Node
) -> None:
    path, user = context.path_of(call.node), next(iter(call.node.users))
    with graph.inserting_before(node):
        weight = call.weight
        weight = graph.get_attr(weight) if isinstance(weight, str) else weight
        image = call.input
        if user is not node:
            image = graph.call_function(torch.permute, (image, list(TO_IMAGE)))
        new = graph.call_function(pointwise_residual, (image, weight, other))
    new.meta = {**node.meta, "is_wrapped": True}
    context.keep_path(new, path)
    context.replaced(node, new)
    node.replace_all_uses_with(new)
    for old in (node, call.node) if user is node else (node, user, call.node):
        graph.erase_node(old)
    context.release(call.node)


def _product(graph_module: fx.GraphModule, value: object) -> AffineCall | None:
    """The layer without a bias that ``value`` is the image of, where nothing else reads it."""
    if not isinstance(value, fx.Node) or len(value.users) > 1:
        return None
    order = permutation(value)
    call = affine_call(graph_module, value if order is None else value.args[0])
    if call is None or call.bias is not None or len(call.node.users) > 1:
        return None
    if order is None:
        weight = product_weight(graph_module, call)
    else:
        weight = linear_weight(graph_module, call) if order == TO_IMAGE else None
    return None if weight is None else call


def _is_spare(graph_module: fx.GraphModule, value: fx.Node, last: fx.Node) -> bool:
    """Whether ``value`` is memory of its own that nothing reads after ``last``."""
    is_new = affine_call(graph_module, value) is not None
    is_new = is_new or layer_norm_call(graph_module, value) is not None
    if value.target is operator.iadd:
        changed = value.args[0]
        if not isinstance(changed, fx.Node) or not _is_spare(graph_module, changed, value):
            return False
    if not is_new and not (value.op == "call_function" and value.target in (*_SUMS, _FUSED)):
        return False
    # A convolution's output is no view of its input.
    return all(
        user is last or (user < last and affine_call(graph_module, user) is not None)
        for user in value.users
    )
