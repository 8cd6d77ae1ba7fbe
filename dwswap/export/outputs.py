"""Which outputs of a program a file of each format can hold."""

from __future__ import annotations

from torch.export import ExportedProgram
from torch.export.graph_signature import (
    ConstantArgument,
    OutputKind,
    SymBoolArgument,
    SymFloatArgument,
    SymIntArgument,
)
from torch.utils import _pytree as pytree

from dwswap.export.errors import ExportError

__all__ = ["check_outputs"]

_NUMBERS: dict[str, tuple[type, ...]] = {
    "pt2": (bool, int, float),
    "aten": (bool, int, float),
    "onnx": (),
    "aoti": (bool, int),
}
_SYMBOLIC = {SymBoolArgument: bool, SymIntArgument: int, SymFloatArgument: float}


def check_outputs(program: ExportedProgram, format: str) -> None:
    """Whether all outputs are tensors, None, or numbers that ``format`` has.

    Raises:
        ExportError: another output, named by its place in what the model returns.
    """
    signature, structure = program.graph_signature, program.call_spec.out_spec
    outputs = [spec.arg for spec in signature.output_specs if spec.kind is OutputKind.USER_OUTPUT]
    places, _ = pytree.tree_flatten_with_path(pytree.tree_unflatten(range(len(outputs)), structure))
    kinds = _NUMBERS[format]
    for (place, _), output in zip(places, outputs, strict=True):
        if isinstance(output, ConstantArgument):
            fits, found = output.value is None or type(output.value) in kinds, repr(output.value)
        elif type(output) in _SYMBOLIC:
            kind = _SYMBOLIC[type(output)]
            fits, found = kind in kinds, f"one of type {kind.__name__}"
        else:
            continue
        if not fits:
            allowed = "".join(f", {kind.__name__}" for kind in kinds)
            raise ExportError(
                f'format="{format}" has outputs that are tensors{allowed} or None, got {found} '
                f"as output{pytree.keystr(place)}"
            )
