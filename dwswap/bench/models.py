"""Whole models: ours next to PyTorch's ways to run them, in turns in one process."""

from __future__ import annotations

import copy
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any, ClassVar, NamedTuple

import torch
from torch import nn

from dwswap.bench.kernel_families import profile
from dwswap.bench.latency import LONG, MemoryMeter, synchronize, time_stream
from dwswap.bench.layers import DTYPES, LAYOUTS
from dwswap.bench.model_cases import Case
from dwswap.bench.model_peers import takes
from dwswap.bench.model_results import Measured, ModelResult
from dwswap.bench.model_subject import Run, Subject, collect, detects
from dwswap.bench.random_weights import randomize
from dwswap.bench.timing import time_side_by_side
from dwswap.report import report

__all__ = ["ModelBench", "Turns"]

STATISTICS_OF = 16
"""Random images whose statistics BatchNorm gets: enough where a feature map is one pixel."""

ROUNDS = 3
VERY_SLOW = 5.0
"""Seconds of a call from which on one round must do: detection of many images loops in Python."""

WARM_UP = 4
"""Calls after the first two, unless these are long. With ``reduce-overhead`` the second warms up,
the third captures."""


class Turns(NamedTuple):
    """One of several calls that were timed in turns.

    Attributes:
        us: microseconds.
        faster: by which factor it is faster than the last of the calls.
        within: half of the interval of ``faster``, see ``Measured``; None where it is not known.
    """

    us: float
    faster: float
    within: float | None = None


class ModelBench:
    """Measures cases on one device; keeps the last model's random weights between them.

    Args:
        device: ``cpu`` is for trying the path out.
        construct: makes a model of a name, in float32 on the CPU.
        budget: seconds of samples per measurement; each peer costs one, and one of each of ours.
        profiled: measure the time per kernel family of ours too.
        step: called with the name of what comes next.

    Attributes:
        result: the class of what is measured.
    """

    result: ClassVar[type[ModelResult]] = ModelResult

    def __init__(
        self,
        device: torch.device,
        construct: Callable[[str], nn.Module],
        *,
        budget: float,
        profiled: bool = False,
        step: Callable[[str], None] = lambda name: None,
    ) -> None:
        self.device = device
        self.budget = budget
        self.profiled = profiled
        self.step = step
        self._construct = construct
        self._last: tuple[str, nn.Module] | None = None

    @torch.no_grad()
    def measure(self, case: Case, peers: Sequence[str]) -> ModelResult:
        """Measure ours and ``peers``; whatever fails is in the result with its reason."""
        try:
            subject = self._subject(case)
        except Exception as error:
            problem = f"the model itself: {_reason(error)}"
            return self.result(*case, "", None, [], [], problem, passed=False)
        ours = [self._prepare(subject, name) for name in self._ours(subject, peers)]
        # Dynamo would keep a model and its graphs for a later call.
        kept = any(self.result.runners[run.name].compiled for run in ours)
        times: dict[str, list[float]] = {run.name: [] for run in ours if run.call is not None}
        found = []
        for name in peers:
            found.append(self._against(subject, name, ours, times))
            if self.result.runners[name].compiled and not kept:
                torch.compiler.reset()
        if not any(times.values()):
            self._time(ours, times)
        runs = [
            run.measured(subject, us=statistics.median(times[run.name]))
            if times.get(run.name)
            else run.measured(subject, us=None)
            for run in ours
        ]
        first = ours[0].call
        families = profile(first, self.device) if self.profiled and first is not None else []
        if kept:
            torch.compiler.reset()
        runs += found
        passed = all(run.reason is None for run in runs if run.name in self.result.ours) and all(
            subject.accepts(run) for run in runs if run.name.startswith("dwswap")
        )
        return self.result(
            *case,
            ours[0].summary,
            runs=runs,
            profile=families,
            problem=None,
            passed=passed,
            **subject.limits,
        )

    def _ours(self, subject: Subject, peers: Sequence[str]) -> list[str]:
        """Names of ours to measure next to ``peers``."""
        # Only optimize itself can fall back where boxes are counted: a graph cannot.
        graph = self.device.type == "cuda" and (takes("cuda_graph") or not subject.detects)
        names, runners = self.result.ours, self.result.runners
        return [name for name in names if graph or not runners[name].cuda]

    def _subject(self, case: Case) -> Subject:
        """The model in the dtype and the layout of the case, in eval mode."""
        model = copy.deepcopy(self._base(case)).to(DTYPES[case.dtype])
        return Subject.make(model.to(memory_format=LAYOUTS[case.layout]), case, self.device)

    def _base(self, case: Case) -> nn.Module:
        """The model in float32 and eval mode, with random weights; to be copied."""
        self.step(f"{case.model}: weights, float64")
        if self._last is None or self._last[0] != case.model:
            torch.manual_seed(0)
            base = self._construct(case.model).to(self.device).eval()
            generator = torch.Generator(self.device).manual_seed(0)
            size = (STATISTICS_OF, 3, case.size, case.size)
            images = torch.randn(size, device=self.device, generator=generator)
            # In train mode a detection model wants targets.
            part: Any = base.backbone if detects(base) else base
            randomize(part, images)
            self._last = (case.model, base)
        return self._last[1]

    def _prepare(self, subject: Subject, name: str) -> Run:
        """Build and warm up one way to run the model, and take its figures but the time."""
        runner, case = self.result.runners[name], subject.case
        self.step(f"{case.model} {case.batch} {case.dtype}: {runner.title}")
        collect(self.device)
        try:
            argument = subject.argument(runner)
            meter = MemoryMeter(self.device)
            model = copy.deepcopy(subject.model).to(memory_format=subject.layout(runner))
            synchronize(self.device)
            start = time.perf_counter()
            forward = runner.build(model, argument)
            synchronize(self.device)
            built = time.perf_counter()
            del model
            call = subject.call(runner, forward, argument)
            call()
            synchronize(self.device)
            called = time.perf_counter()
            peak = meter.peak(call)
            # A compiled model may capture its graphs in the second call.
            seconds = 0.0 if runner.compiled else time.perf_counter() - called
            if self.device.type == "cuda" and seconds < LONG:
                for _ in range(WARM_UP):
                    call()
                peak = meter.peak(call)
            run = Run(name, call, built - start, called - built, peak, slow=seconds > VERY_SLOW)
            subject.check(run, runner, forward)
        except Exception as error:
            return Run(name, reason=_reason(error))
        if name == self.result.ours[0] and isinstance(forward, nn.Module):
            run.summary = report(forward).summary()
        if name == "dwswap_graph" and not takes("cuda_graph"):
            run.note = "captured by the benchmark: optimize has no cuda_graph yet"
        return run

    def _against(
        self, subject: Subject, name: str, ours: list[Run], times: dict[str, list[float]]
    ) -> Measured:
        """Prepare a peer, and time it in turns with ours."""
        run = self._prepare(subject, name)
        if run.call is None:
            return run.measured(subject, us=None)
        mine: dict[str, list[float]] = {**times, name: []}
        try:
            turns = self._time([*ours, run], mine)
        except Exception as error:
            return Measured(name, reason=_reason(error))
        speedups = {ours: turns[ours].faster for ours in times}
        within = {ours: half for ours in times if (half := turns[ours].within) is not None}
        return run.measured(subject, mine[name][-1], speedups, within)

    def _time(self, runs: list[Run], times: dict[str, list[float]]) -> dict[str, Turns]:
        """Add the time of each in turns with the others, in microseconds, to ``times``.

        Returns:
            Of each that is ready.
        """
        ready = {run.name: run.call for run in runs if run.call is not None}
        if not ready:
            return {}
        slow = any(run.slow for run in runs)
        found = dict(zip(ready, self._in_turns(list(ready.values()), slow=slow), strict=True))
        for name, turns in found.items():
            times[name].append(turns.us)
        return found

    def _in_turns(self, calls: Sequence[Callable[[], Any]], *, slow: bool) -> list[Turns]:
        timings = time_side_by_side(
            calls,
            self.device,
            budget=self.budget,
            rounds=1 if slow else ROUNDS,
            measure=time_stream,
        )
        found = [timing.microseconds for timing in timings]
        return [Turns(us, found[-1] / us) for us in found]


def _reason(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0] if lines else ''}"[:300]
