"""Let a linear layer take the mean of the image in front of it, and the activation behind it.

Pattern:
    A linear layer on the means that ``absorb_before_pool`` wrote, directly or flattened: the end of
    most networks. It becomes one call, which has the mean's activation and bias.
Reason:
    For one image the mean takes 2.5 us and the product of a row 3.7 to 5.5 (49 pixels, 960 or 1280
    channels, 1000 outputs, H200), both longer than their bytes do: one kernel takes 4.6. More
    images run the two of them.
Limits:
    In half precision on CUDA, weights of the kernel's shapes. Not where anything else reads the
    means, or the weights are computed.
"""

from __future__ import annotations

from typing import Any

from torch import fx

from dwswap.classifiers import fits, pooled_linear
from dwswap.means import channel_means
from dwswap.passes.absorbing import replace_activation
from dwswap.passes.activation_call import only_activation
from dwswap.passes.affine_call import AffineCall, affine_call, value_of
from dwswap.passes.context import Context
from dwswap.passes.pointwise_call import bias_fits, linear_weight
from dwswap.passes.pooling import flattened

__all__ = ["fuse_pooled_linear"]


def fuse_pooled_linear(graph_module: fx.GraphModule, context: Context) -> None:
    """Fuse in place; writes what it did to ``context.changes``."""
    for node in list(graph_module.graph.nodes):
        call = affine_call(graph_module, node)
        weight = None if call is None else linear_weight(graph_module, call)
        if call is None or weight is None or not fits(weight):
            continue
        if call.bias is not None and not bias_fits(value_of(graph_module, call.bias), weight):
            continue
        read = _read(graph_module, call)
        if read:
            _fuse(graph_module, context, call, read)


def _read(graph_module: fx.GraphModule, call: AffineCall) -> list[fx.Node]:
    """The means that ``call`` alone reads, last, and what flattens them; nothing where it reads
    something else."""
    nodes: list[fx.Node] = []
    node = call.input
    while node is not None and len(node.users) == 1:
        nodes.append(node)
        if node.target is channel_means:
            return nodes if bool(node.kwargs.get("keepdim")) == (len(nodes) == 2) else []
        if len(nodes) == 2:
            break
        means = node.args[0] if node.args else None
        image = means.args[0] if isinstance(means, fx.Node) and means.args else None
        node = flattened(graph_module, node, image) if isinstance(image, fx.Node) else None
    return []


def _fuse(
    graph_module: fx.GraphModule, context: Context, call: AffineCall, read: list[fx.Node]
) -> None:
    node, means = call.node, read[-1]
    found = only_activation(graph_module, node)
    context.note(node, "mean", means, "absorbed")
    options: dict[str, Any] = {
        f"input_{name}": value for name, value in means.kwargs.items() if name != "keepdim"
    }
    if found is not None:
        context.note(node, "activation", found.node, "absorbed", name=found.name)
        options["activation"] = found.name
    given = (means.args[0], call.weight, call.bias)
    new = context.substitute_layer(node, pooled_linear, given, options)
    for unread in read:
        unread.graph.erase_node(unread)
        context.release(unread)
    if found is not None:
        replace_activation(context, found, new)
