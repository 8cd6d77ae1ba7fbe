"""The record of a run of ``dwswap bench layers``: saved as it grows, and taken up again."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from typing import Any

from dwswap.bench.layer_results import Key, LayerResult, Skipped
from dwswap.bench.layer_summary import markdown, summarize
from dwswap.bench.records import record, write_text

__all__ = ["LayerRecord", "switches"]

SAVE_SECONDS = 1.0

SAME = ("settings", "switches", "device", "environment")
"""What two halves of one record must agree in."""


def switches() -> dict[str, str]:
    """The environment variables that choose kernels, such as ``DWSWAP_PORTABLE``."""
    return {
        name: value
        for name, value in sorted(os.environ.items())
        if name.startswith("DWSWAP_") and name != "DWSWAP_CACHE_DIR"
    }


class LayerRecord:
    """What a run has measured so far, and its files.

    Until the run is complete it is in ``NAME.partial.json``, so a run that was ended does not cost
    the record of an earlier one. ``add`` saves at most every second, whole or not at all, so a
    killed run loses its last second.

    Args:
        path: the JSON file of the complete run.
        device: the name of the device.
        settings: what was asked for; ``resume`` compares them.
        whole: every shape, dtype and layout, with nothing changed: fit for the README.
        targets: the targets of ``dwswap.bench.layer_summary`` are meant for this run.
    """

    def __init__(
        self,
        path: Path,
        *,
        device: str,
        settings: dict[str, Any],
        whole: bool = False,
        targets: bool = False,
    ) -> None:
        self.path = path
        self.partial = path.with_suffix(".partial.json")
        self.targets = targets
        self.results: list[LayerResult] = []
        self.skipped: list[Skipped] = []
        self._head = record(
            "layers",
            device=device,
            batch=settings["batch"],
            settings=settings,
            switches=switches(),
            whole=whole,
            complete=False,
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
            results = [LayerResult(**row) for row in found["results"]]
            skipped = [Skipped(**row) for row in found["skipped"]]
        except (KeyError, TypeError, json.JSONDecodeError) as error:
            raise ValueError(f"{self.partial} is no record of this version: {error!r}") from error
        if different:
            raise ValueError(f"{self.partial} is of another run ({'; '.join(different)})")
        self.results, self.skipped = results, skipped

    @property
    def done(self) -> set[Key]:
        return {r.key for r in self.results} | {s.key for s in self.skipped}

    @property
    def copies(self) -> dict[int, float]:
        """Times of copies by number of bytes."""
        return {result.moved_bytes: result.copy_us for result in self.results}

    def add(self, entry: LayerResult | Skipped) -> None:
        """Append ``entry``, and save where the last time is more than a second ago."""
        if isinstance(entry, Skipped):
            self.skipped.append(entry)
        else:
            self.results.append(entry)
        if time.monotonic() - self._saved >= SAVE_SECONDS:
            self.save()

    def save(self) -> None:
        """Write the partial file.

        Raises:
            OSError: the place cannot be written.
        """
        write_text(self.partial, self._text(self._head))
        self._saved = time.monotonic()

    def finish(self) -> None:
        """Write the complete record, with its summary, and remove the partial file.

        Raises:
            OSError: the place cannot be written.
        """
        summary = self.summary()
        head = {**self._head, "complete": True, "summary": summary, "markdown": markdown(summary)}
        write_text(self.path, self._text(head))
        self.partial.unlink(missing_ok=True)

    def summary(self) -> dict[str, Any]:
        """See ``dwswap.bench.layer_summary.summarize``."""
        return summarize(self.results, targets=self.targets)

    def _text(self, head: dict[str, Any]) -> str:
        text = json.dumps(head, indent=2).removesuffix("\n}")
        # One row per line: json's indentation would make fifty thousand lines of a whole run.
        for name, entries in (("results", self.results), ("skipped", self.skipped)):
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
