"""Whole steps of training: ours next to PyTorch's, in turns in one process."""

from __future__ import annotations

import copy
import statistics
from collections.abc import Callable, Sequence
from itertools import chain
from typing import Any, ClassVar

from dwswap.bench.latency import median_within, time_rounds
from dwswap.bench.layers import LAYOUTS
from dwswap.bench.model_cases import Case
from dwswap.bench.model_results import ModelResult
from dwswap.bench.model_subject import Subject
from dwswap.bench.models import ModelBench, Turns
from dwswap.bench.training_results import TRAINING_PEERS, TrainingResult
from dwswap.bench.training_subject import TrainingSubject

__all__ = ["TrainingBench"]

LEAST_ROUNDS = 6
"""Of fewer, the interval of a ratio is not known."""


class TrainingBench(ModelBench):
    """Measures steps of training instead of forwards; see ``ModelBench``."""

    result: ClassVar[type[ModelResult]] = TrainingResult

    def _ours(self, subject: Subject, peers: Sequence[str]) -> list[str]:
        """The plain one, and those that are run as one of ``peers`` is."""
        wanted = (names for peer, names in TRAINING_PEERS.items() if peer in peers)
        found = {"dwswap", *chain.from_iterable(wanted)}
        return [name for name in self.result.ours if name in found]

    def _in_turns(self, calls: Sequence[Callable[[], Any]], *, slow: bool) -> list[Turns]:
        """Medians over short rounds, as the host decides: a step launches a thousand kernels."""
        least = 1 if slow else LEAST_ROUNDS
        rounds = time_rounds(calls, self.device, budget=self.budget, least=least)
        last = [times[-1] for times in rounds]
        turns = []
        for column in zip(*rounds, strict=True):
            factors = [other / own for own, other in zip(column, last, strict=True)]
            turns.append(Turns(statistics.median(column), *median_within(factors)))
        return turns

    def _subject(self, case: Case) -> Subject:
        model = copy.deepcopy(self._base(case)).to(memory_format=LAYOUTS[case.layout])
        return TrainingSubject.make(model.train(), case, self.device)
