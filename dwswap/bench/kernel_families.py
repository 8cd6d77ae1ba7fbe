"""Where the time of a forward or of a training step goes, by the names of the kernels that run."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch

from dwswap.bench.latency import synchronize

__all__ = ["FAMILIES", "FamilyTime", "family", "profile"]

DEPTHWISE = "depthwise"
GEMM = "GEMM, convolution"
ELEMENTWISE = "elementwise"
REDUCTION = "reduction, pooling"
COPY = "copy"
OTHER = "other"

FAMILIES = (DEPTHWISE, GEMM, ELEMENTWISE, REDUCTION, COPY, OTHER)

NAMES: tuple[tuple[str, str], ...] = (
    # Inductor's names list what was fused, convolutions too: the prefix alone tells what it is.
    (r"^triton_(tem|mm|bmm|convolution)", GEMM),
    (r"^triton_(red|per)_", REDUCTION),
    (r"^triton_", ELEMENTWISE),
    (r"dwswap::.*(stem_conv2d|pooled_linear)", GEMM),
    (r"depthwise|conv2d_c1_k1_n", DEPTHWISE),
    # Before squeeze_kernel: both have SqueezeExcitationParams among their arguments.
    (r"dwswap::excite_kernel", ELEMENTWISE),
    # As aten's, which it stands in for.
    (r"dwswap::batch_norm", ELEMENTWISE),
    (r"dwswap::.*(pool|reduce|mean|norm|squeeze)", REDUCTION),
    (r"dwswap::.*(scale|elementwise|add_)", ELEMENTWISE),
    (r"dwswap::.*(copy|interleave|transpose|to_channels_last|to_nchw)", COPY),
    (r"dwswap::", DEPTHWISE),
    # Before copies: CUTLASS names its copy atoms among the template arguments.
    (r"gemm|gemv|nvjet|xmma|cutlass|splitKreduce|winograd|cask", GEMM),
    (r"memcpy|memset|copy|clone|transpose|FillFunctor|::cat$", COPY),
    (r"(nchw|nhwc)To(nchw|nhwc)|convertTensor", COPY),
    # In eval mode a scale and a shift; in train mode the statistics come with it.
    (r"bn_[fb]w|batch_?norm", ELEMENTWISE),
    (r"softmax|layer_?norm|RowwiseMoments|pool|::mean|::sum|ReduceOp|reduce_kernel", REDUCTION),
    (r"conv|::mm$|::addmm|::bmm|::linear|dot_kernel", GEMM),
    (r"elementwise|multi_tensor_apply|op_?tensor|scalePackedTensor|addTensor", ELEMENTWISE),
    (r"^aten::(relu|hardtanh|hardswish|hardsigmoid|sigmoid|silu|gelu|clamp)", ELEMENTWISE),
    (r"^aten::(add|mul|sub|div)", ELEMENTWISE),
)
"""Patterns, ignoring case, and the family; the first that is found in a name decides."""

_PATTERNS = tuple((re.compile(pattern, re.IGNORECASE), name) for pattern, name in NAMES)


@dataclass(frozen=True)
class FamilyTime:
    """The kernels of one family in one forward.

    Attributes:
        us: microseconds per forward.
        percent: of the time of all kernels.
        kernels: launches per forward.
        largest: the name of the kernel that took the most, for the eye.
    """

    family: str
    us: float
    percent: float
    kernels: float
    largest: str

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def family(kernel: str) -> str:
    """The family of a kernel (or, on the CPU, of an aten operator) by its name."""
    return next((name for pattern, name in _PATTERNS if pattern.search(kernel)), OTHER)


def profile(
    call: Callable[[], object], device: torch.device, *, forwards: int = 5
) -> list[FamilyTime]:
    """Time per family of what ``call`` runs, largest first; needs a warm ``call``.

    On CUDA the kernels, on the CPU the operators without those that they call.
    """
    from torch.profiler import ProfilerActivity
    from torch.profiler import profile as profiler

    cuda = device.type == "cuda"
    activity = ProfilerActivity.CUDA if cuda else ProfilerActivity.CPU
    with torch.no_grad(), profiler(activities=[activity]) as recorded:
        for _ in range(forwards):
            call()
        synchronize(device)
    found: dict[str, list[tuple[float, int, str]]] = {}
    for event in recorded.key_averages():
        # Without CPU activities these are kernels, copies and fills only.
        us = event.self_device_time_total if cuda else event.self_cpu_time_total
        if us > 0:
            found.setdefault(family(event.key), []).append((us, event.count, event.key))
    total = sum(us for entries in found.values() for us, _, _ in entries)
    rows = [
        FamilyTime(
            family=name,
            us=sum(us for us, _, _ in entries) / forwards,
            percent=100 * sum(us for us, _, _ in entries) / total,
            kernels=sum(count for _, count, _ in entries) / forwards,
            largest=max(entries)[2][:120],
        )
        for name, entries in found.items()
    ]
    return sorted(rows, key=lambda row: -row.us)
