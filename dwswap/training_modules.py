"""BatchNorm of a model that trains, and activations that it takes with it where that is safe."""

from __future__ import annotations

import weakref
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.nn.modules import module as module_globals

from dwswap.batch_norm import batch_norm, has_batch_norm

__all__ = ["ABSORBABLE", "BatchNorm2d", "absorb", "activation_of", "base_of", "norm_for"]

_MARK = "_dwswap_activated"
_PLACE = "_dwswap_place"
_BUFFERS = {"running_mean", "running_var", "num_batches_tracked"}
# By name: dwswap runs without timm.
_TIMM = ("timm.layers.norm_act", "BatchNormAct2d")


class _StandIn(nn.Module):
    """What takes the place of a module of the last of its bases."""


class _TrainingNorm(_StandIn):
    """BatchNorm that runs the dwswap operator in training on CUDA."""

    # Of the base class.
    momentum: float | None
    eps: float

    def forward(self, input: Tensor) -> Tensor:
        """``(N, C, H, W)`` to the same."""
        ordinary = type(input) is not Tensor or torch.compiler.is_compiling()
        if ordinary or not self.training or self.momentum is None:
            return self._ordinary(input)
        activation = self._activation()
        parameters, buffers = self._parameters, self._buffers
        weight, bias = parameters.get("weight"), parameters.get("bias")
        statistics = buffers.get("running_mean"), buffers.get("running_var")
        # What is no parameter or buffer any more is an attribute.
        complete = {"weight", "bias"} <= parameters.keys() and buffers.keys() >= _BUFFERS
        if (
            activation is None
            or not complete
            or not has_batch_norm(input, weight, bias, *statistics)
        ):
            return self._ordinary(input)
        batches = buffers["num_batches_tracked"]
        return self._marked(
            batch_norm(
                input, weight, bias, *statistics, batches, self.momentum, self.eps, activation
            ),
            activation,
        )

    def _ordinary(self, input: Tensor) -> Tensor:
        """What the base class computes."""
        return super().forward(input)

    def _activation(self) -> str | None:
        """Which activation to compute as well; None for what the operator does not have."""
        raise NotImplementedError

    def _marked(self, output: Tensor, activation: str) -> Tensor:
        return output


class BatchNorm2d(_TrainingNorm, nn.BatchNorm2d):
    """Drop-in for ``nn.BatchNorm2d`` that runs the dwswap operator in training on CUDA.

    With a place it computes the activation there as well, which then passes on what it gets. It
    looks for it at every call; where it finds another module, or one of the two has hooks, and
    wherever there is no kernel (the CPU, eval mode, ``torch.compile``, ...), both compute what
    their base classes do.

    Shape:
        ``(N, C, H, W)`` to the same.
    """

    def _ordinary(self, input: Tensor) -> Tensor:
        if not issubclass(type(input), fx.Proxy):
            return super()._ordinary(input)
        # torch.fx makes nodes of modules of torch.nn alone.
        by_batch = self.training or self.running_mean is None
        tracked = not self.training or self.track_running_stats
        statistics = (self.running_mean, self.running_var) if tracked else (None, None)
        factor = 0.0 if self.momentum is None else self.momentum
        return F.batch_norm(input, *statistics, self.weight, self.bias, by_batch, factor, self.eps)

    def _activation(self) -> str:
        place = self.__dict__.get(_PLACE)
        module = None if place is None else place.module()
        if module is None or _has_hooks(self) or _has_hooks(module):
            return "none"
        return _NAMES.get(type(module), "none") if isinstance(module, _Absorbed) else "none"

    def _marked(self, output: Tensor, activation: str) -> Tensor:
        if activation != "none":
            output.__dict__[_MARK] = True
        return output

    def extra_repr(self) -> str:
        activation = self._activation()
        absorbed = "" if activation == "none" else f", activation={activation}"
        return super().extra_repr() + absorbed


class _Absorbed(_StandIn):
    """An activation that the ``BatchNorm2d`` in front of it may have computed already."""

    def forward(self, input: Tensor) -> Tensor:
        """Any shape to the same."""
        plain = type(input) is Tensor and not torch.compiler.is_compiling()
        # The mark is taken off: what comes behind may be the same tensor.
        if plain and input.__dict__.pop(_MARK, False):
            return input
        return super().forward(input)


class ReLU(_Absorbed, nn.ReLU):
    """``nn.ReLU``."""


class ReLU6(_Absorbed, nn.ReLU6):
    """``nn.ReLU6``."""


class Hardswish(_Absorbed, nn.Hardswish):
    """``nn.Hardswish``."""


class SiLU(_Absorbed, nn.SiLU):
    """``nn.SiLU``."""


ABSORBABLE: dict[type[nn.Module], type[nn.Module]] = {
    nn.ReLU: ReLU,
    nn.ReLU6: ReLU6,
    nn.Hardswish: Hardswish,
    nn.SiLU: SiLU,
}
"""The activations of torch.nn, and what stands in for them."""

_NAMES: dict[type[nn.Module], str] = {
    kind: name
    for kinds, name in (
        ((nn.ReLU, ReLU), "relu"),
        ((nn.ReLU6, ReLU6), "relu6"),
        ((nn.Hardswish, Hardswish), "hardswish"),
        ((nn.SiLU, SiLU), "silu"),
        ((nn.Identity,), "none"),
    )
    for kind in kinds
}


def norm_for(module: nn.Module) -> type[nn.Module] | None:
    """What stands in for ``module`` in training; None where nothing does."""
    cls = type(module)
    if cls is nn.BatchNorm2d:
        return BatchNorm2d
    return _timm_norm() if (cls.__module__, cls.__qualname__) == _TIMM else None


def base_of(module: nn.Module) -> type[nn.Module] | None:
    """The class that ``module`` stands in for; None where it is what it is."""
    cls = type(module)
    return cls.__bases__[-1] if issubclass(cls, _StandIn) else None


def activation_of(norm: nn.Module, behind: nn.Module | None) -> str | None:
    """The activation that ``norm`` computes as well, of its own or ``behind`` it; None for none."""
    module = getattr(norm, "act", None) if behind is None else behind
    name = "none" if module is None else _NAMES.get(type(module), "none")
    return None if name == "none" else name


def absorb(norm: nn.Module, parent: nn.Module | None, name: str) -> None:
    """Let ``norm`` compute the activation ``parent.name`` behind it, or none without a parent."""
    if parent is None:
        norm.__dict__.pop(_PLACE, None)
    else:
        norm.__dict__[_PLACE] = _Place(parent, name)


class _Place:
    """Where in an ``nn.Sequential`` the activation behind a ``BatchNorm2d`` is.

    It keeps nothing alive, and a copy of the Sequential has a place in itself.
    """

    def __init__(self, parent: nn.Module | None, name: str) -> None:
        self._parent = (lambda: None) if parent is None else weakref.ref(parent)
        self._name = name

    def module(self) -> nn.Module | None:
        """What is there now."""
        parent = self._parent()
        return None if parent is None else parent._modules.get(self._name)

    def __deepcopy__(self, memo: dict[int, Any]) -> _Place:
        # A Sequential that is copied as well has been before its children; else there is no place.
        return _Place(memo.get(id(self._parent())), self._name)

    def __reduce__(self) -> tuple[Any, ...]:
        return _Place, (self._parent(), self._name)


def _has_hooks(module: nn.Module) -> bool:
    return bool(
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
        or module_globals._global_forward_hooks
        or module_globals._global_forward_pre_hooks
        or module_globals._global_backward_hooks
        or module_globals._global_backward_pre_hooks
    )


# --- timm ---------------------------------------------------------------------------------------


def __getattr__(name: str) -> Any:
    # Pickle finds the class by this name, in a process that has not made it yet too.
    if name == "BatchNormAct2d":
        return _timm_norm()
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def _timm_norm() -> type[nn.Module]:
    """Drop-in for the BatchNorm of timm that has dropout and an activation of its own behind it."""
    made = globals().get("BatchNormAct2d")
    if made is not None:
        return made

    from timm.layers.norm_act import BatchNormAct2d as Base

    def activation(self: Any) -> str | None:
        modules = self._modules
        act, drop = modules.get("act"), modules.get("drop")
        if type(drop) is not nn.Identity or act is None or _has_hooks(drop) or _has_hooks(act):
            return None
        return _NAMES.get(type(act))

    members = {"__module__": __name__, "__doc__": _timm_norm.__doc__, "_activation": activation}
    made = globals()["BatchNormAct2d"] = type("BatchNormAct2d", (_TrainingNorm, Base), members)
    return made
