"""The cut of a problem into blocks: whatever problem and GPU, it exists and can be launched.

The search is host code: nvcc compiles it with ``tests/host/cuts.cpp``, and no GPU is needed.
"""

from __future__ import annotations

import functools
import itertools
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import pytest
from cuts_program import compile_cuts, run_cuts

from dwswap.bench.shapes import torchvision_shapes
from dwswap.separable import Cut, choose_cut, shared_bytes
from dwswap.toolkit import BuildError

STAGE_BYTES = 32 * 1024
STATIC_BYTES = 64
# Multiprocessors, bytes of shared memory of each and of a block: H200, A100, RTX 4090, a small GPU.
DEVICES = ((132, 233472, 232448), (108, 167936, 166912), (128, 102400, 101376), (6, 102400, 101376))


class Problem(NamedTuple):
    batch: int
    channels: int
    height: int
    width: int
    kernel_h: int
    kernel_w: int
    stride: int
    element_bytes: int

    @property
    def out_h(self) -> int:
        return (self.height + self.kernel_h // 2 * 2 - self.kernel_h) // self.stride + 1

    @property
    def out_w(self) -> int:
        return (self.width + self.kernel_w // 2 * 2 - self.kernel_w) // self.stride + 1


Cuts = Callable[[str, list[tuple[Problem, tuple[int, int, int]]]], list[list[int]]]


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Compiles the program once per set of flags."""
    folder = tmp_path_factory.mktemp("cuts")

    @functools.cache
    def program(*flags: str) -> Path:
        path = folder / f"cuts{''.join(flags)}"
        try:
            compile_cuts(path, *flags)
        except BuildError as error:
            pytest.skip(f"needs nvcc: {error}")
        return path

    return program


@pytest.fixture(scope="module")
def cuts(compiled) -> Cuts:
    program = compiled()

    def run(family: str, problems: list[tuple[Problem, tuple[int, int, int]]]) -> list[list[int]]:
        return run_cuts(program, [(family, *problem, *device) for problem, device in problems])

    return run


def fits(problem: Problem) -> bool:
    """``covers_plane_strips``: a row of output and the rows that it sees fit a stage."""
    rows = min(problem.kernel_h, problem.height)
    widest = max(rows * problem.width, problem.out_w)
    return problem.out_h > 0 and widest * problem.element_bytes <= STAGE_BYTES


def ragged(count: int) -> Iterator[Problem]:
    rng = random.Random(0)
    sizes = (1, 2, 3, 5, 7, 8, 9, 14, 15, 19, 28, 33, 56, 57, 112, 213, 600, 1003, 2000, 16000)
    kernels = ((3, 3), (5, 5), (7, 7), (3, 1), (1, 3), (3, 7), (7, 3))
    for _ in range(count):
        kernel = rng.choice(kernels)
        stride = rng.choice((1, 2)) if kernel[0] == kernel[1] else 1
        yield Problem(
            rng.choice((1, 2, 3, 64, 256)),
            rng.choice((1, 2, 3, 16, 57, 58, 144, 960, 4000)),
            rng.choice(sizes),
            rng.choice(sizes),
            *kernel,
            stride,
            rng.choice((2, 4)),
        )


def test_plane_strips_can_always_be_launched(cuts):
    problems = [problem for problem in ragged(800) if fits(problem)]
    problems += [
        Problem(64, s.channels, s.height, s.width, *s.kernel, s.stride[0], element_bytes)
        for s, element_bytes in itertools.product(torchvision_shapes(), (2, 4))
    ]
    runs = list(itertools.product(problems, DEVICES))
    for (problem, device), cut in zip(runs, cuts("plane_strips", runs), strict=True):
        wide, planes, rows, lanes, groups, stages, buffers, in_bytes, out_bytes, shared, _ = cut
        what = f"{problem} on {device}: {cut}"
        columns = 7 if wide else 1
        assert 1 <= planes <= problem.channels, what
        assert 1 <= groups <= rows <= problem.out_h, what
        assert planes == 1 or rows == problem.out_h, what
        assert not wide or problem.out_w >= columns, what
        assert 1 <= lanes <= -(-problem.out_w // columns), what
        assert planes * groups * lanes <= 256, what
        assert (stages, buffers) in ((1, 1), (2, 1), (2, 2)), what
        assert 0 < in_bytes <= STAGE_BYTES, what
        assert 0 < out_bytes <= STAGE_BYTES, what
        assert shared + STATIC_BYTES <= device[2], what


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
        assert shared + STATIC_BYTES <= device[2], what


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
    ((_, planes, rows, *_),) = cuts("plane_strips", [(problem, DEVICES[2])])
    assert (planes, rows) == (1, 1)


def test_squeeze_excitation_can_always_be_launched(cuts):
    """Of ``Problem``, kernel_h is the number of hidden units; stride 1 stands for channels_last."""
    problems = [
        problem._replace(kernel_h=hidden, batch=problem.batch * batch, stride=stride)
        for problem, (hidden, batch), stride in itertools.product(
            ragged(300), ((1, 1), (48, 1), (1024, 7), (4, 5000)), (1, 2)
        )
        if problem.height * problem.width * problem.channels < 2**30
    ]
    runs = list(itertools.product(problems, DEVICES))
    for (problem, device), cut in zip(runs, cuts("squeeze_excitation", runs), strict=True):
        covered, slice_, slices, chunk, chunks, samples, lanes, wide, wide_weights, _ = cut
        what = f"{problem} on {device}: {cut}"
        pixels, elements = problem.height * problem.width, 16 // problem.element_bytes
        assert covered, what
        assert 1 <= slice_ <= 64, what
        assert slice_ * (slices - 1) < problem.channels <= slice_ * slices, what
        assert chunk * (chunks - 1) < pixels <= chunk * chunks, what
        assert 1 <= chunks <= 256, what
        assert samples >= 1, what
        assert -(-problem.batch // samples) <= 65535, what
        channels_last = problem.stride == 1
        assert wide == ((problem.channels if channels_last else pixels) % elements == 0), what
        if channels_last:
            assert slice_ % (elements if wide else 1) == 0, what
        else:
            assert slice_ * lanes <= 256, what
            assert lanes in (8, 32), what
            assert chunk % (elements if wide else 1) == 0, what
        assert not wide_weights or problem.channels % elements == slice_ % elements == 0, what


def test_squeeze_excitation_fills_the_gpu(cuts):
    """With one sample there are blocks along the pixels; with many, blocks of several samples."""
    one = Problem(1, 32, 112, 112, 8, 1, 1, 2)
    many = Problem(256, 1152, 7, 7, 48, 1, 1, 2)
    runs = [(problem, DEVICES[0]) for problem in (one, many)]
    for (problem, _), cut in zip(runs, cuts("squeeze_excitation", runs), strict=True):
        _, _, slices, _, chunks, samples, *_ = cut
        assert slices * chunks * -(-problem.batch // samples) >= 49
        assert (samples > 1) == (problem is many)


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize(
    ("batch", "channels", "side", "hidden", "products"),
    [
        (1, 1152, 7, 48, False),
        (1, 960, 7, 240, False),
        (4, 4096, 7, 1024, True),
        (4, 4096, 64, 1024, False),  # too few warps for such planes
        (256, 96, 56, 4, False),
        (256, 1152, 7, 48, True),
        (256, 672, 14, 168, True),
        (512, 696, 28, 174, True),
    ],
)
def test_layers_of_many_samples_are_matrix_products(
    cuts, batch, channels, side, hidden, products, stride
):
    problem = Problem(batch, channels, side, side, hidden, 1, stride, 2)
    ((*_, chosen),) = cuts("squeeze_excitation", [(problem, DEVICES[0])])
    assert chosen == products


def test_stem_conv2d_covers_every_output(cuts):
    sizes = (1, 2, 15, 16, 31, 32, 33, 64, 224, 257, 300, 1037, 4001)
    problems = [
        Problem(batch, 32, height, width, 3, 3, 2, 2)
        for batch, height, width in itertools.product((1, 2, 33, 256), sizes, sizes)
    ]
    runs = list(itertools.product(problems, DEVICES))
    for (problem, device), cut in zip(runs, cuts("stem_conv2d", runs), strict=True):
        rows, tiles, groups, pieces, units = cut
        what = f"{problem} on {device}: {cut}"
        assert 1 <= rows <= 4, what
        assert 1 <= tiles <= 8, what
        assert (groups - 1) * rows < problem.out_h <= groups * rows, what
        assert (pieces - 1) * tiles * 16 < problem.out_w <= pieces * tiles * 16, what
        assert units == problem.batch * groups * pieces, what
        # Units are small before multiprocessors have none.
        assert rows == 1 or units >= 2 * device[0], what
        assert units >= 2 * device[0] or tiles <= 4, what
    # The networks' own: one image, and many.
    one, many = (
        cuts("stem_conv2d", [(Problem(batch, 32, 224, 224, 3, 3, 2, 2), DEVICES[0])])[0]
        for batch in (1, 256)
    )
    assert one[:2] == [1, 4]
    assert many[:2] == [4, 7]


def test_batch_norm_covers_every_value(cuts):
    sizes = ((1, 1), (1, 2), (3, 5), (7, 7), (14, 14), (9, 16), (28, 28), (33, 31), (112, 112))
    channels = (1, 3, 8, 20, 24, 57, 58, 72, 96, 116, 144, 160, 576, 960, 1280, 2500, 4104)
    problems = [
        Problem(batch, c, *size, 1, 1, stride, element_bytes)
        for batch, c, size, stride, element_bytes in itertools.product(
            (1, 2, 33, 256), channels, sizes, (1, 2), (2, 4)
        )
    ]
    runs = list(itertools.product(problems, DEVICES))
    times: list[int] = []
    for (problem, device), cut in zip(runs, cuts("batch_norm", runs), strict=True):
        matrix, vector, columns, of_channel, lanes, rows, chunks, splits, positions, us = cut
        what = f"{problem} on {device}: {cut}"
        pixels = problem.height * problem.width
        assert vector * problem.element_bytes in (16, 8, problem.element_bytes), what
        assert min(lanes, rows) >= 1, what
        assert lanes * rows <= 256, what
        assert columns == problem.channels * of_channel, what
        if matrix:
            assert columns % vector == 0, what
            assert (chunks - 1) * lanes * vector < columns <= chunks * lanes * vector, what
            assert columns * positions == problem.batch * problem.channels * pixels, what
            # A vector has columns of two channels at most.
            assert of_channel == 1 or of_channel == pixels >= vector, what
        else:
            assert (lanes, chunks, of_channel) == (1, problem.channels, 1), what
            assert pixels % vector == 0, what
            assert positions * vector == problem.batch * pixels, what
        # Of a grid, in y; no block without a position, and few where they would have many.
        assert 1 <= splits <= 65535, what
        assert splits == 1 or (splits - 1) * rows < positions, what
        assert chunks * splits >= 3 * device[0] or splits * rows * 4 >= positions, what
        times.append(us)
    assert sorted(times)[len(times) // 2] < 100


def test_channel_scale_covers_every_value(cuts):
    sizes = ((1, 1), (1, 2), (3, 5), (7, 7), (14, 14), (9, 16), (28, 28), (33, 31), (112, 112))
    channels = (1, 3, 8, 20, 32, 57, 58, 72, 96, 144, 240, 576, 672, 1152, 2500, 4104)
    problems = [
        Problem(batch, c, *size, kernel, 1, stride, element_bytes)
        for batch, c, size, kernel, stride, element_bytes in itertools.product(
            (1, 2, 33, 256, 100000), channels, sizes, (1, 2), (1, 2), (2, 4)
        )
        if batch < 1000 or size[0] < 3 > c
    ]
    runs = list(itertools.product(problems, DEVICES))
    times: list[int] = []
    for (problem, device), cut in zip(runs, cuts("channel_scale", runs), strict=True):
        vector, lanes, rows, groups, chunks, splits, positions, span, units, us = cut
        what = f"{problem} on {device}: {cut}"
        pixels, last = problem.height * problem.width, problem.stride == 1
        assert vector * problem.element_bytes in (16, 8, problem.element_bytes), what
        assert min(lanes, rows, groups, chunks, splits, span) >= 1, what
        assert lanes * rows * groups <= 256 < lanes * rows * (groups + 1), what
        # All channels, and no chunk without one.
        if last:
            assert problem.channels % vector == 0, what
            vectors = problem.channels // vector
            assert (chunks - 1) * lanes < vectors <= chunks * lanes, what
            assert positions == pixels, what
        else:
            assert (lanes, chunks, positions * vector) == (1, 1, pixels), what
        # All positions, and no split without one.
        assert (splits - 1) * span < positions <= splits * span, what
        assert units == problem.batch * (chunks if last else problem.channels) * splits, what
        assert units < 1 << 31, what
        # Loads enough for a thread, where there are positions enough.
        assert splits == 1 or span >= rows, what
        times.append(us)
    assert sorted(times)[len(times) // 2] < 100


def products_of_sums(*channels: int) -> list[tuple[Problem, tuple[int, int, int]]]:
    """Gradients of the weight that the tensor cores may have, on sm_90 alone.

    Args:
        channels: of the ragged ones.
    """
    problems = [
        Problem(64, s.channels, s.height, s.width, *s.kernel, s.stride[0], 2)
        for s in torchvision_shapes()
        if s.channels % 8 == 0 and s.kernel[0] in (3, 5, 7) and s.dilation == (1, 1)
    ]
    problems += [
        problem._replace(channels=count)
        for problem in ragged(4000)
        for count in channels
        if problem.kernel_h == problem.kernel_w
    ]
    return [(problem, DEVICES[0]) for problem in problems]


def test_diagonal_sums_has_every_pixel_and_channel(cuts):
    runs = products_of_sums(8, 72, 136, 200, 1632)
    times: list[int] = []
    for (problem, device), cut in zip(runs, cuts("diagonal_sums", runs), strict=True):
        groups, teams, box, swizzle, columns, images, rows, seen, threads, shared, *split = cut
        strip, share, shares, us = split
        what = f"{problem}: {cut}"
        kernel = problem.kernel_h
        # A team has 32 pixels, and every team some; registers are for so many warps.
        assert 32 * (teams - 1) < columns * images <= 32 * teams, what
        assert threads == 32 * groups * teams, what
        assert threads <= 32 * {3: 24, 5: 16, 7: 12}[kernel], what
        assert groups % box == 0, what
        # Neighbouring pixels in different banks.
        assert swizzle == {2: 0x10, 4: 0x30, 8: 0x70}[box] if box % 2 == 0 else swizzle == 0, what
        assert shared <= device[2], what
        assert max(seen, rows * problem.stride, images) <= 256, what
        assert images <= problem.batch, what
        assert images == 1 or columns == problem.out_w, what
        tiles, strips = -(-problem.out_w // columns), -(-problem.out_h // strip)
        items = tiles * strips * -(-problem.batch // images)
        assert (shares - 1) * share < items <= shares * share, what
        times.append(us)
    assert sorted(times)[len(times) // 2] < 100


def test_gram_sums_has_every_row(cuts):
    runs = products_of_sums(8, 72, 1632)
    times: list[int] = []
    narrow = fitting = 0
    for (problem, device), cut in zip(runs, cuts("gram_sums", runs), strict=True):
        images, strips, rows, together, input_bytes, grad_bytes, *sides = cut
        input, grad, (shared, slots, shares, us) = sides[:6], sides[6:12], sides[12:]
        what = f"{problem}: {cut}"
        times.append(us)
        narrow += problem.width <= 31
        if slots == 0:
            continue
        fitting += problem.width <= 31
        assert 2 <= slots <= 3, what
        assert shared <= device[2], what
        assert images <= min(problem.batch, 16), what
        assert (strips - 1) * rows < problem.out_h <= strips * rows, what
        # Rows in different banks, at the places of matrices, each with all that is moved at once.
        parts = (problem.stride, 1)
        for (_, piece, aligned, lead, pitch, _), width, each in zip(
            (input, grad), (problem.width, problem.out_w), parts, strict=True
        ):
            assert pitch % 32 == 16, what
            assert lead + 2 * width <= pitch, what
            assert lead % piece == 0, what
            assert 2 * width % piece == 0 if aligned else piece == 4, what
            assert -(-2 * width // piece) * each <= 32, what
        # The matrices of 16 rows, or of 8 of two images.
        count = grad[0]
        assert together in (1, 2), what
        assert count % (16 // together) == 0, what
        assert rows <= count, what
        assert problem.out_h <= 8 or together == 1, what
        assert input[0] == (count - 1) * problem.stride + problem.kernel_h, what
        for (held, *_, pitch, image_bytes), each in zip((input, grad), parts, strict=True):
            assert image_bytes == -(-held // each) * each * pitch, what
        # Columns: a tile of grad_output sees two of the input, or three, from the first unseen on.
        tiles, padding = -(-problem.out_w // 8), problem.kernel_w // 2
        unseen = input[3] // 2 - padding
        assert unseen >= 0, what
        assert unseen + 7 * problem.stride + problem.kernel_w <= 8 * (problem.stride + 1), what
        assert 16 * problem.stride * (tiles + 1) <= input[4], what
        assert grad[3] == 16, what
        assert 16 * (tiles + 2) <= grad[4], what
        # What the copies bring, of 8 planes at once or of strips that begin anywhere in 16 bytes.
        assert input_bytes % 16 == grad_bytes % 16 == 0, what
        if strips == 1:
            assert input_bytes == 16 * problem.height * problem.width, what
            assert grad_bytes == 16 * problem.out_h * problem.out_w, what
        else:
            assert images == 1, what
            assert rows == count, what
            seen = min(problem.height, (rows - 1) * problem.stride + problem.kernel_h)
            assert input_bytes >= 2 * seen * problem.width + 14, what
            assert grad_bytes >= 2 * rows * problem.out_w + 14, what
        units = -(-problem.batch // images) * strips
        assert 1 <= shares <= units, what
    assert fitting == narrow > 1000
    assert sorted(times)[len(times) // 2] < 100


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
        # Boxes of the copy engine.
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


def test_separable_conv2d_can_be_launched(cuts):
    """What the choice in Python finds faster is a cut that the kernel has, and has memory for."""
    runs, devices = [], []
    for batch, channels, side, kernel, stride, outputs, device in itertools.product(
        (1, 2, 5),
        (8, 24, 72, 120, 200, 384, 576, 960, 1152, 3840),
        (1, 4, 7, 14, 29, 56),
        (3, 5),
        (1, 2),
        (8, 24, 40, 160, 320, 1000),
        DEVICES,
    ):
        multiprocessors, _, shared = device
        shape = (batch, channels, side, side)
        cut = choose_cut(shape, outputs, kernel, stride, kernel // 2, multiprocessors, shared)
        if cut is not None:
            problem = Problem(batch, channels, side, side, kernel, outputs, stride, 2)
            runs.append((problem, (*cut, shared)))
            devices.append(device)
    assert len(runs) > 1000
    found = zip(runs, devices, cuts("separable_conv2d", runs), strict=True)
    for (problem, (pixels, slices, shared)), (multiprocessors, *_), cut in found:
        tiles, made, share, padded, pitch, needed = cut
        what = f"{problem}, {pixels} pixels and {slices} slices: {cut}"
        assert made == slices, what
        assert tiles * slices <= multiprocessors, what
        assert (slices - 1) * share < problem.channels <= slices * share, what
        assert share <= padded < share + 32, what
        assert pitch % 64 == 32, what
        assert pitch >= padded, what
        told = shared_bytes(
            Cut(pixels, slices), problem.channels, problem.kernel_w, problem.kernel_h
        )
        assert needed == told <= shared, what


@pytest.mark.parametrize(
    ("family", "kernel"),
    [
        ("plane_strips", 3),
        ("plane_bands", 5),
        ("channel_columns", 3),
        ("channel_tiles", 5),
        ("diagonal", 5),
        ("diagonal_sums", 3),
        ("toeplitz", 31),
    ],
)
def test_other_cuts_than_the_best_can_be_measured(cuts, compiled, family, kernel):
    """What ``scripts/explore_cuts.py`` runs: rank 0 is what the library takes."""
    problem = Problem(64, 240, 56, 56, kernel, kernel, 1, 2)
    (chosen,) = cuts(family, [(problem, DEVICES[0])])
    explored = compiled("-DDWSWAP_EXPLORE")
    runs = [(family, *problem, *DEVICES[0])]
    ranked = [tuple(run_cuts(explored, runs, rank)[0][:-1]) for rank in (0, 1, 2, 3, 10**6)]
    assert list(ranked[0]) == chosen[:-1]
    assert len(set(ranked)) > 2
    assert ranked[-1] != ranked[0]
