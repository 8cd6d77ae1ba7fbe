"""Files that appear whole or not at all."""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import stat
import tempfile
from collections.abc import Iterator
from pathlib import Path

__all__ = ["replacing"]


@contextlib.contextmanager
def replacing(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Give a path to write to; at the end of the block that file is renamed to ``path``.

    Where the block raises, or the process is killed, what was at ``path`` stays as it was. A link
    stays a link, to a file with the new content; the file keeps its permissions. The file to write
    has the name of ``path``, in a hidden folder beside it, which a process that is killed leaves.

    Raises:
        OSError: the folder of ``path`` is missing or cannot be written, or ``path`` is a folder or
            a device (before the block).
    """
    name, target = Path(path).name, Path(os.path.realpath(path))
    permissions = None
    if target.exists():
        mode = target.stat().st_mode
        if not stat.S_ISREG(mode):
            code = errno.EISDIR if stat.S_ISDIR(mode) else errno.EINVAL
            raise OSError(code, os.strerror(code), str(path))
        permissions = stat.S_IMODE(mode)
    try:
        folder = tempfile.mkdtemp(dir=target.parent, prefix=f".{name}.", suffix=".tmp")
    except OSError as error:  # which names the hidden folder
        raise OSError(error.errno, error.strerror, str(path)) from error
    staging = Path(folder)
    try:
        yield staging / name
        if permissions is not None:
            (staging / name).chmod(permissions)
        os.replace(staging / name, target)
    finally:
        shutil.rmtree(staging, ignore_errors=True)
