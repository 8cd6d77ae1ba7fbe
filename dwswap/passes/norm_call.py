"""BatchNorm in a graph, modules and calls alike."""

from __future__ import annotations

import operator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.instancenorm import _InstanceNorm

from dwswap.eligibility import reason_not_plain
from dwswap.frozen_norm import is_frozen_norm
from dwswap.passes.affine_call import Operand

__all__ = ["NormCall", "norm_arguments", "norm_call"]

aten = torch.ops.aten

# Number of dimensions that a module takes; BatchNorm1d takes two or three.
_RANKS: dict[type, int | None] = {
    nn.BatchNorm1d: None,
    nn.BatchNorm2d: 4,
    nn.BatchNorm3d: 5,
}
_PYTHON = ("input", "running_mean", "running_var", "weight", "bias", "training", "momentum", "eps")
_ATEN = ("input", "weight", "bias", "running_mean", "running_var", "training", "momentum", "eps")
_EVAL = tuple(name for name in _ATEN if name != "training")
_SIGNATURES: dict[Any, tuple[str, ...]] = {
    F.batch_norm: _PYTHON,
    **dict.fromkeys((torch.batch_norm, aten.batch_norm, aten.batch_norm.default), _ATEN),
}
# They return what backward needs as well.
_OF_SEVERAL: dict[Any, tuple[str, ...]] = {
    aten._native_batch_norm_legit_no_training.default: _EVAL,
    aten._native_batch_norm_legit.default: _ATEN,
    aten.native_batch_norm.default: _ATEN,
}
_DEFAULTS = {"weight": None, "bias": None, "training": False, "momentum": 0.1, "eps": 1e-5}


@dataclass(frozen=True)
class NormCall:
    """A node that computes BatchNorm.

    Attributes:
        node: the output. Where the function returns more than that, a ``getitem``.
        operands: mean, variance, weight and bias.
        rank: the number of dimensions that it takes, where that is fixed.
        refusal: a reason code and its facts: why it must stay as it is.
    """

    node: fx.Node
    input: Any
    operands: tuple[Operand | None, ...] = ()
    eps: float = 0.0
    rank: int | None = None
    refusal: tuple[str, dict[str, object]] | None = None

    def erase(self) -> None:
        """Take the call, whose output has no users any more, out of the graph."""
        source = self.node.args[0] if self.node.target is operator.getitem else None
        self.node.graph.erase_node(self.node)
        if isinstance(source, fx.Node):
            for unused in (*source.users, source):
                self.node.graph.erase_node(unused)


def norm_call(graph_module: fx.GraphModule, node: fx.Node) -> NormCall | None:
    """``node`` as BatchNorm; None where it is none."""
    if node.op == "call_module":
        module = graph_module.get_submodule(str(node.target))
        is_norm = isinstance(module, _NormBase) and not isinstance(module, _InstanceNorm)
        if is_norm or is_frozen_norm(module):
            return _of_module(module, node)
    elif node.op == "call_function" and _is_norm(node.target):
        return _of_function(node, node, _SIGNATURES[node.target])
    elif node.target is operator.getitem and node.args[1] == 0:
        several: Any = node.args[0]
        # Nothing else of what it returns is used.
        if several.target in _OF_SEVERAL and all(n is node or not n.users for n in several.users):
            return _of_function(node, several, _OF_SEVERAL[several.target])
    return None


def norm_arguments(node: fx.Node) -> dict[str, Any] | None:
    """What a function that returns BatchNorm alone is given, by name; None for any other node."""
    if node.op != "call_function" or not _is_norm(node.target):
        return None
    return _arguments(node, _SIGNATURES[node.target])


def _of_module(module: nn.Module, node: fx.Node) -> NormCall:
    given = dict(zip(("input",), node.args, strict=False)) | node.kwargs
    refusal: tuple[str, dict[str, object]] | None = None
    tensors = {**module._parameters, **module._buffers}
    statistics = [tensors.get("running_mean"), tensors.get("running_var")]
    frozen = is_frozen_norm(module)
    if type(module) not in _RANKS and not frozen:
        refusal = reason_not_plain(module) or ("norm_type", {"type": type(module).__name__})
    elif module.training:
        refusal = "train_mode", {}
    elif any(type(t) not in (torch.Tensor, nn.Buffer) for t in statistics if t is not None):
        refusal = "tensor_subclass", {"type": "a buffer"}
    elif None in statistics:
        refusal = "no_statistics", {}
    elif len(node.args) + len(node.kwargs) != 1:
        refusal = "call_form", {}
    else:
        refusal = reason_not_plain(module)
    names = ("running_mean", "running_var", "weight", "bias")
    return NormCall(
        node,
        given.get("input"),
        tuple(f"{node.target}.{n}" if tensors.get(n) is not None else None for n in names),
        module.eps,  # type: ignore[arg-type]
        4 if frozen else _RANKS.get(type(module)),
        refusal,
    )


def _of_function(node: fx.Node, call: fx.Node, names: tuple[str, ...]) -> NormCall:
    given = _arguments(call, names)
    operands = [given.get(n) for n in ("running_mean", "running_var", "weight", "bias")]
    refusal: tuple[str, dict[str, object]] | None = None
    if given["training"] is not False:
        unknown = isinstance(given["training"], fx.Node)
        refusal = "call_form" if unknown else "train_mode", {}
    elif any(operand is None for operand in operands[:2]):
        refusal = "no_statistics", {}
    elif not isinstance(given["eps"], float):
        refusal = "call_form", {}
    input = given.get("input")
    eps = given["eps"] if refusal is None else 0.0
    return NormCall(node, input, tuple(operands), eps, None, refusal)


def _arguments(call: fx.Node, names: tuple[str, ...]) -> dict[str, Any]:
    return {**_DEFAULTS, **dict(zip(names, call.args, strict=False)), **call.kwargs}


def _is_norm(target: Any) -> bool:
    try:
        return target in _SIGNATURES
    except TypeError:  # an unhashable callable
        return False
