"""Pointwise convolutions as matrix products where cuDNN's are slow: with a bias, or odd channels.

Pattern:
    A 1 x 1 convolution without stride, padding and groups: with a bias, which ``push_bias`` has
    left before what is not linear or an output; or without a bias, where the channels on one side
    are no multiple of 8.
Reason:
    cuDNN adds the bias in a kernel of its own, which reads and writes the whole result. BLAS does
    so on the way out: half the time of the convolution. Of 58 or 116 channels cuDNN has kernels
    that take several times as long, depending on the batch.
Limits:
    In half precision on CUDA: in float32 convolutions may round to TF32 and products may not. In
    channels_last: in the other layout pixels are no rows. The activation behind it stays: of those
    BLAS has only ReLU, and makes 0 of NaN. Other convolutions without a bias stay: cuDNN's take the
    time of the product.
"""

from __future__ import annotations

from torch import fx

from dwswap.passes.affine_call import affine_call, value_of
from dwswap.passes.context import Context
from dwswap.passes.pointwise_call import bias_fits, product_weight
from dwswap.pointwise import pointwise_product

__all__ = ["multiply_pointwise"]


def multiply_pointwise(graph_module: fx.GraphModule, context: Context) -> None:
    """Rewrite in place; writes what it did to ``context.changes``."""
    for node in list(graph_module.graph.nodes):
        call = affine_call(graph_module, node)
        weight = None if call is None else product_weight(graph_module, call)
        if call is None or weight is None or not context.lays_out(weight):
            continue
        if call.bias is None:
            odd = next((size for size in weight.shape[:2] if size % 8), None)
            if odd is None:
                continue
            context.note(node, "pointwise", node, "product", {"channels": odd})
        else:
            if not bias_fits(value_of(graph_module, call.bias), weight):
                continue
            context.note(node, "pointwise", node, "epilogue")
        context.substitute_layer(node, pointwise_product, (call.input, call.weight, call.bias))
