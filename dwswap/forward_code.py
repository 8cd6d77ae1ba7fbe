"""The code behind a forward, read and not run."""

from __future__ import annotations

import dis
import sys
from collections.abc import Iterator, Mapping
from functools import cached_property
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
    "only_of_self",
    "package_of",
    "special_methods",
]

# Code that no model brings along; what it does to the proxies of a trace, these refuse themselves.
_NOT_THE_MODELS = {"torch", *sys.stdlib_module_names}
# Special methods that a call does not run, but making, copying, saving and showing an object.
_NOT_IN_A_CALL = {"__init__", "__new__", "__del__", "__init_subclass__", "__class_getitem__"}
_NOT_IN_A_CALL |= {"__copy__", "__deepcopy__", "__reduce__", "__reduce_ex__", "__dir__"}
_NOT_IN_A_CALL |= {"__getstate__", "__setstate__", "__repr__", "__str__", "__format__"}
# Up to Python 3.10, and from 3.11 on.
_MATCHES_ERRORS = {"JUMP_IF_NOT_EXC_MATCH", "CHECK_EXC_MATCH", "CHECK_EG_MATCH"}


def called_functions(cls: type, forward: object) -> list[FunctionType]:
    """``forward`` and the methods and functions that it names, and what these name or wrap."""
    found: list[FunctionType] = []
    descriptors: list[object] = []
    pending = [forward]
    while pending:
        function = pending.pop()
        if isinstance(function, (staticmethod, classmethod)):
            function = function.__func__
        elif isinstance(function, property):
            function = function.fget
        elif isinstance(function, cached_property):
            function = function.func
        elif _is_descriptor(function) and not any(function is known for known in descriptors):
            descriptors.append(function)
            pending += [getattr(type(function), "__get__", None), *vars(function).values()]
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


def special_methods(cls: type) -> list[FunctionType]:
    """What the code of a call may run without its name: ``__len__`` for ``len(self)``, say."""
    return [
        value
        for owner in cls.__mro__
        if not is_foreign(owner.__module__)
        for name, value in vars(owner).items()
        if isinstance(value, FunctionType) and name.startswith("__") and name.endswith("__")
        if name not in _NOT_IN_A_CALL
    ]


def _is_descriptor(value: object) -> bool:
    """An object, of a class that a model brings along, which makes an attribute when it is read."""
    cls = type(value)
    return hasattr(cls, "__get__") and not is_foreign(cls.__module__) and hasattr(value, "__dict__")


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


def only_of_self(code: CodeType, name: str) -> bool:
    """Whether ``code`` has ``name`` for attributes of its first argument, and nothing else."""
    for inner in codes(code):
        instructions = list(dis.get_instructions(inner))
        for before, instruction in pairwise([instructions[0], *instructions]):
            if instruction.argval != name or instruction.opname == "LOAD_CONST":
                continue
            # From Python 3.13 on, one instruction may load two variables.
            loaded = before.argval if isinstance(before.argval, tuple) else (before.argval,)
            of_self = loaded[-1:] == code.co_varnames[:1]
            if not (inner is code and before.opname.startswith("LOAD_FAST") and of_self):
                return False
    return True


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
