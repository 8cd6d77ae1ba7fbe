"""The record of a run of ``dwswap bench layers --backward``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from dwswap.bench.gradient_results import PARTS, GradientResult
from dwswap.bench.layer_results import LayerResult, Skipped
from dwswap.bench.layer_summary import speedup_markdown, summarize
from dwswap.bench.run_record import RunRecord

__all__ = ["GradientRecord"]


class GradientRecord(RunRecord):
    """Shapes that were measured and shapes that were skipped; see ``LayerRecord``."""

    def __init__(
        self, path: Path, *, device: str, settings: dict[str, Any], whole: bool = False
    ) -> None:
        super().__init__(
            "gradients",
            path,
            {"results": GradientResult, "skipped": Skipped},
            device=device,
            settings=settings,
            batch=settings["batch"],
            whole=whole,
        )

    @property
    def results(self) -> list[GradientResult]:
        return self.rows["results"]

    @property
    def skipped(self) -> list[Skipped]:
        return self.rows["skipped"]

    @property
    def copies(self) -> dict[int, float]:
        """Times of copies by number of bytes."""
        return {row.moved_bytes: row.copy_us for row in self.part("input")}

    def add(self, entry: GradientResult | Skipped) -> None:
        """Append ``entry``, and save where the last time is more than a second ago."""
        self.append("skipped" if isinstance(entry, Skipped) else "results", entry)

    def part(self, name: str) -> list[LayerResult]:
        """The measurements ``name``, one of ``PARTS``."""
        return [result.part(name) for result in self.results]

    def summaries(self) -> dict[str, dict[str, Any]]:
        """By the names of ``PARTS``; see ``dwswap.bench.layer_summary.summarize``."""
        return {name: summarize(self.part(name), targets=False) for name in PARTS}

    def conclusion(self) -> dict[str, Any]:
        summaries = self.summaries()
        lines = ["Nothing was measured."] if not self.results else []
        for name, summary in summaries.items() if self.results else ():
            lines += [*([""] if lines else []), f"{PARTS[name]}, speedup over PyTorch's:", ""]
            lines += speedup_markdown(summary)
        return {"summary": summaries, "markdown": lines}
