"""Fold a pointwise convolution into the one before it, where nothing is between the two.

Pattern:
    Two 1 x 1 convolutions without groups and padding, the first without stride, whose value in
    between nothing else reads: the linear bottleneck of a MobileNetV2's first block, between its
    projection and the expansion of the next block.
Reason:
    ``W2 (W1 x + b1) + b2`` is ``(W2 W1) x + (W2 b1 + b2)``: one product, and a narrow image is
    neither written nor read. Of 256 images in half precision the two take 105 and 209 us, and the
    bytes of the one 196 (32 to 16 to 96 channels, 112 x 112 pixels, H200).
Limits:
    In half precision on CUDA, where the bytes decide: products of many channels, which are bound by
    arithmetic, and those that would have much more of it, stay two. In float32 cuDNN takes more
    memory for the one than the model did, and on the CPU it takes as long as the two. As in
    fold_batchnorm: in float64, rounded once, in new parameters of one call.
"""

from __future__ import annotations

import torch
from torch import Tensor, fx

from dwswap.passes.affine_call import AffineCall, Operand, affine_call, value_of
from dwswap.passes.aliasing import changed_tensors
from dwswap.passes.context import Context
from dwswap.passes.folding import (
    add_folded,
    layer_refusal,
    path_of,
    range_refusal,
    tensor_refusal,
)
from dwswap.passes.pointwise_call import is_pointwise
from dwswap.pointwise import suits

__all__ = ["fold_pointwise"]

MOST_PRODUCTS = 64
"""Multiply-adds per channel that is read or written. In half precision an H200 has time for 100 per
element that it moves, an A100 for 80."""
MOST_ARITHMETIC = 1.5
"""Times as much as that of both."""


def fold_pointwise(graph_module: fx.GraphModule, context: Context) -> None:
    """Fold in place; writes what it did to ``context.changes``."""
    changed = changed_tensors(graph_module)
    for node in list(graph_module.graph.nodes):
        second = _pointwise(graph_module, affine_call(graph_module, node))
        first = None if second is None else affine_call(graph_module, second.input)
        first = _pointwise(graph_module, first)
        if first is None or second is None or not _is_plain(context, first, second):
            continue
        if set(_numbers(first.option("stride"))) == {1}:
            _fold(graph_module, context, first, second, changed)


def _pointwise(graph_module: fx.GraphModule, call: AffineCall | None) -> AffineCall | None:
    if call is None or call.spatial != 2 or call.transposed or call.depthwise:
        return None
    weight = value_of(graph_module, call.weight)
    fits = weight is not None and suits(weight) and is_pointwise(call, weight)
    return call if fits else None


def _is_plain(context: Context, first: AffineCall, second: AffineCall) -> bool:
    report = context.layers.get(context.path_of(second.node))
    skipped = report is not None and report.reason == "skipped"
    return layer_refusal(context, first) is None and second.refusal is None and not skipped


def _numbers(option: object) -> list[object]:
    return list(option) if isinstance(option, (list, tuple)) else [option]


def _pays(first: Tensor, second: Tensor) -> bool:
    between, inputs, outputs = first.shape[0], first.shape[1], second.shape[0]
    products, ends = inputs * outputs, inputs + outputs
    return products <= MOST_PRODUCTS * ends and products <= MOST_ARITHMETIC * between * ends


@torch.no_grad()
def _fold(
    graph_module: fx.GraphModule,
    context: Context,
    first: AffineCall,
    second: AffineCall,
    changed: set[int],
) -> None:
    operands = (first.weight, second.weight, first.bias, second.bias)
    tensors = [None if o is None else value_of(graph_module, o) for o in operands]
    given = [
        tensor for tensor, operand in zip(tensors, operands, strict=True) if operand is not None
    ]
    if (
        tensor_refusal(given, changed) is not None
        or len({t.dtype for t in given if t is not None}) > 1
    ):
        return
    inner, outer, inner_bias, outer_bias = tensors
    assert inner is not None
    assert outer is not None
    if outer.shape[1] != inner.shape[0] or not _pays(inner, outer):
        return
    exact = [_exact(context, operand, t) for operand, t in zip(operands, tensors, strict=True)]
    matrices = [m.flatten(1) for m in exact[:2] if m is not None]
    folded = [(matrices[1] @ matrices[0])[..., None, None]]
    if inner_bias is not None or outer_bias is not None:
        biases = [exact[3]] if exact[3] is not None else []
        biases += [matrices[1] @ exact[2]] if exact[2] is not None else []
        folded.append(torch.stack(biases).sum(0))
    if range_refusal(folded, outer.dtype) is not None:
        return
    assert first.input is not None
    merged = second.with_input(first.input)
    paths = add_folded(graph_module, context, merged, (outer, outer_bias), folded)
    context.note(second.node, "layer", first.node, "folded")
    path = context.path_of(second.node)
    new = merged.with_tensors(*paths).rewrite()
    context.keep_path(new, path)
    context.replaced(second.node, new)
    graph_module.graph.erase_node(first.node)
    context.release(first.node, second.node, *operands)


def _exact(context: Context, operand: Operand | None, tensor: Tensor | None) -> Tensor | None:
    """In float64, as it was before it was rounded, where that is known."""
    if operand is None or tensor is None:
        return None
    return context.exact.get(path_of(operand), tensor.detach()).double()
