"""What records of ``dwswap bench layers`` have in common: shapes measured and shapes skipped."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Generic, TypeVar

from dwswap.bench.layer_results import Skipped
from dwswap.bench.run_record import Row, RunRecord

__all__ = ["ShapeRecord"]

Result = TypeVar("Result", bound=Row)


class ShapeRecord(RunRecord, Generic[Result]):
    """Shapes that were measured and shapes that were skipped; see ``RunRecord`` for the files.

    Args:
        kind: of the record.
        path: the JSON file of the complete run.
        result: the class of a measurement.
        device: the name of the device.
        settings: what was asked for; ``resume`` compares them.
        whole: every shape, dtype and layout, with nothing changed: fit for the tables.
    """

    def __init__(
        self,
        kind: str,
        path: Path,
        result: type[Result],
        *,
        device: str,
        settings: dict[str, Any],
        whole: bool = False,
    ) -> None:
        super().__init__(
            kind,
            path,
            {"results": result, "skipped": Skipped},
            device=device,
            settings=settings,
            batch=settings["batch"],
            whole=whole,
        )

    @property
    def results(self) -> list[Result]:
        return self.rows["results"]

    @property
    def skipped(self) -> list[Skipped]:
        return self.rows["skipped"]

    def add(self, entry: Result | Skipped) -> None:
        """Append ``entry``, and save where the last time is more than a second ago."""
        self.append("skipped" if isinstance(entry, Skipped) else "results", entry)
