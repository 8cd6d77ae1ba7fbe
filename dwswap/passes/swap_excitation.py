"""Squeeze-and-excitation where a model trains."""

from __future__ import annotations

from torch import nn

from dwswap.changes import CHANGE_REASONS, Change
from dwswap.eligibility import reason_not_plain
from dwswap.excitation_modules import excitation_for, gate_of
from dwswap.modules import as_class
from dwswap.passes.substitution import replace_modules
from dwswap.passes.swap_batch_norm import held_elsewhere

__all__ = ["swap_excitations"]


def swap_excitations(model: nn.Module) -> dict[str, tuple[Change, ...]]:
    """Replace the squeeze-and-excitation of torchvision and timm; returns a change for each.

    Pattern: an exact module of one of their classes in train mode, with a gate that the operators
    have. Reason: the means, the product and the gradients of both move each value of the image 7
    times and not 12. Limits: modules stay that have hooks or methods of their own, or that the
    model has in a list as well. Whether the operators run is decided when it is called
    (``excitation_modules``).
    """
    held = held_elsewhere(model)
    found = {
        module: (kind, gate)
        for module in model.modules()
        if (kind := excitation_for(module)) is not None
        and module.training
        and module not in held
        and reason_not_plain(module) is None
        and (gate := gate_of(module)) is not None
    }
    code = "training_kernel"
    changes: dict[str, tuple[Change, ...]] = {}
    for path, module in model.named_modules():
        if module in found:
            name = found[module][1]
            change = Change("excitation", path, True, code, CHANGE_REASONS[code], name)
            changes[path] = (change,)
    new = {m: as_class(m, kind) for m, (kind, _) in found.items() if type(m) is not kind}
    replace_modules(model, new)
    return changes
