"""One line of the record of ``dwswap bench layers --backward``."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

from dwswap.bench.layer_results import Key, LayerResult, Skipped

__all__ = ["PARTS", "GradientResult", "Measured"]

PARTS = {
    "input": "Gradient of the input",
    "weight": "Gradient of the weight",
    "training": "Forward and both gradients",
}


@dataclass(frozen=True)
class GradientResult:
    """One shape in one dtype and layout.

    Attributes:
        shape: of the input, ``(N, C, H, W)`` in any layout.
        parts: by the names of ``PARTS`` the fields of a ``LayerResult``; the copy is of input and
            output, and of three times as many bytes for ``"training"``.
        passed: both gradients are as near to float64 as they must be.
    """

    index: int
    dtype: str
    layout: str
    shape: list[int]
    parts: dict[str, dict[str, Any]]
    passed: bool

    @property
    def key(self) -> Key:
        return self.index, self.dtype, self.layout

    def part(self, name: str) -> LayerResult:
        """The measurement ``name``, one of ``PARTS``."""
        return LayerResult(**self.parts[name])

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)


Measured = LayerResult | GradientResult | Skipped
