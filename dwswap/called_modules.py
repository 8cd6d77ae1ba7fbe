"""Whether a model does nothing with one of its modules but call it."""

from __future__ import annotations

import dis
import itertools
import sys
from collections.abc import Iterator, Mapping, Set
from types import CodeType, FunctionType

from torch import nn

from dwswap.copying import modules_by_path
from dwswap.eligibility import HOOKS
from dwswap.forward_code import (
    called_functions,
    codes,
    global_names,
    names_in,
    package_of,
    special_methods,
)
from dwswap.state_marks import own_attributes

__all__ = ["Held", "held_in", "lists_tensors", "only_called", "runs_its_children"]

Held = Mapping[str, Set[int]]
"""By the path of a module: ``id()`` of what its attributes have."""

_CONTAINERS = (nn.Sequential, nn.ModuleList, nn.ModuleDict)
# How a module is reached without its name in the code.
_LOOKUPS = {"getattr", "vars", "attrgetter"}
_ALL_CHILDREN = {"children", "named_children", "modules", "named_modules", "get_submodule"}
_ALL_CHILDREN |= {"_modules", "__dict__", "__getattr__", "attrgetter"}
# Of all modules inside: a graph has folded tensors, by other names.
_ALL_TENSORS = {"parameters", "named_parameters", "get_parameter", "state_dict"}
_ALL_TENSORS |= {"buffers", "named_buffers", "get_buffer", "_parameters", "_buffers"}
_KINDS = {"dtype", "device", "is_cuda"}
_CONVERSIONS = {"tolist", "numpy", "__array__"}
# What stands between the loads and calls of a line that does nothing else.
_PADDING = {"PUSH_NULL", "PRECALL", "NOT_TAKEN"}
_READS = ("LOAD_ATTR", "LOAD_METHOD")
# Of one value that is there already.
_LOADS = {"LOAD_FAST", "LOAD_FAST_BORROW", "LOAD_FAST_CHECK", "LOAD_DEREF", "LOAD_CONST"}
_LOAD_ATTR_LOADS_METHODS = sys.version_info >= (3, 12)


def runs_its_children(module: nn.Module) -> bool:
    """An ``nn.Sequential``, of a subclass too, whose class runs them one after the other."""
    return isinstance(module, nn.Sequential) and all(
        getattr(type(module), name) is getattr(nn.Sequential, name)
        for name in ("forward", "__iter__", "__call__")
    )


def only_called(model: nn.Module, path: str, held: Held | None = None) -> bool:
    """Whether the modules above ``path`` only call the one there, so that another which can be
    called may take its place.

    Read off the bytecode of what their forwards may run: ``self.backbone(x)`` is a call,
    ``self.backbone[0](x)``, ``for block in self.blocks`` and ``getattr(self, name)`` are not.
    A module that is part of something outside, or shares tensors with it, does not qualify.

    Args:
        held: what :func:`held_in` says of ``model``, where several paths are asked for.
    """
    held = held_in(model) if held is None else held
    names = path.split(".")
    above = [model.get_submodule(".".join(names[:depth])) for depth in range(len(names))]
    if _is_shared(model, path) or _is_held(model, path, above, held):
        return False
    return all(_only_calls(owner, names) for owner in above)


def held_in(model: nn.Module) -> Held:
    """What attributes have of the modules and tensors of ``model``, past their registration: in a
    list, say, a partial function, a method of it, or an object that was given it."""
    parts = {id(part) for module in model.modules() for part in _parts(module)}
    found = {
        path: {
            id(held)
            for name, mark in own_attributes(module).items()
            if name != "train"  # no forward calls train(), which may be ours (train_guard)
            for held, _ in mark.held
        }
        for path, module in modules_by_path(model).items()
    }
    return {path: ids & parts for path, ids in found.items() if not ids.isdisjoint(parts)}


def _only_calls(owner: nn.Module, names: list[str]) -> bool:
    cls = type(owner)
    if "forward" in owner.__dict__ or any(getattr(owner, name, None) for name in HOOKS):
        return False
    if type(owner) is nn.Sequential:
        return True
    if isinstance(owner, _CONTAINERS) or package_of(cls.__module__) == "torch":
        return False
    functions = called_functions(cls, cls.forward)
    for method in special_methods(cls):
        functions += called_functions(cls, method)
    if any(not _LOOKUPS.isdisjoint(global_names(f.__code__)) for f in functions):
        return False
    inner = [code for function in functions for code in codes(function.__code__)]
    return bool(functions) and not any(_reaches(code, names) for code in inner)


def _reaches(code: CodeType, names: list[str]) -> bool:
    """Whether ``code`` may do something with the last of ``names`` that is no call."""
    instructions = _instructions(code)
    # The last instruction of all code returns or raises.
    for place, (instruction, then) in enumerate(itertools.pairwise(instructions)):
        if not instruction.opname.endswith(("_ATTR", "_METHOD")):
            continue
        name = instruction.argval
        if name in _ALL_CHILDREN:
            return True
        if _asks_for_tensors(instructions, place):
            return True
        if name not in names or _is_call(instructions, place):
            continue
        passes_by = name != names[-1] and instruction.opname in _READS
        if not passes_by or then.opname not in _READS:
            return True
    return False


def lists_tensors(function: FunctionType) -> bool:
    """Whether it may ask a module for its tensors past their names, and make lists or arrays of
    them: no operation tells of these."""
    names = names_in(function.__code__)
    return bool(names & _ALL_TENSORS) and bool(names & _CONVERSIONS)


def _instructions(code: CodeType) -> list[dis.Instruction]:
    return [i for i in dis.get_instructions(code) if i.opname not in _PADDING]


def _asks_for_tensors(instructions: list[dis.Instruction], place: int) -> bool:
    """Whether it loads such an attribute, but for ``next(self.parameters()).dtype``, say."""
    instruction = instructions[place]
    if not instruction.opname.endswith(("_ATTR", "_METHOD")):
        return False
    behind_both_calls = instructions[place + 3 : place + 4]
    only_its_kind = (
        place >= 2
        and instructions[place - 2].argval == "next"
        and any(t.opname in _READS and t.argval in _KINDS for t in behind_both_calls)
    )
    return instruction.argval in _ALL_TENSORS and not only_its_kind


def _is_call(instructions: list[dis.Instruction], place: int) -> bool:
    """Whether the attribute that is loaded there is called at once."""
    instruction, behind = instructions[place], instructions[place + 1 :]
    if instruction.opname == "LOAD_METHOD":
        return True
    if instruction.opname != "LOAD_ATTR":
        return False
    if _LOAD_ATTR_LOADS_METHODS and (instruction.arg or 0) & 1:
        return True
    return _is_called_by_keyword(behind) or _is_called_with_all(behind)


def _is_called_by_keyword(behind: list[dis.Instruction]) -> bool:
    """``self.body(x, mask=mask)`` of Python 3.10, where arguments are no more than loaded."""
    arguments = list(itertools.takewhile(lambda i: i.opname in _LOADS, behind))
    call = behind[len(arguments)]
    # The names are loaded as well.
    return call.opname == "CALL_FUNCTION_KW" and len(arguments) == (call.arg or 0) + 1


def _is_called_with_all(behind: list[dis.Instruction]) -> bool:
    """``self.body(*args)`` and ``self.body(*args, **kwargs)``."""
    names = ["LOAD" if i.opname in _LOADS else i.opname for i in behind[:5]]
    if names[:2] == ["LOAD", "CALL_FUNCTION_EX"]:
        return not (behind[1].arg or 0) & 1  # else what was loaded are keywords
    return names == ["LOAD", "BUILD_MAP", "LOAD", "DICT_MERGE", "CALL_FUNCTION_EX"]


def _is_shared(model: nn.Module, path: str) -> bool:
    """Whether modules or tensors of the one at ``path`` are part of others as well."""
    inside = _inside(model, path)
    return any(id(part) in inside for module in _outside(model, path) for part in _parts(module))


def _is_held(model: nn.Module, path: str, above: list[nn.Module], held: Held) -> bool:
    """Whether an attribute of another module has one of those ``above``, the one at ``path`` or
    what is inside, and so may reach it."""
    wanted = _inside(model, path) | set(map(id, above))
    return any(
        not wanted.isdisjoint(found) for where, found in held.items() if _is_outside(where, path)
    )


def _inside(model: nn.Module, path: str) -> set[int]:
    return {id(part) for m in model.get_submodule(path).modules() for part in _parts(m)}


def _outside(model: nn.Module, path: str) -> Iterator[nn.Module]:
    for where, module in modules_by_path(model).items():
        if _is_outside(where, path):
            yield module


def _is_outside(where: str, path: str) -> bool:
    return where != path and not where.startswith(f"{path}.")


def _parts(module: nn.Module) -> list[object]:
    tensors = (*module._parameters.values(), *module._buffers.values())
    return [module, *(tensor for tensor in tensors if tensor is not None)]
