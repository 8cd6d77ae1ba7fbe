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

from collections.abc import Set

from torch import fx

from dwswap.passes.absorbing import activation_refusal, bias_refusal, erase, rewritten
from dwswap.passes.activation_call import activation_call
from dwswap.passes.affine_call import affine_call, value_of
from dwswap.passes.aliasing import changed_tensors
from dwswap.passes.context import Context
from dwswap.shuffling import has_kernel, interleaved

__all__ = ["absorb_before_shuffle"]


def absorb_before_shuffle(graph_module: fx.GraphModule, context: Context) -> None:
    """Absorb in place; writes what it did, and why not, to ``context.changes``."""
    changed = changed_tensors(graph_module)
    for node in list(graph_module.graph.nodes):
        if node.target is interleaved and node.args[0] is not node.args[1]:
            for position, name in enumerate(("first", "second")):
                _absorb(graph_module, context, node, position, name, changed)


def _absorb(
    graph_module: fx.GraphModule,
    context: Context,
    node: fx.Node,
    position: int,
    name: str,
    changed: Set[int],
) -> None:
    source = node.args[position]
    found = activation_call(graph_module, source)
    producer = affine_call(graph_module, source if found is None else found.input)
    if producer is None or producer.depthwise or producer.spatial != 2:
        return
    weight = value_of(graph_module, producer.weight)
    if weight is None or not has_kernel(weight):
        return
    if found is not None:
        refusal = activation_refusal(graph_module, found, node)
        if refusal is not None:
            context.note(producer.node, "shuffle", found.node, *refusal, name=found.name)
            return
        context.note(producer.node, "shuffle", node, "absorbed", name=found.name)
        node.update_arg(position, found.input)
        node.update_kwarg(f"{name}_activation", found.name)
        erase(context, found)
    if producer.bias is None:
        return
    refusal = bias_refusal(graph_module, producer, weight, changed)
    if refusal is not None:
        context.note(producer.node, "bias", node, *refusal)
        return
    context.retract(producer.node, "bias")
    context.note(producer.node, "bias", node, "absorbed")
    with node.graph.inserting_before(node):
        bias = producer.bias
        node.update_kwarg(
            f"{name}_bias", node.graph.get_attr(bias) if isinstance(bias, str) else bias
        )
    rewritten(context, producer.with_tensors(producer.weight, None))
