"""Squeeze-and-excitation in a graph: recognize it, and judge whether one call may replace it."""

from __future__ import annotations

import operator
from collections.abc import Set
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from dwswap.eligibility import reason_not_plain
from dwswap.passes.activation_call import ActivationCall, activation_call
from dwswap.passes.affine_call import AffineCall, affine_call, value_of
from dwswap.passes.aliasing import changes_between, is_in_place
from dwswap.passes.context import Context
from dwswap.passes.count_calls import does_nothing
from dwswap.passes.pointwise_call import is_pointwise
from dwswap.passes.pooling import added_dimensions, flattened, pooled
from dwswap.passes.ranks import is_image

__all__ = ["ExcitationCall", "excitation_call"]

aten = torch.ops.aten

Refusal = tuple[str, dict[str, object]]

_PRODUCTS = (operator.mul, torch.mul, torch.multiply, aten.mul.Tensor, "mul", "multiply")
_PRODUCTS_IN_PLACE = (operator.imul, aten.mul_.Tensor, "mul_", "multiply_")
_GATES = ("sigmoid", "hardsigmoid")


@dataclass(frozen=True)
class ExcitationCall:
    """A product of a value and gates that are computed from its means.

    Attributes:
        node: the product.
        input: what is scaled.
        inner: the nodes in between, in the order in which they run; first the pooling.
        refusal: a reason code and its facts: why it must stay as it is.
    """

    node: fx.Node
    input: fx.Node
    reduce: AffineCall
    activation: ActivationCall
    expand: AffineCall
    gate: ActivationCall
    inner: tuple[fx.Node, ...]
    refusal: Refusal | None


def excitation_call(
    graph_module: fx.GraphModule, node: fx.Node, changed: Set[int], context: Context
) -> ExcitationCall | None:
    """``node`` as the product of a squeeze-and-excitation; None where it is none.

    ``changed`` are the graph's ``changed_tensors``.
    """
    products = (*_PRODUCTS, *_PRODUCTS_IN_PLACE)
    if node.op not in ("call_function", "call_method") or node.target not in products:
        return None
    if len(node.args) != 2 or node.kwargs:
        return None
    for scale, input in (node.args, node.args[::-1]):
        if isinstance(scale, fx.Node) and isinstance(input, fx.Node) and scale is not input:
            found = _excitation(graph_module, node, scale, input, changed, context)
            if found is not None:
                return found
    return None


def _excitation(
    graph_module: fx.GraphModule,
    node: fx.Node,
    scale: fx.Node,
    input: fx.Node,
    changed: Set[int],
    context: Context,
) -> ExcitationCall | None:
    inner: list[fx.Node] = []

    def back(value: Any) -> Any:
        """``value``, or what it was before dropout in eval mode and its like."""
        while isinstance(value, fx.Node):
            inner.append(value)
            if not does_nothing(graph_module, value) or not value.args:
                break
            value = value.args[0]
        return value

    source, views = added_dimensions(scale, input)
    inner += views
    gate = activation_call(graph_module, back(source))
    expand = None if gate is None else affine_call(graph_module, back(gate.input))
    activation = None if expand is None else activation_call(graph_module, back(expand.input))
    reduce = None if activation is None else affine_call(graph_module, back(activation.input))
    if gate is None or expand is None or activation is None or reduce is None:
        return None
    pool, flat = back(reduce.input), None
    if isinstance(pool, fx.Node):
        flat = flattened(graph_module, pool, input)
        pool = pool if flat is None else back(flat)
    found = pooled(graph_module, pool)
    refusal: Refusal | None = None
    if found is None and not _may_pool(graph_module, pool):
        return None
    if found is None:
        refusal = "no_pool", {}
    elif found[0] is not input:
        refusal = "other_input", {"value": found[0].name}
    else:
        inner.append(pool)
        linear = {call.function is F.linear for call in (reduce, expand)}
        # Linear layers take and give matrices, convolutions images of one pixel.
        matrix = flat is not None or not found[1]
        if linear != {matrix} or bool(views) != matrix:
            refusal = "call_form", {}
        elif matrix and not is_image(graph_module, pool if found[1] else input, context):
            # A linear layer takes the means of a video as well.
            refusal = "not_image", {"value": input.name}
    order = {value: i for i, value in enumerate(graph_module.graph.nodes)}
    ordered = tuple(sorted(set(inner), key=order.__getitem__))
    refusal = refusal or _refusal(graph_module, node, ordered, reduce, activation, expand, gate)
    refusal = refusal or _weights_refusal(graph_module, reduce, expand, changed)
    return ExcitationCall(node, input, reduce, activation, expand, gate, ordered, refusal)


def _may_pool(graph_module: fx.GraphModule, node: object) -> bool:
    if not isinstance(node, fx.Node):
        return False
    is_module = node.op == "call_module"
    called = type(graph_module.get_submodule(str(node.target))) if is_module else node.target
    name = str(getattr(called, "__name__", called)).lower()
    return "pool" in name or "mean" in name


def _refusal(
    graph_module: fx.GraphModule,
    node: fx.Node,
    inner: tuple[fx.Node, ...],
    reduce: AffineCall,
    activation: ActivationCall,
    expand: AffineCall,
    gate: ActivationCall,
) -> Refusal | None:
    for part in (reduce, activation, expand, gate):
        if part.refusal is not None:
            return part.refusal
    if gate.name not in _GATES:
        return "gate", {"activation": gate.name}
    if is_in_place(graph_module, node):
        return "in_place", {}
    for value in inner:
        if value.op == "call_module":
            why = reason_not_plain(graph_module.get_submodule(str(value.target)))
            if why is not None:
                return why
        if len(value.users) > 1:
            return "other_users", {"value": value.name}
    # Those of the pattern change what nothing else reads.
    if changes_between(graph_module, inner[0], node, apart=inner):
        return "changed_between", {}
    return None


def _weights_refusal(
    graph_module: fx.GraphModule, reduce: AffineCall, expand: AffineCall, changed: Set[int]
) -> Refusal | None:
    tensors: list[Tensor] = []
    for call in (reduce, expand):
        for operand in (call.weight, call.bias):
            tensor = None if operand is None else value_of(graph_module, operand)
            if operand is not None and tensor is None:
                return "computed", {}
            tensors += [] if tensor is None else [tensor]
    if any(id(tensor) in changed for tensor in tensors):
        return "changed_in_graph", {}
    for tensor in tensors:
        if type(tensor) not in (Tensor, nn.Parameter) or tensor.layout != torch.strided:
            return "tensor_subclass", {"type": type(tensor).__name__}
    shapes = []
    for call in (reduce, expand):
        weight = value_of(graph_module, call.weight)
        if call.function not in (torch.conv2d, F.linear) or weight is None:
            return "call_form", {}
        if not weight.is_floating_point():
            return "dtype", {"dtype": weight.dtype}
        if call.function is torch.conv2d and not is_pointwise(call, weight):
            return "not_pointwise", {}
        shapes.append(weight.shape[:2])
    (hidden, channels), (outputs, inputs) = shapes
    if (outputs, inputs) != (channels, hidden):
        return "gates", {"gates": outputs, "channels": channels}
    dtypes = [str(tensor.dtype).removeprefix("torch.") for tensor in tensors]
    if len(set(dtypes)) > 1:
        return "dtypes", {"norm": ", ".join(dtypes[1:]), "layer": dtypes[0]}
    if len({tensor.device for tensor in tensors if not tensor.is_meta}) > 1:
        return "devices", {}
    return None
