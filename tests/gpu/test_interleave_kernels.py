"""The CUDA kernel that interleaves the channels of two images, and the models that it is for."""

from __future__ import annotations

import itertools
import os

import pytest
import torch
from cases import LAYOUTS, place
from export_models import build_model
from numerics import ACTIVATIONS, WIDE_ACTIVATIONS, Judge, poison
from test_shuffle_pass import FORMATS, shuffle
from torch import Tensor

import dwswap
from dwswap.bench.kernel_families import ELEMENTWISE, profile
from dwswap.shuffling import interleaved

DEVICE = os.environ.get("DWSWAP_FUZZ_DEVICE", "cuda")
pytestmark = [] if DEVICE == "cpu" else [pytest.mark.gpu]

FAST = (torch.float32, torch.float16, torch.bfloat16)
# Of ShuffleNets, odd ones, one; a pixel, images that no block divides.
CHANNELS = (24, 58, 116, 232, 57, 8, 1)
SIZES = ((1, 1, 1), (2, 7, 5), (3, 28, 28), (70, 14, 9))


def draw(shape: tuple[int, ...], dtype: torch.dtype, seed: int = 0) -> Tensor:
    generator = torch.Generator(DEVICE).manual_seed(seed)
    return 3 * torch.randn(shape, generator=generator, device=DEVICE).to(dtype)


def expected(
    first: Tensor, second: Tensor, first_bias, second_bias, names: tuple[str, str], exact: bool
) -> Tensor:
    functions = WIDE_ACTIVATIONS if exact else ACTIVATIONS
    images = []
    for x, bias, name in zip((first, second), (first_bias, second_bias), names, strict=True):
        x, bias = (t if t is None or not exact else t.double() for t in (x, bias))
        images.append(functions[name](x if bias is None else x + bias[:, None, None]))
    return shuffle(torch.cat(images, 1).contiguous())


def add(judge: Judge, first: Tensor, second: Tensor, case: int, channels_last: bool) -> None:
    names = tuple(ACTIVATIONS)
    chosen = (names[case % len(names)], names[case * 5 // 2 % len(names)])
    biases = [
        draw((first.shape[1] + i,), first.dtype, case + i)[i:] if case & 1 << i else None
        for i in range(2)
    ]
    theirs = expected(first, second, *biases, chosen, exact=False)
    poison(theirs)
    ours = interleaved(
        first,
        second,
        channels_last,
        first_bias=biases[0],
        second_bias=biases[1],
        first_activation=chosen[0],
        second_activation=chosen[1],
    )
    assert ours.is_contiguous(memory_format=FORMATS[channels_last])
    exact = expected(first, second, *biases, chosen, exact=True)
    label = f"{tuple(first.shape)} {first.dtype} {chosen} biases {case & 3} {channels_last}"
    judge.add(label, ours, theirs, exact)


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [*FAST, torch.float64], ids=str)
@torch.no_grad()
def test_values(dtype: torch.dtype, layout: str, channels_last: bool) -> None:
    judge = Judge()
    for case, (channels, (n, h, w)) in enumerate(itertools.product(CHANNELS, SIZES)):
        first, second = (place(draw((n, channels, h, w), dtype, s), layout) for s in (case, -case))
        add(judge, first, second, case, channels_last)
        # Halves of the channels of one image, read where they are.
        halves = place(draw((n, 2 * channels, h, w), dtype, case), layout).chunk(2, 1)
        add(judge, halves[0], second, case + 1, channels_last)
        add(judge, halves[1], halves[0], case + 2, channels_last)
    judge.check()


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("dtype", FAST, ids=str)
@torch.no_grad()
def test_exact(dtype: torch.dtype, channels_last: bool) -> None:
    """What is only moved stays bit by bit, NaN stays NaN, and nothing is written elsewhere."""
    first, second = (draw((5, 58, 9, 7), dtype, seed) for seed in (1, 2))
    first[0, 0, 0, :4] = torch.tensor([float("nan"), float("inf"), -float("inf"), -0.0])
    second[1, 57, 8] = float("nan")
    ours = interleaved(first, second, channels_last)
    assert torch.equal(ours.nan_to_num(7.0), shuffle(torch.cat((first, second), 1)).nan_to_num(7.0))
    assert torch.equal(ours.isnan(), shuffle(torch.cat((first, second), 1)).isnan())
    rectified = interleaved(first, second, channels_last, first_activation="relu")
    torch.testing.assert_close(
        rectified, shuffle(torch.cat((first.relu(), second), 1)), rtol=0, atol=0, equal_nan=True
    )


@torch.no_grad()
def test_what_has_no_kernel_is_left_to_aten() -> None:
    first, second = draw((2, 4, 5, 3), torch.float16), draw((2, 6, 5, 3), torch.float16)
    for other in (second, second[:, :4].float(), second[:, :4].int()):
        joined = torch.cat((first, other), 1)
        torch.testing.assert_close(interleaved(first, other), shuffle(joined), rtol=0, atol=0)
    assert interleaved(first[:0], first[:0], True).shape == (0, 8, 5, 3)
    leaf = first.clone().requires_grad_()
    with torch.enable_grad():
        (grad,) = torch.autograd.grad(interleaved(leaf, first).float().sum(), leaf)
    assert grad.eq(1).all()


@pytest.mark.gpu
@torch.no_grad()
def test_one_kernel() -> None:
    image = draw((4, 116, 28, 28), torch.float16).to(memory_format=torch.channels_last)
    first, second = image.chunk(2, 1)
    bias = draw((58,), torch.float16)
    options = {"second_bias": bias, "second_activation": "relu"}
    interleaved(first, second, True, **options)
    rows = profile(lambda: interleaved(first, second, True, **options), torch.device("cuda"))
    assert [row.kernels for row in rows] == [1], rows


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", FAST[1:], ids=str)
@torch.no_grad()
def test_shufflenet_has_nothing_elementwise(dtype: torch.dtype) -> None:
    model = build_model("shufflenet_v2_x1_0", "cuda", dtype)
    x = draw((64, 3, 64, 64), dtype).to(memory_format=torch.channels_last)
    fast = dwswap.optimize(model)
    fast(x)
    rows = {row.family: row for row in profile(lambda: fast(x), torch.device("cuda"))}
    assert ELEMENTWISE not in rows, rows
    done = [c for layer in dwswap.report(fast).layers for c in layer.changes if c.kind == "shuffle"]
    assert len(done) == 19
    assert all(change.done for change in done)
