"""What an export can fail with, beside wrong arguments."""

from __future__ import annotations

import importlib
import re
from types import ModuleType

from dwswap.tracing import one_line

__all__ = ["ExportError", "required", "summary"]

_LONGEST = 300
_COLORS = re.compile(r"\x1b\[[0-9;]*m")


class ExportError(RuntimeError):
    """A model cannot be exported, or a file not loaded; the cause is what failed."""


def required(package: str, purpose: str, source: str = "dwswap[onnx]") -> ModuleType:
    """Import an optional package.

    Raises:
        ModuleNotFoundError: it is not installed; names ``source``, with which pip brings it.
    """
    try:
        return importlib.import_module(package)
    except ModuleNotFoundError as error:
        if error.name != package:
            raise
        raise ModuleNotFoundError(
            f"{purpose} needs the package {package}, which is not installed: "
            f"pip install {source!r}",
            name=package,
        ) from error


def summary(error: BaseException) -> str:
    """Type and first line of ``error``, for a message whose cause tells all of it."""
    # The outer errors of the exporter for ONNX say how to report one.
    while type(error).__module__.startswith("torch.onnx") and error.__cause__ is not None:
        error = error.__cause__
    text = _COLORS.sub("", f"{type(error).__name__}: {one_line(error)}")
    return text if len(text) <= _LONGEST else text[:_LONGEST] + " ..."
