"""One line of the record of ``dwswap bench layers``."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

__all__ = ["Key", "LayerResult", "Skipped"]

Key = tuple[int, str, str]


@dataclass(frozen=True)
class LayerResult:
    """One shape in one dtype and layout; times in microseconds per launch.

    Attributes:
        shape: of the input, ``(N, C, H, W)`` in any layout.
        family: the CUDA kernels that ran; ``"aten"`` where none of ours did.
        moved_bytes: input and output.
        plain_us: ours without the activations, where the run has them.
        remeasured: ours and PyTorch's were so close that both were measured three times.
        error, pytorch_error, error_limit: see ``dwswap.report.LayerErrors``.
    """

    index: int
    dtype: str
    layout: str
    shape: list[int]
    kernel: list[int]
    stride: list[int]
    padding: list[int]
    dilation: list[int]
    bias: bool
    family: str
    moved_bytes: int
    ours_us: float
    pytorch_us: float
    copy_us: float
    plain_us: float | None
    speedup: float
    percent_of_copy: float
    remeasured: bool
    error: float
    pytorch_error: float
    error_limit: float
    problem: str | None
    passed: bool

    @property
    def key(self) -> Key:
        return self.index, self.dtype, self.layout

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)


@dataclass(frozen=True)
class Skipped:
    """A shape that was not measured, and why."""

    index: int
    dtype: str
    layout: str
    shape: list[int]
    reason: str

    @property
    def key(self) -> Key:
        return self.index, self.dtype, self.layout

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)
