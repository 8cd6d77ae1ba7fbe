"""What the sizes of the inputs of a program must satisfy, as text that a package can hold."""

from __future__ import annotations

import ast
import functools
import operator
from collections.abc import Callable, Iterable, Mapping, Set
from typing import Any

from torch.export import ExportedProgram

__all__ = ["evaluate", "guards_of", "is_met", "solved", "symbols_in"]

_OPERATORS: dict[type[ast.operator], Callable[[int, int], int]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.FloorDiv: operator.floordiv,
    ast.Mod: operator.mod,
    ast.Pow: operator.pow,
}
# As sympy and torch.utils._sympy print them.
_FUNCTIONS: dict[str, Callable[..., Any]] = {
    "Eq": operator.eq,
    "Max": max,
    "Min": min,
    **dict.fromkeys(("Mod", "PythonMod"), operator.mod),
    **dict.fromkeys(("FloorDiv", "CleanDiv"), operator.floordiv),
}


def evaluate(text: str, symbols: Mapping[str, int]) -> int:
    """The value of an expression of whole numbers.

    Raises:
        ValueError: it has an operation or a symbol that is not known.
    """
    return int(_value(_parsed(text), symbols))


def is_met(guard: str, symbols: Mapping[str, int]) -> bool:
    """Whether sizes satisfy a condition; none does that would have it divide by zero."""
    try:
        return bool(evaluate(guard, symbols))
    except ZeroDivisionError:
        return False


@functools.cache  # of the few expressions of a package, in every call
def symbols_in(text: str) -> frozenset[str]:
    """The names of sizes in an expression."""
    names = {node.id for node in ast.walk(_parsed(text)) if isinstance(node, ast.Name)}
    return frozenset(names - _FUNCTIONS.keys())


def solved(text: str, size: int) -> dict[str, int]:
    """The symbol of an expression that is linear in it, as a derived ``Dim`` is, where the value is
    ``size``; empty for other expressions, and where there is no such whole number."""
    names = symbols_in(text)
    if len(names) != 1:
        return {}
    (name,) = names
    at = [evaluate(text, {name: value}) for value in (0, 1, 2)]
    slope = at[1] - at[0]
    linear = slope != 0 and at[2] - at[1] == slope
    fits = linear and (size - at[0]) % slope == 0
    return {name: (size - at[0]) // slope} if fits else {}


def guards_of(program: ExportedProgram, symbols: Iterable[str]) -> tuple[str, ...]:
    """The equations between sizes that the trace of ``program`` relied on.

    Inequalities are its ``range_constraints``.

    Args:
        symbols: those that the shapes of the inputs tell.

    Raises:
        ValueError: one holds something else, or an operation that is not known.
    """
    known = set(symbols)
    found: dict[str, None] = {}
    for expression in _equations(program, known):
        text = str(expression)
        if not symbols_in(text) <= known:
            raise ValueError(f"sizes of the inputs do not tell whether {text}")
        is_met(text, dict.fromkeys(known, 2))
        found[text] = None
    return tuple(text for text in found if text != "True")


def _equations(program: ExportedProgram, known: Set[str]) -> list[Any]:
    """With symbols that are not ``known`` as what they are equal to."""
    values = (node.meta.get("val") for node in program.graph.nodes if node.op == "placeholder")
    modes = {id(m): m for v in values if (m := getattr(v, "fake_mode", None)) is not None}
    equations: list[Any] = []
    for mode in modes.values():
        guards = [] if mode.shape_env is None else [g.expr for g in mode.shape_env.guards]
        found = [expr for expr in guards if type(expr).__name__ == "Equality"]
        equal = [pair for expr in found for pair in (expr.args, expr.args[::-1])]
        derived = {s: other for s, other in equal if s.is_Symbol and str(s) not in known}
        equations += [expr.subs(derived) for expr in found]
    return equations


@functools.cache
def _parsed(text: str) -> ast.expr:
    return ast.parse(text, mode="eval").body


def _value(node: ast.AST, symbols: Mapping[str, int]) -> int:
    if isinstance(node, ast.Constant) and isinstance(node.value, int):  # True is one
        return int(node.value)
    if isinstance(node, ast.Name) and node.id in symbols:
        return symbols[node.id]
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
        return -_value(node.operand, symbols)
    if isinstance(node, ast.BinOp) and type(node.op) in _OPERATORS:
        left, right = _value(node.left, symbols), _value(node.right, symbols)
        return _OPERATORS[type(node.op)](left, right)
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
        function = _FUNCTIONS.get(node.func.id)
        if function is not None and not node.keywords:
            return int(function(*(_value(argument, symbols) for argument in node.args)))
    raise ValueError(f"{ast.unparse(node)} in a condition on sizes cannot be checked")
