"""Problems that make every family of CUDA kernels run, at every size that it is compiled for.

A family is added by its lines in ``ROWS``; sizes that its source compiles and no line covers fail a
test.
"""

from __future__ import annotations

import itertools
import math
import os
from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from cases import ACTIVATION_NAMES, MANY_RESULTS, MIN_RESULTS, Case

DEVICE = os.environ.get("DWSWAP_FUZZ_DEVICE", "cuda")
FAST = (torch.float32, torch.float16, torch.bfloat16)
HALVES = FAST[1:]
SQUARES = ((3, 3), (5, 5), (7, 7))
CLAMPS = ("none", "relu", "relu6")
# Height, width: no tile divides them; those of networks; one row; long rows.
SIZES = ((7, 7), (13, 9), (14, 14), (33, 29), (1, 23), (5, 213), (56, 57))


@dataclass(frozen=True)
class Row:
    """Problems that one family runs: each kernel, stride, number of channels and size of image."""

    family: str
    layout: str
    kernels: tuple[tuple[int, int], ...]
    strides: tuple[int, ...] = (1, 2)
    channels: tuple[int, ...] = (3, 8)
    multiplier: int = 1
    dilation: tuple[int, int] = (1, 1)
    extra_padding: tuple[int, int] = (0, 0)
    dtypes: tuple[torch.dtype, ...] = FAST
    sizes: tuple[tuple[int, int], ...] = SIZES
    least_outputs: int = MIN_RESULTS  # of every problem
    transforms_input: bool = True  # whether it covers an activation or a bias of the input
    activations: tuple[str, ...] = ACTIVATION_NAMES  # that it covers


# Problems large enough for threads of many columns.
PAIRED_STRIPS = Row(
    "plane_strips",
    "contiguous",
    SQUARES[:1],
    strides=(1,),
    channels=(57, 96),
    dtypes=HALVES,
    least_outputs=1_600_000,
)
ROWS = {
    "channel tiles": Row("channel_tiles", "channels_last", SQUARES, channels=(2, 20, 58, 72, 136)),
    "channel tiles, misaligned": Row("channel_tiles", "offset_by_pair", SQUARES, channels=(8, 58)),
    "channel tiles, padding only": Row(
        "channel_tiles", "channels_last", SQUARES, channels=(24,), extra_padding=(9, 5)
    ),
    "channel tiles, dilation": Row(
        "channel_tiles", "channels_last", SQUARES, (1,), channels=(20, 58, 72), dilation=(2, 2)
    ),
    "channel tiles, dilation, misaligned": Row(
        "channel_tiles", "offset_by_pair", SQUARES, (1,), channels=(8, 58), dilation=(2, 2)
    ),
    "channel tiles, dilation, padding only": Row(
        "channel_tiles",
        "channels_last",
        SQUARES,
        (1,),
        channels=(24,),
        dilation=(3, 3),
        extra_padding=(9, 5),
    ),
    "channel tiles, dilation of rows": Row(
        "channel_tiles", "channels_last", SQUARES, (1,), channels=(24,), dilation=(2, 1)
    ),
    "channel tiles, dilation of columns": Row(
        "channel_tiles", "channels_last", SQUARES, (1,), channels=(20,), dilation=(1, 4)
    ),
    # As many lattices as outputs in the smallest; outputs in front of which is no padding.
    "channel tiles, dilation, no padding": Row(
        "channel_tiles",
        "channels_last",
        SQUARES[:1],
        (1,),
        channels=(24, 58),
        dilation=(4, 5),
        extra_padding=(-6, -7),
        sizes=((12, 15), (14, 16), (33, 29), (13, 57)),
    ),
    # Further apart than the pixels of a box may be.
    "channel tiles, large dilation": Row(
        "channel_tiles", "channels_last", SQUARES, (1,), channels=(24,), dilation=(6, 6)
    ),
    "channel columns": Row(
        "channel_columns",
        "channels_last",
        ((3, 3),),
        channels=(8, 24, 64, 72, 136),
        dtypes=HALVES,
    ),
    "channel columns, padding only": Row(
        "channel_columns",
        "channels_last",
        ((3, 3),),
        channels=(24,),
        extra_padding=(9, 5),
        dtypes=HALVES,
    ),
    # Stride 2 in float32 is channel_direct's.
    "channel columns, float32": Row(
        "channel_columns",
        "channels_last",
        ((3, 3),),
        strides=(1,),
        channels=(8, 24, 64, 72, 136),
        dtypes=FAST[:1],
    ),
    "channel columns, float32, padding only": Row(
        "channel_columns",
        "channels_last",
        ((3, 3),),
        strides=(1,),
        channels=(24,),
        extra_padding=(9, 5),
        dtypes=FAST[:1],
    ),
    # A stride and a dilation that nothing is compiled for; 1, 2 and 4 channels of a thread.
    "points": Row(
        "points",
        "contiguous",
        SQUARES[:1],
        strides=(1, 2, 3),
        channels=(1, 3, 57),
        sizes=((1, 1), (2, 3), *SIZES),
    ),
    "points, dilation": Row("points", "contiguous", SQUARES[:1], dilation=(2, 3)),
    "points, misaligned": Row("points", "offset", SQUARES[:1]),
    "points, padding only": Row("points", "contiguous", SQUARES[:1], extra_padding=(9, 5)),
    "points of channels_last": Row(
        "points",
        "channels_last",
        SQUARES[:1],
        strides=(1, 2, 3),
        channels=(1, 2, 20, 57, 58, 136),
        sizes=((1, 1), (2, 3), *SIZES),
    ),
    "points of channels_last, dilation": Row(
        "points", "channels_last", SQUARES[:1], dilation=(2, 3)
    ),
    # float32: two pixels of a thread, whose windows share columns.
    "points of channels_last, dilation like the stride": Row(
        "points", "channels_last", SQUARES[:1], strides=(2, 4), channels=(8, 20), dilation=(3, 2)
    ),
    "points of channels_last, misaligned": Row(
        "points", "offset_channels_last", SQUARES[:1], channels=(8, 57, 58)
    ),
    "points of channels_last, aligned to a pair": Row(
        "points", "offset_by_pair", SQUARES[:1], channels=(8, 58)
    ),
    "points of channels_last, padding only": Row(
        "points", "channels_last", SQUARES[:1], channels=(24, 57), extra_padding=(9, 5)
    ),
    "points of channels_last, no padding": Row(
        "points", "channels_last", SQUARES[:1], channels=(24, 57), extra_padding=(-1, -1)
    ),
    # Accesses of 8, 4 and 2 bytes.
    "channel direct": Row(
        "channel_direct",
        "channels_last",
        ((3, 3),),
        channels=(1, 2, 20, 57, 58, 136),
        sizes=((1, 1), (2, 3), *SIZES),
    ),
    # 4 columns per thread where blocks of 2 would be more than one wave, of rows that are not wide.
    "channel direct, four columns": Row(
        "channel_direct",
        "channels_last",
        ((3, 3),),
        strides=(2,),
        channels=(136, 250),
        dtypes=FAST[:1],
        sizes=((57, 53), (33, 47), (200, 46), (27, 53)),
        least_outputs=900_000,
    ),
    "channel direct, misaligned": Row(
        "channel_direct", "offset_channels_last", ((3, 3),), channels=(8, 57, 58)
    ),
    "channel direct, aligned to a pair": Row(
        "channel_direct", "offset_by_pair", ((3, 3),), channels=(8, 58)
    ),
    "channel direct, padding only": Row(
        "channel_direct", "channels_last", ((3, 3),), channels=(24, 57), extra_padding=(9, 5)
    ),
    "channel direct, no padding": Row(
        "channel_direct", "channels_last", ((3, 3),), channels=(24, 57), extra_padding=(-1, -1)
    ),
    # Several images of a unit, several columns of units; the last group of channels not whole.
    "diagonal": Row(
        "diagonal",
        "channels_last",
        SQUARES[1:],
        channels=(8, 24, 72, 136),
        dtypes=HALVES,
        sizes=((1, 1), (7, 7), (14, 14), *SIZES),
        transforms_input=False,
    ),
    "diagonal, padding only": Row(
        "diagonal",
        "channels_last",
        SQUARES[1:],
        channels=(24,),
        extra_padding=(9, 5),
        dtypes=HALVES,
        transforms_input=False,
    ),
    "diagonal, no padding": Row(
        "diagonal",
        "channels_last",
        SQUARES[1:],
        channels=(40,),
        extra_padding=(-2, -2),
        dtypes=HALVES,
        transforms_input=False,
    ),
    # Walks of several images and of segments of one; rows that begin at odd elements.
    "plane bands": Row(
        "plane_bands",
        "contiguous",
        ((5, 5),),
        channels=(2, 8, 30, 56),
        dtypes=HALVES,
        sizes=((7, 7), (14, 14), *SIZES, (9, 5), (40, 3), (28, 28), (17, 17)),
        activations=CLAMPS,
    ),
    "plane bands, 7x7": Row(
        "plane_bands",
        "contiguous",
        ((7, 7),),
        strides=(1,),
        channels=(2, 8, 30, 56),
        dtypes=HALVES,
        sizes=((7, 7), (14, 14), *SIZES, (9, 5), (40, 3), (28, 28), (17, 17)),
        activations=CLAMPS,
    ),
    "plane bands, wide": Row(
        "plane_bands",
        "contiguous",
        ((5, 5),),
        dtypes=HALVES,
        channels=(2, 8),
        sizes=((9, 301), (150, 100), (31, 403), (112, 113)),
        activations=CLAMPS,
    ),
    "plane bands, 7x7, wide": Row(
        "plane_bands",
        "contiguous",
        ((7, 7),),
        strides=(1,),
        dtypes=HALVES,
        channels=(2, 8),
        sizes=((9, 301), (150, 100), (31, 403), (112, 113)),
        activations=CLAMPS,
    ),
    "plane bands, no padding": Row(
        "plane_bands",
        "contiguous",
        ((5, 5),),
        channels=(2, 24),
        extra_padding=(-1, -2),
        dtypes=HALVES,
        sizes=((9, 10), (30, 57), (14, 14), (13, 15)),
        activations=CLAMPS,
    ),
    # Rows of 4, 2 and 1 elements, and whole planes.
    "toeplitz": Row(
        "toeplitz",
        "contiguous",
        (*SQUARES, (9, 9), (1, 11), (31, 31)),
        channels=(3, 8, 40),
        dtypes=HALVES,
        sizes=((1, 1), (7, 7), (14, 14), *SIZES),
    ),
    "toeplitz, channels_last": Row(
        "toeplitz",
        "channels_last",
        (*SQUARES, (9, 9), (1, 11), (31, 31)),
        channels=(8, 24, 72),
        dtypes=HALVES,
        sizes=((1, 1), (7, 7), *SIZES),
    ),
    "toeplitz, dilation": Row(
        "toeplitz", "contiguous", SQUARES, channels=(3, 24), dilation=(2, 2), dtypes=HALVES
    ),
    "toeplitz, dilation of channels_last": Row(
        "toeplitz", "channels_last", SQUARES, channels=(24,), dilation=(2, 2), dtypes=HALVES
    ),
    "toeplitz, misaligned": Row("toeplitz", "offset", SQUARES, dtypes=HALVES),
    "toeplitz, padding only": Row(
        "toeplitz", "contiguous", SQUARES, extra_padding=(9, 5), dtypes=HALVES
    ),
    "toeplitz, no padding": Row(
        "toeplitz", "channels_last", SQUARES, (1, 2), (24,), extra_padding=(-1, -1), dtypes=HALVES
    ),
    "plane strips": Row(
        "plane_strips",
        "contiguous",
        SQUARES,
        channels=(1, 3, 16, 57),
        sizes=(*SIZES, (9, 5), (40, 3)),
    ),
    # Threads of pairs of columns, of which the last of a row may be moved to the left: units of
    # planes and of strips.
    "plane strips, 6 columns": replace(
        PAIRED_STRIPS, sizes=((3, 6), (9, 22), (112, 46), (112, 96), (112, 12))
    ),
    "plane strips, 8 columns": replace(PAIRED_STRIPS, sizes=((9, 8), (20, 64), (112, 64))),
    "plane strips, 10 columns": replace(
        PAIRED_STRIPS, sizes=((3, 10), (3, 18), (57, 156), (57, 300))
    ),
    "plane strips, 14 columns": replace(PAIRED_STRIPS, sizes=((9, 14), (16, 14), (33, 14))),
    # Even rows are loaded in words: units of planes and of strips.
    "plane strips, stride 2": replace(
        PAIRED_STRIPS,
        strides=(2,),
        sizes=((30, 28), (9, 30), (9, 18), (112, 46), (57, 300), (112, 112), (14, 14)),
    ),
    "plane strips, 7 columns are a row": replace(
        PAIRED_STRIPS, kernels=SQUARES, dtypes=FAST, sizes=((7, 7), (3, 7))
    ),
    # Threads that hold their rows, of forms for which they are compiled: nothing around 7 x 7 taps.
    # Those of pairs in large problems alone.
    "plane strips, many taps": replace(
        PAIRED_STRIPS,
        kernels=SQUARES[1:],
        dtypes=FAST,
        sizes=(
            (7, 7),
            (13, 28),
            (12, 20),
            (30, 56),
            (12, 300),
            (112, 28),
            (112, 112),
            (112, 156),
            (9, 9),
            (9, 230),
        ),
        transforms_input=False,
        activations=("none",),
    ),
    "plane strips, many taps, clamps": replace(
        PAIRED_STRIPS,
        kernels=SQUARES[1:2],
        dtypes=FAST,
        sizes=((7, 7), (14, 28), (12, 20), (30, 56), (12, 300), (112, 156)),
        activations=CLAMPS,
    ),
    "plane strips, held gates": replace(
        PAIRED_STRIPS,
        kernels=SQUARES[:2],
        dtypes=FAST,
        sizes=((7, 7), (14, 28), (7, 7), (12, 300)),
        activations=("hardswish", "silu"),
    ),
    "plane strips, held planes": replace(
        PAIRED_STRIPS, kernels=SQUARES[:2], dtypes=FAST, sizes=((7, 7),), activations=CLAMPS
    ),
    "plane strips, large": replace(
        PAIRED_STRIPS,
        channels=(57,),
        sizes=((21, 56), (14, 300), (56, 230), (42, 156), (7, 18)),
        least_outputs=17_000_000,
        activations=CLAMPS,
    ),
    # A block has several units, which it takes in any of their orders.
    "plane strips, many units": Row(
        "plane_strips",
        "contiguous",
        SQUARES[:2],
        channels=(57, 96),
        sizes=((14, 14), (64, 224), (72, 225), (65, 300)),
        least_outputs=20_000_000,
        activations=CLAMPS,
    ),
    # Even rows, whose windows begin at other places.
    "plane strips, pairs without padding": replace(
        PAIRED_STRIPS, extra_padding=(-1, -1), sizes=((20, 32), (9, 16), (9, 9), (57, 152))
    ),
    "plane strips, pairs without padding above": replace(
        PAIRED_STRIPS, extra_padding=(-1, 0), sizes=((20, 32), (9, 14), (112, 46))
    ),
    "plane strips, flat kernels": Row(
        "plane_strips",
        "contiguous",
        ((3, 1), (1, 3), (3, 7), (7, 3)),
        strides=(1,),
    ),
    # Strips of few rows.
    "plane strips, wide": Row("plane_strips", "contiguous", SQUARES, sizes=((9, 901), (10, 1003))),
    "plane strips, no padding": Row(
        "plane_strips", "contiguous", SQUARES, extra_padding=(-1, -1), sizes=((9, 10), (30, 113))
    ),
    "rolling rows, multiplier": Row("rolling_rows", "contiguous", SQUARES, multiplier=2),
    "rolling rows, dilation": Row("rolling_rows", "contiguous", SQUARES, dilation=(2, 2)),
    "rolling rows, misaligned": Row("rolling_rows", "offset", SQUARES),
    "rolling rows": Row("rolling_rows", "contiguous", SQUARES, sizes=((40, 3), *SIZES)),
    # Threads of some rows and columns.
    "rolling rows, a part of a GPU": Row(
        "rolling_rows",
        "contiguous",
        SQUARES,
        channels=(57, 96),
        sizes=((19, 20), (33, 31), (10, 9)),
        least_outputs=110_000,
    ),
    "rolling rows, padding only": Row("rolling_rows", "contiguous", SQUARES, extra_padding=(9, 5)),
    "general, kernels": Row("general", "contiguous", ((1, 1), (2, 2), (1, 11), (4, 3), (11, 9))),
    "general, kernels of channels_last": Row(
        "general", "channels_last", ((1, 1), (2, 2), (3, 1), (9, 9), (11, 1))
    ),
    "general, odd channels": Row("general", "channels_last", SQUARES, channels=(1, 57)),
    "general, misaligned": Row("general", "offset_channels_last", SQUARES, channels=(8, 58)),
    "general, kernels with a multiplier": Row(
        "general", "contiguous", ((3, 1), (1, 3), (3, 7), (7, 3)), multiplier=3
    ),
    "general, multiplier of channels_last": Row("general", "channels_last", SQUARES, multiplier=2),
    "general, dilation": Row("general", "channels_last", SQUARES, dilation=(2, 2)),
    "general, stride": Row("general", "contiguous", SQUARES, strides=(3,)),
    "general, strided": Row("general", "sliced", SQUARES),
    "general, strided channels_last": Row("general", "channel_sliced_channels_last", SQUARES),
    "general, float64": Row("general", "contiguous", SQUARES, dtypes=(torch.float64,)),
    "general, float64 channels_last": Row(
        "general", "channels_last", SQUARES, dtypes=(torch.float64,)
    ),
}


def problems(row: Row, dtype: torch.dtype) -> Iterator[Case]:
    """Small batches, and one image size whose batch fills a GPU; activations in turn."""
    count = 0
    for kernel, stride in itertools.product(row.kernels, row.strides):
        sides = list(zip(kernel, row.dilation, row.extra_padding, strict=True))
        padding = [apart * side // 2 + extra for side, apart, extra in sides]
        least = [
            apart * (side - 1) + 1 - 2 * p
            for (side, apart, _), p in zip(sides, padding, strict=True)
        ]
        for i, size in enumerate((*row.sizes, row.sizes[count % len(row.sizes)])):
            channels = row.channels[count % len(row.channels)]
            count += 1
            activation = row.activations[count % len(row.activations)]
            case = Case(
                dtype,
                row.layout,
                1 + count % 3,
                channels,
                max(size[0], least[0]),
                max(size[1], least[1]),
                kernel,
                (stride, stride),
                (padding[0], padding[1]),
                row.dilation,
                row.multiplier,
                bias=count % 2 == 0,
                input_bias=row.transforms_input and count % 4 == 0,
                input_activation=activation if row.transforms_input and count % 3 != 1 else "none",
                activation=activation if count % 3 != 0 else "none",
                seed=3 * count,  # bias aligned as the input is
            )
            many = i == len(row.sizes) and DEVICE != "cpu"
            outputs = math.prod(case.output_shape[1:])
            wanted = -(-(MANY_RESULTS if many else row.least_outputs) // outputs)
            yield replace(case, batch=max(case.batch or 1, wanted))
