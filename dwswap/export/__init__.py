"""Save optimized models in files, and load them: ``dwswap.export.save`` and ``load``.

| format   | what it holds                           | what runs it                                |
| -------- | --------------------------------------- | ------------------------------------------- |
| ``pt2``  | a program with the dwswap operator      | ``dwswap.export.load``                      |
| ``aten`` | a program of PyTorch's own operators    | ``torch.export.load``, without dwswap       |
| ``onnx`` | operators of the ONNX standard          | ONNX Runtime and others                     |
| ``aoti`` | code compiled by AOTInductor            | PyTorch in Python or C++; on CUDA with the  |
|          |                                         | library of ``dwswap build --standalone``    |
"""

from __future__ import annotations

import os
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import nn
from torch.export import ExportedProgram

from dwswap.atomic_file import replacing
from dwswap.checks import check_flags
from dwswap.export.aoti import load_compiled, save_compiled
from dwswap.export.errors import ExportError, summary
from dwswap.export.onnx import OnnxModel, check_packages, save_onnx
from dwswap.export.outputs import check_outputs
from dwswap.export.program import to_program
from dwswap.export.pt2 import load_program, save_aten, save_pt2

__all__ = ["FORMATS", "ExportError", "check_target", "load", "save"]

_WRITERS: dict[str, Callable[[ExportedProgram, Path], None]] = {
    "pt2": save_pt2,
    "aten": save_aten,
    "onnx": save_onnx,
    "aoti": save_compiled,
}

FORMATS = tuple(_WRITERS)
"""The names of the formats."""


def save(
    model: nn.Module | ExportedProgram,
    path: str | os.PathLike[str],
    example_inputs: Any = None,
    *,
    format: str = "pt2",
    dynamic_batch: bool = False,
    dynamic_shapes: Any = None,
) -> Path:
    """Export ``model``, a result of :func:`dwswap.optimize` or any other model, to a file.

    The file appears whole or not at all: what was there before stays until then.

    Args:
        model: in eval mode, on one device; or a ``torch.export.ExportedProgram``.
        path: ends with ``.onnx`` for that format, with ``.pt2`` for the others. Its folder exists.
        example_inputs: a tensor, a tuple of positional arguments or a dict of keyword arguments.
            Their dtypes, device, layout and, but for what is dynamic, shapes are those that the
            file is for. ``"pt2"`` and ``"aten"`` files hold these tensors.
        format: ``"pt2"``, ``"aten"``, ``"onnx"`` or ``"aoti"``. Outputs that are numbers are
            returned by files of the first two; by ``"aoti"`` as tensors without dimensions, floats
            excepted; ``"onnx"`` has tensors alone, and leaves None out.
        dynamic_batch: the first dimension of all tensors may have any size.
        dynamic_shapes: what may vary, as ``torch.export.export`` takes it.

    Returns:
        ``path``.

    Raises:
        TypeError, ValueError: an argument, named with what it must be and what it is.
        OSError: the folder is missing or cannot be written.
        ModuleNotFoundError: a package of the format's extra is missing.
        ExportError: the model cannot be exported; its cause says why.
    """
    target = check_target(path, format)
    check_flags(dynamic_batch=dynamic_batch)
    # Before the work, which may take minutes: a place that cannot be written shows at once.
    with replacing(target) as partial:
        program = to_program(model, example_inputs, dynamic_batch, dynamic_shapes)
        check_outputs(program, format)
        try:
            _WRITERS[format](program, partial)
        except (ExportError, OSError, ValueError):
            raise
        except Exception as error:  # of the exporter or compiler of the format, whatever it is
            raise ExportError(
                f'the program cannot be saved as format="{format}": {summary(error)}'
            ) from error
    return target


def load(path: str | os.PathLike[str]) -> Callable[..., Any]:
    """Load a file of :func:`save`, whatever its format.

    Returns:
        What is called like the model and returns what it returns. An ONNX file takes tensors and
        returns a tensor, or a tuple of several, on the CPU.

    Raises:
        TypeError: ``path`` is no path.
        OSError: there is no such file, or it cannot be read.
        ModuleNotFoundError: ONNX Runtime is not installed.
        ExportError: the file is none of these, or cannot be loaded; its cause says why.
    """
    source = _path(path)
    try:
        return _reader(source)(source)
    except (ExportError, OSError, ModuleNotFoundError):
        raise
    except Exception as error:  # of the loader of the format, whatever it is
        raise ExportError(f"{source} cannot be loaded: {summary(error)}") from error


def _path(path: str | os.PathLike[str]) -> Path:
    if not isinstance(path, (str, os.PathLike)):
        raise TypeError(f"path must be a string or a path, got {path!r}")
    return Path(path)


def check_target(path: str | os.PathLike[str], format: str) -> Path:
    """``path``, where :func:`save` can write a file of this format.

    Raises:
        TypeError, ValueError, OSError, ModuleNotFoundError: as :func:`save`.
    """
    if not isinstance(format, str) or format not in _WRITERS:
        raise ValueError(f"format must be one of {', '.join(FORMATS)}, got {format!r}")
    target, suffix = _path(path), ".onnx" if format == "onnx" else ".pt2"
    if target.suffix != suffix:
        raise ValueError(f'path must end with {suffix} for format="{format}", got {str(target)!r}')
    if target.is_dir():
        raise IsADirectoryError(f"path must be a file, {target} is a folder")
    if not target.parent.is_dir():
        raise FileNotFoundError(f"path must be in a folder that exists, {target.parent} does not")
    if format == "onnx":
        check_packages()
    return target


def _reader(path: Path) -> Callable[[Path], Callable[..., Any]]:
    with path.open("rb") as file:
        if file.read(1) != b"P" and path.suffix != ".pt2":  # of PK, the mark of a zip archive
            return OnnxModel
    if not zipfile.is_zipfile(path):
        raise ExportError(f"{path} is neither a .pt2 archive nor an ONNX file, or is damaged")
    with zipfile.ZipFile(path) as archive:
        names = archive.namelist()
    if any("/data/aotinductor/" in name for name in names):
        return load_compiled
    # The second is of files that PyTorch wrote before 2.8.
    marks = ("archive_format", "serialized_exported_program.json")
    if not any(name.rpartition("/")[2] in marks for name in names):
        raise ExportError(
            f"{path} must hold an exported program, got another zip archive"
            + (", of torch.save or torch.jit.save" if _is_pickled(names) else "")
        )
    return load_program


def _is_pickled(names: list[str]) -> bool:
    return any(name.endswith("/data.pkl") for name in names)
