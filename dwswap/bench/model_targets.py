"""What we aim at on an H200: how many times faster than which peer."""

from __future__ import annotations

from typing import NamedTuple

from dwswap.bench.model_cases import ACCEPTED, SIZE, Case

__all__ = ["ERROR_RATIO", "OPTIMIZE_SECONDS", "target", "training_target"]

ERROR_RATIO = 1.2
"""The most that the RMS error against float64 may be, in errors of the eager model."""

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


TRAINING: dict[tuple[str, str], tuple[Target, ...]] = {
    ("float16", "channels_last"): (
        Target(("mobilenet_v2",), (256,), "eager", 1.12),
        Target(("efficientnet_b0",), (128,), "eager", 1.08),
    ),
    ("float16", "contiguous"): (
        Target(("mobilenet_v2",), (256,), "eager", 1.25),
        Target(("efficientnet_b0",), (128,), "eager", 1.15),
    ),
}
"""Of a step of training, ours over eager PyTorch in the same layout, in a CUDA graph or not."""

NOT_SLOWER = 0.97
"""The least that ``torch.compile`` of ours may be in times of ``torch.compile`` of the original."""


def target(case: Case, peer: str) -> float | None:
    """The speed-up of ours over ``peer`` to aim at; None where there is no aim.

    Args:
        case: what was measured.
        peer: a name, or ``"eager"`` for the better of its layouts, which is to be beaten always.
    """
    return 1.0 if peer == "eager" else _listed(TARGETS, case, peer)


def training_target(case: Case, peer: str) -> float | None:
    """The speed-up of a step of training to aim at; None where there is no aim.

    Args:
        case: what was measured.
        peer: ``"eager"`` or ``"eager_graph"``, which are to be beaten always, or ``"compile"``;
            ours is run as the peer is.
    """
    if peer == "compile":
        return NOT_SLOWER
    return (_listed(TRAINING, case, "eager") or 1.0) if peer in ("eager", "eager_graph") else None


def _listed(
    targets: dict[tuple[str, str], tuple[Target, ...]], case: Case, peer: str
) -> float | None:
    if case.size != SIZE:
        return None
    for entry in targets.get((case.dtype, case.layout), ()):
        if peer == entry.peer and case.model in entry.models and case.batch in entry.batches:
            return entry.speedup
    return None
