"""As ``test_cuts``, of the gradients of the weight."""

from __future__ import annotations

import pytest
from cuts_program import DEVICES, Problem, ragged

from dwswap.bench.shapes import torchvision_shapes


def products_of_sums(
    *channels: int, kernels: tuple[int, ...] = (3, 5, 7), element_bytes: int = 2
) -> list[tuple[Problem, tuple[int, int, int]]]:
    """Gradients of the weight of square kernels, on sm_90 alone.

    Args:
        channels: of the ragged ones.
    """
    problems = [
        Problem(64, s.channels, s.height, s.width, *s.kernel, s.stride[0], element_bytes)
        for s in torchvision_shapes()
        if s.channels * element_bytes % 16 == 0 and s.kernel[0] in kernels and s.dilation == (1, 1)
    ]
    problems += [
        problem._replace(channels=count, element_bytes=element_bytes)
        for problem in ragged(4000)
        for count in channels
        if problem.kernel_h == problem.kernel_w and problem.kernel_h in kernels
    ]
    return [(problem, DEVICES[0]) for problem in problems]


@pytest.mark.parametrize("element_bytes", [2, 4])
def test_column_sums_has_every_pixel_and_channel(cuts, element_bytes):
    least = 16 // element_bytes
    channels = (least, 9 * least, 17 * least, 25 * least, 1632)
    runs = products_of_sums(*channels, kernels=(3,), element_bytes=element_bytes)
    times: list[int] = []
    for (problem, device), cut in zip(runs, cuts("column_sums", runs), strict=True):
        pairs, groups, images, slots, rows, shares, seen, threads, shared, us = cut
        what = f"{problem}: {cut}"
        assert pairs * groups * images <= threads <= 256, what
        assert threads % 32 == 0, what
        assert 2 <= slots <= 4, what
        # Boxes of the copy engine.
        assert 2 * pairs * element_bytes % 16 == 0, what
        assert max(2 * pairs, seen, images) <= 256, what
        assert seen == (4 * groups - 1) * problem.stride + 3, what
        assert shared <= device[2], what
        assert images <= problem.batch, what
        assert images == 1 or 4 * groups >= problem.out_w, what
        assert 1 <= rows <= problem.out_h, what
        tiles, strips = -(-problem.out_w // (4 * groups)), -(-problem.out_h // rows)
        items = tiles * strips * -(-problem.batch // images)
        assert 1 <= shares <= items, what
        times.append(us)
    assert len(times) > 1000
    assert sorted(times)[len(times) // 2] < 400


def test_diagonal_sums_has_every_pixel_and_channel(cuts):
    runs = products_of_sums(8, 72, 136, 200, 1632, kernels=(5, 7))
    times: list[int] = []
    for (problem, device), cut in zip(runs, cuts("diagonal_sums", runs), strict=True):
        groups, teams, box, swizzle, columns, images, rows, seen, threads, shared, *split = cut
        strip, share, shares, us = split
        what = f"{problem}: {cut}"
        kernel = problem.kernel_h
        # A team has 32 pixels, and every team some; registers are for so many warps.
        assert 32 * (teams - 1) < columns * images <= 32 * teams, what
        assert threads == 32 * groups * teams, what
        assert threads <= 32 * {5: 16, 7: 12}[kernel], what
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
