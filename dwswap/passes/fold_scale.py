"""Fold a constant factor per channel into the convolution or linear layer before it.

Pattern:
    A convolution (any kind) or linear layer times a parameter or buffer with one value per channel,
    or a single one; dimensions may be permuted in between. ConvNeXt and CaiT call it layer scale.
    Nothing else reads the values in between.
Reason:
    ``weight * scale`` and ``bias * scale`` do the same without a pass over the tensor, and what
    comes behind, a residual sum as a rule, is next to the layer.
Limits:
    As in fold_batchnorm: in float64, rounded once, in new parameters of one call.
"""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import Tensor, fx

from dwswap.passes.absorbing import rewritten
from dwswap.passes.affine_call import AffineCall, affine_call, value_of
from dwswap.passes.aliasing import changed_tensors
from dwswap.passes.context import Context
from dwswap.passes.folding import (
    Refusal,
    add_folded,
    channel_groups,
    layer_refusal,
    range_refusal,
    scaled,
    tensor_refusal,
)
from dwswap.passes.permutation import moved, permutation
from dwswap.passes.ranks import known_rank

__all__ = ["fold_scale"]

aten = torch.ops.aten
_PRODUCTS = (operator.mul, torch.mul, torch.multiply, aten.mul, aten.mul.Tensor)


def fold_scale(graph_module: fx.GraphModule, context: Context) -> None:
    """Fold in place; writes what it did, and why not, to ``context.changes``."""
    changed = changed_tensors(graph_module)
    made: dict[tuple[Any, ...], tuple[str, str | None]] = {}
    for node in list(graph_module.graph.nodes):
        if node.op != "call_function" or node.target not in _PRODUCTS or node.kwargs:
            continue
        for factor, value in (node.args, node.args[::-1]):
            scale, found = value_of(graph_module, factor), _layer(graph_module, value)
            if scale is None or found is None:
                continue
            layer, orders = found
            refusal = layer_refusal(context, layer)
            refusal = refusal or _refusal(graph_module, context, layer, orders, scale, changed)
            refusal = refusal or _fold(graph_module, context, layer, node, scale, made)
            if refusal is not None:
                context.note(layer.node, "scale", node, *refusal)
                break
            # Not ``value``, which may have been the node of the layer.
            node.replace_all_uses_with(next(n for n in node.args if n is not factor))
            graph_module.graph.erase_node(node)
            context.release(node, factor)
            break


def _layer(
    graph_module: fx.GraphModule, value: object
) -> tuple[AffineCall, list[tuple[int, ...]]] | None:
    """The layer that ``value`` is computed by, and how that is permuted, from the last on."""
    orders: list[tuple[int, ...]] = []
    while isinstance(value, fx.Node):
        order = permutation(value)
        if order is None:
            call = affine_call(graph_module, value)
            return None if call is None else (call, orders)
        if len(value.users) > 1:
            break
        orders.append(order)
        value = value.args[0]
    return None


def _refusal(
    graph_module: fx.GraphModule,
    context: Context,
    layer: AffineCall,
    orders: list[tuple[int, ...]],
    scale: Tensor,
    changed: set[int],
) -> Refusal | None:
    operands = [o for o in (layer.weight, layer.bias) if o is not None]
    tensors = [scale, *(value_of(graph_module, operand) for operand in operands)]
    refusal = tensor_refusal(tensors, changed)
    if refusal is not None:
        return refusal
    weight = tensors[1]
    assert weight is not None
    if scale.dtype != weight.dtype:
        names = (str(dtype).removeprefix("torch.") for dtype in (scale.dtype, weight.dtype))
        return "dtypes", dict(zip(("norm", "layer"), names, strict=True))
    dim = -1 - layer.spatial
    rank: int | None = len(orders[0]) if orders else known_rank(graph_module, layer.node, context)
    for order in reversed(orders):
        if len(order) != rank or rank < -dim:
            return "rank_unknown", {}
        dim = moved(dim, order)
    # Fewer dimensions than the layer's output has at least change no shape.
    if scale.dim() > (rank or 1 + layer.spatial):
        return "rank_unknown", {}
    channels, _ = channel_groups(layer, weight)
    along = scale.shape[dim] if scale.dim() >= -dim else 1
    if scale.numel() != along or along not in (1, channels):
        return "channels", {"norm": scale.numel(), "layer": channels}
    return None


def _fold(
    graph_module: fx.GraphModule,
    context: Context,
    layer: AffineCall,
    node: fx.Node,
    scale: Tensor,
    made: dict[tuple[Any, ...], tuple[str, str | None]],
) -> Refusal | None:
    weight = value_of(graph_module, layer.weight)
    bias = None if layer.bias is None else value_of(graph_module, layer.bias)
    assert weight is not None
    channels, groups = channel_groups(layer, weight)
    key = (layer.function, groups, id(weight), id(bias), id(scale))
    if key not in made:
        factors = scale.detach().double().flatten().expand(channels)
        folded = [scaled(weight.detach(), factors, groups, layer.transposed)]
        folded += [] if bias is None else [bias.detach().double() * factors]
        refusal = range_refusal(folded, weight.dtype)
        if refusal is not None:
            return refusal
        made[key] = add_folded(graph_module, context, layer, (weight, bias), folded)
    context.note(layer.node, "scale", node, "folded")
    rewritten(context, layer.with_tensors(*made[key]))
    context.release(layer.weight, layer.bias)
    return None
