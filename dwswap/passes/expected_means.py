"""Mean and deviation per channel of the values of a graph, without data: BatchNorm tells them.

The output of a BatchNorm has its bias as the mean, its weight as the standard deviation (Nagel et
al., "Data-Free Quantization through Weight Equalization and Bias Correction", 2019). From there on
values are taken for normally distributed, for independent where several meet, and for alike at all
pixels, borders too. That is right on the average, and never so wrong that a rounding which is
chosen by it would be none.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx, nn

from dwswap.activations import ACTIVATIONS
from dwswap.passes.activation_call import activation_call
from dwswap.passes.affine_call import value_of
from dwswap.passes.channel_shuffle import shuffle_groups, shuffle_input
from dwswap.passes.count_calls import does_nothing
from dwswap.passes.layout_kinds import name_of
from dwswap.passes.norm_call import NormCall, norm_call
from dwswap.passes.pooling import pooled
from dwswap.passes.rounding import Moments

__all__ = ["expected_means"]

_GATES = ("sigmoid", "hardsigmoid")
_PASSING = ("contiguous", "flatten", "avg_pool2d")
_PASSING_MODULES = (nn.Flatten, nn.AvgPool2d)
# The expected maximum of nine independent normal values, in deviations above their mean.
_MAXIMUM = 1.485


def expected_means(graph_module: fx.GraphModule) -> dict[fx.Node, Moments]:
    """The moments, in float64, of every value of which they are known."""
    known: dict[fx.Node, Moments] = {}
    with torch.no_grad():
        for node in graph_module.graph.nodes:
            moments = _moments(graph_module, node, known)
            if moments is not None:
                known[node] = moments
    return known


def _moments(
    graph_module: fx.GraphModule, node: fx.Node, known: dict[fx.Node, Moments]
) -> Moments | None:
    norm = norm_call(graph_module, node)
    if norm is not None:
        return _of_norm(graph_module, norm)
    activation = activation_call(graph_module, node)
    if activation is not None:
        return _behind(activation.name, known.get(activation.input))
    name, first = name_of(node), node.args[0] if node.args else None
    if name in ("add", "mul", "cat"):
        return _of_several(name, node, known)
    if not isinstance(first, fx.Node):
        return None
    if name == "getitem":
        return _of_slice(first, node.args[1], known)
    shuffled = shuffle_input(node)
    if shuffled is not None:
        return _shuffled(known.get(shuffled), shuffle_groups(node))
    before = known.get(first)
    module = graph_module.get_submodule(str(node.target)) if node.op == "call_module" else None
    if before is not None and (name == "max_pool2d" or type(module) is nn.MaxPool2d):
        return Moments(before.mean + _MAXIMUM * before.deviation, before.deviation)
    passes = name in _PASSING or type(module) in _PASSING_MODULES
    passes = passes or does_nothing(graph_module, node) or pooled(graph_module, node) is not None
    return before if passes else None


def _of_norm(graph_module: fx.GraphModule, norm: NormCall) -> Moments | None:
    if norm.refusal is not None:
        return None
    mean, _, weight, bias = (
        None if operand is None else value_of(graph_module, operand) for operand in norm.operands
    )
    tensors = [tensor for tensor in (mean, weight, bias) if tensor is not None]
    plain = all(type(t) in (Tensor, nn.Parameter) and not t.is_meta for t in tensors)
    if mean is None or not plain or any(t.shape != mean.shape for t in tensors) or mean.dim() != 1:
        return None
    zeros = torch.zeros_like(mean, dtype=torch.float64)
    return Moments(
        zeros if bias is None else bias.detach().double(),
        zeros + 1 if weight is None else weight.detach().double().abs(),
    )


def _behind(name: str | None, before: Moments | None) -> Moments | None:
    """Behind an activation. The integrals over the normal distribution are sums over even steps,
    whose error at a kink is a thousandth of the deviation, less than of Gauss-Hermite quadrature.
    """
    if before is None or name is None:
        # The gates of squeeze-and-excitation, which no BatchNorm comes before.
        half = torch.tensor(0.5, dtype=torch.float64)
        return Moments(half, torch.zeros_like(half)) if name in _GATES else None
    steps = torch.linspace(-6, 6, 97, dtype=torch.float64, device=before.mean.device)
    density = torch.softmax(steps.square() / -2, 0)
    values = before.mean.unsqueeze(-1) + before.deviation.unsqueeze(-1) * steps
    values = ACTIVATIONS[name].forward(values)
    mean = (values * density).sum(-1)
    return Moments(mean, ((values - mean.unsqueeze(-1)).square() * density).sum(-1).sqrt())


def _of_several(name: str, node: fx.Node, known: dict[fx.Node, Moments]) -> Moments | None:
    operands: Any = node.args
    if name == "cat":
        operands, *dim = (*node.args, *node.kwargs.values())
        if not isinstance(operands, (list, tuple)) or dim != [1]:
            return None
    elif node.kwargs or len(operands) != 2:
        return None
    found = [known.get(operand) for operand in operands if isinstance(operand, fx.Node)]
    several = [moments for moments in found if moments is not None]
    means, deviations = [m.mean for m in several], [m.deviation for m in several]
    vectors = [mean for mean in means if mean.dim()]
    if len(several) < len(operands) or len({mean.device for mean in vectors}) != 1:
        return None
    if name == "mul":  # by a gate, which is the same for all channels
        first, second = means
        spread = first * deviations[1] + second * deviations[0]
        return Moments(first * second, spread) if len(vectors) == 1 else None
    if len(vectors) < len(operands):
        return None
    if name == "cat":
        return Moments(torch.cat(means), torch.cat(deviations))
    if means[0].shape != means[1].shape:
        return None
    return Moments(means[0] + means[1], torch.hypot(*deviations))


def _of_slice(parts: fx.Node, index: Any, known: dict[fx.Node, Moments]) -> Moments | None:
    """One of the values that ``parts`` splits another into, by channels."""
    name, given = name_of(parts), (*parts.args, *parts.kwargs.values())
    if name not in ("chunk", "split") or len(given) != 3 or not isinstance(index, int):
        return None
    whole, sizes, dim = given
    before = known.get(whole) if isinstance(whole, fx.Node) else None
    if before is None or dim != 1:
        return None
    split = torch.chunk if name == "chunk" else torch.split
    try:
        return _each(lambda t: split(t, sizes)[index], before)  # type: ignore[arg-type]
    except (IndexError, RuntimeError, TypeError):  # numbers that are computed
        return None


def _shuffled(before: Moments | None, groups: int | None) -> Moments | None:
    if before is None or groups is None or before.mean.numel() % groups:
        return None
    return _each(lambda t: t.view(groups, -1).t().flatten(), before)


def _each(change: Callable[[Tensor], Tensor], moments: Moments) -> Moments:
    return Moments(change(moments.mean), change(moments.deviation))
