"""Fold a pointwise convolution into the one behind it, where nothing is between the two.

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

from dwswap.layouts import memory_format
from dwswap.passes.absorbing import rewritten
from dwswap.passes.affine_call import AffineCall, Operand, affine_call, value_of
from dwswap.passes.aliasing import changed_tensors
from dwswap.passes.context import Context
from dwswap.passes.folding import (
    add_folded,
    call_refusal,
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
        if first is None or second is None or not first.is_size("stride", 1):
            continue
        if layer_refusal(context, first) is None and call_refusal(context, second) is None:
            _fold(graph_module, context, first, second, changed)


def _pointwise(graph_module: fx.GraphModule, call: AffineCall | None) -> AffineCall | None:
    if call is None or call.spatial != 2 or call.transposed or call.depthwise:
        return None
    weight = value_of(graph_module, call.weight)
    fits = weight is not None and suits(weight) and is_pointwise(call, weight)
    return call if fits else None


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
    operands = [o for o in (first.weight, second.weight, first.bias, second.bias) if o is not None]
    known = [value_of(graph_module, operand) for operand in operands]
    tensors = [tensor for tensor in known if tensor is not None]
    if tensor_refusal(known, changed) is not None or len({t.dtype for t in tensors}) > 1:
        return
    inner, outer = tensors[:2]
    if outer.shape[1] != inner.shape[0] or not _pays(inner, outer):
        return
    exact = {o: _exact(context, o, t) for o, t in zip(operands, tensors, strict=True)}
    expansion = exact[operands[1]].flatten(1)
    product = (expansion @ exact[operands[0]].flatten(1))[..., None, None]
    # Either of the two makes the result channels_last.
    last = torch.channels_last in map(memory_format, (inner, outer))
    folded = [product.to(memory_format=torch.channels_last) if last else product]
    biases = [] if first.bias is None else [expansion @ exact[first.bias]]
    biases += [] if second.bias is None else [exact[second.bias]]
    folded += [sum(biases[1:], biases[0])] if biases else []
    if range_refusal(folded, outer.dtype) is not None:
        return
    assert first.input is not None
    merged = second.with_input(first.input)
    outer_bias = None if second.bias is None else value_of(graph_module, second.bias)
    paths = add_folded(graph_module, context, merged, (outer, outer_bias), folded)
    context.note(second.node, "layer", first.node, "folded")
    rewritten(context, merged.with_tensors(*paths))
    graph_module.graph.erase_node(first.node)
    context.release(first.node, *operands)


def _exact(context: Context, operand: Operand, tensor: Tensor) -> Tensor:
    """In float64, as it was before it was rounded, where that is known."""
    return context.exact.get(path_of(operand), tensor.detach()).double()
