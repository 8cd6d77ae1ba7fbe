"""Let a depthwise convolution and the pointwise one behind it be one call.

Pattern:
    A depthwise convolution with 3 x 3 or 5 x 5 taps and a 1 x 1 convolution that alone reads it:
    without a bias, or as the product or the sum with a residual that other passes made of it.
Reason:
    For one image both kernels take longer than their bytes do, 2 and 2.5 us with a gap between
    them, where one takes 4 (H200); and what is between them is neither written nor read. Larger
    problems run the two of them: the call decides by the shape of its input.
Limits:
    In half precision on CUDA and in channels_last, weights of the kernel's shapes, no activations
    but ReLU and ReLU6: with others the kernel took as long as the two. Not where the weights are
    computed, or what the first reads may change before the second. Graphs of exported programs
    stay, as they compute with aten.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor, fx

from dwswap.checks import pair
from dwswap.convolution_call import example_of
from dwswap.passes.affine_call import AffineCall, affine_call, value_of
from dwswap.passes.aliasing import changes_between
from dwswap.passes.context import Context
from dwswap.passes.pointwise_call import bias_fits, product_weight
from dwswap.pointwise import pointwise_product, pointwise_residual
from dwswap.separable import CLAMPS, STRIDES, fits, separable_conv2d

__all__ = ["POINTWISE", "fuse_separable"]

POINTWISE = "dwswap_pointwise"
"""Key in ``Node.meta``: the ``meta`` of the pointwise convolution that is part of the call."""


@dataclass(frozen=True)
class _Pointwise:
    """A call of a pointwise convolution; ``weight`` and ``bias`` as ``Operand``."""

    input: object
    weight: Any
    value: Tensor
    bias: Any = None
    residual: fx.Node | None = None


def fuse_separable(graph_module: fx.GraphModule, context: Context) -> None:
    """Fuse in place; writes what it did to ``context.changes``."""
    for node in list(graph_module.graph.nodes):
        point = None if example_of(node) is not None else _pointwise(graph_module, node)
        call = None if point is None else affine_call(graph_module, point.input)
        if point is None or call is None or point.residual is call.node:
            continue
        if len(call.node.users) > 1 or not _fits(graph_module, call, point.value):
            continue
        if not context.lays_out(point.value) or changes_between(graph_module, call.node, node):
            continue
        _fuse(context, node, call, point)


def _pointwise(graph_module: fx.GraphModule, node: fx.Node) -> _Pointwise | None:
    call = affine_call(graph_module, node)
    if call is not None:
        value = product_weight(graph_module, call)
        if value is None or call.bias is not None:
            return None
        return _Pointwise(call.input, call.weight, value)
    if node.target not in (pointwise_product, pointwise_residual):
        return None
    input, weight, other = node.args
    value = value_of(graph_module, weight)
    if value is None or value.dim() != 4:
        return None
    if node.target is pointwise_residual:
        assert isinstance(other, fx.Node)
        return _Pointwise(input, weight, value, residual=other)
    if other is not None and not bias_fits(value_of(graph_module, other), value):
        return None
    return _Pointwise(input, weight, value, bias=other)


def _fits(graph_module: fx.GraphModule, call: AffineCall, point: Tensor) -> bool:
    if not call.depthwise or call.refusal is not None:
        return False
    if any(call.option(name) not in CLAMPS for name in ("input_activation", "activation")):
        return False
    weight = value_of(graph_module, call.weight)
    if weight is None or weight.dtype != point.dtype or not fits(weight, point):
        return False
    if not call.is_size("dilation", 1) or call.option("groups") != len(weight):
        return False
    return any(call.is_size("stride", stride) for stride in STRIDES) and any(
        call.is_size("padding", padding) for padding in range(weight.shape[-1])
    )


def _fuse(context: Context, node: fx.Node, call: AffineCall, point: _Pointwise) -> None:
    path = context.path_of(call.node)
    context.note(call.node, "separable", node, "separable")
    given = (call.input, call.weight, call.bias, point.weight, point.bias, point.residual)
    sizes = {name: pair(name, call.option(name), 0)[0] for name in ("stride", "padding")}
    options = {**sizes, **call.absorbed}
    behind = dict(node.meta)
    new = context.substitute(node, separable_conv2d, given, options)
    # As a layer it is the swapped one.
    new.meta = {**call.node.meta, POINTWISE: behind, "is_wrapped": True}
    context.keep_path(new, path)
    call.node.graph.erase_node(call.node)
    context.release(call.node)
