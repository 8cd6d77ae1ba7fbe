"""What one layer costs the host: the time until a call returns, whatever the GPU still does."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor, nn

from dwswap.modules import DepthwiseConv2d

__all__ = ["MODES", "TRAINING", "Overhead", "host_microseconds", "overheads"]

MODES: dict[str, Callable[[], AbstractContextManager[object]]] = {
    "no_grad": torch.no_grad,
    "inference_mode": torch.inference_mode,
    "grad": torch.enable_grad,
}
TRAINING = "training"
LAYOUTS = {"nchw": torch.contiguous_format, "channels_last": torch.channels_last}


class Overhead(NamedTuple):
    """Host microseconds per call of ``nn.Conv2d`` and of ``DepthwiseConv2d``."""

    dtype: torch.dtype
    layout: str
    mode: str
    theirs: float
    ours: float


def host_microseconds(
    calls: Sequence[Callable[[], object]],
    device: torch.device,
    *,
    times: int = 200,
    rounds: int = 20,
) -> list[float]:
    """The shortest mean of ``times`` calls in a row, per callable; the callables take turns.

    Args:
        calls: without arguments; the GPU must be faster with each than the host.
        device: where they run.
        times: calls in a row. A CUDA stream holds 1000 launches, then the host waits.
        rounds: turns of each; one more comes before them.
    """
    best = [float("inf")] * len(calls)
    for turn in range(rounds + 1):
        for index, call in enumerate(calls):
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            start = time.perf_counter()
            for _ in range(times):
                call()
            mean = (time.perf_counter() - start) / times * 1e6
            best[index] = min(best[index], mean) if turn else float("inf")
    return best


def overheads(
    device: torch.device, dtypes: Sequence[torch.dtype], *, times: int = 200, rounds: int = 20
) -> Iterator[Overhead]:
    """Time a small 3 x 3 layer in every dtype, layout and mode of autograd, then its training.

    Training is forward and backward of float32 parameters under autocast, to float16 on CUDA.
    """
    for dtype in dtypes:
        for layout, memory_format in LAYOUTS.items():
            modules, x = _layer(device, dtype, memory_format)
            calls = [partial(module, x) for module in modules]
            for mode, context in MODES.items():
                with context():
                    theirs, ours = host_microseconds(calls, device, times=times, rounds=rounds)
                yield Overhead(dtype, layout, mode, theirs, ours)
    half = torch.float16 if device.type == "cuda" else torch.bfloat16
    for layout, memory_format in LAYOUTS.items():
        modules, x = _layer(device, torch.float32, memory_format)
        steps = [_training_step(module, x.to(half).requires_grad_(), half) for module in modules]
        # A step launches several kernels, and a stream holds 1000.
        theirs, ours = host_microseconds(steps, device, times=max(1, times // 8), rounds=rounds)
        yield Overhead(torch.float32, layout, TRAINING, theirs, ours)


def _layer(
    device: torch.device, dtype: torch.dtype, memory_format: torch.memory_format
) -> tuple[tuple[nn.Conv2d, DepthwiseConv2d], Tensor]:
    """PyTorch's layer and ours, and an input."""
    conv = nn.Conv2d(32, 32, 3, padding=1, groups=32, bias=False)
    conv = conv.to(device, dtype).to(memory_format=memory_format)
    x = torch.randn(1, 32, 7, 7, device=device, dtype=dtype)
    return (conv, DepthwiseConv2d.from_conv2d(conv)), x.contiguous(memory_format=memory_format)


def _training_step(module: nn.Module, x: Tensor, dtype: torch.dtype) -> Callable[[], None]:
    grad_output = torch.ones_like(x, requires_grad=False)
    leaves = (x, *module.parameters())

    def step() -> None:
        with torch.autocast(x.device.type, dtype):
            output = module(x)
        torch.autograd.grad(output, leaves, grad_output)

    return step
