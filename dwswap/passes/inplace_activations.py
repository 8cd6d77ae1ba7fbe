"""Activations for whose backward autograd keeps the input: out of place where a model trains."""

from __future__ import annotations

from collections import Counter
from itertools import pairwise

from torch import nn
from torch.nn.modules import module as module_globals

from dwswap.called_modules import held_in, only_called, runs_its_children
from dwswap.changes import CHANGE_REASONS, Change
from dwswap.eligibility import reason_not_plain
from dwswap.modules import DepthwiseConv2d, as_class
from dwswap.passes.substitution import replace_modules

__all__ = ["in_place_again", "is_marked", "out_of_place"]

# In the __dict__ of a module that out_of_place made: deepcopy and pickle take it along.
_MARK = "_dwswap_was_in_place"

# Their backward reads their input. That of nn.ReLU, LeakyReLU, ELU, CELU and SELU is content with
# their output, so that these need no copy, and SELU rounds its gradient in another way then.
_KEEP_THEIR_INPUT = frozenset(
    {nn.ReLU6, nn.Hardtanh, nn.Hardswish, nn.Hardsigmoid, nn.SiLU, nn.Mish, nn.Threshold}
)
# What they return is dense memory of its own, which they do not keep for their backward.
_RETURN_A_NEW_TENSOR = frozenset(
    {
        DepthwiseConv2d,
        *(nn.Conv1d, nn.Conv2d, nn.Conv3d),
        *(nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d),
        *(nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm, nn.GroupNorm),
    }
)


def out_of_place(model: nn.Module) -> dict[str, tuple[Change, ...]]:
    """Replace activations that change their input in place; returns a change for each, by path.

    Pattern: ``nn.ReLU6(inplace=True)``, or another whose backward reads its input, in train mode,
    called by a plain ``nn.Sequential`` on what a convolution or a normalization before it returns.
    Reason: autograd copies that input before it changes; out of place it keeps the input itself,
    which takes the same memory, and no copy. Limits: modules that have hooks or methods of their
    own, that are in the model twice, or in a Sequential that the model's code does not only call,
    stay, and all do while there are global hooks: these may keep the tensor, and would find other
    values in it.
    """
    if module_globals._global_forward_hooks or module_globals._global_forward_pre_hooks:
        return {}
    parents = Counter(child for module in model.modules() for child in module._modules.values())
    new: dict[nn.Module, nn.Module] = {}
    changes: dict[str, tuple[Change, ...]] = {}
    held = held_in(model)
    for path, parent in model.named_modules():
        if not runs_its_children(parent) or reason_not_plain(parent):
            continue
        if not only_called(model, path, held):
            continue
        for before, (name, module) in pairwise(parent._modules.items()):
            if type(module) not in _KEEP_THEIR_INPUT or not (module.inplace and module.training):
                continue
            if parents[module] > 1 or type(before[1]) not in _RETURN_A_NEW_TENSOR:
                continue
            if reason_not_plain(module) or reason_not_plain(before[1]):
                continue
            new[module] = _changed(module, inplace=False)
            where, code = f"{path}.{name}" if path else name, "input_kept"
            changes[where] = (Change("inplace", where, True, code, CHANGE_REASONS[code]),)
    replace_modules(model, new)
    return changes


def in_place_again(model: nn.Module) -> None:
    """The inverse of :func:`out_of_place`."""
    marked = [module for module in model.modules() if is_marked(module)]
    replace_modules(model, {module: _changed(module, inplace=True) for module in marked})


def is_marked(module: nn.Module) -> bool:
    """Whether :func:`out_of_place` made ``module``."""
    return _MARK in module.__dict__


def _changed(module: nn.Module, inplace: bool) -> nn.Module:
    # A new module, as one of a shared copy must not change what it shares.
    result = as_class(module, type(module))
    result.__dict__["inplace"] = inplace
    if inplace:
        del result.__dict__[_MARK]
    else:
        result.__dict__[_MARK] = True
    return result
