"""Fold BatchNorm into the convolution or linear layer before it.

Pattern:
    A convolution (any kind, transposed too) or linear layer, then ``nn.BatchNorm1d``, ``2d``,
    ``3d`` or ``F.batch_norm``, in eval mode; modules or calls. Nothing else reads the value in
    between.
Reason:
    With the statistics of training, BatchNorm is ``y * scale + shift`` per channel:
    ``weight * scale`` and ``bias * scale + shift`` do the same without a pass over the tensor.
Limits:
    The folded weights, computed in float64 and rounded once (``rounding`` tells how), are new
    parameters of one call. The original ones stay where other calls read them; else they leave the
    graph, and their keys the ``state_dict``. What stays as it is: statistics of the batch, layers
    with hooks, parametrizations and the like, and wherever the channels of the norm may not be
    those of the layer.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx

from dwswap.passes.affine_call import AffineCall, Operand, affine_call, value_of
from dwswap.passes.aliasing import changed_tensors
from dwswap.passes.context import Context
from dwswap.passes.expected_means import expected_means
from dwswap.passes.folding import (
    Refusal,
    add_folded,
    channel_groups,
    layer_refusal,
    range_refusal,
    scaled,
    tensor_refusal,
)
from dwswap.passes.norm_call import NormCall, norm_call
from dwswap.passes.ranks import known_rank
from dwswap.passes.rounding import HALF

__all__ = ["fold_batchnorm"]


def fold_batchnorm(graph_module: fx.GraphModule, context: Context) -> None:
    """Fold in place; writes what it did, and why not, to ``context.changes``."""
    changed = changed_tensors(graph_module)
    made: dict[tuple[Any, ...], tuple[str, str | None]] = {}
    if context.values and any(p.dtype in HALF for p in graph_module.parameters()):
        context.moments.update(expected_means(graph_module))
    for node in list(graph_module.graph.nodes):
        norm = norm_call(graph_module, node)
        if norm is None:
            continue
        layer = affine_call(graph_module, norm.input)
        if layer is None:
            code, facts = norm.refusal or ("no_convolution", {})
            context.note(node, "batchnorm", node, code, facts)
            continue
        refusal = _refusal(graph_module, context, layer, norm, changed)
        if refusal is None:
            refusal = _fold(graph_module, context, layer, norm, made)
        if refusal is not None:
            context.note(layer.node, "batchnorm", node, *refusal)


def _refusal(
    graph_module: fx.GraphModule,
    context: Context,
    layer: AffineCall,
    norm: NormCall,
    changed: set[int],
) -> Refusal | None:
    refusal = norm.refusal or layer_refusal(context, layer)
    if refusal is not None:
        return refusal
    rank = norm.rank or known_rank(graph_module, layer.node, context)
    if rank != (layer.spatial + 2 if layer.spatial else 2):
        return "rank_unknown", {}
    operands = [layer.weight, layer.bias, *norm.operands]
    tensors = [value_of(graph_module, o) for o in operands if o is not None]
    refusal = tensor_refusal(tensors, changed)
    if refusal is not None:
        return refusal
    weight = tensors[0]
    assert weight is not None
    dtypes = {t.dtype for t in (value_of(graph_module, o) for o in norm.operands) if t is not None}
    wide = weight.dtype in (torch.float16, torch.bfloat16) and dtypes == {torch.float32}
    if dtypes != {weight.dtype} and not wide:
        names = [str(dtype).removeprefix("torch.") for dtype in (*dtypes, weight.dtype)]
        return "dtypes", {"norm": ", ".join(names[:-1]), "layer": names[-1]}
    return None


def _fold(
    graph_module: fx.GraphModule,
    context: Context,
    layer: AffineCall,
    norm: NormCall,
    made: dict[tuple[Any, ...], tuple[str, str | None]],
) -> Refusal | None:
    old: tuple[Operand | None, ...] = (layer.weight, layer.bias, *norm.operands)
    tensors = [None if o is None else value_of(graph_module, o) for o in old]
    weight, bias, mean, var, gain, shift = tensors
    assert weight is not None
    assert mean is not None
    assert var is not None
    channels, groups = channel_groups(layer, weight)
    if any(t is not None and t.shape != (channels,) for t in tensors[1:]):
        return "channels", {"norm": mean.shape[0], "layer": channels}
    key = (layer.function, groups, norm.eps, *map(id, tensors))
    if key not in made:
        folded = _folded(weight, bias, mean, var, gain, shift, norm.eps, groups, layer.transposed)
        refusal = range_refusal(folded, weight.dtype)
        if refusal is not None:
            return refusal
        made[key] = add_folded(graph_module, context, layer, (weight, bias), folded)
    context.note(layer.node, "batchnorm", norm.node, "folded")
    path = context.path_of(layer.node)
    new = layer.with_tensors(*made[key]).rewrite()
    context.keep_path(new, path)
    context.replaced(norm.node, new)
    norm.node.replace_all_uses_with(new)
    norm.erase()
    context.release(layer.node, norm.node, *old)
    return None


@torch.no_grad()
def _folded(
    weight: Tensor,
    bias: Tensor | None,
    mean: Tensor,
    var: Tensor,
    gain: Tensor | None,
    shift: Tensor | None,
    eps: float,
    groups: int,
    transposed: bool,
) -> tuple[Tensor, Tensor]:
    """Weight and bias in float64: with ``scale = gain / sqrt(var + eps)``, ``weight * scale`` and
    ``(bias - mean) * scale + shift``."""
    scale = (var.double() + eps).rsqrt()
    scale = scale if gain is None else scale * gain.double()
    moved = -mean.double() if bias is None else bias.double() - mean.double()
    moved = moved * scale if shift is None else moved * scale + shift.double()
    return scaled(weight, scale, groups, transposed), moved
