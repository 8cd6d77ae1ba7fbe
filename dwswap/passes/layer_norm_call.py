"""Layer normalization over channels in a graph, modules and calls alike."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx, nn

from dwswap.eligibility import reason_not_plain
from dwswap.passes.affine_call import Operand

__all__ = ["LayerNormCall", "layer_norm_call"]

_FUNCTIONS = (F.layer_norm, torch.layer_norm)
_ARGUMENTS = ("input", "normalized_shape", "weight", "bias", "eps")
_ON_IMAGES = ("torchvision.models.convnext", "LayerNorm2d")


@dataclass(frozen=True)
class LayerNormCall:
    """A node that normalizes over the channels of every pixel.

    Attributes:
        last: whether the channels are the last dimension; else they are that of an image
            ``(N, C, H, W)``.
    """

    node: fx.Node
    input: fx.Node
    weight: Operand | None
    bias: Operand | None
    eps: float
    last: bool


def layer_norm_call(graph_module: fx.GraphModule, node: fx.Node) -> LayerNormCall | None:
    """``node`` as such a call; None where it is none, or does more than its class says."""
    if node.op == "call_module":
        module = graph_module.get_submodule(str(node.target))
        return _of_module(module, node) if isinstance(module, nn.LayerNorm) else None
    if node.op != "call_function" or node.target not in _FUNCTIONS:
        return None
    given: dict[str, Any] = dict(zip(_ARGUMENTS, node.args, strict=False)) | node.kwargs
    shape, eps = given.get("normalized_shape"), given.get("eps", 1e-5)
    input, weight, bias = (given.get(name) for name in ("input", "weight", "bias"))
    if not _is_vector(shape) or not isinstance(eps, float) or len(node.args) > len(_ARGUMENTS):
        return None
    known = all(operand is None or isinstance(operand, fx.Node) for operand in (weight, bias))
    if not known or not isinstance(input, fx.Node):
        return None
    return LayerNormCall(node, input, weight, bias, eps, last=True)


def _of_module(module: nn.LayerNorm, node: fx.Node) -> LayerNormCall | None:
    kind = (type(module).__module__, type(module).__qualname__)
    if type(module) is not nn.LayerNorm and kind != _ON_IMAGES:
        return None
    if reason_not_plain(module) is not None or not _is_vector(module.normalized_shape):
        return None
    if len(node.args) != 1 or node.kwargs or not isinstance(node.args[0], fx.Node):
        return None
    weight, bias = (
        None if getattr(module, name) is None else f"{node.target}.{name}"
        for name in ("weight", "bias")
    )
    return LayerNormCall(node, node.args[0], weight, bias, module.eps, last=kind != _ON_IMAGES)


def _is_vector(shape: object) -> bool:
    return isinstance(shape, (list, tuple)) and len(shape) == 1 and isinstance(shape[0], int)
