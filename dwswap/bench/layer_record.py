"""The record of a run of ``dwswap bench layers``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from dwswap.bench.layer_results import LayerResult
from dwswap.bench.layer_summary import markdown, summarize
from dwswap.bench.shape_record import ShapeRecord

__all__ = ["LayerRecord"]


class LayerRecord(ShapeRecord[LayerResult]):
    """See ``ShapeRecord``.

    Args:
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
        super().__init__("layers", path, LayerResult, device=device, settings=settings, whole=whole)
        self.targets = targets

    @property
    def copies(self) -> dict[int, float]:
        """Times of copies by number of bytes."""
        return {result.moved_bytes: result.copy_us for result in self.results}

    def conclusion(self) -> dict[str, Any]:
        summary = self.summary()
        return {"summary": summary, "markdown": markdown(summary)}

    def summary(self) -> dict[str, Any]:
        """See ``dwswap.bench.layer_summary.summarize``."""
        return summarize(self.results, targets=self.targets)
