"""BatchNorm in training, forward and backward."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F

from dwswap.activations import PAIRS
from dwswap.schema import batch_norm, batch_norm_backward
from sanitizer.common import FORMATS, HALVES, difference, place


class BatchNorm(NamedTuple):
    """A problem of the kernels of BatchNorm in training, forward and backward."""

    dtype: torch.dtype
    memory_format: torch.memory_format
    shape: tuple[int, int, int, int]
    offset: int
    activation: str


def problems() -> Iterator[BatchNorm]:
    """Every width of an access and every way over planes; blocks of which threads are idle."""
    shapes = ((2, 24, 8, 8), (3, 40, 7, 7), (3, 20, 7, 5), (5, 57, 3, 5), (2, 600, 4, 9))
    for dtype, memory_format in itertools.product((torch.float32, *HALVES), FORMATS):
        for shape, offset in itertools.product((*shapes, (1, 3, 37, 61)), (0, 1, 4)):
            activation = "silu" if offset == 0 else "none"
            yield BatchNorm(dtype, memory_format, shape, offset, activation)


def check(problem: BatchNorm) -> str | None:
    """Run one problem of BatchNorm in training; returns what is wrong with one of its results."""
    generator = torch.Generator().manual_seed(0)
    x, gradient = (
        torch.randn(problem.shape, generator=generator).to(problem.dtype) for _ in range(2)
    )
    weight, bias, mean, variance = torch.rand((4, problem.shape[1]), generator=generator)
    number = PAIRS["none", problem.activation]
    running = mean.cuda(), variance.cuda()
    batches = torch.zeros((), dtype=torch.int64, device="cuda")
    image, factors = place(x, problem), weight.cuda()
    output, stats = batch_norm(image, factors, bias.cuda(), *running, batches, 0.1, 1e-5, number)
    gradients = batch_norm_backward(
        place(gradient, problem), image, stats, factors, number, (True, True, True)
    )
    leaves = [t.double().requires_grad_() for t in (x, weight, bias)]
    wide = [mean.double(), variance.double()]
    with torch.enable_grad():
        normalized = F.batch_norm(
            leaves[0], wide[0], wide[1], leaves[1], leaves[2], True, 0.1, 1e-5
        )
        exact = F.silu(normalized) if problem.activation == "silu" else normalized
    wanted = [exact.detach(), *torch.autograd.grad(exact, leaves, gradient.double()), *wide]
    # Kernels read the results here, so that initcheck misses no element that nobody wrote.
    results = [(t * 1).cpu().double() for t in (output, *gradients, *running, batches)]
    if results.pop() != 1:
        return "batches were not counted"
    names = ("output", "grad_input", "grad_weight", "grad_bias", "running_mean", "running_var")
    for name, result, right in zip(names, results, wanted, strict=True):
        wrong = difference(result, right, problem.dtype)
        if wrong is not None:
            return f"{name}: {wrong}"
    return None
