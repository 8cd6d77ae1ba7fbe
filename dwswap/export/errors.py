"""What an export can fail with, beside wrong arguments."""

from __future__ import annotations

import importlib
from types import ModuleType

__all__ = ["ExportError", "required"]


class ExportError(RuntimeError):
    """A model cannot be exported, or a file not loaded; the cause is what failed."""


def required(package: str, purpose: str) -> ModuleType:
    """Import an optional package.

    Raises:
        ModuleNotFoundError: it is not installed; names the extra that brings it.
    """
    try:
        return importlib.import_module(package)
    except ModuleNotFoundError as error:
        if error.name != package:
            raise
        raise ModuleNotFoundError(
            f"{purpose} needs the package {package}, which is not installed: "
            "pip install 'dwswap[onnx]'",
            name=package,
        ) from error
