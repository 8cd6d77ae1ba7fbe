"""Modules that call their children one after the other."""

from __future__ import annotations

from torch import nn

from dwswap.eligibility import reason_not_plain

__all__ = ["is_plain_sequential"]

_METHODS = ("forward", "__iter__", "__call__")


def is_plain_sequential(module: nn.Module) -> bool:
    """An ``nn.Sequential``, of a subclass too, that runs its children as ``nn.Sequential`` does."""
    return (
        isinstance(module, nn.Sequential)
        and all(getattr(type(module), name) is getattr(nn.Sequential, name) for name in _METHODS)
        and reason_not_plain(module) is None
    )
