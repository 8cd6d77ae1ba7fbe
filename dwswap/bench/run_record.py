"""The record of a long run of ``dwswap bench``: saved as it grows, and taken up again."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Hashable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from dwswap.bench.records import record, write_text

__all__ = ["Row", "RunRecord", "switches"]

SAVE_SECONDS = 1.0

SAME = ("kind", "settings", "switches", "device", "environment")
"""What two halves of one record must agree in."""


class Row(Protocol):
    """One measurement, or what stands for one that failed."""

    @property
    def key(self) -> Hashable: ...

    def to_dict(self) -> dict[str, Any]: ...


def switches() -> dict[str, str]:
    """The environment variables that choose kernels, such as ``DWSWAP_PORTABLE``."""
    return {
        name: value
        for name, value in sorted(os.environ.items())
        if name.startswith("DWSWAP_") and name != "DWSWAP_CACHE_DIR"
    }


class RunRecord:
    """What a run has measured so far, and its files.

    Until the run is complete it is in ``NAME.partial.json``, so a run that was ended does not cost
    the record of an earlier one. Rows are saved at most every second, whole or not at all, so a
    killed run loses its last second.

    Args:
        kind: what makes the record; readers choose by it.
        path: the JSON file of the complete run.
        lists: names of the lists of rows, with what makes a row of the keyword arguments in a file.
        device: the name of the device.
        settings: what was asked for; ``resume`` compares them.
        head: more that the record says about the run.
    """

    def __init__(
        self,
        kind: str,
        path: Path,
        lists: Mapping[str, Callable[..., Row]],
        *,
        device: str,
        settings: dict[str, Any],
        **head: Any,
    ) -> None:
        self.path = path
        self.partial = path.with_suffix(".partial.json")
        self.rows: dict[str, list[Any]] = {name: [] for name in lists}
        self._lists = lists
        self._head = record(
            kind, device=device, settings=settings, switches=switches(), **head, complete=False
        )
        self._saved = time.monotonic()

    def resume(self) -> None:
        """Take over what the partial file holds; nothing where there is none.

        Raises:
            OSError: the file cannot be read.
            ValueError: it is no such record, or of other settings or another environment; says in
                what they differ.
        """
        if not self.partial.exists():
            return
        try:
            found = json.loads(self.partial.read_text(encoding="utf-8"))
            different = [
                f"{name}: {old!r}, now {new!r}"
                for part in SAME
                for name, old, new in _differences(part, found[part], self._head[part])
            ]
            rows = {
                name: [make(**row) for row in found[name]] for name, make in self._lists.items()
            }
        except (KeyError, TypeError, json.JSONDecodeError) as error:
            raise ValueError(f"{self.partial} is no record of this version: {error!r}") from error
        if different:
            raise ValueError(f"{self.partial} is of another run ({'; '.join(different)})")
        self.rows = rows

    @property
    def done(self) -> set[Any]:
        return {row.key for rows in self.rows.values() for row in rows}

    def append(self, name: str, row: Row) -> None:
        """Append to the list ``name``; save where the last time is more than a second ago."""
        self.rows[name].append(row)
        if time.monotonic() - self._saved >= SAVE_SECONDS:
            self.save()

    def save(self) -> None:
        """Write the partial file.

        Raises:
            OSError: the place cannot be written.
        """
        write_text(self.partial, self._text(self._head))
        self._saved = time.monotonic()

    def arrange(self, keys: Sequence[Hashable]) -> None:
        """Put the rows of each list into the order of ``keys``; those of other keys go last."""
        places = {key: place for place, key in enumerate(keys)}
        for rows in self.rows.values():
            rows.sort(key=lambda row: places.get(row.key, len(places)))

    def finish(self) -> None:
        """Write the complete record, with its summary, and remove the partial file.

        Raises:
            OSError: the place cannot be written.
        """
        write_text(self.path, self._text({**self._head, "complete": True, **self.conclusion()}))
        self.partial.unlink(missing_ok=True)

    def conclusion(self) -> dict[str, Any]:
        """What a complete record says besides its rows."""
        return {}

    def _text(self, head: dict[str, Any]) -> str:
        text = json.dumps(head, indent=2).removesuffix("\n}")
        # One row per line: json's indentation would make fifty thousand lines of a whole run.
        for name, entries in self.rows.items():
            rows = ",\n".join(f"    {json.dumps(entry.to_dict())}" for entry in entries)
            text += f',\n  "{name}": [\n{rows}\n  ]' if rows else f',\n  "{name}": []'
        return text + "\n}\n"


def _differences(part: str, old: Any, new: Any) -> list[tuple[str, Any, Any]]:
    if not isinstance(old, dict):
        return [(part, old, new)] if old != new else []
    names = sorted({*old, *new})
    return [
        (f"{part} {name}", old.get(name), new.get(name))
        for name in names
        if old.get(name) != new.get(name)
    ]
