"""Squeeze-and-excitation of torchvision and timm in a model that trains."""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from typing import Any, ClassVar, cast

import torch
from torch import Tensor, nn

from dwswap.channel_scale import excite, has_channel_scale, squeeze, takes_gates
from dwswap.training_modules import StandIn, is_changed, of_x

__all__ = ["excitation_for", "gate_of"]


@dataclass(frozen=True)
class _Kind:
    """A class, by name, as dwswap runs without torchvision and timm, and what its forward is.

    Attributes:
        methods: of the class, and the names in their code.
        layers: submodules that make the gates of the means, one after the other.
        gate: the submodule that is applied to these.
        pool: the submodule that computes the means; None for a method of the tensor.
        flag: an attribute with which the forward computes something else.
    """

    module: str
    methods: dict[str, tuple[str, ...]]
    layers: tuple[str, ...]
    gate: str = "gate"
    pool: str | None = None
    flag: str | None = None


_KINDS: dict[str, _Kind] = {
    "SqueezeExcitation": _Kind(
        "torchvision.ops.misc",
        {
            "forward": ("_scale",),
            "_scale": ("avgpool", "fc1", "activation", "fc2", "scale_activation"),
        },
        ("fc1", "activation", "fc2"),
        gate="scale_activation",
        pool="avgpool",
    ),
    "SqueezeExcite": _Kind(
        "timm.models._efficientnet_blocks",
        {"forward": ("mean", "conv_reduce", "act1", "conv_expand", "gate")},
        ("conv_reduce", "act1", "conv_expand"),
    ),
    "SEModule": _Kind(
        "timm.layers.squeeze_excite",
        {"forward": ("mean", "add_maxpool", "amax", "fc1", "act", "bn", "fc2", "gate")},
        ("fc1", "bn", "act", "fc2"),
        flag="add_maxpool",
    ),
    "EffectiveSEModule": _Kind(
        "timm.layers.squeeze_excite",
        {"forward": ("mean", "add_maxpool", "amax", "fc", "gate")},
        ("fc",),
        flag="add_maxpool",
    ),
}

_GATES: dict[type[nn.Module], str] = {
    nn.Sigmoid: "sigmoid",
    nn.Hardsigmoid: "hardsigmoid",
    nn.Identity: "none",
}
_TIMM_SIGMOID = ("timm.layers.activations", "Sigmoid")


class _TrainingExcitation(StandIn):
    """Squeeze-and-excitation whose ends run the dwswap operators in training on CUDA.

    The layers between the two are called as ever. Where the pooling or the gate has hooks or a
    ``forward`` of its own, and where there is no kernel (the CPU, eval mode, ``torch.compile``,
    ...), it computes what its base class does.

    Shape:
        ``(N, C, H, W)`` to the same.
    """

    _kind: ClassVar[_Kind]

    def forward(self, input: Tensor) -> Tensor:
        """``(N, C, H, W)`` to the same."""
        ordinary = type(input) is not Tensor or torch.compiler.is_compiling() or not self.training
        activation = None if ordinary else _activation_of(self, self._kind)
        if activation is None or not has_channel_scale(input):
            return super().forward(input)
        squeezed = squeeze(input, activation)
        gates = squeezed.means
        for name in self._kind.layers:
            gates = getattr(self, name)(gates)
        if takes_gates(squeezed, gates):
            return excite(squeezed, gates, activation)
        return cast(Tensor, input * getattr(self, self._kind.gate)(gates))


def _activation_of(module: nn.Module, kind: _Kind) -> str | None:
    """The activation of the gates; None where the module computes something else."""
    if kind.flag is not None and getattr(module, kind.flag):
        return None
    if not kind.methods.keys().isdisjoint(module.__dict__):
        return None
    gate = module._modules.get(kind.gate)
    if gate is None or is_changed(gate):
        return None
    if kind.pool is not None:
        pool = module._modules.get(kind.pool)
        if type(pool) is not nn.AdaptiveAvgPool2d or is_changed(pool):
            return None
        if pool.output_size not in (1, (1, 1)):
            return None
    cls = type(gate)
    timms = (cls.__module__, cls.__qualname__) == _TIMM_SIGMOID
    return "sigmoid" if timms else _GATES.get(cls)


def gate_of(module: nn.Module) -> str | None:
    """The gate of a module that :func:`excitation_for` knows, where the operators have it."""
    return _activation_of(module, _KINDS[type(module).__name__])


def excitation_for(module: nn.Module) -> type[nn.Module] | None:
    """What stands in for ``module`` in training, or does already; None for none."""
    cls = type(module)
    if cls.__bases__[0] is _TrainingExcitation:
        return cls
    kind = _KINDS.get(cls.__qualname__)
    if kind is None or kind.module != cls.__module__ or not _is_known(cls, kind):
        return None
    return _made(cls.__qualname__)


def _is_known(cls: type[nn.Module], kind: _Kind) -> bool:
    """Whether the forward of this version of the class is the one that is known here."""
    codes = {name: getattr(vars(cls).get(name), "__code__", None) for name in kind.methods}
    return all(code is not None and code.co_names == kind.methods[n] for n, code in codes.items())


def __getattr__(name: str) -> Any:
    # Pickle finds the classes by their names, in a process that has not made them yet too.
    if name in _KINDS:
        return _made(name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def _made(name: str) -> type[nn.Module]:
    made = globals().get(name)
    if made is None:
        kind = _KINDS[name]
        base = getattr(importlib.import_module(kind.module), name)
        doc = _TrainingExcitation.__doc__
        members: dict[str, Any] = {"__module__": __name__, "__doc__": doc, "_kind": kind}
        if kind.module.startswith("timm."):
            members["forward"] = of_x(_TrainingExcitation.forward)
        made = globals()[name] = type(name, (_TrainingExcitation, base), members)
    return cast("type[nn.Module]", made)
