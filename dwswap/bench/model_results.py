"""One line of the record of ``dwswap bench models``."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, ClassVar, TypeVar

from dwswap.bench.kernel_families import FamilyTime
from dwswap.bench.model_cases import Case
from dwswap.bench.model_peers import EAGER, OURS, RUNNERS, Runner
from dwswap.bench.model_targets import target

__all__ = ["Measured", "ModelResult"]

Result = TypeVar("Result", bound="ModelResult")


@dataclass(frozen=True)
class Measured:
    """One way to run a model; all None but ``reason`` where it failed.

    Attributes:
        name: see ``dwswap.bench.model_peers.RUNNERS``.
        us: microseconds per call, as ``dwswap.bench.latency.time_stream`` has them.
        images_per_second: batch size / time.
        speedups: how many times faster each of ours is, measured in turns with this one.
        within: half of the interval that holds each of these with a probability of 95 %
            (``dwswap.bench.latency.median_within``), where they were measured often enough.
        build_s: seconds that ``optimize``, ``fuse`` or a capture took.
        first_call_s: seconds of the first call, in which ``torch.compile`` compiles.
        peak_bytes: weights, temporaries and results of a call; None on the CPU.
        error: largest deviation from float64, relative to the largest value; None where the number
            of outputs depends on the data.
        rms_error: root mean square of the deviations, relative to that of the values; None for a
            step of training, whose ``error`` is one.
        error_ratio: of the RMS error to that of the eager model in the user's layout. The largest
            of a thousand deviations is a third larger or smaller by chance.
        loss_error: of the loss of a training step, relative to that in float64; None for forwards.
        note: what a reader must know.
        reason: why it failed.
    """

    name: str
    us: float | None = None
    images_per_second: float | None = None
    speedups: dict[str, float] = field(default_factory=dict)
    within: dict[str, float] = field(default_factory=dict)
    build_s: float | None = None
    first_call_s: float | None = None
    peak_bytes: int | None = None
    error: float | None = None
    rms_error: float | None = None
    error_ratio: float | None = None
    loss_error: float | None = None
    note: str | None = None
    reason: str | None = None


@dataclass(frozen=True)
class ModelResult:
    """Forwards of one model at one batch size, dtype and layout.

    Attributes:
        runners: what the names of ``runs`` mean.
        ours: names of ours, the plain one first.
        ours_heads: one per name in ``ours``, for tables.
        eager: names of the eager ones that ``"eager"`` stands for.
        basis: what is how many times faster in the picture.
        by_batch: whether models have several batch sizes, a panel of the picture each.
        summary: of the report of ``optimize``.
        error_limit: twice eager's error and a unit in the last place.
        runs: ours first, then the peers.
        profile: of ours without a CUDA graph; empty without ``--profile``.
        problem: why nothing could be measured.
        passed: ours ran, with errors within the limit.
    """

    runners: ClassVar[Mapping[str, Runner]] = RUNNERS
    ours: ClassVar[tuple[str, ...]] = OURS
    ours_heads: ClassVar[tuple[str, ...]] = ("dwswap", "cuda_graph")
    eager: ClassVar[tuple[str, ...]] = EAGER
    basis: ClassVar[str] = f"the faster of {' or '.join(RUNNERS[name].title for name in OURS)}"
    by_batch: ClassVar[bool] = True

    model: str
    batch: int
    dtype: str
    layout: str
    size: int
    summary: str
    error_limit: float | None
    runs: list[Measured]
    profile: list[FamilyTime]
    problem: str | None
    passed: bool

    @classmethod
    def from_dict(
        cls: type[Result],
        *,
        runs: Iterable[dict[str, Any]],
        profile: Iterable[dict[str, Any]],
        **row: Any,
    ) -> Result:
        """From the keyword arguments that ``to_dict`` made."""
        return cls(
            runs=[Measured(**run) for run in runs],
            profile=[FamilyTime(**time) for time in profile],
            **row,
        )

    @property
    def case(self) -> Case:
        return Case(self.model, self.batch, self.dtype, self.layout, self.size)

    @property
    def key(self) -> Case:
        return self.case

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    def run(self, name: str) -> Measured | None:
        """The measurement called ``name``; None where there is none."""
        return next((run for run in self.runs if run.name == name), None)

    def speedups(self, peer: str) -> dict[str, float]:
        """By which factor each of ours is faster than ``peer``, or than the better eager layout.

        Args:
            peer: a name, or ``"eager"``.
        """
        names = self.eager if peer == "eager" else (peer,)
        found = [run.speedups for run in self.runs if run.name in names and run.us is not None]
        return {
            ours: min(speedups[ours] for speedups in found)
            for ours in self.ours
            if found and all(ours in speedups for speedups in found)
        }

    def best_speedup(self, peer: str) -> float | None:
        """That of the faster of ours."""
        return max(self.speedups(peer).values(), default=None)

    def goal(self, peer: str) -> float | None:
        """What ``best_speedup`` should be; None where there is no aim."""
        return target(self.case, peer)
