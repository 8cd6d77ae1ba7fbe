"""Lay out the weights of linear layers on vectors as few of them want it.

Pattern:
    ``nn.Linear`` and ``F.linear`` on ``(N, C)``: classifiers.
Reason:
    With the outputs of each input side by side in memory, cuBLAS multiplies up to 7 rows in half
    precision 1.4 times faster (1 x 1280 by 1280 x 1000: 5.8 us, and 8.8 where the inputs of each
    output are side by side, H200). More rows take 0 to 1 us longer, of a whole network's hundreds.
Limits:
    On GPUs, in half precision. Values and keys of state_dict stay, strides of the weights change.
    What something else reads as well stays as it is.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, fx, nn

from dwswap.means import channel_means
from dwswap.passes.affine_call import AffineCall, affine_call, transposed, value_of
from dwswap.passes.context import Context
from dwswap.passes.module_tree import replace_tensors
from dwswap.passes.pointwise_call import linear_weight
from dwswap.passes.ranks import known_rank

__all__ = ["lay_out_linear"]


@torch.no_grad()
def lay_out_linear(graph_module: fx.GraphModule, context: Context) -> None:
    """Replace the weights in the modules of the graph."""
    if not context.values:
        return
    weights: dict[int, Tensor] = {}
    linear: set[fx.Node] = set()
    for node in graph_module.graph.nodes:
        call = affine_call(graph_module, node)
        weight = None if call is None else linear_weight(graph_module, call)
        if call is None or weight is None or not _reads_vectors(graph_module, call, context):
            continue
        linear.add(node)
        if type(weight) in (Tensor, nn.Parameter) and weight.is_contiguous():
            weights[id(weight)] = weight
    others = {id(tensor) for tensor in _read_elsewhere(graph_module, linear)}
    new = {key: w.detach().t().contiguous().t() for key, w in weights.items() if key not in others}
    replace_tensors(graph_module, new)


def _reads_vectors(graph_module: fx.GraphModule, call: AffineCall, context: Context) -> bool:
    """Whether the input is ``(N, C)``, or ``(C,)`` of an image without N."""
    is_mean = call.input is not None and call.input.target is channel_means
    return is_mean or known_rank(graph_module, call.node, context) == 2


def _read_elsewhere(graph_module: fx.GraphModule, linear: set[fx.Node]) -> Iterator[Tensor]:
    for node in graph_module.graph.nodes:
        if node.op == "call_module" and node not in linear:
            yield from graph_module.get_submodule(str(node.target)).parameters()
        elif node.op == "get_attr" and not _users(node) <= linear:
            value = value_of(graph_module, node)
            if value is not None:
                yield value


def _users(node: fx.Node) -> set[fx.Node]:
    """Of a tensor, those of its transpose in place of that."""
    users: set[fx.Node] = set()
    for user in node.users:
        users |= {user} if transposed(user) is None else _users(user)
    return users
