"""BatchNorm where a model trains, with the activations behind it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from itertools import pairwise

from torch import nn

from dwswap.called_modules import only_called
from dwswap.changes import CHANGE_REASONS, Change
from dwswap.eligibility import reason_not_plain
from dwswap.modules import as_class
from dwswap.passes.sequences import is_plain_sequential
from dwswap.passes.substitution import replace_modules
from dwswap.training_modules import (
    ABSORBABLE,
    BatchNorm2d,
    absorb,
    activation_of,
    base_of,
    norm_for,
)

__all__ = ["absorb_activations", "swap_batch_norms", "unswap_batch_norms"]


def swap_batch_norms(model: nn.Module) -> dict[str, tuple[Change, ...]]:
    """Replace what normalizes by the statistics of each batch; returns a change for each, by path.

    Pattern: an exact ``nn.BatchNorm2d`` in train mode, and behind it in a plain ``nn.Sequential``
    that the model's code only calls an activation of ``ABSORBABLE``; timm's BatchNorm that has one
    itself. Reason: the operator moves each value fewer times, as it needs none of what lies between
    the two. Limits: modules that have hooks or methods of their own stay, and so do activations
    that are in the model twice. ``absorb_activations`` completes the result, where it is what the
    caller gets.
    """
    new: dict[nn.Module, nn.Module] = {}
    behind: dict[nn.Module, nn.Module] = {}
    for norm, activation in _pairs(model):
        new[activation] = as_class(activation, ABSORBABLE[type(activation)])
        behind[norm] = activation
    changes: dict[str, tuple[Change, ...]] = {}
    code = "training_kernel"
    for path, module in model.named_modules():
        kind = norm_for(module)
        if kind is not None and _trains(module):
            new[module] = as_class(module, kind)
            name = activation_of(module, behind.get(module))
            change = Change("batch_norm", path, True, code, CHANGE_REASONS[code], name)
            changes[path] = (change,)
    replace_modules(model, new)
    return changes


def absorb_activations(model: nn.Module) -> None:
    """Tell every ``BatchNorm2d`` where the activation is that ``swap_batch_norms`` found."""
    for parent in model.modules():
        if isinstance(parent, nn.Sequential):
            for before, (name, module) in pairwise(parent._modules.items()):
                if type(before[1]) is BatchNorm2d and base_of(module) in ABSORBABLE:
                    absorb(before[1], parent, name)


def unswap_batch_norms(model: nn.Module) -> nn.Module:
    """The inverse of both; returns the new root."""
    new: dict[nn.Module, nn.Module] = {}
    for module in model.modules():
        base = base_of(module)
        if base is not None:
            new[module] = as_class(module, base)
            absorb(new[module], None, "")
    return replace_modules(model, new)


def _pairs(model: nn.Module) -> Iterator[tuple[nn.Module, nn.Module]]:
    parents = Counter(child for module in model.modules() for child in module._modules.values())
    for path, parent in model.named_modules():
        if not is_plain_sequential(parent) or not only_called(model, path):
            continue
        for norm, activation in pairwise(parent._modules.values()):
            if type(norm) is not nn.BatchNorm2d or not _trains(norm) or activation is None:
                continue
            if type(activation) not in ABSORBABLE or reason_not_plain(activation):
                continue
            if parents[norm] == parents[activation] == 1:
                yield norm, activation


def _trains(module: nn.Module) -> bool:
    return module.training and reason_not_plain(module) is None
