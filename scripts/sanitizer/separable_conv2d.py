"""A depthwise convolution and the pointwise one behind it."""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F

from dwswap.activations import PAIRS
from dwswap.schema import separable_conv2d
from sanitizer.common import HALVES, difference


class Separable(NamedTuple):
    """A problem of the kernel of a depthwise convolution and the pointwise one behind it."""

    dtype: torch.dtype
    shape: tuple[int, int, int, int]
    kernel: int
    stride: int
    outputs: int
    pixels: int
    slices: int


def problems() -> Iterator[Separable]:
    """Pixels that no block divides, rows of odd length, slices of which the last has fewer
    channels, outputs that no matrix instruction divides."""
    shapes = ((1, 8, 1, 1), (2, 40, 9, 7), (1, 136, 5, 14), (3, 384, 7, 7))
    cuts = itertools.cycle(itertools.product((8, 16, 32), (1, 3, 8)))
    for dtype, kernel, stride, shape, outputs in itertools.product(
        HALVES, (3, 5), (1, 2), shapes, (8, 24, 160)
    ):
        yield Separable(dtype, shape, kernel, stride, outputs, *next(cuts))


def check(problem: Separable) -> str | None:
    """Run one problem of a depthwise and a pointwise convolution; returns what is wrong with it."""
    generator = torch.Generator().manual_seed(0)

    def drawn(*shape: int) -> torch.Tensor:
        image = torch.randn(shape, generator=generator).to(problem.dtype)
        return image.contiguous(memory_format=torch.channels_last) if len(shape) == 4 else image

    kernel, stride, padding = problem.kernel, problem.stride, problem.kernel // 2
    channels, outputs = problem.shape[1], problem.outputs
    x, weight, bias = drawn(*problem.shape), drawn(channels, 1, kernel, kernel), drawn(channels)
    input_bias = drawn(channels)
    point_weight, point_bias = drawn(outputs, channels, 1, 1) / channels**0.5, drawn(outputs)
    height, width = ((side - 1) // stride + 1 for side in problem.shape[2:])
    residual = drawn(problem.shape[0], outputs, height, width)
    os.environ["DWSWAP_PORTABLE"] = "0"
    ours = separable_conv2d(
        *(t.cuda() for t in (x, weight, bias, input_bias)),
        *(stride, padding, PAIRS["relu6", "relu"]),
        *(t.cuda() for t in (point_weight, point_bias, residual)),
        *(problem.pixels, problem.slices),
    )
    # A kernel reads the result here, so that initcheck misses no element that nobody wrote.
    result = (ours * 1).cpu().double()
    hidden = F.relu6(x.double() + input_bias.double()[:, None, None])
    taps = weight.double(), bias.double()
    hidden = F.conv2d(hidden, *taps, stride, padding, 1, channels).relu()
    exact = F.conv2d(hidden, point_weight.double(), point_bias.double()) + residual.double()
    return difference(result, exact, problem.dtype)
