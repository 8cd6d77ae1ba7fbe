"""What a forward changes while it is traced: attributes, what these hold, and globals."""

from __future__ import annotations

import itertools
import pickle
import random
import sys
from collections import deque
from collections.abc import Mapping, Sequence
from functools import partial
from types import BuiltinFunctionType, FunctionType, MethodType, ModuleType, SimpleNamespace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from dwswap.forward_code import content_of, global_names, is_foreign

__all__ = ["Variable", "attributes", "changed", "own_attributes", "surroundings"]

# How deep a list in an object in a dict may be, say; far below that are no counters.
_DEPTH = 4
_INTERNAL = frozenset(vars(nn.Module()))
_PLAIN = {bool, int, float, str, type(None)}
_NO_STATE = (BuiltinFunctionType, ModuleType, type, nn.Module)


class Mark:
    """A value with all that it holds, which is kept alive; compares by identity."""

    def __init__(self, value: Any, depth: int = _DEPTH) -> None:
        self.value = value
        self.held: list[tuple[Any, Any]] = []
        _hold(self.held, value, depth, set())

    def __eq__(self, other: object) -> bool:
        return (
            isinstance(other, Mark)
            and len(self.held) == len(other.held)
            and all(
                a is b and version == now
                for (a, version), (b, now) in zip(self.held, other.held, strict=True)
            )
        )


def attributes(module: nn.Module) -> dict[str, Mark]:
    """The attributes of ``module``, but for what is inside its parameters and submodules."""
    if isinstance(module, torch.jit.ScriptModule):  # its methods appear when they are called
        return {}
    return {
        name: Mark(value, 1 if name in _INTERNAL else _DEPTH)
        for name, value in module.__dict__.items()
    }


def own_attributes(module: nn.Module) -> dict[str, Mark]:
    """Those attributes that not every module has."""
    return {name: Mark(value) for name, value in module.__dict__.items() if name not in _INTERNAL}


class Variable(NamedTuple):
    """A function, a global variable or an attribute of a class, and what it was."""

    space: Mapping[str, Any]
    name: str
    mark: Mark

    @property
    def is_changed(self) -> bool:
        return self.mark != Mark(self.space.get(self.name))


def surroundings(cls: type, functions: Sequence[FunctionType]) -> dict[tuple[str, int], Variable]:
    """``functions``, the globals that these name, and the attributes of ``cls`` and of classes that
    they name; by their names, which functions may share, and what they are."""
    found: list[tuple[str, Mapping[str, Any], str]] = []
    classes = {*cls.__mro__}
    for function in functions:
        space = function.__globals__
        for name in global_names(function.__code__) & space.keys():
            found.append((str(space.get("__name__")), space, name))
            if isinstance(space[name], type):
                classes |= {*space[name].__mro__}
    for owner in classes:
        if not is_foreign(owner.__module__):
            found += [(owner.__qualname__, vars(owner), name) for name in vars(owner)]
    # A trace puts other functions in the place of some.
    found = [(w, space, n) for w, space, n in found if not isinstance(space[n], FunctionType)]
    found += [(f.__module__, {f.__qualname__: f}, f.__qualname__) for f in functions]
    return {
        (f"{where}.{name}", id(space[name])): Variable(space, name, Mark(space[name]))
        for where, space, name in found
        if not isinstance(space[name], _NO_STATE)
    }


def changed(before: dict[str, Mark], after: dict[str, Mark]) -> dict[str, Any]:
    """Values that are new or changed in ``after``; None for what is gone."""
    new = {name: mark.value for name, mark in after.items() if before.get(name) != mark}
    return new | dict.fromkeys(before.keys() - after.keys())


def _hold(held: list[tuple[Any, Any]], value: Any, depth: int, seen: set[int]) -> None:
    if not depth or type(value) in _PLAIN:
        held.append((value, None))
        return
    held.append((value, _version(value)))
    if id(value) not in seen:
        seen.add(id(value))
        for item in _items(value):
            _hold(held, item, depth - 1, seen)


def _items(value: Any) -> list[Any]:
    if isinstance(value, dict):
        return [*value, *value.values()]
    if isinstance(value, (list, tuple, set, frozenset, deque)):
        return list(value)
    if isinstance(value, partial):
        return [value.func, *value.args, *value.keywords.values()]
    if isinstance(value, MethodType):
        return [value.__func__, value.__self__]
    if isinstance(value, _NO_STATE):
        return []
    if isinstance(value, FunctionType):
        return _held_by(value)
    if is_foreign(type(value).__module__) and not isinstance(value, SimpleNamespace):
        return []
    return list(getattr(value, "__dict__", {}).values())


def _held_by(function: FunctionType) -> list[Any]:
    """Variables around it that it may set, mutable defaults, attributes."""
    if is_foreign(function.__module__ or ""):
        return []
    around = [content_of(cell) for cell in function.__closure__ or ()]
    defaults = [*(function.__defaults__ or ()), *(function.__kwdefaults__ or {}).values()]
    return [*around, *defaults, *function.__dict__.values()]


def _version(value: Any) -> Any:
    """What changes with a value that has no items: None for all others."""
    if isinstance(value, Tensor):
        return None if value.is_inference() else value._version
    if isinstance(value, torch.Generator):
        return value.get_state().numpy().tobytes()
    if isinstance(value, random.Random):
        return value.getstate()
    if isinstance(value, itertools.count):
        return repr(value)
    numpy = sys.modules.get("numpy")
    if numpy is not None and isinstance(value, numpy.random.Generator):
        return pickle.dumps(value.bit_generator.state)
    if numpy is not None and isinstance(value, numpy.random.RandomState):
        return pickle.dumps(value.get_state(legacy=False))
    return None
