"""Absorb the activations beside a depthwise convolution, and the bias before it.

Pattern:
    A call of the dwswap operator (module or function), then an activation that it has; before it
    a convolution with a bias, an activation, or both. Nothing else reads a value in between.
Reason:
    The operator applies ``activation(bias + conv(input_activation(input + input_bias)))`` while it
    loads and stores, so nothing elementwise is left; and a matrix product without a bias takes
    half the time of one with a bias where it is narrow.
Limits:
    An activation that is read elsewhere stays. So does one that changes a value in place, unless
    that value is new and read here only. A convolution keeps its bias where its output is read
    elsewhere, and where it runs the operator itself, which adds it for nothing.
"""

from __future__ import annotations

from collections.abc import Set
from functools import partial

from torch import fx

from dwswap.passes.absorbing import (
    Refusal,
    activation_refusal,
    bias_refusal,
    erase,
    replace_activation,
    rewritten,
)
from dwswap.passes.activation_call import activation_call
from dwswap.passes.affine_call import AffineCall, affine_call, value_of
from dwswap.passes.aliasing import changed_tensors
from dwswap.passes.context import Context
from dwswap.passes.padding import is_symmetric

__all__ = ["absorb_activation"]


def absorb_activation(graph_module: fx.GraphModule, context: Context) -> None:
    """Absorb in place; writes what it did, and why not, to ``context.changes``."""
    # What the pass erases changes no parameter that it looks at.
    changed = changed_tensors(graph_module)
    # An activation between two of them costs less on the way out: it is computed once.
    for absorb in (_absorb_output, partial(_absorb_input, changed=changed)):
        for node in list(graph_module.graph.nodes):
            call = affine_call(graph_module, node)
            if call is not None and call.depthwise:
                absorb(graph_module, context, call)


def _absorb_output(graph_module: fx.GraphModule, context: Context, call: AffineCall) -> None:
    if call.option("activation") != "none":
        return
    for user in list(call.node.users):
        found = activation_call(graph_module, user)
        if found is None or found.input is not call.node:
            continue
        refusal = found.refusal or call.refusal
        if refusal is None and len(call.node.users) > 1:
            refusal = "other_users", {"value": call.node.name}
        if refusal is not None:
            context.note(call.node, "activation", user, *refusal, name=found.name)
            continue
        context.note(call.node, "activation", user, "absorbed", name=found.name)
        new = rewritten(context, call.with_options(activation=found.name))
        replace_activation(context, found, new)
        return


def _absorb_input(
    graph_module: fx.GraphModule, context: Context, call: AffineCall, *, changed: Set[int]
) -> None:
    source = call.input
    if source is None or call.refusal is not None:
        return
    if call.option("input_bias") is not None or call.option("input_activation") != "none":
        return
    found = activation_call(graph_module, source)
    if found is not None:
        is_operand = call.weight is found.node or call.bias is found.node
        unfit = ("call_form", {}) if is_operand else _unfit(graph_module, call)
        refusal = activation_refusal(graph_module, found, call.node, unfit)
        if refusal is not None:
            context.note(call.node, "input_activation", found.node, *refusal, name=found.name)
            return
        assert found.name is not None
        context.note(call.node, "input_activation", found.node, "absorbed", name=found.name)
        call = call.with_options(input_activation=found.name)
        source = found.input
    producer = affine_call(graph_module, source)
    if producer is not None and producer.bias is not None and not producer.depthwise:
        weight = value_of(graph_module, call.weight)
        refusal = bias_refusal(graph_module, producer, weight, changed, _unfit(graph_module, call))
        if refusal is None:
            context.note(call.node, "input_bias", producer.node, "absorbed")
            call = call.with_options(input_bias=producer.bias)
            context.note(producer.node, "bias", call.node, "absorbed")
            source = rewritten(context, producer.with_tensors(producer.weight, None))
        else:
            context.note(call.node, "input_bias", producer.node, *refusal)
    if call.option("input_bias") is None and call.option("input_activation") == "none":
        return
    rewritten(context, call.with_input(source))
    if found is not None:
        erase(context, found)


def _unfit(graph_module: fx.GraphModule, call: AffineCall) -> Refusal | None:
    return None if is_symmetric(graph_module, call) else ("asymmetric_padding", {})
