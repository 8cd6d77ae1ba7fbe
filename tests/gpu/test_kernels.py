"""Every family of CUDA kernels, at every size that is compiled, is right and is the one that runs.

The families are chosen by shape in ``csrc/depthwise_conv2d/choice.cpp``; ``DWSWAP_FAMILY`` asks for
one, so that each runs small problems too. A family is added here by its lines in ``ROWS``; sizes
that its source compiles and no line covers fail a test.
"""

from __future__ import annotations

import itertools
import math
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass, replace

import pytest
import torch
from cases import ACTIVATION_NAMES, MANY_RESULTS, MIN_RESULTS, Case, make_tensors
from numerics import Judge, forward_errors, nan_in_other_places, operator

from dwswap.compilation import csrc_dir
from dwswap.registration import kernel_family

DEVICE = os.environ.get("DWSWAP_FUZZ_DEVICE", "cuda")
FAST = (torch.float32, torch.float16, torch.bfloat16)
HALVES = FAST[1:]
SQUARES = ((3, 3), (5, 5), (7, 7))
# Height, width: no tile divides them; those of networks; one row; long rows.
SIZES = ((7, 7), (13, 9), (14, 14), (33, 29), (1, 23), (5, 213), (56, 57))

pytestmark = [] if DEVICE == "cpu" else [pytest.mark.gpu]


@dataclass(frozen=True)
class Row:
    """Problems that one family runs: each kernel, stride, number of channels and size of image."""

    family: str
    layout: str
    kernels: tuple[tuple[int, int], ...]
    strides: tuple[int, ...] = (1, 2)
    channels: tuple[int, ...] = (3, 8)
    multiplier: int = 1
    dilation: int = 1
    extra_padding: tuple[int, int] = (0, 0)
    dtypes: tuple[torch.dtype, ...] = FAST
    sizes: tuple[tuple[int, int], ...] = SIZES
    transforms_input: bool = True  # whether it covers an activation or a bias of the input


ROWS = {
    "channel tiles": Row("channel_tiles", "channels_last", SQUARES, channels=(2, 20, 58, 72, 136)),
    "channel tiles, misaligned": Row("channel_tiles", "offset_by_pair", SQUARES, channels=(8, 58)),
    "channel tiles, padding only": Row(
        "channel_tiles", "channels_last", SQUARES, channels=(24,), extra_padding=(9, 5)
    ),
    "channel columns": Row(
        "channel_columns", "channels_last", ((3, 3),), channels=(8, 24, 64, 72, 136)
    ),
    "channel columns, padding only": Row(
        "channel_columns", "channels_last", ((3, 3),), channels=(24,), extra_padding=(9, 5)
    ),
    # Accesses of 8, 4 and 2 bytes.
    "channel direct": Row(
        "channel_direct",
        "channels_last",
        ((3, 3),),
        channels=(1, 2, 20, 57, 58, 136),
        sizes=((1, 1), (2, 3), *SIZES),
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
        "toeplitz", "contiguous", SQUARES, channels=(3, 24), dilation=2, dtypes=HALVES
    ),
    "toeplitz, dilation of channels_last": Row(
        "toeplitz", "channels_last", SQUARES, channels=(24,), dilation=2, dtypes=HALVES
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
    "rolling rows, dilation": Row("rolling_rows", "contiguous", SQUARES, dilation=2),
    "rolling rows, misaligned": Row("rolling_rows", "offset", SQUARES),
    "rolling rows": Row("rolling_rows", "contiguous", SQUARES, sizes=((40, 3), *SIZES)),
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
    "general, dilation": Row("general", "channels_last", SQUARES, dilation=2),
    "general, stride": Row("general", "contiguous", SQUARES, strides=(3,)),
    "general, strided": Row("general", "sliced", SQUARES),
    "general, strided channels_last": Row("general", "channel_sliced_channels_last", SQUARES),
    "general, float64": Row("general", "contiguous", SQUARES, dtypes=(torch.float64,)),
    "general, float64 channels_last": Row(
        "general", "channels_last", SQUARES, dtypes=(torch.float64,)
    ),
}
each_row = pytest.mark.parametrize(
    ("row", "dtype"),
    [
        pytest.param(row, dtype, id=f"{name}-{str(dtype)[6:]}")
        for name, row in ROWS.items()
        for dtype in row.dtypes
    ],
)
# DWSWAP_PORTABLE=1 keeps new GPUs to what all have.
PORTABLE = {
    name: row
    for name, row in ROWS.items()
    if row.family in ("channel_tiles", "plane_strips") and row.dtypes == FAST
}


@pytest.fixture(autouse=True)
def _family(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if "row" in request.fixturenames:
        monkeypatch.setenv("DWSWAP_FAMILY", request.getfixturevalue("row").family)


def problems(row: Row, dtype: torch.dtype) -> Iterator[Case]:
    """Small batches, and one image size whose batch fills a GPU; activations in turn."""
    count = 0
    for kernel, stride in itertools.product(row.kernels, row.strides):
        padding = [row.dilation * side // 2 for side in kernel]
        padding = [side + extra for side, extra in zip(padding, row.extra_padding, strict=True)]
        least = [
            row.dilation * (side - 1) + 1 - 2 * p for side, p in zip(kernel, padding, strict=True)
        ]
        for i, size in enumerate((*row.sizes, row.sizes[count % len(row.sizes)])):
            channels = row.channels[count % len(row.channels)]
            count += 1
            activation = ACTIVATION_NAMES[count % len(ACTIVATION_NAMES)]
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
                (row.dilation, row.dilation),
                row.multiplier,
                bias=count % 2 == 0,
                input_bias=row.transforms_input and count % 4 == 0,
                input_activation=activation if row.transforms_input and count % 3 == 0 else "none",
                activation=activation if count % 3 == 1 else "none",
                seed=3 * count,  # bias aligned as the input is
            )
            many = i == len(row.sizes) and DEVICE != "cpu"
            outputs = math.prod(case.output_shape[1:])
            wanted = -(-(MANY_RESULTS if many else MIN_RESULTS) // outputs)
            yield replace(case, batch=max(case.batch or 1, wanted))


def check_values(row: Row, dtype: torch.dtype) -> None:
    judge = Judge()
    for i, case in enumerate(problems(row, dtype)):
        forward_errors(case, DEVICE, judge)
        if i % 32 == 31:
            judge.check()
    judge.check()


@each_row
def test_values(row, dtype):
    check_values(row, dtype)


@pytest.mark.parametrize("dtype", FAST, ids=lambda dtype: str(dtype)[6:])
@pytest.mark.parametrize("row", PORTABLE.values(), ids=PORTABLE.keys())
def test_portable_kernels(row, dtype, monkeypatch):
    monkeypatch.setenv("DWSWAP_PORTABLE", "1")
    check_values(row, dtype)
    check_nan(row, dtype)


@each_row
def test_every_activation(row, dtype):
    judge = Judge()
    case = list(problems(row, dtype))[len(row.sizes) // 2]
    for side in ("input_activation", "activation")[not row.transforms_input :]:
        for seed, name in enumerate(ACTIVATION_NAMES):
            plain = {"input_activation": "none", "activation": "none"}
            plain["input_bias"] = row.transforms_input and seed % 2 == 1
            forward_errors(replace(case, seed=seed, **{**plain, side: name}), DEVICE, judge)
    judge.check()


def check_nan(row: Row, dtype: torch.dtype) -> None:
    small = [size for size in row.sizes if size[0] * size[1] <= 200] or [(9, 15)]
    for i, (kernel, stride) in enumerate(itertools.product(row.kernels, row.strides)):
        for channels in (row.channels[0], row.channels[-1]):
            size = small[i % len(small)]
            one = replace(row, kernels=(kernel,), strides=(stride,))
            case = next(problems(replace(one, channels=(channels,), sizes=(size,)), dtype))
            assert nan_in_other_places(replace(case, activation="relu6"), DEVICE) == 0, case


@each_row
def test_nan_reaches_exactly_its_windows(row, dtype):
    """From every pixel of a small image, the borders' included; neighbours stay clean."""
    check_nan(row, dtype)


def kernel_names(runs: list[tuple[str, Case]]) -> list[str]:
    """Of our kernels, in the order of the launches; a run asks for a family, or for none."""
    activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    with torch.no_grad(), torch.profiler.profile(activities=activities) as profile:
        for family, case in runs:
            os.environ["DWSWAP_FAMILY"] = family
            operator(case, make_tensors(case, "cuda"))
        torch.cuda.synchronize()
    on_gpu = [e for e in profile.events() if e.device_type == torch.autograd.DeviceType.CUDA]
    # Our kernels have an argument list; the operator's own name has none.
    ours = [event for event in on_gpu if "dwswap::" in event.name and "(" in event.name]
    return [event.name for event in sorted(ours, key=lambda event: event.time_range.start)]


HALF = torch.float16
# What runs where nothing is asked for.
CHOSEN = {
    "channel_columns": Case(HALF, "channels_last", 64, 144, 56, 56, (3, 3), padding=(1, 1)),
    "channel_direct": Case(HALF, "channels_last", 64, 58, 28, 28, (3, 3), padding=(1, 1)),
    "channel_tiles": Case(HALF, "channels_last", 1, 144, 56, 56, (3, 3), padding=(1, 1)),
    "diagonal": Case(HALF, "channels_last", 64, 96, 56, 56, (7, 7), padding=(3, 3)),
    "plane_strips": Case(HALF, "contiguous", 64, 144, 56, 56, (3, 3), padding=(1, 1)),
    "rolling_rows": Case(HALF, "contiguous", 1, 960, 7, 7, (3, 3), padding=(1, 1)),
    "toeplitz": Case(HALF, "contiguous", 2, 96, 32, 32, (31, 31), padding=(15, 15)),
    "general": Case(HALF, "contiguous", 1, 960, 7, 7, (4, 4), padding=(1, 1)),
}


@pytest.mark.gpu
def test_the_family_is_the_one_that_runs(monkeypatch):
    expected = [
        (row.family, case)
        for row in ROWS.values()
        for dtype in row.dtypes
        for case in list(problems(row, dtype))[::5]
    ]
    monkeypatch.setenv("DWSWAP_FAMILY", "")
    case = expected[0][1]
    operator(case, make_tensors(case, "cuda"))  # loads the library
    names = kernel_names([*expected, *(("", case) for case in CHOSEN.values())])
    expected += CHOSEN.items()
    assert len(names) == len(expected)
    others = [
        f"{family}: {ran} for {case}"
        for (family, case), ran in zip(expected, names, strict=True)
        if family not in ran
    ]
    assert not others, f"{len(others)} of {len(expected)}\n" + "\n".join(others[:10])


@pytest.mark.gpu
@pytest.mark.parametrize("family", CHOSEN)
def test_the_family_is_told(family, monkeypatch):
    def told(case: Case) -> str:
        given = make_tensors(case, "cuda")
        geometry = (case.stride, case.padding, case.dilation)
        return kernel_family(given.input, given.weight, given.bias, *geometry)

    monkeypatch.setenv("DWSWAP_FAMILY", "")
    assert told(CHOSEN[family]) == family
    monkeypatch.setenv("DWSWAP_FAMILY", "general")
    assert told(CHOSEN[family]) == "general"
    assert told(replace(CHOSEN[family], dtype=torch.complex64)) == "aten"


def test_every_family_and_every_compiled_size_is_covered():
    """Sizes as the sources list them: ``X(kernel_h, kernel_w, stride)``, ``DWSWAP_CASE(K, S)``."""
    folder = csrc_dir() / "depthwise_conv2d"
    families = re.findall(r'^    \{"(\w+)", ', (folder / "choice.cpp").read_text(), re.MULTILINE)
    assert set(families) == {row.family for row in ROWS.values()}
    for family in families:
        headers = (folder / f"{family}.cuh", folder / f"{family}_cut.h")
        source = "".join(header.read_text() for header in headers if header.exists())
        found = re.findall(r"\b(?:X|DWSWAP_CASE)\((\d+(?:, \d+)+)\)", source)
        sizes = [tuple(map(int, numbers.split(", "))) for numbers in found]
        covered = {
            (*kernel, stride)
            for row in ROWS.values()
            if row.family == family
            for kernel in row.kernels
            for stride in row.strides
        }
        # Any size; 3 x 3 only.
        assert sizes or family in ("general", "toeplitz", "channel_columns", "channel_direct")
        # Square kernels are listed by their side.
        assert {size if len(size) == 3 else (size[0], *size) for size in sizes} <= covered
