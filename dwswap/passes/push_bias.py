"""Push biases forward, through what is linear, to where they cost nothing.

Pattern:
    A convolution or linear layer with a bias, whose output reaches only convolutions without
    padding, linear layers, depthwise calls and sums of which the same is true; also through
    dropout in eval mode, permutations, average pooling to a fixed size, the mean over the image,
    and what flattens the result of these.
Reason:
    A bias takes a matrix product an epilogue that costs up to the product itself where that is
    narrow. The next layer computes ``W (x + b) = W x + W b``, so the bias may move into its own;
    a depthwise call adds it to its input for nothing. In residual chains, what flows is the sum
    without any of the biases, and every reader makes up for all of them.
Limits:
    Exact: computed in float64, rounded once where it stays; a weight whose rounding was to make up
    for that of a bias is rounded anew. A bias stays before what is not linear, zero padding and
    outputs; but of several that meet in a sum, one layer keeps all. No layer that had no bias gets
    one that it cannot pass on. Shared weights stay shared, as each call gets a bias of its own.
"""

from __future__ import annotations

from collections import Counter

import torch
from torch import Tensor, fx

from dwswap.passes.affine_call import AffineCall, affine_call, value_of
from dwswap.passes.bias_plan import BiasPlan, Offset
from dwswap.passes.context import Context
from dwswap.passes.folding import input_moments, path_of
from dwswap.passes.module_tree import add_parameter
from dwswap.passes.offsets import Role, find_roles
from dwswap.passes.rounding import Moments, rounded

__all__ = ["push_bias"]


def push_bias(graph_module: fx.GraphModule, context: Context) -> None:
    """Push in place; writes what it did, and why not, to ``context.changes``."""
    roles = find_roles(graph_module, context)
    exact = _exact(graph_module, context, roles)
    kept: set[fx.Node] = set()
    while True:
        plan = BiasPlan(graph_module, roles, kept, context.values, exact)
        overflowing = {
            node
            for node, new in plan.biases.items()
            if new is not None and not _representable(new, _dtype(graph_module, node))
        }
        if not overflowing:
            break
        kept |= overflowing
    _report(context, plan)
    for node, tensors in exact.items():
        if "weight" in tensors:
            _round_anew(graph_module, context, plan, node, tensors["weight"])
    context.exact.clear()
    for node, new in plan.biases.items():
        _rewrite(graph_module, context, node, new)


def _exact(
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


def _reader(roles: dict[fx.Node, Role], node: fx.Node) -> fx.Node | None:
    """The depthwise call that alone reads ``node``, and takes an offset of it."""
    user = next(iter(node.users), None)
    role = None if user is None or len(node.users) > 1 else roles.get(user)
    return user if role is not None and role.kind == "depthwise" and role.operands else None


def _round_anew(
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


def _report(context: Context, plan: BiasPlan) -> None:
    for node, role in plan.roles.items():
        if role.kind != "layer" or role.call is None or role.call.bias is None:
            continue
        if node in plan.biases and plan.biases[node] is None:
            ends = [n for n, new in plan.biases.items() if new is not None and node in new.origins]
            facts = {"count": len(ends)}
            context.note(node, "bias", ends[0] if ends else node, "pushed", facts)
        elif context.path_of(node) in context.layers:
            value = next(value for value, keeper in plan.keepers.items() if keeper is node)
            refusals = [(user, plan.refusal(user, value)) for user in value.users]
            user, code = next((user, code) for user, code in refusals if code is not None)
            context.note(node, "bias", user, code, {"user": context.path_of(user)})


def _rewrite(
    graph_module: fx.GraphModule, context: Context, node: fx.Node, new: Offset | None
) -> None:
    call = affine_call(graph_module, node)
    assert call is not None
    name = "input_bias" if call.depthwise else "bias"
    old = call.option("input_bias") if call.depthwise else call.bias
    where = None
    if new is not None:
        weight = value_of(graph_module, call.weight)
        assert weight is not None
        tensor = new.value.to(weight.device if context.values else "meta", weight.dtype)
        where = add_parameter(graph_module, _place(call), name, tensor, new.trained)
    path = context.path_of(node)
    changed = call.with_tensors(call.weight, where)
    if call.depthwise:
        changed = call.with_options(input_bias=where)
    rewritten = changed.rewrite()
    context.keep_path(rewritten, path)
    context.replaced(node, rewritten)
    context.release(node, old)


def _place(call: AffineCall) -> str:
    """Beside what a new parameter belongs to."""
    return path_of(call.weight).rpartition(".")[0] or call.node.name


def _dtype(graph_module: fx.GraphModule, node: fx.Node) -> torch.dtype:
    call = affine_call(graph_module, node)
    weight = None if call is None else value_of(graph_module, call.weight)
    assert weight is not None
    return weight.dtype


def _representable(offset: Offset, dtype: torch.dtype) -> bool:
    return offset.value.is_meta or bool(offset.value.to(dtype).isfinite().all())
