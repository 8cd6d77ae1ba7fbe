"""The record of a run of ``dwswap bench layers --backward``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from dwswap.bench.gradient_results import PARTS, GradientResult
from dwswap.bench.layer_results import LayerResult
from dwswap.bench.layer_summary import speedup_markdown, summarize
from dwswap.bench.shape_record import ShapeRecord

__all__ = ["GradientRecord"]


class GradientRecord(ShapeRecord[GradientResult]):
    """See ``ShapeRecord``."""

    def __init__(
        self, path: Path, *, device: str, settings: dict[str, Any], whole: bool = False
    ) -> None:
        super().__init__(
            "gradients", path, GradientResult, device=device, settings=settings, whole=whole
        )

    @property
    def copies(self) -> dict[int, float]:
        """Times of copies by number of bytes."""
        return {row.moved_bytes: row.copy_us for row in self.part("input")}

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
