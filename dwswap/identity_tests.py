"""Where code compares with ``is``, which no value can answer for itself: read off its bytecode."""

from __future__ import annotations

import dis
from bisect import bisect_right
from collections.abc import Iterator
from functools import lru_cache
from types import CodeType
from typing import NamedTuple

__all__ = ["IdentityTest", "reads_local", "tests_of_locals", "tests_result_for_none"]

# Between a value and its test these change neither.
_SKIPPED = {"CACHE", "EXTENDED_ARG", "NOP", "PRECALL", "COPY", "DUP_TOP"}
_LOADS = ("LOAD_FAST", "LOAD_DEREF", "LOAD_CLASSDEREF")
_NAMED = (*_LOADS, "STORE_FAST", "STORE_DEREF")  # ``:=`` stores what is compared
_CONSTANT = ("LOAD_CONST", "LOAD_GLOBAL")


class IdentityTest(NamedTuple):
    """A local variable that is compared; ``for_none``: with ``None``."""

    name: str
    for_none: bool


@lru_cache(maxsize=4096)
def tests_of_locals(code: CodeType) -> frozenset[IdentityTest]:
    """The tests of local variables in ``code``, but for what is defined inside."""
    return frozenset(_tests(_instructions(code)))


@lru_cache(maxsize=4096)
def tests_result_for_none(code: CodeType, offset: int) -> bool | None:
    """Whether what the instruction at ``offset`` makes is compared with ``None``, if compared."""
    found = _instructions(code)
    i = bisect_right([instruction.offset for instruction in found], offset)
    stored: tuple[str, ...] = ()
    while i < len(found) and found[i].opname.startswith("STORE_FAST"):
        # Since Python 3.13 one instruction may store a value and load another.
        loads = found[i].opname == "STORE_FAST_LOAD_FAST"
        stored += _names(found[i])[: 1 if loads else None]
        i += 1
    tests = [test.for_none for test in tests_of_locals(code) if test.name in stored]
    if stored or i == len(found):
        return all(tests) if tests else None
    if _is_jump_on_none(found[i]):
        return True
    for_none = False
    while i < len(found) and found[i].opname.startswith((*_LOADS, *_CONSTANT, "LOAD_ATTR")):
        for_none = _is_none(found[i])
        i += 1
    return for_none if i < len(found) and found[i].opname == "IS_OP" else None


def reads_local(code: CodeType, name: str) -> bool:
    """Whether ``code`` itself reads the local variable ``name``."""
    loads = (i for i in _instructions(code) if i.opname.startswith(_LOADS))
    return any(name in _names(load) for load in loads)


@lru_cache(maxsize=256)
def _instructions(code: CodeType) -> list[dis.Instruction]:
    return [i for i in dis.get_instructions(code) if i.opname not in _SKIPPED]


def _tests(found: list[dis.Instruction]) -> Iterator[IdentityTest]:
    for i, instruction in enumerate(found):
        names: tuple[str, ...] = ()
        for_none = True
        if _is_jump_on_none(instruction):
            names = _names(found[i - 1])[-1:]
        elif instruction.opname == "IS_OP":
            right = i - 1
            while found[right].opname == "LOAD_ATTR":
                right -= 1
            names, left = _names(found[right]), found[right - 1]
            for_none = _is_none(found[right]) or _is_none(left)
            if len(names) < 2 and found[right].opname.startswith((*_LOADS, *_CONSTANT)):
                names += _names(left)[-1:]
        for name in names:
            yield IdentityTest(name, for_none)


def _names(instruction: dis.Instruction) -> tuple[str, ...]:
    """The local variables of an instruction; since Python 3.13 one may load two."""
    if not instruction.opname.startswith(_NAMED):
        return ()
    value = instruction.argval
    return value if isinstance(value, tuple) else (value,)


def _is_jump_on_none(instruction: dis.Instruction) -> bool:
    return instruction.opname.startswith("POP_JUMP") and instruction.opname.endswith("_NONE")


def _is_none(instruction: dis.Instruction) -> bool:
    return instruction.opname == "LOAD_CONST" and instruction.argval is None
