"""BatchNorm of a model that trains, and activations that it takes with it where that is safe."""

from __future__ import annotations

import weakref
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.nn.modules import module as module_globals

from dwswap.batch_norm import batch_norm, has_batch_norm

__all__ = ["ABSORBABLE", "BatchNorm2d", "absorb", "base_of", "name_of"]

_MARK = "_dwswap_activated"
_PLACE = "_dwswap_place"


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


class BatchNorm2d(nn.BatchNorm2d):
    """Drop-in for ``nn.BatchNorm2d`` that runs the dwswap operator in training on CUDA.

    With a place it computes the activation there as well, which then passes on what it gets. It
    looks for it at every call; where it finds another module, or one of the two has hooks, and
    wherever there is no kernel (the CPU, eval mode, ``torch.compile``, ...), both compute what
    their base classes do.

    Shape:
        ``(N, C, H, W)`` to the same.
    """

    def forward(self, input: Tensor) -> Tensor:
        """``(N, C, H, W)`` to the same."""
        if issubclass(type(input), fx.Proxy):
            return self._traced(input)
        ordinary = type(input) is not Tensor or torch.compiler.is_compiling()
        if ordinary or not self.training or self.momentum is None:
            return super().forward(input)
        parameters, buffers = self._parameters, self._buffers
        weight, bias = parameters.get("weight"), parameters.get("bias")
        statistics = buffers.get("running_mean"), buffers.get("running_var")
        # What is no parameter or buffer any more is an attribute.
        complete = {"weight", "bias"} <= parameters.keys() and buffers.keys() >= _BUFFERS
        if not complete or not has_batch_norm(input, weight, bias, *statistics):
            return super().forward(input)
        activation = self._activation()
        batches = buffers["num_batches_tracked"]
        output = batch_norm(
            input, weight, bias, *statistics, batches, self.momentum, self.eps, activation
        )
        if activation != "none":
            output.__dict__[_MARK] = True
        return output

    def _activation(self) -> str:
        place = self.__dict__.get(_PLACE)
        module = None if place is None else place.module()
        if module is None or _has_hooks(self) or _has_hooks(module):
            return "none"
        return name_of(module)

    def _traced(self, input: Any) -> Any:
        """As a node of torch.fx, which takes modules of torch.nn alone for nodes by themselves."""
        by_batch = self.training or self.running_mean is None
        statistics = (self.running_mean, self.running_var)
        if self.training and not self.track_running_stats:
            statistics = (None, None)
        factor = 0.0 if self.momentum is None else self.momentum
        return F.batch_norm(input, *statistics, self.weight, self.bias, by_batch, factor, self.eps)

    def extra_repr(self) -> str:
        activation = self._activation()
        absorbed = "" if activation == "none" else f", activation={activation}"
        return super().extra_repr() + absorbed


_BUFFERS = {"running_mean", "running_var", "num_batches_tracked"}


class _Absorbed(nn.Module):
    """An activation that its ``BatchNorm2d`` may have computed already."""

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
    ReLU: "relu",
    ReLU6: "relu6",
    Hardswish: "hardswish",
    SiLU: "silu",
}
_BASES: dict[type[nn.Module], type[nn.Module]] = {new: old for old, new in ABSORBABLE.items()}
_BASES[BatchNorm2d] = nn.BatchNorm2d


def absorb(norm: nn.Module, parent: nn.Module | None, name: str) -> None:
    """Let ``norm`` compute the activation ``parent.name`` behind it, or none without a parent."""
    if parent is None:
        norm.__dict__.pop(_PLACE, None)
    else:
        norm.__dict__[_PLACE] = _Place(parent, name)


def name_of(module: nn.Module) -> str:
    """The activation that ``module`` is, as the operator calls it; ``"none"`` for all others."""
    return _NAMES.get(type(module), "none")


def base_of(module: nn.Module) -> type[nn.Module] | None:
    """The class of torch.nn that ``module`` stands in for; None where it is none of these."""
    return _BASES.get(type(module))


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
