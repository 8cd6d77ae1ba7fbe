"""The CUDA kernel of the means of channels, and the ends of the models that it is for."""

from __future__ import annotations

import itertools
import os
import random

import pytest
import torch
from cases import LAYOUTS, place
from export_models import build_model
from numerics import ACTIVATIONS, WIDE_ACTIVATIONS, Judge, poison
from test_interleave_kernels import draw
from torch import Tensor

import dwswap
from dwswap.bench.kernel_families import ELEMENTWISE, profile
from dwswap.means import channel_means

DEVICE = os.environ.get("DWSWAP_FUZZ_DEVICE", "cuda")
pytestmark = [] if DEVICE == "cpu" else [pytest.mark.gpu]

FAST = (torch.float32, torch.float16, torch.bfloat16)
# Of networks, ones that no vector and no warp divides, one.
CHANNELS = (1280, 576, 57, 100, 8, 1)
SIZES = ((1, 7, 7), (2, 1, 1), (33, 7, 5), (130, 4, 4), (2, 31, 17), (1, 66, 64))


def expected(x: Tensor, bias: Tensor | None, name: str, exact: bool) -> Tensor:
    functions = WIDE_ACTIVATIONS if exact else ACTIVATIONS
    x, bias = (t if t is None or not exact else t.double() for t in (x, bias))
    return functions[name](x if bias is None else x + bias[:, None, None]).mean((-2, -1))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [*FAST, torch.float64], ids=str)
@torch.no_grad()
def test_values(dtype: torch.dtype, layout: str) -> None:
    judge = Judge()
    for case, (channels, (n, h, w), bits) in enumerate(
        itertools.product(CHANNELS, SIZES, range(3))
    ):
        x = place(draw((n, channels, h, w), dtype, case), layout)
        # None, an aligned one, and one that begins an element later.
        bias = draw((channels + 1,), dtype, case)[bits - 1 :][:channels] if bits else None
        name = random.Random(case).choice(tuple(ACTIVATIONS))
        theirs = expected(x, bias, name, exact=False)
        poison(theirs)
        ours = channel_means(x, bias, activation=name)
        label = f"{tuple(x.shape)} {dtype} {layout} {name} bias {bias is not None}"
        judge.add(label, ours, theirs, expected(x, bias, name, exact=True))
    judge.check()


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("dtype", FAST, ids=str)
@torch.no_grad()
def test_extremes(dtype: torch.dtype, memory_format: torch.memory_format) -> None:
    x = draw((3, 72, 7, 9), dtype).to(memory_format=memory_format)
    x[0, 3, 2, 1], x[1, 70, 6, 8] = float("nan"), float("inf")
    for name in ("none", "relu", "relu6"):
        ours, theirs = channel_means(x, activation=name), expected(x, None, name, exact=False)
        assert torch.equal(ours.isnan(), theirs.isnan())
        assert torch.equal(ours.isinf(), theirs.isinf())
    again = [channel_means(x[2:], activation="silu") for _ in range(20)]
    assert all(torch.equal(result, again[0]) for result in again)


@torch.no_grad()
def test_what_has_no_kernel_is_left_to_aten() -> None:
    x = draw((2, 4, 5, 3), torch.float16)
    large = draw((1, 8, 80, 80), x.dtype)
    for other in (x.double(), x[0], x[:, :, :, ::2], large):
        torch.testing.assert_close(channel_means(other), other.mean((-2, -1)))
    assert channel_means(x[:0], keepdim=True).shape == (0, 4, 1, 1)
    leaf = x.float().requires_grad_()
    with torch.enable_grad():
        (grad,) = torch.autograd.grad(channel_means(leaf).sum(), leaf)
    torch.testing.assert_close(grad, torch.full_like(grad, 1 / 15))


@pytest.mark.gpu
@torch.no_grad()
def test_bad_input_is_named() -> None:
    x = draw((2, 4, 5, 3), torch.float16)
    with pytest.raises(RuntimeError, match="bias must be 1-D of length 4, got shape"):
        channel_means(x, draw((5,), x.dtype))
    with pytest.raises(RuntimeError, match="bias must have the input's dtype Half, got Float"):
        channel_means(x, draw((4,), torch.float32))


@pytest.mark.gpu
@pytest.mark.parametrize("batch", [1, 32, 256])
@torch.no_grad()
def test_one_kernel(batch: int) -> None:
    x = draw((batch, 1280, 7, 7), torch.float16).to(memory_format=torch.channels_last)
    bias = draw((1280,), torch.float16)
    call = lambda: channel_means(x, bias, activation="relu6", keepdim=True)  # noqa: E731
    call()
    assert [row.kernels for row in profile(call, torch.device("cuda"))] == [1]


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["mobilenet_v2", "mnasnet1_0"])
@torch.no_grad()
def test_nothing_elementwise_is_left(name: str) -> None:
    model = build_model(name, "cuda", torch.float16)
    x = draw((64, 3, 64, 64), torch.float16).to(memory_format=torch.channels_last)
    fast = dwswap.optimize(model)
    fast(x)
    rows = {row.family: row for row in profile(lambda: fast(x), torch.device("cuda"))}
    assert ELEMENTWISE not in rows, rows
