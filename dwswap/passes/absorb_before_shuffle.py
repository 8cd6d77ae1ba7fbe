"""Absorb the activations, and the biases of convolutions, in front of a channel shuffle.

Pattern:
    A shuffle of two concatenated images (``fuse_shuffle``), each of which may be an activation of
    a convolution with a bias. Nothing else reads a value in between.
Reason:
    The shuffle reads and writes every element anyway: an activation by itself does so once more,
    and a matrix product without a bias takes half the time of one with a bias where it is narrow.
Limits:
    On GPUs, and for the dtypes that the kernel of the shuffle has: elsewhere the convolution adds
    its bias for nothing. As in absorb_activation.
"""

from __future__ import annotations

from torch import fx

from dwswap.passes.absorbing import absorb_operand, operand_before
from dwswap.passes.aliasing import changed_tensors
from dwswap.passes.context import Context
from dwswap.shuffling import interleaved

__all__ = ["absorb_before_shuffle"]


def absorb_before_shuffle(graph_module: fx.GraphModule, context: Context) -> None:
    """Absorb in place; writes what it did, and why not, to ``context.changes``."""
    changed = changed_tensors(graph_module)
    for node in list(graph_module.graph.nodes):
        if node.target is interleaved and node.args[0] is not node.args[1]:
            for i, name in enumerate(("first_", "second_")):
                operand = operand_before(graph_module, node.args[i])
                if operand is not None:
                    absorb_operand(
                        graph_module, context, node, i, operand, "shuffle", changed, name
                    )
