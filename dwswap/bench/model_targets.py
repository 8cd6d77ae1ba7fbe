"""What we aim at on an H200: how many times faster than which peer."""

from __future__ import annotations

from typing import NamedTuple

from dwswap.bench.model_cases import ACCEPTED, SIZE, Case

__all__ = ["ERROR_RATIO", "OPTIMIZE_SECONDS", "target"]

ERROR_RATIO = 1.2
"""The most that the error against float64 may be, in errors of the eager model."""

OPTIMIZE_SECONDS = 5.0
"""The most that ``optimize`` may take, the kernels being built."""


class Target(NamedTuple):
    models: tuple[str, ...]
    batches: tuple[int, ...]
    peer: str
    speedup: float


HALF = ("float16", "channels_last")
NEWCOMER = ("float32", "contiguous")

TARGETS: dict[tuple[str, str], tuple[Target, ...]] = {
    HALF: (
        Target(("mobilenet_v2",), (256,), "compile", 1.9),
        Target(("mobilenet_v2",), (256,), "max_autotune", 1.75),
        Target(("mobilenet_v2",), (1, 32), "reduce_overhead", 1.8),
        Target(ACCEPTED[1:5], (256,), "compile", 1.25),
        Target(ACCEPTED[1:5], (1, 32), "reduce_overhead", 1.3),
        Target(ACCEPTED[5:], (256,), "compile", 1.1),
    ),
    NEWCOMER: (
        Target(("mobilenet_v2",), (256,), "eager_nchw", 3.0),
        Target(("mobilenet_v2",), (256,), "compile", 1.4),
    ),
}


def target(case: Case, peer: str) -> float | None:
    """The speed-up of ours over ``peer`` to aim at; None where there is no aim.

    Args:
        case: what was measured.
        peer: a name, or ``"eager"`` for the better of its layouts, which is to be beaten always.
    """
    if peer == "eager":
        return 1.0
    if case.size != SIZE:
        return None
    for entry in TARGETS.get((case.dtype, case.layout), ()):
        if peer == entry.peer and case.model in entry.models and case.batch in entry.batches:
            return entry.speedup
    return None
