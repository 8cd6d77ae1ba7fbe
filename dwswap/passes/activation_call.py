"""Activations in a graph: modules, functions and methods, in place or not."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx, nn
from torch.nn.modules import activation as modules

from dwswap.eligibility import reason_not_plain
from dwswap.passes.aliasing import is_in_place

__all__ = ["ActivationCall", "activation_call", "only_activation"]

aten = torch.ops.aten

# What a call is given beside its input -> the name in dwswap.activations, None where it has none.
Naming = Callable[[dict[str, Any]], str | None]


@dataclass(frozen=True)
class ActivationCall:
    """A node that computes an elementwise activation.

    Attributes:
        name: in ``dwswap.activations``; None where the operator does not have it.
        label: what it is, for the report.
        in_place: whether it changes its input.
        refusal: a reason code and its facts: why it must stay as it is.
    """

    node: fx.Node
    input: fx.Node
    name: str | None
    label: str
    in_place: bool
    refusal: tuple[str, dict[str, object]] | None = None


def _always(name: str | None) -> Naming:
    return lambda given: name


def _bounded(given: dict[str, Any]) -> str | None:
    low, high = given.get("min"), given.get("max")
    if any(isinstance(bound, (fx.Node, bool)) for bound in (low, high)) or low != 0:
        return None
    return "relu" if high is None else "relu6" if high == 6 else None


def _gelu(given: dict[str, Any]) -> str | None:
    return {"none": "gelu", "tanh": "gelu_tanh"}.get(given.get("approximate", "none"))


def _every(name: str, *more: Any) -> tuple[Any, ...]:
    """The function ``name`` under each of its names, with its in-place form."""
    found: list[Any] = list(more)
    for suffix in ("", "_"):
        found += [getattr(space, name + suffix, None) for space in (torch, F, torch._C._nn)]
        packet = getattr(aten, name + suffix, None)
        found += [] if packet is None else [packet, getattr(packet, "default", None)]
    return tuple(function for function in found if function is not None)


_CLAMP = ("min", "max")
_HARDTANH = ("min", "max", "inplace")
# Function -> names of its arguments after the input, and what decides the activation.
_FUNCTIONS: dict[Any, tuple[tuple[str, ...], Naming]] = {}
_METHODS: dict[str, tuple[tuple[str, ...], Naming]] = {}
for _name in ("relu", "relu6", "hardswish", "silu", "hardsigmoid", "sigmoid"):
    _FUNCTIONS.update(dict.fromkeys(_every(_name), (("inplace",), _always(_name))))
    _METHODS.update(dict.fromkeys((_name, f"{_name}_"), ((), _always(_name))))
_FUNCTIONS.update(dict.fromkeys((torch.special.expit,), ((), _always("sigmoid"))))
_FUNCTIONS.update(dict.fromkeys(_every("gelu"), (("approximate",), _gelu)))
_FUNCTIONS.update(dict.fromkeys(_every("hardtanh"), (_HARDTANH, _bounded)))
for _name, _arguments in (("clamp", _CLAMP), ("clip", _CLAMP), ("clamp_min", ("min",))):
    _FUNCTIONS.update(dict.fromkeys(_every(_name), (_arguments, _bounded)))
    _METHODS.update(dict.fromkeys((_name, f"{_name}_"), (_arguments, _bounded)))
for _name in (
    *("elu", "selu", "celu", "leaky_relu", "rrelu", "prelu", "mish", "tanh", "softplus"),
    *("softsign", "tanhshrink", "threshold", "logsigmoid", "hardshrink", "softshrink"),
):
    _FUNCTIONS.update(dict.fromkeys(_every(_name), ((), _always(None))))
    _METHODS.update(dict.fromkeys((_name, f"{_name}_"), ((), _always(None))))
_DEFAULTS = {f: {"min": -1, "max": 1} for f in _every("hardtanh")}

_MODULES: dict[type, Callable[[Any], str | None]] = {
    nn.ReLU: lambda m: "relu",
    nn.ReLU6: lambda m: "relu6",
    nn.Hardtanh: lambda m: _bounded({"min": m.min_val, "max": m.max_val}),
    nn.Hardswish: lambda m: "hardswish",
    nn.SiLU: lambda m: "silu",
    nn.GELU: lambda m: _gelu({"approximate": m.approximate}),
    nn.Hardsigmoid: lambda m: "hardsigmoid",
    nn.Sigmoid: lambda m: "sigmoid",
}
_NOT_ELEMENTWISE = (nn.MultiheadAttention, nn.GLU, nn.Softmax, nn.Softmax2d, nn.LogSoftmax)


def activation_call(graph_module: fx.GraphModule, node: object) -> ActivationCall | None:
    """``node`` as an activation; None where it is none that is known."""
    if not isinstance(node, fx.Node):
        return None
    given = dict(node.kwargs)
    input = node.args[0] if node.args else given.pop("input", given.pop("self", None))
    if not isinstance(input, fx.Node) or "out" in given:
        return None
    target: Any = node.target
    refusal: tuple[str, dict[str, object]] | None = None
    if node.op == "call_module":
        module = graph_module.get_submodule(str(target))
        cls = type(module)
        if not _is_activation(cls):
            return None
        name, label = _MODULES[cls](module) if cls in _MODULES else None, cls.__name__
        refusal = reason_not_plain(module)
    else:
        table: Any = {"call_function": _FUNCTIONS, "call_method": _METHODS}.get(node.op, {})
        found = _look_up(table, target)
        if found is None:
            return None
        names, naming = found
        given |= dict(zip(names, node.args[1:], strict=False))
        given = {_RENAMED.get(key, key): value for key, value in given.items()}
        name = naming({**_DEFAULTS.get(target, {}), **given})
        label = str(getattr(target, "__name__", target)).partition(".")[0].rstrip("_")
    if name is None:
        refusal = refusal or ("unknown_activation", {"activation": label})
    return ActivationCall(node, input, name, label, is_in_place(graph_module, node), refusal)


def only_activation(graph_module: fx.GraphModule, node: fx.Node) -> ActivationCall | None:
    """The activation that alone reads what ``node`` computes, which is new memory, where a call in
    their place may compute both."""
    if len(node.users) != 1:
        return None
    found = activation_call(graph_module, next(iter(node.users)))
    fits = found is not None and found.refusal is None and found.input is node
    return found if fits else None


_RENAMED = {"min_val": "min", "max_val": "max"}


def _is_activation(cls: type) -> bool:
    ours = cls.__module__ == modules.__name__ or issubclass(cls, tuple(_MODULES))
    return ours and not issubclass(cls, _NOT_ELEMENTWISE)


def _look_up(table: dict[Any, Any], target: Any) -> Any:
    try:
        return table.get(target)
    except TypeError:  # an unhashable callable
        return None
