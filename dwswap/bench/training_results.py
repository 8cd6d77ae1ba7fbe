"""One line of the record of ``dwswap bench models --train``, and what a step can be run by."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from typing import ClassVar

from dwswap.bench.model_peers import RUNNERS, Runner, eager
from dwswap.bench.model_results import ModelResult
from dwswap.bench.model_targets import training_target

__all__ = ["TRAINERS", "TRAINING_PEERS", "TrainingResult", "training_peers"]

TRAINERS: dict[str, Runner] = {
    "dwswap": RUNNERS["dwswap"],
    "dwswap_compile": RUNNERS["dwswap_compile"],
    "dwswap_backend": RUNNERS["dwswap_backend"],
    "dwswap_graph": replace(
        RUNNERS["dwswap"], title="dwswap, CUDA graph", cuda=True, captured=True
    ),
    "eager": Runner("eager", eager),
    "eager_graph": Runner("eager, CUDA graph", eager, cuda=True, captured=True),
    "compile": RUNNERS["compile"],
}
"""As ``RUNNERS``, for models in train mode, all in the layout of the user's model."""

TRAINING_PEERS: dict[str, tuple[str, ...]] = {
    "eager": ("dwswap",),
    "eager_graph": ("dwswap_graph",),
    "compile": ("dwswap_compile", "dwswap_backend"),
}
"""Each peer with ours run as it is: these are compared, and the first of them has a target."""


def training_peers(asked: Sequence[str], *, cuda: bool) -> list[str]:
    """Names of the peers to measure next to ours.

    Args:
        asked: names out of ``TRAINING_PEERS``, or ``auto``, ``all``, ``none``.
        cuda: without it those that need CUDA are left out.

    Raises:
        ValueError: a name that no step of training can be run by.
    """
    sets: dict[str, Sequence[str]] = {"none": ()}
    sets |= dict.fromkeys(("auto", "all"), tuple(TRAINING_PEERS))
    wanted = {name for word in asked for name in sets.get(word, (word,))}
    unknown = sorted(wanted - TRAINING_PEERS.keys())
    if unknown:
        known = ", ".join([*sets, *TRAINING_PEERS])
        raise ValueError(f"peers of a training step must be among {known}, got {unknown[0]!r}")
    return [name for name in TRAINING_PEERS if name in wanted and (cuda or not TRAINERS[name].cuda)]


@dataclass(frozen=True)
class TrainingResult(ModelResult):
    """Steps of training of one model; ``dtype`` is that of autocast, float32 goes without.

    ``error`` and ``error_ratio`` of a run are of the gradients of the first step, as
    ``dwswap.bench.training_subject`` has them.

    Attributes:
        loss_limit: of the error of the loss: twice eager's and a unit in the last place.
    """

    runners: ClassVar[Mapping[str, Runner]] = TRAINERS
    ours: ClassVar[tuple[str, ...]] = tuple(chain.from_iterable(TRAINING_PEERS.values()))
    ours_heads: ClassVar[tuple[str, ...]] = (
        "dwswap",
        "CUDA graph",
        "compile(dwswap)",
        "backend=dwswap",
    )
    eager: ClassVar[tuple[str, ...]] = ("eager",)
    basis: ClassVar[str] = "a step of training, ours run as the peer is"
    by_batch: ClassVar[bool] = False

    loss_limit: float | None = None

    def speedups(self, peer: str) -> dict[str, float]:
        """Those of ours run as the peer is: compiled over compiled, captured over captured."""
        mine = TRAINING_PEERS.get(peer, ())
        return {name: by for name, by in super().speedups(peer).items() if name in mine}

    def best_speedup(self, peer: str) -> float | None:
        """That of the first of ``TRAINING_PEERS[peer]``: the target is of the swapped model."""
        found = self.speedups(peer)
        return next((found[name] for name in TRAINING_PEERS.get(peer, ()) if name in found), None)

    def goal(self, peer: str) -> float | None:
        return training_target(self.case, peer)
