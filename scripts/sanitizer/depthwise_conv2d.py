"""Depthwise convolutions, every family of kernels."""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F

from dwswap import depthwise_conv2d
from dwswap.registration import kernel_family
from sanitizer.common import FORMATS, HALVES, difference, place

# The families with bulk copies from shared memory.
BULK_STORES = ("plane_strips", "plane_bands", "diagonal")


class Problem(NamedTuple):
    """A problem of depthwise_conv2d, or of its gradients."""

    dtype: torch.dtype
    memory_format: torch.memory_format
    shape: tuple[int, int, int, int]
    kernel: tuple[int, int]
    stride: int = 1
    dilation: int = 1
    multiplier: int = 1
    transform: bool = False
    extra_padding: tuple[int, int] = (0, 0)
    offset: int = 0  # of the input in its storage, in elements
    portable: bool = False
    family: str = ""  # asked for; the choice's where it is empty or does not cover the problem
    backward: str = ""  # the same for the families of the gradients; must be the one that runs
    bias_gradient: bool = True

    @property
    def padding(self) -> list[int]:
        sizes = zip(self.kernel, self.extra_padding, strict=True)
        return [self.dilation * size // 2 + extra for size, extra in sizes]


def problems() -> Iterator[Problem]:
    """Shapes that no tile divides, for every family of kernels and each way it reads and cuts."""
    fast = (torch.float32, *HALVES)
    contiguous, last = FORMATS
    for size in ((3, 3), (5, 5), (7, 7)):
        for stride in (1, 2):
            for i, dtype in enumerate(fast):
                transform = (size[0] + i) % 2 == 0
                ragged = Problem(dtype, last, (2, 2, 7, 7), size, stride, transform=transform)
                # channel_tiles: read by the copy engine, and by 16, 8 and 4 bytes.
                for channels, portable in ((72, False), (72, True), (20, False), (58, False)):
                    shape = (2, channels, 7 + 6 * i, 17 - 4 * i)
                    yield ragged._replace(shape=shape, portable=portable, family="channel_tiles")
                if stride == 1:
                    for dilation, portable in ((2, False), (2, True), (5, False)):
                        lattice = ragged._replace(dilation=dilation, portable=portable)
                        yield lattice._replace(shape=(2, 40, 17, 13), family="channel_tiles")
                yield ragged._replace(shape=(2, 72, 23, 17 - 4 * i), family="channel_columns")
                if size == (3, 3):
                    # channel_direct: accesses of 8 to 2 bytes; outputs enough for many per thread.
                    direct = ragged._replace(family="channel_direct")
                    for channels, offset in ((20, 0), (58, 0), (57, 0), (20, 1)):
                        shape = (2, channels, 9 + 6 * i, 17 - 4 * i)
                        yield direct._replace(shape=shape, offset=offset)
                    yield direct._replace(shape=(100 * stride**2, 58, 19, 21))
                    # points: 1, 2 and 4 channels of a thread, one pixel and two; both layouts.
                    points = ragged._replace(family="points")
                    for channels, offset, dilation in (
                        (58, 0, 1),
                        (57, 0, 1),
                        (20, 0, 1),
                        (20, 0, 2),
                        (20, 1, 2),
                    ):
                        shape = (2, channels, 9 + 6 * i, 17 - 4 * i)
                        point = points._replace(shape=shape, offset=offset, dilation=dilation)
                        yield point
                        yield point._replace(memory_format=contiguous)
                # plane_strips: whole planes and strips, by both kinds of copies; rolling_rows.
                ragged = ragged._replace(memory_format=contiguous)
                small, wide = (2, 7, 9 + 6 * i, 15 + 2 * i), (1, 2, 11, 803 + i)
                for portable in (False, True):
                    strips = ragged._replace(portable=portable, family="plane_strips")
                    yield strips._replace(shape=small)
                    yield strips._replace(shape=wide)
                    yield strips._replace(shape=(19, 30, 7, 7))
                for offset in (0, 1):
                    yield ragged._replace(shape=small, offset=offset, family="rolling_rows")
        # Outputs enough for the kernels that compute many rows per thread.
        large = Problem(torch.float16, contiguous, (25, 96, 30, 31), size, family="plane_strips")
        yield large
        # plane_strips: all columns of a row; pairs and vectors of columns.
        yield large._replace(shape=(340, 96, 7, 7))
        for height, width in ((9, 14), (9, 22), (112, 46), (9, 8), (112, 64), (3, 18), (57, 156)):
            shape = (2_000_000 // (96 * height * width), 96, height, width)
            yield large._replace(shape=shape)
        # Threads that hold their rows: a plane, those of many taps, and of pairs in large problems.
        yield large._replace(shape=(340, 96, 7, 7), dtype=torch.float32)
        if size == (3, 3):
            yield large._replace(shape=(240, 57, 21, 56))
            yield large._replace(shape=(23, 57, 56, 230))
        else:
            for height, width in ((14, 28), (12, 20), (30, 56), (112, 28), (112, 112)):
                shape = (1_700_000 // (96 * height * width), 96, height, width)
                for dtype, portable in itertools.product(fast[:2], (False, True)):
                    yield large._replace(shape=shape, dtype=dtype, portable=portable)
        # plane_strips: stride 2, rows in words. rolling_rows: some and many outputs of a thread.
        for portable in (False, True):
            even = large._replace(stride=2, portable=portable)
            yield even._replace(shape=(25, 96, 30, 28))
            yield even._replace(shape=(4, 57, 57, 300))
        rolling = large._replace(family="rolling_rows")
        yield rolling._replace(shape=(2, 57, 30, 31))
        yield rolling
        yield rolling._replace(stride=2, transform=True)
        yield Problem(torch.float16, last, (25, 96, 30, 31), size)
        yield Problem(torch.float32, last, (25, 96, 30, 31), size, portable=True)
        yield large._replace(portable=True)
        for memory_format in FORMATS:
            # Rows of outputs that see nothing but padding, at both ends of the tensor.
            for transform in (False, True):
                shape = (2, 8, 9, 901)
                padded = Problem(torch.float16, memory_format, shape, size, transform=transform)
                yield padded._replace(extra_padding=(6, 0))
                yield padded._replace(shape=(3, 8, 11, 13), extra_padding=(9, 5))
    for dtype, stride in itertools.product(HALVES, (1, 2)):
        # diagonal: several images of a unit; columns and channels that do not divide.
        for size, shape in itertools.product(((5, 5), (7, 7)), ((5, 40, 7, 9), (2, 24, 37, 41))):
            yield Problem(dtype, last, shape, size, stride, family="diagonal")
        # plane_bands: walks of images and of segments, whole planes and strips, odd rows; pieces
        # that bulk copies write, and that do not begin at 16 bytes.
        for size, shape in itertools.product(
            ((5, 5), (7, 7)),
            ((17, 16, 7, 7), (5, 6, 14, 14), (2, 2, 37, 41), (3, 8, 28, 32), (1, 2, 9, 901)),
        ):
            banded = Problem(dtype, contiguous, shape, size, stride, family="plane_bands")
            yield banded
            yield banded._replace(transform=True)
        # toeplitz: pixels, rows of 4, 2 and 1 elements, whole planes; every number of products.
        for kernel in ((5, 5), (15, 15), (31, 31)):
            transform = stride == 2
            tall = Problem(dtype, last, (3, 24, 19, 21), kernel, stride, transform=transform)
            tall = tall._replace(family="toeplitz")
            yield tall
            yield tall._replace(dilation=2, kernel=(5, 5))
            for shape in (
                (3, 8, 7, 7),
                (2, 24, 14, 14),
                (2, 3, 33, 33),
                (2, 3, 17, 60),
                (1, 5, 50, 66),
            ):
                yield tall._replace(memory_format=contiguous, shape=shape)
    for kernel in ((3, 1), (1, 3), (3, 7), (7, 3)):
        for dtype in fast:
            yield Problem(dtype, contiguous, (2, 3, 19, 21), kernel, family="plane_strips")
    for memory_format in FORMATS:
        # What the general kernel takes.
        for dtype in (*fast, torch.float64):
            yield Problem(dtype, memory_format, (2, 3, 10, 13), (1, 11), transform=True)
            yield Problem(dtype, memory_format, (1, 57, 1, 33), (3, 3), transform=True)
            yield Problem(dtype, memory_format, (1, 5, 11, 9), (5, 5), dilation=2)
            yield Problem(dtype, memory_format, (2, 4, 7, 7), (4, 2), stride=3, multiplier=3)


def check(problem: Problem, bulk_stores: bool) -> str | None:
    """Run one problem; returns what is wrong with its result."""
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator).to(problem.dtype)

    channels = problem.shape[1]
    input = draw(*problem.shape)
    weight = draw(channels * problem.multiplier, 1, *problem.kernel)
    bias, input_bias = draw(weight.shape[0]), draw(channels)
    os.environ["DWSWAP_PORTABLE"] = str(int(problem.portable))  # both are read at each launch
    os.environ["DWSWAP_FAMILY"] = problem.family
    tensors = (place(input, problem), weight.cuda(), bias.cuda())
    geometry = ([problem.stride] * 2, problem.padding, [problem.dilation] * 2)
    absorbed: dict[str, Any] = {}
    if problem.transform:
        absorbed = {"input_bias": input_bias.cuda(), "input_activation": "relu6"}
        absorbed["activation"] = "silu"
    if not bulk_stores and kernel_family(*tensors, *geometry, *absorbed.values()) in BULK_STORES:
        os.environ["DWSWAP_PORTABLE"] = "1"
    ours = depthwise_conv2d(*tensors, *geometry, **absorbed)
    # A kernel reads the result here, so that initcheck misses no element that nobody wrote.
    result = (ours * 1).cpu().double()
    hidden = input.double()
    if problem.transform:
        hidden = F.relu6(hidden + input_bias.double()[:, None, None])
    exact = F.conv2d(
        hidden,
        weight.double(),
        bias.double(),
        problem.stride,
        problem.padding,
        problem.dilation,
        groups=channels,
    )
    exact = F.silu(exact) if problem.transform else exact
    return difference(result, exact, problem.dtype)
