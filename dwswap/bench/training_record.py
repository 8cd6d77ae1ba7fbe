"""The record of a run of ``dwswap bench models --train``, and its table."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

from dwswap.bench.model_record import ModelRecord
from dwswap.bench.model_results import ModelResult
from dwswap.bench.model_summary import speedup_rows
from dwswap.bench.tables import Cells, markdown_table
from dwswap.bench.training_results import TrainingResult

__all__ = ["TrainingRecord", "training_markdown", "training_rows"]


class TrainingRecord(ModelRecord):
    """What was measured of training; see ``RunRecord`` for the files and the arguments."""

    kind: ClassVar[str] = "training"
    row: ClassVar[type[ModelResult]] = TrainingResult

    def markdown(self) -> list[str]:
        return training_markdown(self.results)


def training_rows(results: Sequence[ModelResult]) -> Cells:
    """As ``speedup_rows``, with the peak memory of a step of ours and of eager's."""
    heads, rows = speedup_rows(results, TrainingResult)
    peaks = []
    for result in results:
        ours, eager = (
            run.peak_bytes if run is not None else None
            for run in (result.run("dwswap"), result.run("eager"))
        )
        more = ours is not None and eager is not None and ours > eager
        peaks.append([(_megabytes(ours), more), (_megabytes(eager), False)])
    wide = [[*row, *peak] for row, peak in zip(rows, peaks, strict=True)]
    return [*heads, "peak MB", "eager's"], wide


def training_markdown(results: Sequence[ModelResult]) -> list[str]:
    """The table for benchmarks/RESULTS.md; what misses its target is bold."""
    if not results:
        return ["Nothing was measured."]
    return [
        "Milliseconds per step, and how many times faster dwswap is than each peer if it is run as "
        "that is (in parentheses the target; a CUDA graph shows what the GPU takes where Python "
        "does not keep up; behind ±, half of the interval that holds it with a probability of 95 "
        "%), and the peak memory of a step without graph or compiler:",
        "",
        *markdown_table(training_rows(results), left=("model", "dtype", "layout")),
    ]


def _megabytes(size: int | None) -> str:
    return "" if size is None else f"{size / 1e6:,.0f}"
