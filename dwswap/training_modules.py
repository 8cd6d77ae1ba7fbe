"""BatchNorm of a model that trains, and activations that it takes with it where that is safe."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch._C._dynamo.eval_frame import get_eval_frame_callback
from torch.nn.modules import module as module_globals

from dwswap.batch_norm import batch_norm, has_batch_norm

__all__ = [
    "ABSORBABLE",
    "BatchNorm2d",
    "StandIn",
    "activation_of",
    "base_of",
    "is_changed",
    "norm_for",
    "of_x",
]

_MARK = "_dwswap_activated"
_SEQUENTIAL_FORWARD = nn.Sequential.forward.__code__
_PARAMETERS = {"weight", "bias"}
_BUFFERS = {"running_mean", "running_var", "num_batches_tracked"}
# By name: dwswap runs without timm.
_TIMM = ("timm.layers.norm_act", "BatchNormAct2d")


class StandIn(nn.Module):
    """What takes the place of a module of the last of its bases.

    In compiled code it calls methods of the latter by its name and not by ``super()``: for that
    Dynamo looks at the order of the classes anew in each call of each module, and cannot skip the
    other guards of that module then (some 2 us of the host's).
    """


class _TrainingNorm(StandIn):
    """BatchNorm that runs the dwswap operator in training on CUDA."""

    # Of the base class.
    momentum: float | None
    eps: float
    track_running_stats: bool

    def forward(self, input: Tensor) -> Tensor:
        """``(N, C, H, W)`` to the same."""
        ordinary = type(input) is not Tensor or torch.compiler.is_compiling()
        if ordinary or not self.training or self.momentum is None:
            return self._ordinary(input)
        parameters, buffers = self._parameters, self._buffers
        # What is no parameter or buffer any more is an attribute.
        if not (parameters.keys() >= _PARAMETERS and buffers.keys() >= _BUFFERS):
            return self._ordinary(input)
        weight, bias = parameters["weight"], parameters["bias"]
        mean = var = batches = None
        if self.track_running_stats:
            mean, var = buffers["running_mean"], buffers["running_var"]
            batches = buffers["num_batches_tracked"]
        if not has_batch_norm(input, weight, bias, mean, var):
            return self._ordinary(input)
        activation = self._activation()
        if activation is None:
            return self._ordinary(input)
        output = batch_norm(
            input, weight, bias, mean, var, batches, self.momentum, self.eps, activation
        )
        return self._marked(output, activation)

    def _ordinary(self, input: Tensor) -> Tensor:
        """What the base class computes."""
        raise NotImplementedError

    def _activation(self) -> str | None:
        """Which activation to compute as well; None for what the operator does not have."""
        raise NotImplementedError

    def _marked(self, output: Tensor, activation: str) -> Tensor:
        return output


class BatchNorm2d(_TrainingNorm, nn.BatchNorm2d):
    """Drop-in for ``nn.BatchNorm2d`` that runs the dwswap operator in training on CUDA.

    Called by an ``nn.Sequential`` in which an activation of this module is next, it computes that
    as well, and the activation passes on what it gets. Wherever else it is called, where one of
    the two has hooks or a ``forward`` of its own, and where there is no kernel (the CPU, eval mode,
    ``torch.compile``, ...), both compute what their base classes do.

    Shape:
        ``(N, C, H, W)`` to the same.
    """

    # A method of this class, or Dynamo would look for it along the order of the classes.
    _check_input_dim = nn.BatchNorm2d._check_input_dim

    def _ordinary(self, input: Tensor) -> Tensor:
        if torch.compiler.is_dynamo_compiling() or not issubclass(type(input), fx.Proxy):
            return nn.BatchNorm2d.forward(self, input)
        # torch.fx makes nodes of modules of torch.nn alone.
        tracer: Any = input.tracer  # type: ignore[attr-defined]
        return tracer.create_proxy("call_module", tracer.path_of_module(self), (input,), {})

    def _activation(self) -> str:
        behind = _next_in_sequential(self)
        if behind is None or is_changed(self) or is_changed(behind) or _is_beside_compiled_code():
            return "none"
        return _NAMES.get(type(behind), "none") if isinstance(behind, _Absorbed) else "none"

    def _marked(self, output: Tensor, activation: str) -> Tensor:
        if activation != "none":
            output.__dict__[_MARK] = True
        return output


def _next_in_sequential(module: nn.Module) -> nn.Module | None:
    """What the ``nn.Sequential`` that is calling ``module`` calls next.

    None for any other caller, to which the output of ``module`` itself may matter. (Called by
    ``_activation``, that by ``forward``, and that by two functions of ``nn.Module``.)
    """
    try:
        caller = sys._getframe(5)
    except ValueError:  # the stack is not so deep
        return None
    if caller.f_code is not _SEQUENTIAL_FORWARD:
        return None
    found = caller.f_locals
    sequential = found["self"]
    if type(found) is dict:  # before Python 3.13 a snapshot, which the frame would keep alive
        found.clear()
    if type(sequential).__iter__ is not nn.Sequential.__iter__:
        return None
    children = list(sequential._modules.values())
    if children.count(module) != 1:
        return None
    position = children.index(module) + 1
    return children[position] if position < len(children) else None


def _is_beside_compiled_code() -> bool:
    """Whether Dynamo is at work around this call, and may have compiled the activation alone."""
    return get_eval_frame_callback() is not None


class _Absorbed(StandIn):
    """An activation that the ``BatchNorm2d`` in front of it may have computed already."""

    def forward(self, input: Tensor) -> Tensor:
        """Any shape to the same."""
        plain = type(input) is Tensor and not torch.compiler.is_compiling()
        # The mark is taken off: what comes behind may be the same tensor.
        if plain and input.__dict__.pop(_MARK, False):
            return input
        return self._ordinary(input)

    def _ordinary(self, input: Tensor) -> Tensor:
        """What the base class computes."""
        raise NotImplementedError


class ReLU(_Absorbed, nn.ReLU):
    """``nn.ReLU``."""

    def _ordinary(self, input: Tensor) -> Tensor:
        return nn.ReLU.forward(self, input)


class ReLU6(_Absorbed, nn.ReLU6):
    """``nn.ReLU6``."""

    def _ordinary(self, input: Tensor) -> Tensor:
        return nn.ReLU6.forward(self, input)


class Hardswish(_Absorbed, nn.Hardswish):
    """``nn.Hardswish``."""

    def _ordinary(self, input: Tensor) -> Tensor:
        return nn.Hardswish.forward(self, input)


class SiLU(_Absorbed, nn.SiLU):
    """``nn.SiLU``."""

    def _ordinary(self, input: Tensor) -> Tensor:
        return nn.SiLU.forward(self, input)


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
    """What stands in for the BatchNorm ``module`` in training, or does already; None for none."""
    cls = type(module)
    if cls is nn.BatchNorm2d or cls is BatchNorm2d:
        return BatchNorm2d
    if cls.__bases__[0] is _TrainingNorm:
        return cls
    return _timm_norm() if (cls.__module__, cls.__qualname__) == _TIMM else None


def base_of(module: nn.Module) -> type[nn.Module] | None:
    """The class that ``module`` stands in for; None where it is what it is."""
    # Not of classes that PyTorch derives from ours, as parametrize does.
    first, *others = type(module).__bases__
    return others[-1] if first.__bases__ == (StandIn,) else None


def activation_of(norm: nn.Module, behind: nn.Module | None) -> str | None:
    """The activation that ``norm`` computes as well, of its own or ``behind`` it; None for none."""
    module = getattr(norm, "act", None) if behind is None else behind
    name = "none" if module is None else _NAMES.get(type(module), "none")
    return None if name == "none" else name


def is_changed(module: nn.Module) -> bool:
    """Whether a call of ``module`` may do more than its class."""
    return bool(
        "forward" in module.__dict__
        or module._compiled_call_impl is not None
        or module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
        or module_globals._global_forward_hooks
        or module_globals._global_forward_pre_hooks
        or module_globals._global_backward_hooks
        or module_globals._global_backward_pre_hooks
    )


# --- timm ---------------------------------------------------------------------------------------


def of_x(forward: Callable[[Any, Tensor], Tensor]) -> Callable[[Any, Tensor], Tensor]:
    """``forward`` with its argument named as timm has it."""

    def forward_of_x(self: Any, x: Tensor) -> Tensor:
        return forward(self, x)

    forward_of_x.__doc__ = forward.__doc__
    return forward_of_x


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
        if type(drop) is not nn.Identity or act is None or is_changed(drop) or is_changed(act):
            return None
        return _NAMES.get(type(act))

    def ordinary(self: Any, input: Tensor) -> Tensor:
        return Base.forward(self, input)

    members = {
        "__module__": __name__,
        "__doc__": _timm_norm.__doc__,
        "_activation": activation,
        "_ordinary": ordinary,
        "forward": of_x(_TrainingNorm.forward),
    }
    made = globals()["BatchNormAct2d"] = type("BatchNormAct2d", (_TrainingNorm, Base), members)
    return made
