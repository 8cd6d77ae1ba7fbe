"""What a reader of a value needs before it may apply the activation and the bias behind that value
itself: those of absorb_activation, absorb_before_shuffle and absorb_before_pool."""

from __future__ import annotations

from collections.abc import Set
from typing import TypeAlias

import torch
from torch import Tensor, fx

from dwswap.passes.activation_call import ActivationCall, activation_call
from dwswap.passes.affine_call import AffineCall, affine_call, value_of
from dwswap.passes.aliasing import changes_between
from dwswap.passes.context import Context
from dwswap.plain import has_kernels

__all__ = [
    "Operand",
    "Refusal",
    "absorb_operand",
    "activation_refusal",
    "bias_refusal",
    "erase",
    "operand_before",
    "replace_activation",
    "rewritten",
]

Refusal: TypeAlias = tuple[str, dict[str, object]]
"""A reason code and its facts."""


def activation_refusal(
    graph_module: fx.GraphModule,
    found: ActivationCall,
    reader: fx.Node,
    unfit: Refusal | None = None,
) -> Refusal | None:
    """Why ``reader`` must leave the activation that it reads as it is; ``unfit`` is its own reason
    to do so."""
    if found.refusal is not None:
        return found.refusal
    if len(found.node.users) > 1:
        return "other_users", {"value": found.node.name}
    if unfit is not None:
        return unfit
    producer = affine_call(graph_module, found.input)
    if producer is not None and len(found.input.users) == 1 and producer.refusal is None:
        return None  # nothing else knows the value, and no hook keeps it
    if found.in_place:
        return "in_place", {}
    if changes_between(graph_module, found.node, reader):
        return "changed_between", {}
    return None


def bias_refusal(
    graph_module: fx.GraphModule,
    producer: AffineCall,
    like: Tensor | None,
    changed: Set[int],
    unfit: Refusal | None = None,
) -> Refusal | None:
    """Why the bias of ``producer`` must stay there, whose only reader computes with tensors like
    ``like``; ``changed`` are the graph's ``changed_tensors``, ``unfit`` is the reader's own reason.
    """
    if producer.refusal is not None:
        return producer.refusal
    if producer.spatial != 2:
        return "call_form", {}
    if len(producer.node.users) > 1:
        return "other_users", {"value": producer.node.name}
    if unfit is not None:
        return unfit
    bias = value_of(graph_module, producer.bias)
    if bias is None or like is None:
        return "computed", {}
    if id(bias) in changed:
        return "changed_in_graph", {}
    if bias.dtype != like.dtype:
        return "dtypes", {"norm": _name(bias.dtype), "layer": _name(like.dtype)}
    if len({tensor.device for tensor in (bias, like) if not tensor.is_meta}) > 1:
        return "devices", {}
    return None


Operand: TypeAlias = tuple[ActivationCall | None, AffineCall, Tensor]
"""An activation, the convolution in front of it, and that one's weight."""


def operand_before(graph_module: fx.GraphModule, source: object) -> Operand | None:
    """What makes ``source``, where it is a convolution, or an activation behind one, of weights
    that are where our kernels are."""
    found = activation_call(graph_module, source)
    producer = affine_call(graph_module, source if found is None else found.input)
    if producer is None or producer.depthwise or producer.spatial != 2:
        return None
    weight = value_of(graph_module, producer.weight)
    return None if weight is None or not has_kernels(weight) else (found, producer, weight)


def absorb_operand(
    graph_module: fx.GraphModule,
    context: Context,
    node: fx.Node,
    position: int,
    operand: Operand,
    kind: str,
    changed: Set[int],
    prefix: str = "",
) -> None:
    """Let ``node`` apply what is between a convolution and the image that it reads at ``position``,
    its ``operand``: an activation, as its argument ``{prefix}activation``, and the convolution's
    bias, as ``{prefix}bias``. Writes what it did, and why not, to ``context.changes``, as ``kind``.
    """
    found, producer, weight = operand
    if found is not None:
        refusal = activation_refusal(graph_module, found, node)
        if refusal is not None:
            context.note(producer.node, kind, found.node, *refusal, name=found.name)
            return
        context.note(producer.node, kind, node, "absorbed", name=found.name)
        node.update_arg(position, found.input)
        node.update_kwarg(f"{prefix}activation", found.name)
        erase(context, found)
    if producer.bias is None:
        return
    refusal = bias_refusal(graph_module, producer, weight, changed)
    context.retract(producer.node, "bias")
    context.note(producer.node, "bias", node, *(refusal or ("absorbed",)))
    if refusal is not None:
        return
    with node.graph.inserting_before(node):
        bias = producer.bias
        node.update_kwarg(
            f"{prefix}bias", node.graph.get_attr(bias) if isinstance(bias, str) else bias
        )
    rewritten(context, producer.with_tensors(producer.weight, None))


def rewritten(context: Context, call: AffineCall) -> fx.Node:
    """``call`` in the place of its node; the new node has the path of the old one."""
    path = context.path_of(call.node)
    new = call.rewrite()
    context.keep_path(new, path)
    context.replaced(call.node, new)
    context.release(call.node)
    return new


def replace_activation(context: Context, found: ActivationCall, new: fx.Node) -> None:
    """Put ``new``, which computes an activation as well, in the place of that behind it."""
    context.replaced(found.node, new)
    found.node.replace_all_uses_with(new)
    erase(context, found)


def erase(context: Context, found: ActivationCall) -> None:
    """Remove an activation that nothing reads any more."""
    found.node.graph.erase_node(found.node)
    context.release(found.node)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
