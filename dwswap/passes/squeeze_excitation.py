"""Run squeeze-and-excitation as one call of an operator.

Pattern:
    ``x * gate(expand(activation(reduce(mean of x over height and width))))`` with two pointwise
    convolutions, or linear layers and the views around them, any activation that the operators
    have, and sigmoid or hardsigmoid as the gate. Nothing else reads a value in between.
Reason:
    As layers they are six to eight kernels, of which the pooling is a badly shaped reduction and
    most of the others take longer to launch than to run. The operator takes two.
Limits:
    The layers stay where they are read elsewhere, have hooks, change something in place that the
    product reads, or differ in dtype; linear layers also where what is scaled may have more than
    four dimensions. The operator reads the parameters of the layers, which keep their keys.
"""

from __future__ import annotations

from torch import fx

from dwswap.ops import squeeze_excitation
from dwswap.passes.aliasing import changed_tensors
from dwswap.passes.context import Context
from dwswap.passes.excitation_call import ExcitationCall, excitation_call

__all__ = ["fuse_squeeze_excitation"]


def fuse_squeeze_excitation(graph_module: fx.GraphModule, context: Context) -> None:
    """Fuse in place; writes what it did, and why not, to ``context.changes``."""
    changed = changed_tensors(graph_module)
    for node in list(graph_module.graph.nodes):
        call = excitation_call(graph_module, node, changed, context)
        if call is None:
            continue
        kind = "squeeze_excitation"
        if call.refusal is not None:
            context.note(call.reduce.node, kind, node, *call.refusal)
            continue
        context.note(call.reduce.node, kind, call.expand.node, "absorbed")
        _rewrite(graph_module.graph, context, call)


def _rewrite(graph: fx.Graph, context: Context, call: ExcitationCall) -> None:
    operands = (call.reduce.weight, call.reduce.bias, call.expand.weight, call.expand.bias)
    options = {"activation": call.activation.name, "gate": call.gate.name}
    context.substitute(call.node, squeeze_excitation, (call.input, *operands), options)
    for node in reversed(call.inner):
        graph.erase_node(node)
        context.release(node)
