"""Files of ``torch.export``: with our operator (``"pt2"``), or of aten alone (``"aten"``)."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch.export import ExportedProgram

from dwswap.export.program import to_aten

__all__ = ["load_program", "save_aten", "save_pt2"]


def save_pt2(program: ExportedProgram, path: Path) -> None:
    """Write ``program`` as it is."""
    torch.export.save(program, path)


def save_aten(program: ExportedProgram, path: Path) -> None:
    """Write ``program`` without our operator: whoever has PyTorch can load it."""
    torch.export.save(to_aten(program), path)


def load_program(path: Path) -> Callable[..., Any]:
    """The module of the program in ``path``; our operator is registered by importing this file."""
    return torch.export.load(path).module()
