"""What folds into the weights of a layer have in common."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, fx, nn

from dwswap.passes.affine_call import AffineCall, Operand
from dwswap.passes.context import Context
from dwswap.passes.module_tree import add_parameters
from dwswap.passes.rounding import HALF, Moments, rounded

__all__ = [
    "Refusal",
    "add_folded",
    "call_refusal",
    "channel_groups",
    "input_moments",
    "layer_refusal",
    "path_of",
    "range_refusal",
    "scaled",
    "tensor_refusal",
]

Refusal = tuple[str, dict[str, object]]


def call_refusal(context: Context, layer: AffineCall) -> Refusal | None:
    """Why the tensors of ``layer`` must stay."""
    if layer.refusal is not None:
        return layer.refusal
    report = context.layers.get(context.path_of(layer.node))
    return ("skipped", {}) if report is not None and report.reason == "skipped" else None


def layer_refusal(context: Context, layer: AffineCall) -> Refusal | None:
    """Why nothing can be folded into ``layer``, whose output is to be changed."""
    refusal = call_refusal(context, layer)
    if refusal is not None:
        return refusal
    if len(layer.node.users) > 1:
        return "other_users", {"value": layer.node.name}
    if layer.depthwise and layer.option("activation") != "none":
        return "activation_before", {}
    return None


def tensor_refusal(tensors: Sequence[Tensor | None], changed: set[int]) -> Refusal | None:
    """Why ``tensors`` cannot be folded into one another; one that is computed is None."""
    known = [tensor for tensor in tensors if tensor is not None]
    if len(known) < len(tensors):
        return "computed", {}
    if any(id(tensor) in changed for tensor in known):
        return "changed_in_graph", {}
    for tensor in known:
        if type(tensor) not in (Tensor, nn.Parameter) or tensor.layout != torch.strided:
            return "tensor_subclass", {"type": type(tensor).__name__}
    if len({tensor.device for tensor in known if not tensor.is_meta}) > 1:
        return "devices", {}
    return None


def channel_groups(layer: AffineCall, weight: Tensor) -> tuple[int, int]:
    """Number of output channels, and of groups where they lie along the weight's second
    dimension: of a transposed convolution."""
    groups = int(layer.option("groups") or 1) if layer.transposed else 1
    return (weight.shape[1] * groups if layer.transposed else weight.shape[0]), groups


@torch.no_grad()
def scaled(weight: Tensor, scale: Tensor, groups: int, transposed: bool) -> Tensor:
    """``weight`` in float64 with the output channels times ``scale``.

    Args:
        scale: ``(channels,)`` in float64.
        groups: see ``channel_groups``.
    """
    wide = weight.double()
    if transposed:  # (in, out / groups, ...), and the outputs of a group are neighbours
        scale = scale.view(groups, 1, -1, *[1] * (wide.dim() - 2))
        return (wide.unflatten(0, (groups, -1)) * scale).flatten(0, 1)
    return wide * scale.view(-1, *[1] * (wide.dim() - 1))


def range_refusal(folded: Sequence[Tensor], dtype: torch.dtype) -> Refusal | None:
    """Why ``folded`` cannot be rounded to ``dtype``.

    It may cost no more than the precision of ``dtype``: no overflow, no underflow to speak of,
    neither next to the other weights nor next to the bias.

    Args:
        folded: weight and, where there is one, bias in float64.
    """
    if folded[0].is_meta or not folded[0].numel():
        return None
    rounded = [tensor.to(dtype).double() for tensor in folded]
    if all(bool(tensor.isfinite().all()) for tensor in rounded):
        scale = max(float(tensor.abs().max()) for tensor in folded)
        error = max(float((a - b).abs().max()) for a, b in zip(folded, rounded, strict=True))
        if error <= torch.finfo(dtype).eps * scale:
            return None
    return "not_representable", {"dtype": str(dtype).removeprefix("torch.")}


def add_folded(
    graph_module: fx.GraphModule,
    context: Context,
    layer: AffineCall,
    old: Sequence[Tensor | None],
    folded: Sequence[Tensor],
) -> tuple[str, str | None]:
    """Round ``folded`` and make it parameters beside those of ``layer``; their paths.

    Args:
        old: weight and bias that they replace.
        folded: as ``range_refusal`` takes them.
    """
    weight, bias = old
    assert weight is not None
    exact = folded
    if context.values:
        moments, groups = input_moments(context, layer, exact[0]), layer.option("groups")
        groups = groups if isinstance(groups, int) else 1
        folded = rounded(exact, weight.dtype, moments, groups, layer.transposed)
    paths = add_parameters(
        graph_module,
        path_of(layer.weight).rpartition(".")[0] or layer.node.name,
        [t.to(t.device if context.values else "meta", weight.dtype) for t in folded],
        [weight.requires_grad, (weight if bias is None else bias).requires_grad][: len(folded)],
    )
    if context.values and weight.dtype in HALF:
        context.exact[paths[0]] = exact[0].float()
        if paths[1] is not None:
            context.exact[paths[1]] = exact[1]
    return paths


def input_moments(context: Context, layer: AffineCall, weight: Tensor) -> Moments | None:
    """What is expected of the input of ``layer``, as every tap finds it."""
    known = None if layer.input is None else context.moments.get(layer.input)
    groups, strides = layer.option("groups") or 1, layer.option("stride") or 1
    if known is None or not isinstance(groups, int) or layer.option("input_bias") is not None:
        return None
    inputs = weight.shape[0] if layer.transposed else weight.shape[1] * groups
    if known.mean.numel() not in (1, inputs) or layer.option("input_activation") != "none":
        return None
    if not layer.transposed:
        return known
    # An output meets one tap in as many as there are outputs per input, and zeros at the others.
    strides = strides if isinstance(strides, (list, tuple)) else [strides] * layer.spatial
    if not all(isinstance(stride, int) for stride in strides):
        return None
    share = 1 / math.prod(strides)
    return Moments(known.mean * share, known.deviation * share**0.5)


def path_of(operand: Operand | None) -> str:
    """Of a tensor that a call takes."""
    return str(operand.target) if isinstance(operand, fx.Node) else str(operand)
