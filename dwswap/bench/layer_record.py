"""The record of a run of ``dwswap bench layers``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from dwswap.bench.layer_results import LayerResult, Skipped
from dwswap.bench.layer_summary import markdown, summarize
from dwswap.bench.run_record import RunRecord

__all__ = ["LayerRecord"]


class LayerRecord(RunRecord):
    """Shapes that were measured and shapes that were skipped; see ``RunRecord`` for the files.

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
        super().__init__(
            "layers",
            path,
            {"results": LayerResult, "skipped": Skipped},
            device=device,
            settings=settings,
            batch=settings["batch"],
            whole=whole,
        )
        self.targets = targets

    @property
    def results(self) -> list[LayerResult]:
        return self.rows["results"]

    @property
    def skipped(self) -> list[Skipped]:
        return self.rows["skipped"]

    @property
    def copies(self) -> dict[int, float]:
        """Times of copies by number of bytes."""
        return {result.moved_bytes: result.copy_us for result in self.results}

    def add(self, entry: LayerResult | Skipped) -> None:
        """Append ``entry``, and save where the last time is more than a second ago."""
        self.append("skipped" if isinstance(entry, Skipped) else "results", entry)

    def conclusion(self) -> dict[str, Any]:
        summary = self.summary()
        return {"summary": summary, "markdown": markdown(summary)}

    def summary(self) -> dict[str, Any]:
        """See ``dwswap.bench.layer_summary.summarize``."""
        return summarize(self.results, targets=self.targets)
