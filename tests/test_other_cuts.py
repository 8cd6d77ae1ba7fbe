"""As ``test_cuts``, of the operators beside the depthwise convolution."""

from __future__ import annotations

import itertools

import pytest
from cuts_program import DEVICES, Problem, ragged

from dwswap.separable import Cut, choose_cut, shared_bytes


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
