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

from typing import Any

import torch
import torch.nn.functional as F
from torch import fx, nn

from dwswap.passes.affine_call import AffineCall, affine_call, value_of
from dwswap.passes.bias_plan import BiasPlan, Offset
from dwswap.passes.context import Context
from dwswap.passes.folding import path_of
from dwswap.passes.module_tree import add_parameter
from dwswap.passes.offsets import find_roles
from dwswap.passes.rounding_anew import exact_tensors, round_anew

__all__ = ["push_bias"]


def push_bias(graph_module: fx.GraphModule, context: Context) -> None:
    """Push in place; writes what it did, and why not, to ``context.changes``."""
    roles = find_roles(graph_module, context)
    exact = exact_tensors(graph_module, context, roles)
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
            round_anew(graph_module, context, plan, node, tensors["weight"])
    context.exact.clear()
    for node, new in plan.biases.items():
        _rewrite(graph_module, context, node, new)
    for node in plan.passed:
        _inline(graph_module, context, node)


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


def _inline(graph_module: fx.GraphModule, context: Context, node: fx.Node) -> None:
    """A function in the place of a module: a hook on it, or another module, would get values
    without the bias."""
    module: Any = graph_module.get_submodule(str(node.target))
    function: Any
    arguments: tuple[Any, ...]
    if isinstance(module, nn.AdaptiveAvgPool2d):
        function, arguments = F.adaptive_avg_pool2d, (module.output_size,)
    elif isinstance(module, nn.Flatten):
        function, arguments = torch.flatten, (module.start_dim, module.end_dim)
    else:  # does nothing
        return
    new = context.substitute(node, function, (node.args[0], *arguments))
    del new.meta["is_wrapped"]  # functions of PyTorch are nodes anyway


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
