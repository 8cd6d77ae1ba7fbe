"""The channels of two images in turn."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F

from dwswap.shuffling import interleaved
from sanitizer.common import FORMATS, HALVES, difference, place


class Interleaving(NamedTuple):
    """A problem of the kernel that interleaves the channels of two images."""

    dtype: torch.dtype
    memory_format: torch.memory_format  # of the images and of the result
    shape: tuple[int, int, int, int]
    offset: int = 0
    halves: bool = False  # the images are the halves of the channels of one


def problems() -> Iterator[Interleaving]:
    """Channels and pixels that no access and no block divides; more than one access per thread."""
    for dtype, memory_format in itertools.product((torch.float32, *HALVES), FORMATS):
        for shape in (
            (2, 58, 7, 5),
            (3, 116, 13, 9),
            (1, 57, 11, 1),
            (2, 1, 1, 1),
            (70, 24, 57, 33),
        ):
            for offset, halves in ((0, False), (1, False), (0, True)):
                yield Interleaving(dtype, memory_format, shape, offset, halves)


def check(problem: Interleaving) -> str | None:
    """Run one problem of the interleaving kernel; returns what is wrong with its result."""
    generator = torch.Generator().manual_seed(0)
    batch, channels, *pixels = problem.shape
    both = torch.randn((batch, 2 * channels, *pixels), generator=generator).to(problem.dtype)
    bias = torch.randn(channels, generator=generator).to(problem.dtype)
    images = both.chunk(2, 1)
    first, second = (place(image, problem) for image in images)
    if problem.halves:
        first, second = place(both, problem).chunk(2, 1)
    ours = interleaved(
        first,
        second,
        problem.memory_format is torch.channels_last,
        first_bias=bias.cuda(),
        first_activation="relu",
        second_activation="silu",
    )
    # A kernel reads the result here, so that initcheck misses no element that nobody wrote.
    result = (ours * 1).cpu().double()
    wide = [image.double() for image in images]
    exact = torch.stack((F.relu(wide[0] + bias.double()[:, None, None]), F.silu(wide[1])), 2)
    return difference(result, exact.flatten(1, 2), problem.dtype)
