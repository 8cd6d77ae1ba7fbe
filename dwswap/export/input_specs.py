"""What the inputs of a compiled program must be."""

from __future__ import annotations

import json
import sys
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor
from torch.export import ExportedProgram
from torch.utils import _pytree as pytree

from dwswap.export.size_guards import evaluate, guards_of, is_met, solved, symbols_in

__all__ = [
    "InputSpecs",
    "TensorSpec",
    "check_constant",
    "check_kinds",
    "constants_of",
    "leaves_by_path",
]

_PLAIN = (bool, int, float, str, type(None))
_MOST_NAMED = 8


@dataclass(frozen=True)
class TensorSpec:
    """One tensor; a size that may vary is its symbol, or an expression of symbols."""

    dtype: str
    device: str
    shape: tuple[int | str, ...]
    channels_last: bool

    @classmethod
    def of(cls, example: Tensor, shape: Sequence[int | torch.SymInt]) -> TensorSpec:
        """Of an example input whose shape in the program is ``shape``.

        Raises:
            ValueError: its strides are neither those of a contiguous nor of a channels_last tensor.
        """
        channels_last = not example.is_contiguous()
        if channels_last and not _is_channels_last(example):
            raise ValueError(
                "the example inputs of a program that is compiled must be contiguous or "
                f"channels_last, got shape {list(example.shape)} with strides {example.stride()}"
            )
        # Without the spaces that sympy prints.
        sizes = tuple(s if isinstance(s, int) else str(s).replace(" ", "") for s in shape)
        return cls(_name(example.dtype), example.device.type, sizes, channels_last)

    def check_kind(self, name: str, value: Any) -> Tensor:
        """``value`` as a tensor that may fit.

        Raises:
            TypeError: it is no tensor, or of another dtype or device.
            ValueError: it has another number of dimensions.
        """
        if not isinstance(value, Tensor):
            raise TypeError(f"{name} must be a tensor, got {type(value).__name__}")
        found = (_name(value.dtype), value.device.type)
        if found != (self.dtype, self.device):
            raise TypeError(
                f"{name} must be {self.dtype} on {self.device}, got {found[0]} on {found[1]}"
            )
        if value.dim() != len(self.shape):
            raise self._other_shape(name, value, list(self.shape))
        return value

    def conform(self, name: str, value: Tensor, symbols: Mapping[str, int]) -> Tensor:
        """``value`` with the strides that the compiled code expects.

        Args:
            symbols: the sizes that symbols have in this call.

        Raises:
            ValueError: it has another shape.
        """
        expected = [
            evaluate(size, symbols)
            if isinstance(size, str) and symbols_in(size) <= symbols.keys()
            else size
            for size in self.shape
        ]
        if list(value.shape) != expected:
            raise self._other_shape(name, value, expected)
        layout = torch.channels_last if self.channels_last else torch.contiguous_format
        return value.contiguous(memory_format=layout)

    def _other_shape(self, name: str, value: Tensor, expected: Sequence[int | str]) -> ValueError:
        wanted = ", ".join(map(str, expected))
        return ValueError(f"{name} must have shape [{wanted}], got {list(value.shape)}")


@dataclass(frozen=True)
class InputSpecs:
    """Of all leaves of the arguments, by their paths: ``args[0]``, ``kwargs['x']``.

    Attributes:
        tensors: what the tensors must be.
        constants: values that are part of the compiled code.
        ranges: least and, where there is one, largest size of every symbol.
        guards: equations between symbols.
    """

    tensors: Mapping[str, TensorSpec]
    constants: Mapping[str, Any]
    ranges: Mapping[str, tuple[int, int | None]]
    guards: tuple[str, ...] = ()

    @classmethod
    def of_program(cls, program: ExportedProgram) -> InputSpecs:
        """The specs of the example inputs of ``program``, and of its constraints.

        Raises:
            ValueError: it has no example inputs, or some with strides that cannot be described, or
                relies on what cannot be checked.
        """
        if program.example_inputs is None:
            raise ValueError("a program that is compiled must have example inputs, got none")
        leaves = leaves_by_path(*program.example_inputs)
        nodes = {node.name: node for node in program.graph.nodes if node.op == "placeholder"}
        tensors = {}
        inputs = program.graph_signature.user_inputs
        for (path, leaf), name in zip(leaves.items(), inputs, strict=True):
            if isinstance(leaf, Tensor):
                tensors[path] = TensorSpec.of(leaf, nodes[str(name)].meta["val"].shape)
        constants = constants_of(leaves)
        ranges = {str(s).replace(" ", ""): _bounds(r) for s, r in program.range_constraints.items()}
        sizes = [size for spec in tensors.values() for size in spec.shape if isinstance(size, str)]
        symbols = set().union(*map(symbols_in, sizes))
        return cls(tensors, constants, ranges, guards_of(program, symbols))

    @property
    def dtype(self) -> str:
        """That of the first tensor of floating point; empty where there is none."""
        dtypes = (spec.dtype for spec in self.tensors.values())
        return next((name for name in dtypes if getattr(torch, name).is_floating_point), "")

    def conform(
        self, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The arguments with the strides that the compiled code expects.

        Raises:
            TypeError, ValueError: naming the argument, what it must be, and what it is.
        """
        found = leaves_by_path(args, kwargs)
        known = self.tensors.keys() | self.constants.keys()
        if not known <= found.keys() or any(
            isinstance(found[path], (Tensor, *_PLAIN)) for path in found.keys() - known
        ):
            raise _other_arguments(known, found)
        given = {path: spec.check_kind(path, found[path]) for path, spec in self.tensors.items()}
        symbols = self._symbols(given)
        for path, spec in self.tensors.items():
            found[path] = spec.conform(path, given[path], symbols)
        for path, value in self.constants.items():
            check_constant(path, value, found[path])
        for guard in self.guards:
            if not is_met(guard, symbols):
                sizes = ", ".join(f"{name} = {symbols[name]}" for name in sorted(symbols_in(guard)))
                raise ValueError(f"the sizes of the inputs must satisfy {guard}, got {sizes}")
        for symbol, size in symbols.items():
            least, most = self.ranges.get(symbol, (0, None))
            if size < least or (most is not None and size > most):
                limit = f"at least {least}" + ("" if most is None else f" and at most {most}")
                raise ValueError(f"the size {symbol} of the inputs must be {limit}, got {size}")
        # The compiled code takes the tensors one after the other: as in the export, whose dicts
        # may have been filled in another order.
        kwargs = {name: kwargs[name] for name in sorted(kwargs, key=self._place)}
        leaves, structure = pytree.tree_flatten((args, kwargs))
        ordered = iter([found[path] for path in self.tensors])
        leaves = [next(ordered) if isinstance(leaf, Tensor) else leaf for leaf in leaves]
        result: tuple[tuple[Any, ...], dict[str, Any]]
        result = pytree.tree_unflatten(leaves, structure)
        return result

    def _symbols(self, given: Mapping[str, Tensor]) -> dict[str, int]:
        """The size of every symbol: of the first input that has it, alone or in an expression."""
        sizes = [
            (expected, size)
            for path, spec in self.tensors.items()
            for expected, size in zip(spec.shape, given[path].shape, strict=True)
            if isinstance(expected, str)
        ]
        symbols: dict[str, int] = {}
        for expected, size in sizes:
            if expected.isidentifier():
                symbols.setdefault(expected, size)
        for expected, size in sizes:
            if not symbols_in(expected) <= symbols.keys():
                symbols |= solved(expected, size)
        return symbols

    def _place(self, name: str) -> int:
        """Of the first tensor in a keyword argument; behind all others where it has none."""
        inside = (i for i, path in enumerate(self.tensors) if path.startswith(f"kwargs[{name!r}]"))
        return next(inside, len(self.tensors))

    def to_json(self) -> str:
        """As text, for the metadata of a package."""
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> InputSpecs:
        """The inverse of :meth:`to_json`."""
        content = json.loads(text)
        tensors = {
            path: TensorSpec(**{**spec, "shape": tuple(spec["shape"])})
            for path, spec in content["tensors"].items()
        }
        ranges = {symbol: tuple(bounds) for symbol, bounds in content["ranges"].items()}
        guards = tuple(content.get("guards", ()))  # files of before have none
        return cls(tensors, content["constants"], ranges, guards)


def constants_of(leaves: Mapping[str, Any]) -> dict[str, Any]:
    """What a program holds of the arguments with which it was exported, given by their paths."""
    return {path: leaf for path, leaf in leaves.items() if isinstance(leaf, _PLAIN)}


def check_constant(path: str, value: Any, found: Any) -> None:
    """Compare an argument with what a program was exported with.

    Raises:
        ValueError: naming the argument, what it must be, and what it is.
    """
    if found != value:
        raise ValueError(f"{path} must be {value!r}, which it was in the export, got {found!r}")


def check_kinds(kinds: Mapping[str, type], found: Mapping[str, Any]) -> None:
    """Compare the arguments of a call, by their paths, with the types that they must have.

    Only tensors are told from what is none.

    Raises:
        TypeError: naming the argument, what it must be, and what it is.
    """
    if kinds.keys() != found.keys():
        raise _other_arguments(kinds, found)
    for path, kind in kinds.items():
        if issubclass(kind, Tensor) and not isinstance(found[path], Tensor):
            raise TypeError(f"{path} must be a tensor, got {type(found[path]).__name__}")


def _other_arguments(known: Collection[str], found: Collection[str]) -> TypeError:
    named = [
        ", ".join(sorted(paths)[:_MOST_NAMED]) + (", ..." if len(paths) > _MOST_NAMED else "")
        for paths in (known, found)
    ]
    return TypeError(f"the arguments must be {named[0] or 'none'}, got {named[1] or 'none'}")


def leaves_by_path(args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """All values in the arguments of a call, by their paths."""
    return {
        root + pytree.keystr(path): leaf
        for root, tree in (("args", args), ("kwargs", kwargs))
        for path, leaf in pytree.tree_flatten_with_path(tree)[0]
    }


def _bounds(values: Any) -> tuple[int, int | None]:
    # A trace holds 0 and 1 for special and says 2; what it makes is right for them too.
    least = 0 if values.lower <= 2 else int(values.lower)
    return least, int(values.upper) if values.upper < sys.maxsize else None


def _is_channels_last(tensor: Tensor) -> bool:
    return tensor.dim() == 4 and tensor.is_contiguous(memory_format=torch.channels_last)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
