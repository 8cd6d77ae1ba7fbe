"""Replace modules in their parents: what needs no graph."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TypeVar

from torch import nn

from dwswap.modules import DepthwiseConv2d, as_class
from dwswap.report import Layer
from dwswap.training_modules import base_of

__all__ = ["replace_modules", "swap_modules", "unswap_modules", "unswap_training_modules"]

M = TypeVar("M", bound=nn.Module)


def swap_modules(model: nn.Module, layers: Mapping[str, Layer], prefix: str = "") -> nn.Module:
    """Replace the convolutions that ``layers`` decides to swap; returns the new root.

    Pattern: an exact ``nn.Conv2d`` with ``groups == in_channels``, in any parent, any number of
    times. Reason: the operator of dwswap computes the same, faster. Limits: what
    ``eligibility.inspect_modules`` keeps. Parameter objects and ``state_dict`` keys stay, and an
    old module that has several parents or names becomes the same new module in all of them.
    """
    new: dict[nn.Module, nn.Module] = {}
    for path, module in model.named_modules():
        layer = layers.get(f"{prefix}.{path}" if prefix and path else prefix or path)
        if layer is not None and layer.reason == "depthwise" and type(module) is nn.Conv2d:
            new[module] = DepthwiseConv2d.from_conv2d(module)
    return replace_modules(model, new)


def unswap_modules(model: nn.Module, paths: Iterable[str] | None = None) -> nn.Module:
    """The inverse, for the modules at ``paths`` (default: all); returns the new root."""
    wanted = None if paths is None else set(paths)
    new: dict[nn.Module, nn.Module] = {}
    for path, module in model.named_modules():
        if type(module) is DepthwiseConv2d and (wanted is None or path in wanted):
            new[module] = module.to_conv2d()
    return replace_modules(model, new)


def unswap_training_modules(model: nn.Module) -> nn.Module:
    """Take away what stands in for modules where a model trains; returns the new root."""
    bases = {module: base_of(module) for module in model.modules()}
    new = {module: as_class(module, base) for module, base in bases.items() if base is not None}
    return replace_modules(model, new)


def replace_modules(model: nn.Module, new: Mapping[nn.Module, nn.Module]) -> nn.Module:
    """Put ``new[m]`` in the place of ``m`` in every parent; returns the new root."""
    if new:
        # One that is replaced may have had another in it.
        for parent in (*model.modules(), *new.values()):
            for name, child in parent._modules.items():
                if child is not None and child in new:
                    parent._modules[name] = new[child]
    return new.get(model, model)
