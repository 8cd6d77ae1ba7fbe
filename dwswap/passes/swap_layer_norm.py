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
from dwswap.passes.layer_norm_call import LayerNormCall, layer_norm_call
from dwswap.plain import has_kernels

__all__ = ["swap_layer_norm"]


def swap_layer_norm(graph_module: fx.GraphModule, context: Context) -> None:
    """Swap in place; writes what it did to ``context.changes``."""
    for node in list(graph_module.graph.nodes):
        call = layer_norm_call(graph_module, node)
        weight = None if call is None else value_of(graph_module, call.weight)
        if call is not None and weight is not None and has_kernels(weight):
            context.note(node, "layer_norm", node, "rows")
            _rewrite(context, call)


def _rewrite(context: Context, call: LayerNormCall) -> None:
    node, graph = call.node, call.node.graph
    path = context.path_of(node)
    with graph.inserting_before(node):
        tensors = [graph.get_attr(o) if isinstance(o, str) else o for o in (call.weight, call.bias)]
        new = graph.call_function(
            channel_norm, (call.input, *tensors, call.eps), {"last": call.last}
        )
    # torch.fx traces the generated code when it unpickles; is_wrapped keeps the call one node.
    new.meta = {**node.meta, "is_wrapped": True}
    context.keep_path(new, path)
    context.replaced(node, new)
    node.replace_all_uses_with(new)
    graph.erase_node(node)
    context.release(node)
