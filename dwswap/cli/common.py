"""What the commands share: their one error type, their console, their output files."""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path
from typing import Any, NoReturn, TextIO

from rich.console import Console

from dwswap.bench.records import write_json

__all__ = ["CliError", "console", "missing_extra", "output_folder", "positive", "save_json"]

PIPE_WIDTH = 160


class CliError(Exception):
    """Something that the user can put right: printed without a traceback, exit code 2."""


def console(file: TextIO | None = None) -> Console:
    """Return a console for ``file`` (standard output), wide enough for the tables in a pipe too."""
    file = file or sys.stdout
    width = None if file.isatty() or "COLUMNS" in os.environ else PIPE_WIDTH
    return Console(file=file, width=width, highlight=False)


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


def positive(text: str) -> int:
    """The integer of at least 1 that a command line argument gives."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be an integer of at least 1, got {text!r}")
    return int(text)
