"""JSON records of a run: what was measured, and the environment it was measured in."""

from __future__ import annotations

import json
import os
import re
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from dwswap.atomic_file import replacing
from dwswap.environment import environment

__all__ = ["record", "slug", "write_json", "write_text"]


def record(kind: str, **content: Any) -> dict[str, Any]:
    """Return a record of one run: its kind, the time, the environment, and ``content``.

    Args:
        kind: what made the record (``"demo"``, ``"kernelbench"``); readers choose by it.
        content: JSON-able values.
    """
    return {
        "kind": kind,
        "recorded": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "environment": environment(),
        **content,
    }


def slug(device: str) -> str:
    """The name of a device as part of a file's: ``nvidia-h200``."""
    return re.sub(r"[^a-z0-9]+", "-", device.lower()).strip("-")


def write_json(path: str | os.PathLike[str], value: Any) -> Path:
    """Write ``value`` to ``path`` as JSON: all of it, or the file that was there stays as it was.

    Missing parent folders are made.

    Raises:
        OSError: the place cannot be written.
        TypeError: ``value`` is not JSON-able.
    """
    return write_text(path, json.dumps(value, indent=2) + "\n")


def write_text(path: str | os.PathLike[str], text: str) -> Path:
    """Write ``text`` to ``path`` as UTF-8: all of it, or the file that was there stays as it was.

    Missing parent folders are made.

    Raises:
        OSError: the place cannot be written.
    """
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    with replacing(target) as partial:
        partial.write_text(text, encoding="utf-8")
    return target
