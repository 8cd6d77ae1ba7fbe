"""Round weights anew whose rounding was to make up for biases, once these have moved.

A weight that was folded is rounded so that, with its bias as it was rounded and the input as it was
expected, the mean output stays (``rounding``). ``push_bias`` takes an offset from the input, and
makes another bias or none.
"""

from __future__ import annotations

from collections import Counter

import torch
from torch import Tensor, fx

from dwswap.passes.affine_call import value_of
from dwswap.passes.bias_plan import BiasPlan
from dwswap.passes.context import Context
from dwswap.passes.folding import input_moments, path_of
from dwswap.passes.offsets import Role
from dwswap.passes.rounding import Moments, rounded

__all__ = ["exact_tensors", "round_anew"]


def exact_tensors(
    graph_module: fx.GraphModule, context: Context, roles: dict[fx.Node, Role]
) -> dict[fx.Node, dict[str, Tensor]]:
    """Weight and bias before they were rounded, of layers whose weights nothing else reads; of the
    depthwise call that alone reads a layer, the bias which that has given to it."""
    nodes = graph_module.graph.nodes
    readers = Counter(str(node.target) for node in nodes if node.op == "get_attr")
    found: dict[fx.Node, dict[str, Tensor]] = {}
    for node, role in roles.items():
        weight = None if role.call is None else role.call.weight
        if role.kind != "layer" or role.call is None or not isinstance(weight, fx.Node):
            continue
        path = path_of(weight)
        if path not in context.exact or readers[path] != 1 or len(weight.users) != 1:
            continue
        found[node] = {"weight": context.exact[path]}
        end = _reader(roles, node)
        call = None if end is None else roles[end].call
        given = None if call is None else call.option("input_bias")
        for reader, bias in ((node, role.call.bias), (end, given)):
            where = path_of(bias)
            own = where.rpartition(".")[0] == path.rpartition(".")[0]
            if reader is not None and own and where in context.exact:
                found.setdefault(reader, {})["bias"] = context.exact[where]
    return found


def round_anew(
    graph_module: fx.GraphModule, context: Context, plan: BiasPlan, node: fx.Node, exact: Tensor
) -> None:
    """Round the weight of a layer for what its input and its bias have become."""
    call, arriving = plan.roles[node].call, plan.arriving.get(node)
    end = node if plan.biases.get(node) is not None else _reader(plan.roles, node)
    new = None if end is None else plan.biases.get(end)
    assert call is not None
    if arriving is None and new is None and node not in plan.biases:
        return
    weight = value_of(graph_module, call.weight)
    assert weight is not None
    moments = input_moments(context, call, weight)
    if moments is not None and arriving is not None:
        offset = arriving.value.to(moments.mean.device)
        moments = Moments(moments.mean - offset, moments.deviation.expand(offset.shape))
    tensors = [exact.double(), *([] if new is None else [new.value])]
    groups = call.option("groups") or 1
    with torch.no_grad():
        weight.copy_(rounded(tensors, weight.dtype, moments, groups, call.transposed)[0])


def _reader(roles: dict[fx.Node, Role], node: fx.Node) -> fx.Node | None:
    """The depthwise call that alone reads ``node``, and takes an offset of it."""
    user = next(iter(node.users), None)
    role = None if user is None or len(node.users) > 1 else roles.get(user)
    return user if role is not None and role.kind == "depthwise" and role.operands else None
