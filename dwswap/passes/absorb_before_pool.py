"""Absorb the activation, and the bias of the convolution, in front of the mean of an image.

Pattern:
    The mean over height and width of a convolution, or of an activation of one: the end of most
    networks. It becomes a call that takes what nothing else reads in between.
Reason:
    The mean reads every element anyway: an activation by itself reads and writes them once more,
    and aten's reduction takes longer than all of it for one image.
Limits:
    On GPUs, and for the dtypes that the kernel of the mean has. Means in their aten form are left:
    an exported program computes with aten, and would only have more operations. As in
    absorb_activation.
"""

from __future__ import annotations

import torch
from torch import fx

from dwswap.eligibility import reason_not_plain
from dwswap.means import channel_means
from dwswap.passes.absorbing import absorb_operand, operand_before
from dwswap.passes.aliasing import changed_tensors
from dwswap.passes.context import Context
from dwswap.passes.pooling import pooled

__all__ = ["absorb_before_pool"]


def absorb_before_pool(graph_module: fx.GraphModule, context: Context) -> None:
    """Absorb in place; writes what it did, and why not, to ``context.changes``."""
    changed = changed_tensors(graph_module)
    for node in list(graph_module.graph.nodes):
        found = pooled(graph_module, node)
        if found is None or isinstance(node.target, torch._ops.OpOverload):
            continue
        operand = operand_before(graph_module, found[0])
        if operand is None:
            continue
        module = node.op == "call_module" and graph_module.get_submodule(str(node.target))
        if module and reason_not_plain(module) is not None:
            continue
        image, keepdim = found
        options = {"keepdim": True} if keepdim else {}
        new = context.substitute(node, channel_means, (image,), options)
        absorb_operand(graph_module, context, new, 0, operand, "pool", changed)
