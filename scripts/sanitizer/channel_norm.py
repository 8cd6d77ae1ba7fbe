"""Normalization over the channels of every pixel."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F

from dwswap.norms import channel_norm
from sanitizer.common import HALVES, difference, place


class Norm(NamedTuple):
    """A problem of the kernels that normalize over channels."""

    dtype: torch.dtype
    memory_format: torch.memory_format  # channels_last, of which rows of channels are a view
    shape: tuple[int, int, int, int]
    offset: int
    last: bool


def problems() -> Iterator[Norm]:
    """Every number of lanes and of vectors; rows that no block and no thread divides."""
    for dtype in (torch.float32, *HALVES):
        for channels in (1, 8, 64, 96, 100, 104, 192, 200, 384, 512, 640, 1000, 1536, 2048):
            for offset, last in ((0, False), (0, True), (1, True)):
                shape = (3, channels, 7, 5 + 2 * offset)
                yield Norm(dtype, torch.channels_last, shape, offset, last)


def check(problem: Norm) -> str | None:
    """Run one problem of the kernels of norms; returns what is wrong with its result."""
    generator = torch.Generator().manual_seed(0)
    channels = problem.shape[1]
    x = torch.randn(problem.shape, generator=generator).to(problem.dtype)
    parameters = torch.randn((2, channels), generator=generator).to(problem.dtype)
    image = place(x, problem)
    rows = image.movedim(1, -1) if problem.last else image
    weight, bias = (values.clone() for values in parameters)
    ours = channel_norm(rows, weight.cuda(), bias.cuda(), 1e-6, last=problem.last)
    # A kernel reads the result here, so that initcheck misses no element that nobody wrote.
    result = (ours * 1).cpu().double()
    exact = F.layer_norm(
        x.double().movedim(1, -1), (channels,), weight.double(), bias.double(), 1e-6
    )
    return difference(result, exact if problem.last else exact.movedim(-1, 1), problem.dtype)
