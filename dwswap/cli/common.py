"""What the commands share: their one error type, their console, their output files."""

from __future__ import annotations

import argparse
import io
import math
import os
import sys
from pathlib import Path
from typing import Any, NoReturn, TextIO

import torch
from rich.console import Console

from dwswap.bench.records import write_json

__all__ = [
    "CliError",
    "batch_size",
    "chosen_device",
    "console",
    "device_text",
    "failed",
    "file_path",
    "input_shape",
    "missing_extra",
    "output_folder",
    "pixels",
    "positive",
    "save_json",
    "say",
]

PIPE_WIDTH = 160
MOST_INPUT_ELEMENTS = 1 << 28
"""Of one input: a gigabyte in float32, some 9,000 x 9,000 pixels; a model needs a multiple."""

MOST_IMAGES = 1 << 14
"""Of a batch: ten gigabytes of 224 x 224 pixels in float32, which the CPU makes first."""


class CliError(Exception):
    """Something that the user can put right: printed without a traceback, exit code 2."""


def console(file: TextIO | None = None) -> Console:
    """Return a console for ``file`` (standard output), wide enough for the tables in a pipe too.

    What the encoding of ``file`` lacks is printed as a question mark.
    """
    file = file or sys.stdout
    if isinstance(file, io.TextIOWrapper) and file.errors in ("strict", "surrogateescape"):
        file.reconfigure(errors="replace")
    width = None if file.isatty() or "COLUMNS" in os.environ else PIPE_WIDTH
    return Console(file=file, width=width, highlight=False)


def failed(reason: object, status: int = 1) -> int:
    """Print ``reason`` as the error of the command; gives its exit code, ``status``."""
    console(sys.stderr).print(f"dwswap: error: {reason}", markup=False, soft_wrap=True)
    return status


def missing_extra(package: str, extra: str, purpose: str) -> NoReturn:
    """Refuse for want of an optional package, and name the extra that brings it.

    Raises:
        CliError: always.
    """
    raise CliError(
        f"{purpose} needs the package {package}, which is not installed: "
        f"pip install 'dwswap[{extra}]'"
    )


def output_folder(path: str) -> Path:
    """Return ``path`` as a folder that exists and can be written.

    Raises:
        CliError: it is a file, or cannot be made or written.
    """
    folder = Path(path)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise CliError(f"cannot make the output folder {folder}: {error.strerror}") from error
    if not os.access(folder, os.W_OK | os.X_OK):
        raise CliError(f"cannot write to the output folder {folder}: permission denied")
    return folder


def save_json(path: str | os.PathLike[str], value: Any) -> Path:
    """Write ``value`` to ``path`` as JSON, whole or not at all.

    Raises:
        CliError: the place cannot be written.
    """
    try:
        return write_json(path, value)
    except OSError as error:
        raise CliError(f"cannot write {os.fspath(path)}: {error.strerror}") from error


def file_path(text: str) -> str:
    """The path of a file that a command line argument gives."""
    if not text:
        raise argparse.ArgumentTypeError("must be the path of a file, got ''")
    return text


def positive(text: str) -> int:
    """The integer of at least 1 that a command line argument gives."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be an integer of at least 1, got {text!r}")
    return int(text)


def input_shape(text: str) -> tuple[int, ...]:
    """The shape that a command line argument gives: 224, 224x320 or a whole one."""
    try:
        sizes = tuple(int(part) for part in text.lower().split("x"))
    except ValueError:
        raise argparse.ArgumentTypeError(
            f"must be sizes joined by x, such as 224 or 224x320, got {text!r}"
        ) from None
    if min(sizes) < 1:
        raise argparse.ArgumentTypeError(f"sizes must be at least 1, got {text!r}")
    if len(sizes) == 1:
        sizes *= 2
    shape = (1, 3, *sizes) if len(sizes) == 2 else sizes
    if math.prod(shape) > MOST_INPUT_ELEMENTS:
        raise argparse.ArgumentTypeError(
            f"sizes must make an input of at most {MOST_INPUT_ELEMENTS:,} elements, got {text!r}: "
            f"{math.prod(shape):,}"
        )
    return shape


def batch_size(text: str) -> int:
    """The number of images of a batch that a command line argument gives."""
    count = positive(text)
    if count > MOST_IMAGES:
        raise argparse.ArgumentTypeError(f"must be at most {MOST_IMAGES:,}, got {text!r}")
    return count


def pixels(text: str) -> int:
    """The side of a square picture that a command line argument gives."""
    side = positive(text)
    input_shape(text)  # which is limited
    return side


def chosen_device(name: str | None) -> torch.device:
    """The device that ``--device`` names; by default the GPU where there is one.

    Raises:
        CliError: there is no such device.
    """
    if name is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise CliError(f"--device must be cpu or cuda, got {name!r}") from error
    if device.type not in ("cpu", "cuda"):
        raise CliError(f"--device must be cpu or cuda, got {name!r}")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise CliError(
            f"--device {name}: torch sees {torch.cuda.device_count()} CUDA GPUs (try dwswap doctor)"
        )
    return device


def device_text(device: torch.device) -> str:
    """The device in words."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"CPU, {torch.get_num_threads()} threads"


def say(out: Console, label: str, text: str) -> None:
    """Print one line of ``label: text``."""
    out.print(f"{label + ':':<11}{text}", markup=False, soft_wrap=True)
