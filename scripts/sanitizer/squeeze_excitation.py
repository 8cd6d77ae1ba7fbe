"""Squeeze-and-excitation, for inference."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F

from dwswap.ops import squeeze_excitation
from sanitizer.common import FORMATS, HALVES, difference, place


class Excitation(NamedTuple):
    """A problem of squeeze_excitation."""

    dtype: torch.dtype
    memory_format: torch.memory_format
    shape: tuple[int, int, int, int]
    hidden: int
    offset: int = 0


def problems() -> Iterator[Excitation]:
    """Channels, pixels and hidden units that no slice, vector or group of threads divides."""
    for dtype, memory_format in itertools.product((torch.float32, *HALVES), FORMATS):
        for shape, hidden in (
            ((1, 72, 7, 7), 24),
            ((2, 57, 13, 9), 5),
            ((3, 200, 8, 10), 13),
            ((1, 24, 56, 57), 300),
            ((2, 1, 1, 1), 1),
            ((300, 40, 7, 8), 10),
            ((300, 240, 7, 8), 60),  # the layers are matrix products, as in those below
            ((600, 57, 5, 7), 130),
        ):
            for offset in (0, 1):
                yield Excitation(dtype, memory_format, shape, hidden, offset)


def check(problem: Excitation) -> str | None:
    """Run one problem of squeeze_excitation; returns what is wrong with its result."""
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator).to(problem.dtype)

    channels, hidden = problem.shape[1], problem.hidden
    input, reduce_bias, expand_bias = draw(*problem.shape), draw(hidden), draw(channels)
    reduce_weight, expand_weight = draw(hidden, channels, 1, 1), draw(channels, hidden)
    expand_weight /= hidden
    parameters = (reduce_weight, reduce_bias, expand_weight, expand_bias)
    ours = squeeze_excitation(place(input, problem), *(t.cuda() for t in parameters))
    # A kernel reads the result here, so that initcheck misses no element that nobody wrote.
    result = (ours * 1).cpu().double()
    wide = [t.double() for t in parameters]
    units = F.relu(F.linear(input.double().mean((2, 3)), wide[0].flatten(1), wide[1]))
    gates = torch.sigmoid(F.linear(units, *wide[2:]))
    return difference(result, input.double() * gates[:, :, None, None], problem.dtype)
