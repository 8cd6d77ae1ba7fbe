"""Times of convolutions that were measured on this machine, kept between processes.

One JSON file beside the libraries: ``{key: [ours, aten]}`` in microseconds. It is read without a
lock, since it is replaced as a whole, and written under one, so that no writer loses the times of
another. What is wrong with it costs measurements, never an error.
"""

from __future__ import annotations

import json
import logging
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from dwswap import library_cache
from dwswap.toolkit import BuildError

__all__ = ["FILE", "Times", "known_times", "remember"]

logger = logging.getLogger("dwswap")

FILE = "selection.json"
LOCK_SECONDS = 10.0


class Times(NamedTuple):
    """Microseconds of one convolution on the dwswap kernels and on PyTorch's."""

    ours: float
    aten: float


def known_times() -> dict[str, Times]:
    """What earlier calls, here and in other processes, have measured."""
    found: dict[str, Times] = {}
    for folder in library_cache.readable_dirs():
        found = _read(folder / FILE) | found
    return found


def remember(times: Mapping[str, Times]) -> None:
    """Add ``times`` to the file; where that cannot be written, one warning in the log."""
    from filelock import FileLock  # here, as in build: only a writer needs it

    try:
        path = library_cache.writable_dir() / FILE
        with FileLock(f"{path}.lock", timeout=LOCK_SECONDS):
            # Whoever holds the lock is alone with this file, so its name needs no random part.
            partial = path.with_suffix(".partial")
            partial.write_text(json.dumps({**_read(path), **times}, indent=1) + "\n")
            os.replace(partial, path)
    except (OSError, BuildError) as error:  # filelock.Timeout is an OSError
        logger.warning("the measured times are not kept: %s", error)


def _read(path: Path) -> dict[str, Times]:
    try:
        content = json.loads(path.read_text())
        if not isinstance(content, dict) or not all(map(_is_times, content.values())):
            raise ValueError("it is no table of times")
    except (FileNotFoundError, NotADirectoryError):
        return {}
    except (OSError, ValueError) as error:  # of JSON and of UTF-8 too
        logger.warning("ignoring the measured times in %s: %s", path, error)
        return {}
    return {key: Times(*value) for key, value in content.items()}


def _is_times(value: Any) -> bool:
    return (
        isinstance(value, list)
        and len(value) == 2
        and all(isinstance(time, float) and 0 < time < math.inf for time in value)
    )
