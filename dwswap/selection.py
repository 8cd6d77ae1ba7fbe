"""``select="measured"``: keep a swap only where it is not slower than PyTorch on this GPU.

What is timed is the forward of the layer alone, in a CUDA graph on buffers that the L2 cache does
not hold (``dwswap.bench.timing``), with the sizes, strides and dtype that it meets in the model.
Equal layers are timed once, and once per machine: ``dwswap.selection_cache`` keeps the times.
"""

from __future__ import annotations

import dataclasses
import logging
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from statistics import fmean
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dwswap import build
from dwswap.bench.timing import buffers_needed, time_launches
from dwswap.checks import pair
from dwswap.example_inputs import Arguments
from dwswap.ops import depthwise_conv2d
from dwswap.report import Report
from dwswap.selection_cache import Times, known_times, remember
from dwswap.swapped_layers import LayerCall, put_back, run_watched

__all__ = ["Problem", "Strided", "machine", "measure", "select_faster"]

logger = logging.getLogger("dwswap")

CLEARLY_SLOWER = 1.03
"""Ours loses where it takes more than this times as long as PyTorch's: two measurements of one
kernel may differ by that much, and noise is no reason to undo a swap."""

ROUNDS = 2
"""Each side has its turn so often and the best counts: the clocks of an idle GPU are still rising
in the first."""

BUDGET = 0.01
"""Seconds of samples for each side, over all rounds."""


class Strided(NamedTuple):
    """Size and strides of a tensor: its layout, in full."""

    size: tuple[int, ...]
    stride: tuple[int, ...]

    @classmethod
    def of(cls, tensor: Tensor) -> Strided:
        return cls(tuple(tensor.shape), tensor.stride())


@dataclass(frozen=True)
class Problem:
    """What decides, on one machine, how long a convolution takes. Its ``str`` is a key on disk.

    Attributes:
        dtype: what the kernel computes in, after autocast.
        padding: (height, width), ``"same"`` or ``"valid"``.
    """

    dtype: torch.dtype
    input: Strided
    weight: Strided
    bias: bool
    stride: tuple[int, int]
    padding: tuple[int, int] | str
    dilation: tuple[int, int]

    @classmethod
    def of(cls, call: LayerCall) -> Problem:
        stride, padding, dilation, _ = call.geometry
        return cls(
            call.output.dtype,
            Strided.of(call.input),
            Strided.of(call.weight),
            call.bias is not None,
            pair("stride", stride, 1),
            padding if isinstance(padding, str) else pair("padding", padding, 0),
            pair("dilation", dilation, 1),
        )


def select_faster(
    result: nn.Module, report: Report, arguments: Arguments
) -> tuple[nn.Module, Report]:
    """``result`` of rewriting a model, without the swaps that are slower on this machine.

    A layer that is called several times is judged by the mean of its calls. What is never called,
    or does not fit into memory often enough to be timed, stays swapped. Where there is nothing to
    choose from, the report says so.

    Raises:
        ValueError: the model fails on ``arguments``.
    """
    tensors = (*result.parameters(), *result.buffers())
    if not any(machine(device) for device in {tensor.device for tensor in tensors}):
        why = (
            "nothing to choose from: without dwswap's CUDA kernels every layer runs on PyTorch's "
            "own, so all swaps stay"
        )
        logger.info('select="measured" has %s', why)
        return result, dataclasses.replace(report, select=why)
    problems: dict[str, tuple[Problem, torch.device]] = {}
    layers: dict[str, list[str]] = {}

    def watch(call: LayerCall) -> None:
        where = machine(call.input.device)
        if where is not None and call.output.numel():
            problem = Problem.of(call)
            key = f"{where}; {problem}"
            problems[key] = problem, call.input.device
            layers.setdefault(call.path, []).append(key)

    try:
        run_watched(result, report, arguments, watch)
    except Exception as error:  # whatever a user's model raises
        raise ValueError(
            'select="measured" needs a model that runs on example_inputs, got '
            f"{type(error).__name__}: {error}"
        ) from error
    times = _times(problems)
    slower: dict[str, Times] = {}
    for path, keys in layers.items():
        if all(key in times for key in keys):
            ours, aten = (fmean(column) for column in zip(*map(times.get, keys), strict=True))
            if ours > CLEARLY_SLOWER * aten:
                slower[path] = Times(ours, aten)
    if not slower:
        return result, report
    decided = [
        layer.decided("kept", "slower_here", **slower[layer.path]._asdict())
        if layer.path in slower
        else layer
        for layer in report.layers
    ]
    result = put_back(result, report.traced, set(slower))
    return result, dataclasses.replace(report, layers=decided)


def machine(device: torch.device) -> str | None:
    """All that a time depends on besides its problem; None where there is nothing to choose."""
    library = build.status().library
    if device.type != "cuda" or library is None:
        return None
    cudnn: Any = torch.backends.cudnn
    facts = {
        "GPU": torch.cuda.get_device_name(device),
        "torch": torch.__version__,
        "kernels": library.parent.name,
        # These choose among our kernels, and among PyTorch's.
        **{name: os.environ.get(name) for name in ("DWSWAP_FAMILY", "DWSWAP_PORTABLE")},
        "cuDNN": cudnn.version() if cudnn.enabled else None,
        "benchmark": cudnn.benchmark,
        "deterministic": cudnn.deterministic or torch.are_deterministic_algorithms_enabled(),
        "float32": cudnn.conv.fp32_precision,
    }
    return ", ".join(f"{name} {value}" for name, value in facts.items())


def measure(problem: Problem, device: torch.device) -> Times:
    """Time ``problem`` on random numbers, once with our kernel and once with PyTorch's.

    Raises:
        torch.OutOfMemoryError: there is no room for the buffers.
    """
    generator = torch.Generator(device).manual_seed(0)

    def random(layout: Strided) -> Tensor:
        extent = 1 + sum((n - 1) * step for n, step in zip(*layout, strict=True))
        values = torch.empty(extent, dtype=problem.dtype, device=device)
        return values.normal_(generator=generator).as_strided(*layout)

    def ours(x: Tensor) -> Tensor:
        return depthwise_conv2d(x, weight, bias, **geometry)

    def aten(x: Tensor) -> Tensor:
        return F.conv2d(x, weight, bias, **geometry)

    geometry: dict[str, Any] = {
        "stride": problem.stride,
        "padding": problem.padding,
        "dilation": problem.dilation,
        "groups": problem.input.size[-3],
    }
    weight = random(problem.weight)
    out_channels = problem.weight.size[0]
    bias = random(Strided((out_channels,), (1,))) if problem.bias else None
    inputs = [random(problem.input)]
    times = [math.inf, math.inf]
    with torch.no_grad(), torch.autocast(device.type, enabled=False):
        moved = inputs[0].nbytes + ours(inputs[0]).nbytes
        inputs += [random(problem.input) for _ in range(buffers_needed(moved) - 1)]
        for _ in range(ROUNDS):
            for side, call in enumerate((ours, aten)):
                launches = [partial(call, x) for x in inputs]
                timing = time_launches(launches, device, budget=BUDGET / ROUNDS)
                times[side] = min(times[side], timing.microseconds)
    return Times(*times)


def _times(problems: Mapping[str, tuple[Problem, torch.device]]) -> dict[str, Times]:
    """Of every key, from the cache where it has them; without those that do not fit in memory."""
    known = known_times()
    new: dict[str, Times] = {}
    for key, (problem, device) in problems.items():
        if key not in known:
            try:
                new[key] = measure(problem, device)
            except torch.OutOfMemoryError as error:
                logger.warning("%s is not measured: %s", problem, str(error).partition("\n")[0])
    if new:
        remember(new)
    return known | new
