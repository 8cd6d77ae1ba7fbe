"""The record of a run of ``dwswap bench models``."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path
from typing import Any, ClassVar

from dwswap.bench.model_cases import Case
from dwswap.bench.model_results import ModelResult
from dwswap.bench.model_summary import markdown
from dwswap.bench.run_record import RunRecord

__all__ = ["ModelRecord"]


class ModelRecord(RunRecord):
    """What was measured of models; see ``RunRecord`` for the files and the arguments.

    Attributes:
        kind: of the record, and the start of the file's name.
        row: the class of a result.
    """

    kind: ClassVar[str] = "models"
    row: ClassVar[type[ModelResult]] = ModelResult

    def __init__(self, path: Path, *, device: str, settings: dict[str, Any]) -> None:
        lists = {"results": self.row.from_dict}
        super().__init__(self.kind, path, lists, device=device, settings=settings)

    @property
    def results(self) -> list[ModelResult]:
        return self.rows["results"]

    def add(self, result: ModelResult) -> None:
        """Append a result, and save where the last time is more than a second ago."""
        self.append("results", result)

    def left(self, cases: Collection[Case]) -> list[Case]:
        """Those of ``cases`` that are still to be measured."""
        done = self.done
        return [case for case in cases if case not in done]

    def conclusion(self) -> dict[str, Any]:
        return {"markdown": self.markdown()}

    def markdown(self) -> list[str]:
        """The tables for benchmarks/RESULTS.md."""
        return markdown(self.results)
