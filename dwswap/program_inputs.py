"""What the inputs of an exported program must be."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.export import ExportedProgram
from torch.export.graph_signature import ConstantArgument, InputKind

__all__ = ["check_inputs"]


def check_inputs(program: ExportedProgram, leaves: Sequence[Any]) -> None:
    """Compare ``leaves`` of ``example_inputs`` with the inputs of ``program``, one to one.

    PyTorch's own check comes with a run of the program, and tells no dtypes.

    Raises:
        ValueError: naming the input, what it must be, and what it is.
    """
    values = {n.name: n.meta.get("val") for n in program.graph.nodes if n.op == "placeholder"}
    specs = [s.arg for s in program.graph_signature.input_specs if s.kind is InputKind.USER_INPUT]
    sizes: list[tuple[str, Any, int]] = []
    for spec, leaf in zip(specs, leaves, strict=True):
        expected = values[spec.name]
        if isinstance(spec, ConstantArgument):
            _check_constant(spec.name, spec.value, leaf)
        elif isinstance(expected, Tensor):
            _check_tensor(spec.name, expected, leaf)
            for i, size in enumerate(expected.shape):
                sizes.append((f"{spec.name}.shape[{i}]", _expression(size), leaf.shape[i]))
        elif isinstance(expected, torch.SymInt):
            if type(leaf) is not int:
                raise _refusal(spec.name, "an int", _shown(leaf))
            sizes.append((spec.name, _expression(expected), leaf))
    _check_sizes(sizes, program.range_constraints)


def _check_constant(name: str, expected: Any, found: Any) -> None:
    both_nan = expected != expected and found != found
    if type(found) is not type(expected) or (found != expected and not both_nan):
        raise _refusal(name, f"{expected!r}, which it was in the export", _shown(found))


def _check_tensor(name: str, expected: Tensor, found: Any) -> None:
    if not isinstance(found, Tensor):
        raise _refusal(name, "a tensor", _shown(found))
    if found.dtype != expected.dtype:
        raise _refusal(name, f"of {expected.dtype}", str(found.dtype))
    if found.dim() != expected.dim():
        raise _refusal(name, f"of {expected.dim()} dimensions", f"shape {list(found.shape)}")


def _check_sizes(sizes: Sequence[tuple[str, Any, int]], ranges: Mapping[Any, Any]) -> None:
    """Refuse a size other than expected.

    Args:
        sizes: name, expected size (a number, a symbol or an expression of symbols), size found.
        ranges: of symbols and expressions, as ``ExportedProgram.range_constraints`` has them.
    """
    symbols: dict[Any, int] = {}
    for _, size, found in sizes:
        if not isinstance(size, int) and size.is_Symbol:
            symbols.setdefault(size, found)
    for name, size, found in sizes:
        expected = size if isinstance(size, int) else size.subs(symbols)
        is_known = isinstance(expected, int) or expected.is_number
        if is_known and expected != found:
            raise _refusal(name, str(expected), str(found))
        if size in ranges:
            _check_range(name, ranges[size], found)


def _check_range(name: str, values: Any, found: int) -> None:
    # torch.export gives a dimension that varies a lower limit of 2 where the user gave none; 0 and
    # 1 are right for the program too.
    if values.lower > 2 and found < values.lower:
        raise _refusal(name, f"at least {values.lower}", str(found))
    if found > values.upper:
        raise _refusal(name, f"at most {values.upper}", str(found))


def _expression(size: int | torch.SymInt) -> Any:
    return size.node.expr if isinstance(size, torch.SymInt) else size


def _shown(value: Any) -> str:
    return f"a {type(value).__name__}" if isinstance(value, Tensor) else repr(value)


def _refusal(name: str, requirement: str, found: str) -> ValueError:
    return ValueError(
        f"example_inputs must be as the program's own: {name} must be {requirement}, got {found}"
    )
