"""Means of the channels of images."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F

from dwswap.means import channel_means
from sanitizer.common import FORMATS, HALVES, difference, place


class Means(NamedTuple):
    """A problem of the kernel that computes the means of channels."""

    dtype: torch.dtype
    memory_format: torch.memory_format
    shape: tuple[int, int, int, int]
    offset: int


def problems() -> Iterator[Means]:
    """Groups of one warp and of several; channels and pixels that no vector divides."""
    for dtype, memory_format in itertools.product((torch.float32, *HALVES), FORMATS):
        shapes = ((2, 72, 7, 7), (3, 57, 13, 9), (1, 8, 33, 31), (300, 130, 3, 2), (2, 1, 1, 1))
        for shape, offset in itertools.product(shapes, (0, 1)):
            yield Means(dtype, memory_format, shape, offset)


def check(problem: Means) -> str | None:
    """Run one problem of the kernel of means; returns what is wrong with its result."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(problem.shape, generator=generator).to(problem.dtype)
    bias = torch.randn(problem.shape[1], generator=generator).to(problem.dtype)
    ours = channel_means(place(x, problem), bias.cuda(), activation="relu6")
    # A kernel reads the result here, so that initcheck misses no element that nobody wrote.
    result = (ours * 1).cpu().double()
    exact = F.relu6(x.double() + bias.double()[:, None, None]).mean((2, 3))
    return difference(result, exact, problem.dtype)
