"""The cut of a problem into blocks: whatever problem and GPU, it exists and can be launched.

The search is host code: nvcc compiles it with ``tests/host/cuts.cpp``, and no GPU is needed.
"""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from cases import MANY_RESULTS
from cuts_program import DEVICES, Problem, ragged, run_cuts
from kernel_cases import ROWS
from kernel_cases import problems as kernel_problems

from dwswap.bench.shapes import torchvision_shapes

STAGE_BYTES = 32 * 1024
STATIC_BYTES = {"plane_strips": 128, "plane_bands": 64}
CHUNKS, MEMORY, IN_TURN = range(3)  # orders of units of plane_strips
# Of plane_strips: whether a unit has several planes, and whether it has some rows of one.
UNITS = ((True, False), (False, True))


def fits(problem: Problem) -> bool:
    """``covers_plane_strips``: a row of output and the rows that it sees fit a stage."""
    rows = min(problem.kernel_h, problem.height)
    widest = max(rows * problem.width, problem.out_w)
    return problem.out_h > 0 and widest * problem.element_bytes <= STAGE_BYTES


def test_plane_strips_can_always_be_launched(cuts):
    problems = [problem for problem in ragged(800) if fits(problem)]
    problems += [
        Problem(64, s.channels, s.height, s.width, *s.kernel, s.stride[0], element_bytes)
        for s, element_bytes in itertools.product(torchvision_shapes(), (2, 4))
    ]
    runs = list(itertools.product(problems, DEVICES))
    for (problem, device), cut in zip(runs, cuts("plane_strips", runs), strict=True):
        columns, holds, planes, rows, lanes, groups, *memory, order, _ = cut
        stages, buffers, in_bytes, out_bytes, shared = memory
        what = f"{problem} on {device}: {cut}"
        if holds:
            plane = (problem.height, problem.width, columns) == (7, 7, 7)
            assert problem.stride == 1, what
            assert problem.kernel_h == problem.kernel_w, what
            assert -(-rows // groups) <= 7, what
            assert not plane or (rows, groups) == (7, 1), what
            if problem.kernel_h == 3:
                assert problem.element_bytes == 2, what
                assert plane or columns in (8, 10), what
            else:
                assert columns == 7, what
        if columns not in (1, 7):
            assert columns in (6, 8, 10, 14), what
            assert problem.element_bytes == 2, what
            assert (problem.kernel_h, problem.kernel_w, problem.stride) == (3, 3, 1), what
            assert problem.width % (columns if columns in (8, 14) else 2) == 0, what
            assert columns != 14 or problem.width == 14, what
        assert 1 <= planes <= problem.channels, what
        assert 1 <= groups <= rows <= problem.out_h, what
        assert planes == 1 or rows == problem.out_h, what
        assert problem.out_w >= columns, what
        assert 1 <= lanes <= -(-problem.out_w // columns), what
        assert planes * groups * lanes <= (128 if columns % 2 == 0 else 256), what
        assert (stages, buffers) in ((1, 1), (2, 1), (2, 2)), what
        assert 0 < in_bytes <= STAGE_BYTES, what
        assert 0 < out_bytes <= STAGE_BYTES, what
        assert shared + STATIC_BYTES["plane_strips"] <= device[2], what
        few_taps = problem.kernel_h * problem.kernel_w <= 9
        shares_lines = rows < problem.out_h and out_bytes % 128 != 0
        assert order == (CHUNKS if not few_taps else MEMORY if shares_lines else IN_TURN), what


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_kernel_cases_have_every_order_of_units(cuts, dtype):
    """On an H200; a block of theirs has several units."""
    found = set()
    problems = [
        Problem(
            case.batch or 1, *case.input_shape[-3:], *case.kernel, case.stride[0], dtype.itemsize
        )
        for case in kernel_problems(ROWS["plane strips, many units"], dtype)
    ]
    chosen = cuts("plane_strips", [(problem, DEVICES[0]) for problem in problems])
    for problem, cut in zip(problems, chosen, strict=True):
        _, _, planes, rows, lanes, groups, *_, shared, order, _ = cut
        multiprocessors, memory, _ = DEVICES[0]
        warps = -(-planes * lanes * groups // 32)
        held = shared + STATIC_BYTES["plane_strips"] + 1024
        resident = min(32, 64 // warps, memory // held)
        strips = -(-problem.out_h // rows)
        units = problem.batch * -(-problem.channels // planes) * strips
        if units >= 2 * multiprocessors * resident:
            found.add((order, planes > 1, strips > 1))
    assert found >= {
        *((order, *unit) for order in (CHUNKS, IN_TURN) for unit in UNITS),
        (MEMORY, False, True),
    }


def test_kernel_cases_have_every_thread_of_plane_strips(cuts):
    """On an H200; small problems have threads of one column."""
    found = set()
    names = {f"{columns} columns": columns for columns in (6, 8, 10, 14)}
    for name, columns in {**names, "7 columns are a row": 7, "stride 2": 7}.items():
        problems = [
            Problem(case.batch or 1, *case.input_shape[-3:], *case.kernel, case.stride[0], 2)
            for case in kernel_problems(ROWS[f"plane strips, {name}"], torch.float16)
        ]
        chosen = cuts("plane_strips", [(problem, DEVICES[0]) for problem in problems])
        for problem, (picked, _, planes, rows, *_) in zip(problems, chosen, strict=True):
            assert picked == columns, problem
            assert problem.stride == 1 or problem.width % 2 == 0, problem
            ragged_row = problem.out_w % columns != 0
            found.add((columns, problem.stride, ragged_row, planes > 1, rows < problem.out_h))
    # Columns, stride; whether the last threads of a row are moved; units of planes, and of strips.
    both = (False, True)
    assert found >= {
        *((6, 1, last, several, strips) for last in both for several, strips in UNITS),
        *((8, 1, False, *unit) for unit in UNITS),
        *((10, 1, last, *unit) for last in both for unit in UNITS),
        (7, 1, False, True, False),
        *((7, 2, last, *unit) for last in both for unit in UNITS),
        (14, 1, False, True, False),
    }


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_kernel_cases_have_threads_of_plane_strips_that_hold_their_rows(cuts, dtype):
    """On an H200; all cases have activations for which such threads are compiled."""
    found, uneven, half = set(), set(), dtype == torch.float16
    walks = set()
    for name in ("many taps", "held planes", *(["large"] if half else [])):
        problems = [
            Problem(case.batch or 1, *case.input_shape[-3:], *case.kernel, 1, dtype.itemsize)
            for case in kernel_problems(ROWS[f"plane strips, {name}"], dtype)
        ]
        chosen = cuts("plane_strips", [(problem, DEVICES[0]) for problem in problems])
        for problem, cut in zip(problems, chosen, strict=True):
            columns, holds, planes, rows, _, groups, *_ = cut
            kernel = problem.kernel_h
            if not holds:
                walks.add((kernel, columns))
                continue
            whole = problem.height == problem.width == columns
            found.add((kernel, columns, whole, planes > 1, rows < problem.out_h))
            uneven.add((kernel, problem.out_w % columns != 0, rows % -(-rows // groups) != 0))
    # Kernel, columns; whether a thread has a plane of them; units of planes, and of strips.
    assert found >= {
        *((kernel, 7, True, True, False) for kernel in (5, 7)),
        *((kernel, 7, False, *unit) for kernel in (5, 7) for unit in UNITS),
    }
    if half:
        units = ((8, True, False), (10, True, False), (10, False, False), (10, False, True))
        assert found >= {(3, 7, True, True, False)}
        assert found >= {(3, columns, False, *unit) for columns, *unit in units}
    # The last threads of a row are moved; those at the end of a unit have fewer rows.
    assert {kernel for kernel, moved, _ in uneven if moved} >= {5, 7}
    assert {kernel for kernel, _, fewer in uneven if fewer} >= {5, 7}
    assert walks >= {(5, 7), (7, 7)}


def test_kernel_cases_have_four_columns_of_channel_direct(cuts):
    """On an H200, for float32 with stride 2: all but the one whose batch fills it."""
    row = ROWS["channel direct, four columns"]
    problems = [
        Problem(case.batch or 1, *case.input_shape[-3:], *case.kernel, case.stride[0], 4)
        for case in kernel_problems(row, torch.float32)
    ]
    chosen = cuts("channel_direct", [(problem, DEVICES[0]) for problem in problems])
    columns = [columns for _, columns, *_ in chosen]
    assert columns[: len(row.sizes)] == [4] * len(row.sizes)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_kernel_cases_have_every_cut_of_rolling_rows(cuts, dtype):
    """On an H200: rows and columns of a thread, by kernel and stride."""
    problems, half = [], dtype == torch.float16
    for name in ("rolling rows", "rolling rows, a part of a GPU"):
        for case in kernel_problems(ROWS[name], dtype):
            shape = (*case.input_shape[-3:], *case.kernel, case.stride[0], dtype.itemsize)
            # One of the sizes has such a batch, but where the cases are for the CPU.
            full = -(-MANY_RESULTS // math.prod(case.output_shape[-3:]))
            problems += [Problem(case.batch or 1, *shape), Problem(full, *shape)]
    chosen = cuts("rolling_rows", [(problem, DEVICES[0]) for problem in problems])
    found = {
        (problem.kernel_h, problem.stride, rows, columns)
        for problem, (rows, columns, _) in zip(problems, chosen, strict=True)
    }
    assert found == {
        *((3, 1, *cut) for cut in ((1, 1), (3 if half else 4, 2), (8, 2))),
        *((3, 2, *cut) for cut in ((1, 2), (4, 1))),
        *((5, 1, *cut) for cut in ((1, 1), (3, 2), (6, 2))),
        *(((5, 1, 4, 1),) if half else ()),
        *((5, 2, *cut) for cut in ((2, 1), (4, 2 if half else 1))),
        *((7, 1, *cut) for cut in ((1, 1), (4, 1))),
        *((7, 2, *cut) for cut in ((1, 1), (2, 1))),
    }


def test_plane_bands_can_always_be_launched(cuts):
    """Wherever a row of output and the rows that it sees fit a block, and elsewhere says so."""
    squares = [problem for problem in ragged(600) if problem.kernel_h == problem.kernel_w > 3]
    problems = [problem for problem in squares if problem.out_h > 0 and problem.out_w > 0]
    problems += [
        Problem(batch, s.channels, s.height, s.width, *s.kernel, s.stride[0], 2)
        for s, batch in itertools.product(torchvision_shapes(), (1, 3, 64))
        if s.kernel[0] > 3
    ]
    runs = list(itertools.product(problems, DEVICES))
    for (problem, device), cut in zip(runs, cuts("plane_bands", runs), strict=True):
        images, segments, planes, rows, segment_rows, warps, in_pitch, out_pitch, shared, _ = cut
        what = f"{problem} on {device}: {cut}"
        if rows == 0:
            assert 2 * (problem.kernel_h * problem.width + problem.out_w) * 2 > device[2] // 2, what
            continue
        assert images * segments == 16, what
        assert images < 2 * problem.batch, what
        assert 1 <= planes <= problem.channels, what
        assert 1 <= rows <= problem.out_h, what
        assert planes == 1 or rows == problem.out_h, what
        assert segment_rows * segments >= rows, what
        odd_rows = problem.width * problem.stride % 2 or problem.out_w % 2
        assert segments == 1 or not odd_rows or segment_rows % 2 == 0, what
        assert 1 <= warps <= 8, what
        seen = min((rows - 1) * problem.stride + problem.kernel_h, problem.height)
        assert in_pitch % 16 == out_pitch % 16 == 0, what
        assert in_pitch >= planes * seen * problem.width * 2 + 14, what
        assert out_pitch >= planes * rows * problem.out_w * 2 + 14, what
        assert shared + STATIC_BYTES["plane_bands"] <= device[2], what


def test_channel_columns_can_always_be_launched(cuts):
    problems = [
        problem._replace(kernel_h=3, kernel_w=3, channels=16 // problem.element_bytes * multiple)
        for problem, multiple in itertools.product(ragged(100), (1, 3, 7, 18, 120))
    ]
    runs = list(itertools.product(problems, DEVICES[:1]))
    for (problem, _), cut in zip(runs, cuts("channel_columns", runs), strict=True):
        columns, pairs, groups, rows, stages, _ = cut
        what = f"{problem}: {cut}"
        tile_w = (groups * columns - 1) * problem.stride + 3
        chunk_rows = -(-3 // problem.stride) * problem.stride
        assert columns in (4, 7), what
        assert 1 <= 2 * pairs <= problem.channels, what
        assert 2 * pairs * problem.element_bytes % 16 == 0, what
        assert 1 <= pairs * groups <= 128, what
        assert max(2 * pairs, tile_w) <= 256, what  # of a box, along any axis
        assert 1 <= rows <= problem.out_h, what
        assert 2 <= stages <= 4, what
        assert stages * chunk_rows * tile_w * 2 * pairs * problem.element_bytes <= 96 * 1024, what


def test_channel_tiles_can_always_be_launched(cuts):
    problems = [
        problem._replace(kernel_w=problem.kernel_h, channels=problem.channels * 2)
        for problem in ragged(400)
        if problem.kernel_h != 1
    ]
    runs = list(itertools.product(problems, DEVICES))
    for (problem, device), cut in zip(runs, cuts("channel_tiles", runs), strict=True):
        pairs, groups_w, groups_h, rows, microseconds = cut
        what = f"{problem} on {device}: {cut}"
        assert 1 <= pairs <= problem.channels // 2, what
        assert 1 <= groups_w <= min(8, -(-problem.out_w // 7)), what
        assert 1 <= groups_h <= min(8, -(-problem.out_h // rows)), what
        assert pairs * groups_w * groups_h <= 128, what
        width = (groups_w * 7 - 1) * problem.stride + problem.kernel_w
        height = (groups_h * rows - 1) * problem.stride + problem.kernel_h
        taps = problem.kernel_h * problem.kernel_w
        assert max(2 * pairs, width, height) <= 256, what  # of a box, along any axis
        assert 2 * pairs * problem.element_bytes * (width * height + taps) <= 40960, what
        assert microseconds < 2000, what


def test_channel_direct_can_always_be_launched(cuts):
    problems = [problem._replace(kernel_h=3, kernel_w=3) for problem in ragged(300)]
    runs = list(itertools.product(problems, DEVICES))
    for (problem, device), cut in zip(runs, cuts("channel_direct", runs), strict=True):
        channels, columns, rows, threads, _ = cut
        what = f"{problem} on {device}: {cut}"
        assert channels in (1, 2), what
        wide = channels == 2 and problem.element_bytes == 4
        assert columns == 4 // problem.stride or (wide and columns == 4), what
        assert problem.channels % channels == 0, what
        assert 1 <= rows <= problem.out_h, what
        strips = -(-problem.out_h // rows) * -(-problem.out_w // columns)
        assert threads == problem.batch * problem.channels // channels * strips, what


def test_channel_direct_makes_many_threads_of_small_problems(cuts):
    tiny = Problem(64, 128, 2, 2, 3, 3, 1, 4)
    large = Problem(64, 144, 112, 112, 3, 3, 2, 4)
    odd = Problem(64, 57, 56, 56, 3, 3, 1, 2)
    runs = [(problem, DEVICES[0]) for problem in (tiny, large, odd)]
    small_cut, large_cut, odd_cut = cuts("channel_direct", runs)
    assert small_cut[0] == small_cut[2] == 1
    assert large_cut[0] == 2
    assert large_cut[2] >= 4
    assert odd_cut[0] == 1


def test_channel_direct_fills_the_last_wave_of_strided_floats(cuts):
    # On 132 multiprocessors 464 blocks of 4 columns are one wave; the 704 of more channels would be
    # two, of which the second is not even half.
    one_wave = Problem(64, 116, 28, 28, 3, 3, 2, 4)
    more_channels = Problem(64, 176, 28, 28, 3, 3, 2, 4)
    runs = [(problem, DEVICES[0]) for problem in (one_wave, more_channels)]
    (_, *whole, _), (_, *more, _) = cuts("channel_direct", runs)
    assert whole == [4, 4, 464 * 128]
    assert more[:2] == [2, 3]


def test_toeplitz_can_always_be_launched(cuts):
    """Both layouts: of elements of 2 bytes channels_last, else NCHW."""
    sizes = [(7, 7), (15, 15), (31, 31), (1, 31), (31, 1)]
    problems = list(ragged(100))
    problems += [
        problem._replace(kernel_h=size[0], kernel_w=size[1], channels=8 * problem.channels)
        for problem, size in itertools.product(ragged(30), sizes)
    ]
    runs = list(itertools.product(problems, DEVICES))
    for (problem, device), cut in zip(runs, cuts("toeplitz", runs), strict=True):
        steps, tiles, channels, images, rows, in_rows, threads, shared, microseconds = cut
        what = f"{problem} on {device}: {cut}"
        assert rows >= 1, what
        assert steps in (1, 2, 3), what
        assert tiles in (1, 2, 4, 7), what
        assert channels in (8, 16, 32, 64), what
        assert 1 <= images <= problem.batch, what
        assert images == 1 or rows == problem.out_h, what
        assert in_rows == (rows - 1) * problem.stride + problem.kernel_h, what
        assert threads in (128, 256), what
        assert 0 < shared <= device[2], what
        assert microseconds < 500_000, what


@pytest.mark.parametrize("height", [200_000, 2**31 - 17])
def test_the_search_is_short_on_tall_images(cuts, height):
    problem = Problem(1, 1, height, 1, 3, 1, 1, 4)
    ((*_, microseconds),) = cuts("plane_strips", [(problem, DEVICES[0])])
    assert microseconds < 500_000


def test_a_row_that_fills_a_stage(cuts):
    problem = Problem(2, 3, 1000, 16000, 1, 3, 1, 2)
    assert fits(problem)
    ((_, _, planes, rows, *_),) = cuts("plane_strips", [(problem, DEVICES[2])])
    assert (planes, rows) == (1, 1)


def test_diagonal_has_every_pixel_and_channel(cuts):
    problems = [
        Problem(batch, s.channels, s.height, s.width, *s.kernel, s.stride[0], 2)
        for s in torchvision_shapes()
        for batch in (1, 64)
        if s.channels % 8 == 0 and s.kernel[0] in (5, 7) and s.dilation == (1, 1)
    ]
    problems += [
        problem._replace(channels=channels)
        for problem in ragged(4000)
        for channels in (8, 72, 136, 200, 1632, 16384)
        if problem.kernel_h == problem.kernel_w != 3
    ]
    runs = [(problem, DEVICES[0]) for problem in problems]  # on sm_90 alone
    times: list[int] = []
    for (problem, device), cut in zip(runs, cuts("diagonal", runs), strict=True):
        teams, columns, images, rows, stages, units, chunks, parts, seen, shared, us = cut
        what = f"{problem}: {cut}"
        assert 1 <= teams <= 4, what
        assert columns * images <= teams * (16 if problem.kernel_h == 7 else 32), what
        # Boxes of the copy engine, of rows of whole lines of shared memory.
        needed = (columns - 1) * problem.stride + problem.kernel_w
        assert seen % 2 == 0 <= seen - needed < 2, what
        rows_seen = (problem.kernel_h - 1) // problem.stride + 1
        assert max(seen, rows_seen * problem.stride, images) <= 256, what
        assert shared <= device[2], what
        assert images <= problem.batch, what
        assert images == 1 or columns == problem.out_w, what
        # Every row of output leaves in a stage of its unit.
        assert stages * rows_seen >= rows + rows_seen - 1, what
        tiles, strips = -(-problem.out_w // columns), -(-problem.out_h // rows)
        assert units == tiles * strips * -(-problem.batch // images), what
        assert (chunks - 1) * 32 < problem.channels <= chunks * 32, what
        assert 1 <= parts <= units, what
        # Blocks run at once, where every chunk can have one.
        at_once = device[0] * min(4 // teams, device[1] // (shared + 1024))
        assert parts == 1 or chunks * parts <= at_once, what
        times.append(us)
    assert sorted(times)[len(times) // 2] < 100


@pytest.mark.parametrize(
    ("family", "kernel"),
    [
        pytest.param("plane_strips", 3, marks=pytest.mark.slow),
        ("plane_bands", 5),
        ("channel_columns", 3),
        ("channel_tiles", 5),
        ("diagonal", 5),
        ("column_sums", 3),
        ("diagonal_sums", 5),
        ("toeplitz", 31),
    ],
)
def test_other_cuts_than_the_best_can_be_measured(cuts, cuts_compiler, family, kernel):
    """What ``scripts/explore_cuts.py`` runs: rank 0 is what the library takes."""
    problem = Problem(64, 240, 56, 56, kernel, kernel, 1, 2)
    (chosen,) = cuts(family, [(problem, DEVICES[0])])
    explored = cuts_compiler("-DDWSWAP_EXPLORE")
    runs = [(family, *problem, *DEVICES[0])]
    ranked = [tuple(run_cuts(explored, runs, rank)[0][:-1]) for rank in (0, 1, 2, 3, 10**6)]
    assert list(ranked[0]) == chosen[:-1]
    assert len(set(ranked)) > 2
    assert ranked[-1] != ranked[0]
