"""Squeeze-and-excitation in training, forward and backward."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import NamedTuple

import torch

from dwswap.activations import PAIRS
from dwswap.schema import channel_scale, channel_scale_backward
from sanitizer.common import FORMATS, HALVES, difference, place


class Scaling(NamedTuple):
    """A problem of the kernels of squeeze-and-excitation in training, forward and backward."""

    dtype: torch.dtype
    memory_format: torch.memory_format
    shape: tuple[int, int, int, int]
    offset: int
    gate_dtype: torch.dtype


def problems() -> Iterator[Scaling]:
    """Every width of an access; blocks of several groups and groups of several blocks; vectors of
    two planes, and planes smaller than a vector."""
    shapes = (
        *((2, 24, 8, 8), (3, 40, 7, 7), (3, 20, 7, 5), (5, 57, 3, 5), (2, 600, 4, 9)),
        *((1, 3, 37, 61), (300, 16, 1, 1), (70, 8, 2, 1), (1, 32, 120, 111)),
    )
    for dtype, memory_format in itertools.product((torch.float32, *HALVES), FORMATS):
        for i, (shape, offset) in enumerate(itertools.product(shapes, (0, 1, 4))):
            narrower = HALVES[i % 2] if dtype is torch.float32 and i % 3 == 0 else dtype
            yield Scaling(dtype, memory_format, shape, offset, narrower)


def check(problem: Scaling) -> str | None:
    """Run one problem of squeeze-and-excitation in training; returns what is wrong with it."""
    generator = torch.Generator().manual_seed(0)
    x, gradient = (
        torch.randn(problem.shape, generator=generator).to(problem.dtype) for _ in range(2)
    )
    z, spread = torch.randn((2, *problem.shape[:2]), generator=generator)
    z, spread = z.to(problem.gate_dtype), spread.to(problem.dtype)
    image, grad, gates = place(x, problem), place(gradient, problem), z.cuda()
    number = PAIRS["none", "sigmoid"]
    outputs = (
        channel_scale(image, gates, None, number),
        channel_scale(grad, gates, spread.cuda(), number),
        channel_scale_backward(grad, image, gates, number),
    )
    wide, slope, factors = x.double(), gradient.double(), z.double().sigmoid()
    pixels = problem.shape[2] * problem.shape[3]
    exact = (
        wide * factors[..., None, None],
        slope * factors[..., None, None] + spread.double()[..., None, None] / pixels,
        (wide * slope).sum((2, 3)) * factors * (1 - factors),
    )
    names = ("output", "grad_input", "grad_gates")
    dtypes = (problem.dtype, problem.dtype, problem.gate_dtype)
    for name, ours, right, dtype in zip(names, outputs, exact, dtypes, strict=True):
        # A kernel reads the result here, so that initcheck misses no element that nobody wrote.
        wrong = difference((ours * 1).cpu().double(), right, dtype)
        if wrong is not None:
            return f"{name}: {wrong}"
    return None
