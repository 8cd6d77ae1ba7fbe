"""torchvision's BatchNorm with fixed statistics, of detection models with trained backbones."""

from __future__ import annotations

from torch import nn

__all__ = ["is_frozen_norm"]

# By name: dwswap runs without torchvision.
_FROZEN = ("torchvision.ops.misc", "FrozenBatchNorm2d")


def is_frozen_norm(module: nn.Module) -> bool:
    """Whether it is BatchNorm in eval mode of buffers ``weight``, ``bias``, ``running_mean`` and
    ``running_var``, for ``(N, C, H, W)``, in train mode too."""
    return (type(module).__module__, type(module).__qualname__) == _FROZEN
