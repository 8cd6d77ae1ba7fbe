"""Swap the first convolution of a network for a kernel that has its shape compiled in.

Pattern:
    A 2-D convolution ``(K, 3, 3, 3)`` with stride 2 and padding 1, K a multiple of 8 up to 64; with
    the activation behind it, where nothing else reads what is in between. Where it alone reads an
    image that ``set_memory_format`` converts, it reads the image.
Reason:
    cuDNN takes 217 us for 256 images of 224 x 224 and 32 channels in half precision, where their
    bytes take 68, and adds the bias in a kernel of its own; before that, the image is converted. In
    float32 it pads the image as well, in memory of its own, and rounds to TF32. The kernel reads an
    image of either layout.
Limits:
    On CUDA, float64 aside. In channels_last, which the result is. Graphs of exported programs
    stay, as they compute with aten. Weights and biases that are computed stay.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx

from dwswap.convolution_call import example_of
from dwswap.layouts import to_layout
from dwswap.passes.absorbing import replace_activation
from dwswap.passes.activation_call import ActivationCall, only_activation
from dwswap.passes.affine_call import AffineCall, affine_call, value_of
from dwswap.passes.context import Context
from dwswap.passes.pointwise_call import bias_fits
from dwswap.plain import has_kernels
from dwswap.stems import fits, stem_conv2d

__all__ = ["swap_stem"]


def swap_stem(graph_module: fx.GraphModule, context: Context) -> None:
    """Swap in place; writes what it did to ``context.changes``."""
    for node in list(graph_module.graph.nodes):
        call = affine_call(graph_module, node)
        weight = None if call is None else _weight(graph_module, call)
        if call is None or weight is None or example_of(node) is not None:
            continue
        if not context.lays_out(weight):
            continue
        context.note(node, "stem", node, "stem")
        found = only_activation(graph_module, node)
        if found is not None:
            context.note(node, "activation", found.node, "absorbed", name=found.name)
        _rewrite(context, call, found)


def _weight(graph_module: fx.GraphModule, call: AffineCall) -> Tensor | None:
    """The weight of a convolution that the kernel computes."""
    if call.function is not torch.conv2d or call.refusal is not None:
        return None
    weight = value_of(graph_module, call.weight)
    if weight is None or not has_kernels(weight) or weight.dim() != 4 or not fits(weight):
        return None
    if call.bias is not None and not bias_fits(value_of(graph_module, call.bias), weight):
        return None
    geometry = {"stride": 2, "padding": 1, "dilation": 1, "groups": 1}
    return weight if all(call.is_size(k, size) for k, size in geometry.items()) else None


def _rewrite(context: Context, call: AffineCall, found: ActivationCall | None) -> None:
    source = call.input
    assert source is not None
    # What is converted here alone is read as it is.
    converted = source if source.target is to_layout and len(source.users) == 1 else None
    input = source if converted is None else converted.args[0]
    options: dict[str, Any] = {} if found is None else {"activation": found.name}
    given = (input, call.weight, call.bias)
    new = context.substitute_layer(call.node, stem_conv2d, given, options)
    if converted is not None:
        new.graph.erase_node(converted)
    if found is not None:
        replace_activation(context, found, new)
