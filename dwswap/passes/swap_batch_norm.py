"""BatchNorm where a model trains, with the activations behind it."""

from __future__ import annotations

from itertools import pairwise

from torch import nn

from dwswap.called_modules import runs_its_children
from dwswap.changes import CHANGE_REASONS, Change
from dwswap.eligibility import reason_not_plain
from dwswap.modules import as_class
from dwswap.passes.substitution import replace_modules
from dwswap.training_modules import ABSORBABLE, activation_of, norm_for

__all__ = ["held_elsewhere", "swap_batch_norms"]

# Where nn.Module has its children and tensors.
_OWN = ("_modules", "_parameters", "_buffers")


def swap_batch_norms(model: nn.Module) -> dict[str, tuple[Change, ...]]:
    """Replace what normalizes by the statistics of each batch; returns a change for each, by path.

    Pattern: an exact ``nn.BatchNorm2d`` in train mode, and an activation of ``ABSORBABLE`` behind
    it in an ``nn.Sequential``; timm's BatchNorm that has one itself. Reason: the operator moves
    each value fewer times, as it needs none of what lies between the two. Limits: modules stay that
    have hooks or methods of their own, that average over all batches (``momentum=None``), or that
    the model has in a list as well. Which activation is part of which call is decided when it is
    made (``training_modules``), so what replaces one here may be called in any way.
    """
    held = held_elsewhere(model)
    norms = {
        module: kind
        for module in model.modules()
        if (kind := norm_for(module)) is not None
        and module.training
        and module.momentum is not None
        and module not in held
        and reason_not_plain(module) is None
    }
    new = {m: as_class(m, kind) for m, kind in norms.items() if type(m) is not kind}
    behind: dict[nn.Module, nn.Module] = {}
    for parent in model.modules():
        if not runs_its_children(parent):
            continue
        for norm, activation in pairwise(parent._modules.values()):
            if norm not in norms or activation is None or reason_not_plain(activation):
                continue
            behind[norm] = activation
            if type(activation) in ABSORBABLE:
                new[activation] = as_class(activation, ABSORBABLE[type(activation)])
    code = "training_kernel"
    changes: dict[str, tuple[Change, ...]] = {}
    for path, module in model.named_modules():
        if module in norms:
            name = activation_of(module, behind.get(module))
            change = Change("batch_norm", path, True, code, CHANGE_REASONS[code], name)
            changes[path] = (change,)
    replace_modules(model, new)
    return changes


def held_elsewhere(model: nn.Module) -> set[nn.Module]:
    """Modules in lists and the like: what stands there would not follow ``model`` to eval mode."""
    found: set[nn.Module] = set()
    seen: set[int] = set()
    values = [v for m in model.modules() for k, v in m.__dict__.items() if k not in _OWN]
    while values:
        value = values.pop()
        if isinstance(value, nn.Module):
            found.add(value)
        elif isinstance(value, (dict, list, tuple, set)) and id(value) not in seen:
            seen.add(id(value))  # one may be in itself
            values += value.values() if isinstance(value, dict) else value
    return found
