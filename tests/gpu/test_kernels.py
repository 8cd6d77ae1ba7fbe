"""Every family of CUDA kernels, at every size that is compiled, is right and is the one that runs.

The families are chosen by shape in ``csrc/depthwise_conv2d/choice.cpp``; ``DWSWAP_FAMILY`` asks for
one, so that each runs small problems too.
"""

from __future__ import annotations

import itertools
import os
from dataclasses import replace

import pytest
import torch
from cases import Case, make_tensors
from kernel_cases import DEVICE, FAST, ROWS, Row, problems
from numerics import Judge, forward_errors, nan_in_other_places, operator

from dwswap.registration import kernel_family

pytestmark = [] if DEVICE == "cpu" else [pytest.mark.gpu]
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
    sides = (("none", "{}"), ("{}", "none"), ("{}", "{}"))[: 3 if row.transforms_input else 1]
    for before, after in sides:
        for seed, name in enumerate(row.activations):
            one = replace(
                case,
                seed=seed,
                input_bias=row.transforms_input and seed % 2 == 1,
                input_activation=before.format(name),
                activation=after.format(name),
            )
            forward_errors(one, DEVICE, judge)
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
CHOSEN = (
    ("channel_columns", Case(HALF, "channels_last", 64, 144, 56, 56, (3, 3), padding=(1, 1))),
    ("channel_direct", Case(HALF, "channels_last", 64, 58, 28, 28, (3, 3), padding=(1, 1))),
    ("points", Case(HALF, "channels_last", 1, 960, 7, 7, (3, 3), padding=(1, 1))),
    ("points", Case(HALF, "channels_last", 1, 144, 56, 56, (3, 3), padding=(1, 1))),
    ("channel_tiles", Case(HALF, "channels_last", 3, 144, 56, 56, (3, 3), padding=(1, 1))),
    (
        "channel_tiles",
        Case(HALF, "channels_last", 8, 96, 33, 33, (5, 5), padding=(4, 4), dilation=(2, 2)),
    ),
    ("diagonal", Case(HALF, "channels_last", 64, 96, 56, 56, (7, 7), padding=(3, 3))),
    ("plane_bands", Case(HALF, "contiguous", 64, 96, 56, 56, (7, 7), padding=(3, 3))),
    ("plane_strips", Case(HALF, "contiguous", 64, 144, 56, 56, (3, 3), padding=(1, 1))),
    ("points", Case(HALF, "contiguous", 1, 960, 7, 7, (3, 3), padding=(1, 1))),
    ("rolling_rows", Case(HALF, "contiguous", 8, 960, 7, 7, (3, 3), padding=(1, 1))),
    ("toeplitz", Case(HALF, "contiguous", 2, 96, 32, 32, (31, 31), padding=(15, 15))),
    (
        "toeplitz",
        Case(HALF, "contiguous", 8, 96, 33, 33, (5, 5), padding=(4, 4), dilation=(2, 2)),
    ),
    ("points", Case(HALF, "channels_last", 256, 57, 33, 33, (3, 3), (3, 3), padding=(1, 1))),
    ("general", Case(HALF, "contiguous", 1, 960, 7, 7, (4, 4), padding=(1, 1))),
)


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
    names = kernel_names([*expected, *(("", case) for _, case in CHOSEN)])
    expected += CHOSEN
    assert len(names) == len(expected)
    others = [
        f"{family}: {ran} for {case}"
        for (family, case), ran in zip(expected, names, strict=True)
        if family not in ran
    ]
    assert not others, f"{len(others)} of {len(expected)}\n" + "\n".join(others[:10])


@pytest.mark.gpu
@pytest.mark.parametrize(("family", "case"), CHOSEN)
def test_the_family_is_told(family, case, monkeypatch):
    def told(case: Case) -> str:
        given = make_tensors(case, "cuda")
        geometry = (case.stride, case.padding, case.dilation)
        return kernel_family(given.input, given.weight, given.bias, *geometry)

    monkeypatch.setenv("DWSWAP_FAMILY", "")
    assert told(case) == family
    monkeypatch.setenv("DWSWAP_FAMILY", "general")
    assert told(case) == "general"
    assert told(replace(case, dtype=torch.complex64)) == "aten"
