"""The code behind a forward, read and not run."""

from __future__ import annotations

import dis
import sys
from collections.abc import Iterator, Mapping
from itertools import pairwise
from types import CellType, CodeType, FunctionType, ModuleType

from torch import fx

__all__ = [
    "called_functions",
    "catches_errors",
    "codes",
    "content_of",
    "global_names",
    "is_foreign",
    "names_in",
    "package_of",
]

# Code that no model brings along; what it does to the proxies of a trace, these refuse themselves.
_NOT_THE_MODELS = {"torch", *sys.stdlib_module_names}
# Up to Python 3.10, and from 3.11 on.
_MATCHES_ERRORS = {"JUMP_IF_NOT_EXC_MATCH", "CHECK_EXC_MATCH", "CHECK_EG_MATCH"}


def called_functions(cls: type, forward: object) -> list[FunctionType]:
    """``forward`` and the methods and functions that it names, and what these name or wrap."""
    found: list[FunctionType] = []
    pending = [forward]
    while pending:
        function = pending.pop()
        if isinstance(function, (staticmethod, classmethod)):
            function = function.__func__
        elif isinstance(function, property):
            function = function.fget
        if not isinstance(function, FunctionType) or function in found:
            continue
        if is_foreign(function.__module__ or "") or _is_fx_leaf(function):
            continue
        found.append(function)
        pending.append(getattr(function, "__wrapped__", None))
        pending += map(content_of, function.__closure__ or ())
        names = names_in(function.__code__)
        used = [function.__globals__.get(name) for name in global_names(function.__code__)]
        pending += used
        # The others are attributes: of the model, or of a module of Python's.
        spaces: list[Mapping[str, object]] = [*map(vars, cls.__mro__)]
        for value in used:
            if isinstance(value, ModuleType) and not is_foreign(value.__name__):
                spaces.append(vars(value))
        pending += [space.get(name) for space in spaces for name in names]
    return found


def is_foreign(module: str) -> bool:
    """Whether ``module`` is PyTorch's or Python's, which no model brings along."""
    return package_of(module) in _NOT_THE_MODELS


def package_of(module: str) -> str:
    return module.partition(".")[0]


def codes(code: CodeType) -> Iterator[CodeType]:
    """``code`` and what is defined inside: lambdas, comprehensions, local functions."""
    yield code
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from codes(constant)


def names_in(code: CodeType) -> set[str]:
    return {name for inner in codes(code) for name in inner.co_names}


def catches_errors(code: CodeType) -> bool:
    """Whether it has an ``except``, with a type of errors or without."""
    return any(map(_catches_errors, codes(code)))


def _catches_errors(code: CodeType) -> bool:
    instructions = list(dis.get_instructions(code))
    handlers = {i.argval for i in instructions if i.opname == "SETUP_FINALLY"}  # up to 3.10
    for instruction, then in pairwise(instructions):
        if instruction.opname in _MATCHES_ERRORS:
            return True
        # Without a type it drops the error at once; what is behind `finally` raises it again.
        handles = instruction.opname == "PUSH_EXC_INFO" or then.offset in handlers
        if handles and then.opname == "POP_TOP":
            return True
    return False


def global_names(code: CodeType) -> set[str]:
    """Names that are looked up by themselves, not as attributes: ``type``, not ``x.type``."""
    return {
        str(instruction.argval)
        for inner in codes(code)
        for instruction in dis.get_instructions(inner)
        if instruction.opname in ("LOAD_GLOBAL", "LOAD_NAME")
    }


def _is_fx_leaf(function: FunctionType) -> bool:
    """Whether ``torch.fx.wrap`` made a call of the graph of it; so it looks during a trace."""
    return function.__globals__.get("__name__") == fx.Tracer.__module__


def content_of(cell: CellType) -> object:
    try:
        return cell.cell_contents
    except ValueError:  # not assigned yet
        return None
