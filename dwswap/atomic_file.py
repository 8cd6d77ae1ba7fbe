"""Files that appear whole or not at all."""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

__all__ = ["replacing"]


@contextlib.contextmanager
def replacing(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Give a path to write to; at the end of the block that file is renamed to ``path``.

    Where the block raises, or the process is killed, what was at ``path`` stays as it was. The file
    to write has the name of ``path``, in a hidden folder beside it.

    Raises:
        OSError: the folder of ``path`` is missing or cannot be written (before the block), or
            ``path`` is a folder.
    """
    target = Path(path)
    try:
        folder = tempfile.mkdtemp(dir=target.parent, prefix=f".{target.name}.", suffix=".tmp")
    except OSError as error:  # which names the hidden folder
        raise OSError(error.errno, error.strerror, str(target)) from error
    staging = Path(folder)
    try:
        yield staging / target.name
        os.replace(staging / target.name, target)
    finally:
        shutil.rmtree(staging, ignore_errors=True)
