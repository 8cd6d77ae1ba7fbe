"""What a caller of a whole model waits, and what memory that takes."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Sequence

import torch

from dwswap.bench.timing import Timing

__all__ = ["LONG", "MemoryMeter", "median_within", "synchronize", "time_rounds", "time_stream"]

SAMPLES = 5
LONG = 1.0
"""Seconds of a call whose first one is as good as a later one: what settles takes far less."""

TURN = 3
"""Calls of each way in a round of ``time_rounds``."""

MOST_CALLS = 1000
"""Per sample. Beyond about as many launches the host waits for the stream anyway."""


def synchronize(device: torch.device) -> None:
    """Wait for all work on ``device``."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def time_stream(
    call: Callable[[], object], device: torch.device | str, *, budget: float = 0.5
) -> Timing:
    """Time calls back to back by the wall clock, one synchronization at the end of each sample.

    That is what a user sees who runs one batch after the other: the host's time where the host is
    slower, the GPU's where the GPU is, and the larger of both where they overlap.

    Args:
        call: a callable without arguments.
        device: where it runs.
        budget: seconds to spend on samples, about: up to ``SAMPLES`` of as many calls as fit, at
            least one of one call.

    Returns:
        Microseconds per call: the median over the samples.
    """
    device = torch.device(device)
    with torch.no_grad():
        # Another model ran before this one: caches, clocks and the allocator settle.
        estimate = max(_stream(call, device, 1), 1e-7)
        if estimate >= max(budget, LONG):
            microseconds = estimate * 1e6
            return Timing(microseconds, microseconds, microseconds, 1, "wall clock over 1 calls")
        if estimate < budget:
            estimate = max(_stream(call, device, 2), 1e-7)
        samples = max(1, min(SAMPLES, int(budget / estimate)))
        calls = max(1, min(MOST_CALLS, int(budget / samples / estimate)))
        times = [_stream(call, device, calls) * 1e6 for _ in range(samples)]
    method = f"wall clock over {calls} calls"
    return Timing(statistics.median(times), min(times), max(times), len(times), method)


def time_rounds(
    calls: Sequence[Callable[[], object]],
    device: torch.device | str,
    *,
    budget: float,
    least: int,
) -> list[list[float]]:
    """Time a few calls of each back to back by the wall clock, one after the other, over and over.

    For calls in which the host does most of the work, which takes it 10 % more at one moment than
    at the next: those of one round have the same moment, as near as can be.

    Args:
        calls: callables without arguments.
        device: where they run.
        budget: seconds for each, about.
        least: rounds, however long they take.

    Returns:
        Microseconds per call, a list per round with one value for each of ``calls``.
    """
    device = torch.device(device)
    with torch.no_grad():
        slowest = max(_stream(call, device, 1) for call in calls)
        # One call before those of a turn, as another model ran before it.
        rounds = max(least, int(budget / max((TURN + 1) * slowest, 1e-6)))
        return [[_turn(call, device) for call in calls] for _ in range(rounds)]


def median_within(values: Sequence[float]) -> tuple[float, float | None]:
    """The median of some measurements, and how far from it that of ever more may well be.

    Returns:
        The median, and half of the interval between two of the values that holds that of all such
        measurements with a probability of 95 % at least, whatever their distribution (Conover,
        "Practical Nonparametric Statistics", 1999, section 3.2); None for fewer than six values.
    """
    ordered, count = sorted(values), len(values)
    within = None
    # Of 2^count ways to lie on either side of the median of all, those with so few on the one.
    ways = 0
    for outside in range(count // 2):
        ways += math.comb(count, outside)
        if ways / 2**count > 0.025:
            break
        within = (ordered[count - 1 - outside] - ordered[outside]) / 2
    return statistics.median(ordered), within


def _turn(call: Callable[[], object], device: torch.device) -> float:
    call()
    return _stream(call, device, TURN) * 1e6


def _stream(call: Callable[[], object], device: torch.device, calls: int) -> float:
    """Seconds per call."""
    synchronize(device)
    start = time.perf_counter()
    for _ in range(calls):
        call()
    synchronize(device)
    return (time.perf_counter() - start) / calls


class MemoryMeter:
    """Peak memory of something that is built after the meter, on CUDA: its weights, and a call.

    What a CUDA graph works in belongs to it between replays too, though the allocator counts it as
    free: the idle part of private pools is added.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._before = self._held()

    def peak(self, call: Callable[[], object]) -> int | None:
        """Bytes while ``call`` runs, over what there was when the meter was made; None on the CPU.

        The output counts, the input does not.
        """
        if self._device.type != "cuda":
            return None
        synchronize(self._device)
        torch.cuda.reset_peak_memory_stats(self._device)
        call()
        synchronize(self._device)
        peak = torch.cuda.max_memory_allocated(self._device)
        return peak + self._idle() - self._before

    def _held(self) -> int:
        if self._device.type != "cuda":
            return 0
        return torch.cuda.memory_allocated(self._device) + self._idle()

    def _idle(self) -> int:
        return sum(
            segment["total_size"] - segment["allocated_size"]
            for segment in torch.cuda.memory_snapshot()
            if tuple(segment["segment_pool_id"]) != (0, 0)
        )
