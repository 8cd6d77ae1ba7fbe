"""Timing of kernels and of whole models, in microseconds.

Two questions, two functions. ``time_launches`` asks how long a kernel takes: one launch per buffer
of a set that is larger than the L2 cache, captured in one CUDA graph, so that neither launch gaps
nor cache hits count. ``time_calls`` asks how long a caller waits per call, launches included. On a
device that is not CUDA both are medians of ``time.perf_counter`` over whole calls.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any, Protocol

import torch

__all__ = [
    "MOST_BUFFERS",
    "GraphMemory",
    "Timing",
    "buffers_needed",
    "time_calls",
    "time_copy",
    "time_launches",
    "time_side_by_side",
]

ROTATION_BYTES = 300_000_000
"""Least memory that a set of buffers must touch: five times the largest L2 cache (60 MB, H200)."""

MOST_BUFFERS = 24


@dataclass(frozen=True)
class Timing:
    """The median time of one launch or call, with the spread of the samples."""

    microseconds: float
    fastest: float
    slowest: float
    samples: int
    method: str

    def without(self, microseconds: float) -> Timing:
        """What is left of times that each hold so much of something else."""
        median, fastest, slowest = (
            time - microseconds for time in (self.microseconds, self.fastest, self.slowest)
        )
        return Timing(median, fastest, slowest, self.samples, self.method)

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


class Between(Protocol):
    """Such as ``dwswap.bench.other_code.OtherCode``."""

    microseconds: float

    def __call__(self) -> object: ...


class GraphMemory:
    """Memory of one CUDA device for the outputs of graphs that are captured one after the other.

    Without it each graph takes its memory from the driver and gives it back, which costs 10 to 20
    ms. It grows with what graphs need, and is free to others when this object is gone.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        # The allocator has blocks of each stream.
        self.stream = torch.cuda.Stream(device)
        self._pool = torch.cuda.graph_pool_handle()
        # A pool lives as long as a graph that has memory of it.
        self._keeper = torch.cuda.CUDAGraph()
        with torch.cuda.device(device), self.capture(self._keeper):
            torch.zeros(1, device=device)

    @contextmanager
    def capture(self, graph: torch.cuda.CUDAGraph, mode: str = "global") -> Iterator[None]:
        """As ``torch.cuda.graph`` on ``stream``, but without emptying the allocator's caches.

        ``mode`` is CUDA's, of what may be called meanwhile: ``"global"`` or ``"relaxed"``, say.
        """
        with torch.cuda.stream(self.stream):
            graph.capture_begin(pool=self._pool, capture_error_mode=mode)
            try:
                yield
            finally:
                graph.capture_end()


def buffers_needed(bytes_per_launch: int) -> int:
    """Return how many buffers keep a rotation out of the L2 cache: 1 to ``MOST_BUFFERS``.

    Args:
        bytes_per_launch: bytes that one launch reads and writes; at least 1.
    """
    if bytes_per_launch < 1:
        raise ValueError(f"bytes_per_launch must be at least 1, got {bytes_per_launch}")
    return min(MOST_BUFFERS, -(-ROTATION_BYTES // bytes_per_launch))


def time_launches(
    launches: Sequence[Callable[[], object]],
    device: torch.device | str,
    *,
    budget: float = 0.5,
    memory: GraphMemory | None = None,
    between: Between | None = None,
) -> Timing:
    """Time one launch: every launch of the set once per CUDA graph replay, divided.

    Each launch must use its own input, and return its output: the outputs are kept until the end,
    so that each launch also writes memory of its own. On the CPU the launches are timed in turn.

    Args:
        launches: callables without arguments, one per buffer; see ``buffers_needed``.
        device: where they run.
        budget: seconds to spend on samples, about; at least 5 samples are taken.
        memory: for the outputs, of ``device``; by default the driver's.
        between: on CUDA, called before every launch; its own time is taken off.
    """
    if not launches:
        raise ValueError("launches must hold at least one callable, got none")
    device = torch.device(device)
    with torch.no_grad():
        if device.type == "cuda":
            return _time_graph(launches, device, budget, memory, between)
        return _time_in_turn(launches, budget)


def time_calls(
    call: Callable[[], object],
    device: torch.device | str,
    *,
    budget: float = 0.5,
) -> Timing:
    """Time a stream of equal calls, per call, with what Python and the launches cost.

    On CUDA a pair of events stands around each call and nothing synchronizes in between, so a call
    that the host prepares faster than the GPU works through counts with its GPU time, any other
    with its host time.

    Args:
        call: a callable without arguments, such as ``partial(model, x)``.
        device: where it runs.
        budget: seconds to spend on samples, about; at least 5 samples are taken.
    """
    device = torch.device(device)
    with torch.no_grad():
        if device.type == "cuda":
            with torch.cuda.device(device):
                return _time_events(call, budget, divide_by=1, method="cuda events")
        return _time_in_turn([call], budget)


def time_side_by_side(
    calls: Sequence[Callable[[], object]],
    device: torch.device | str,
    *,
    budget: float = 0.5,
    rounds: int = 3,
    measure: Callable[..., Timing] = time_calls,
) -> list[Timing]:
    """Time several calls for comparison, in turn and more than once.

    What slows the machine down for a moment then does not count against one of them only: each gets
    its best round.

    Args:
        calls: callables without arguments.
        device: where they run.
        budget: seconds to spend on each, about, over all rounds.
        rounds: how often each has its turn.
        measure: times one call, with the arguments of ``time_calls``.
    """
    timings = [
        [measure(call, device, budget=budget / rounds) for call in calls] for _ in range(rounds)
    ]
    return [
        min((turn[index] for turn in timings), key=lambda timing: timing.microseconds)
        for index in range(len(calls))
    ]


def time_copy(
    num_bytes: int,
    device: torch.device | str,
    *,
    budget: float = 0.5,
    memory: GraphMemory | None = None,
) -> Timing:
    """Time the copy floor: ``num_bytes`` moved, half read and half written.

    A kernel that reads an input of A bytes and writes an output of B bytes moves A + B bytes: its
    floor is ``time_copy(A + B)``. The faster of ``copy_`` and an elementwise kernel: in a CUDA
    graph the driver copies some large tensors at two thirds of the memory's rate (1 and 2 GiB on
    an H200).
    """
    elements = max(1, num_bytes // 8)
    count = buffers_needed(8 * elements)
    # Not zeros: memory that was never written may be one shared page, which a cache holds.
    sources = [torch.ones(elements, device=device) for _ in range(count)]
    targets = [torch.ones_like(source) for source in sources]
    pairs = list(zip(sources, targets, strict=True))
    ways = (
        [partial(target.copy_, source) for source, target in pairs],
        [partial(torch.neg, source, out=target) for source, target in pairs],
    )
    timings = [
        time_launches(launches, device, budget=budget / len(ways), memory=memory)
        for launches in ways
    ]
    return min(timings, key=lambda timing: timing.microseconds)


def _time_graph(
    launches: Sequence[Callable[[], object]],
    device: torch.device,
    budget: float,
    memory: GraphMemory | None,
    between: Between | None,
) -> Timing:
    with torch.cuda.device(device):
        stream = memory.stream if memory else torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            # Outside the capture: the first call may build kernels, choose algorithms, allocate
            # workspaces, none of which a capture allows.
            for launch in launches:
                launch()
        stream.synchronize()
        graph = torch.cuda.CUDAGraph()
        capture = memory.capture(graph) if memory else torch.cuda.graph(graph, stream=stream)
        with capture:
            outputs = []
            for launch in launches:
                if between is not None:
                    between()
                outputs.append(launch())
        timing = _time_events(
            graph.replay, budget, divide_by=len(launches), method="cuda graph of rotating buffers"
        )
        if between is not None:
            timing = timing.without(between.microseconds)
        graph.reset()
        del outputs
    return timing


def _time_events(
    call: Callable[[], object], budget: float, *, divide_by: int, method: str
) -> Timing:
    """Time ``call`` on the current CUDA stream with one pair of events per sample."""
    for _ in range(3):
        call()
    torch.cuda.synchronize()
    start = time.perf_counter()
    for _ in range(3):
        call()
    torch.cuda.synchronize()
    estimate = max((time.perf_counter() - start) / 3, 1e-6)
    samples = max(5, min(300, int(budget / estimate)))

    pairs = [
        (torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True))
        for _ in range(samples)
    ]
    # Work queued ahead lets the host run ahead of the GPU from the first sample on.
    call()
    for before, after in pairs:
        before.record()
        call()
        after.record()
    torch.cuda.synchronize()
    times = [before.elapsed_time(after) * 1e3 / divide_by for before, after in pairs]
    return _summary(times, method)


def _time_in_turn(launches: Sequence[Callable[[], object]], budget: float) -> Timing:
    start = time.perf_counter()
    launches[0]()
    estimate = max(time.perf_counter() - start, 1e-6)
    samples = max(5, min(300, int(budget / estimate)))
    times = []
    for index in range(samples):
        launch = launches[index % len(launches)]
        start = time.perf_counter()
        launch()
        times.append((time.perf_counter() - start) * 1e6)
    return _summary(times, "perf_counter")


def _summary(times: list[float], method: str) -> Timing:
    return Timing(statistics.median(times), min(times), max(times), len(times), method)
