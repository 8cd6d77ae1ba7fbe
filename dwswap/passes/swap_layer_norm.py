"""Swap layer normalization over channels for a kernel that reads many pixels at once.

Pattern:
    ``nn.LayerNorm`` and ``F.layer_norm`` over one dimension, and torchvision's ``LayerNorm2d``.
Reason:
    aten gives each row a block of threads, of which few channels leave most idle: ConvNeXt's first
    stage has 96.
Limits:
    On GPUs, for the dtypes that the kernel has. It leaves to aten itself what is not laid out for
    it, or has more channels.
"""

from __future__ import annotations

from torch import fx

from dwswap.norms import channel_norm
from dwswap.passes.affine_call import value_of
from dwswap.passes.context import Context
from dwswap.passes.layer_norm_call import layer_norm_call
from dwswap.plain import has_kernels

__all__ = ["swap_layer_norm"]


def swap_layer_norm(graph_module: fx.GraphModule, context: Context) -> None:
    """Swap in place; writes what it did to ``context.changes``."""
    for node in list(graph_module.graph.nodes):
        call = layer_norm_call(graph_module, node)
        weight = None if call is None else value_of(graph_module, call.weight)
        if call is not None and weight is not None and has_kernels(weight):
            context.note(node, "layer_norm", node, "rows")
            given = (call.input, call.weight, call.bias, call.eps)
            context.substitute_layer(node, channel_norm, given, {"last": call.last})
