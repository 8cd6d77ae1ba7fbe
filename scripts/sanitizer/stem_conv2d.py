"""The first layer of a network."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F

from dwswap.stems import stem_conv2d
from sanitizer.common import FORMATS, HALVES, difference, place


class Stem(NamedTuple):
    """A problem of the kernels of the first layer of a network."""

    dtype: torch.dtype
    memory_format: torch.memory_format
    shape: tuple[int, int, int, int]
    channels: int  # of the output
    offset: int
    activation: str


def problems() -> Iterator[Stem]:
    """Every number of channels and every access; units of all heights, and several for a block."""
    shapes = ((2, 3, 9, 40), (3, 3, 7, 13), (1, 3, 1, 1), (1, 3, 5, 1037), (1, 3, 224, 224))
    many = (1, 3, 3001, 62)
    for dtype, memory_format in itertools.product((torch.float32, *HALVES), FORMATS):
        for channels, (i, shape) in itertools.product(range(8, 65, 8), enumerate(shapes)):
            activation = ("none", "relu6", "silu")[(i + channels // 8) % 3]
            yield Stem(dtype, memory_format, shape, channels, i % 2, activation)
        for shape in (many, (700, 3, 24, 24), (700, 3, 23, 23)):
            yield Stem(dtype, memory_format, shape, 16, 0, "relu6")


def check(problem: Stem) -> str | None:
    """Run one problem of the kernels of the first layer; returns what is wrong with its result."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(problem.shape, generator=generator).to(problem.dtype)
    weight = torch.randn((problem.channels, 3, 3, 3), generator=generator).to(problem.dtype)
    weight = weight.contiguous(memory_format=problem.memory_format)
    bias = torch.randn(problem.channels, generator=generator).to(problem.dtype)
    ours = stem_conv2d(place(x, problem), weight.cuda(), bias.cuda(), activation=problem.activation)
    # A kernel reads the result here, so that initcheck misses no element that nobody wrote.
    result = (ours * 1).cpu().double()
    exact = F.conv2d(x.double(), weight.double(), bias.double(), 2, 1)
    activation = {"none": lambda y: y, "relu6": F.relu6, "silu": F.silu}[problem.activation]
    return difference(result, activation(exact), problem.dtype)
