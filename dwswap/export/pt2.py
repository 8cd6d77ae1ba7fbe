"""Files of ``torch.export``: with our operator (``"pt2"``), or of aten alone (``"aten"``)."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.export import ExportedProgram

from dwswap.export.input_specs import check_kinds, leaves_by_path
from dwswap.export.program import to_aten
from dwswap.flops import register as register_flops

__all__ = ["load_program", "save_aten", "save_pt2"]


def save_pt2(program: ExportedProgram, path: Path) -> None:
    """Write ``program`` as it is."""
    torch.export.save(program, path)


def save_aten(program: ExportedProgram, path: Path) -> None:
    """Write ``program`` without our operator: whoever has PyTorch can load it."""
    torch.export.save(to_aten(program), path)


def load_program(path: Path) -> Callable[..., Any]:
    """The module of the program in ``path``; our operator is registered by importing this file.

    Calling it with other arguments than those of the program raises TypeError.
    """
    register_flops()
    program = torch.export.load(path)
    module = program.module()
    if program.example_inputs is not None:
        kinds = {path: type(leaf) for path, leaf in leaves_by_path(*program.example_inputs).items()}
        names = list(inspect.signature(module.forward).parameters)[: len(program.example_inputs[0])]
        check = partial(_check, kinds, ", ".join(f"args[{i}] is {n}" for i, n in enumerate(names)))
        # Before the checks of torch.export, which name neither the argument nor what it is.
        module.register_forward_pre_hook(check, with_kwargs=True, prepend=True)
    return module


def _check(
    kinds: dict[str, type],
    names: str,
    module: nn.Module,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> None:
    if torch.compiler.is_compiling():
        return
    try:
        check_kinds(kinds, leaves_by_path(args, kwargs))
    except TypeError as error:
        raise TypeError(f"{error} ({names})" if names else str(error)) from None
