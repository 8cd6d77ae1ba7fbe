"""The CUDA kernels of ``squeeze_excitation``, over shapes that nothing they cut by divides."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
import torch
from cases import DENSE_LAYOUTS, LAYOUTS
from excitation_cases import ExcitationCase, composite, exact_result, operator
from numerics import Judge, poison
from torch.profiler import ProfilerActivity, profile

from dwswap.ops import squeeze_excitation

pytestmark = pytest.mark.gpu

FAST = (torch.float32, torch.float16, torch.bfloat16)
# Channels, height, width, hidden units: of networks, ragged, one pixel, one channel, more hidden
# units than threads.
SHAPES = (
    (32, 112, 112, 8),
    (96, 56, 56, 4),
    (144, 28, 28, 6),
    (480, 14, 14, 20),
    (1152, 7, 7, 48),
    (2304, 12, 12, 96),
    (57, 7, 7, 5),
    (116, 13, 9, 29),
    (58, 31, 33, 3),
    (24, 1, 1, 8),
    (1, 9, 11, 1),
    (8, 3, 5, 700),
    (72, 17, 1, 1024),
)
BATCHES = (1, 2, 7, 32, 256)
# Of so many samples that the layers are matrix products: batch, channels, height, width, hidden.
PRODUCTS = (
    (256, 1152, 7, 7, 48),
    (260, 672, 14, 14, 168),
    (64, 960, 1, 1, 240),
    (513, 57, 5, 5, 300),
    (40, 116, 13, 9, 1024),
    (512, 200, 17, 16, 60),
)
MOST_ELEMENTS = 1 << 24


@pytest.mark.parametrize("dtype", FAST)
@pytest.mark.parametrize("layout", DENSE_LAYOUTS)
@pytest.mark.parametrize("batch", BATCHES)
def test_shapes(dtype: torch.dtype, layout: str, batch: int) -> None:
    judge = Judge()
    for i, (channels, height, width, hidden) in enumerate(SHAPES):
        if batch * channels * height * width > MOST_ELEMENTS:
            continue
        case = ExcitationCase(dtype, layout, batch, channels, height, width, hidden)
        case = replace(case, activation=("relu", "silu", "hardswish")[i % 3], seed=i)
        case = replace(case, gate=("sigmoid", "hardsigmoid")[(i + batch) % 2], bias=i % 4 != 3)
        tensors = case.tensors("cuda")
        theirs = composite(case, tensors)
        poison(theirs)
        judge.add(repr(case), operator(case, tensors), theirs, exact_result(case, tensors))
    judge.check()


@pytest.mark.parametrize("dtype", FAST)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_views(dtype: torch.dtype, layout: str) -> None:
    judge = Judge()
    batches, channels, sides = (1, 3, 40), (8, 57, 116), ((7, 7), (14, 16), (33, 5))
    for batch, c, (height, width), offset in itertools.product(batches, channels, sides, (0, 1)):
        case = ExcitationCase(dtype, layout, batch, c, height, width, 9, "silu", offset=offset)
        tensors = case.tensors("cuda")
        theirs = composite(case, tensors)
        poison(theirs)
        judge.add(repr(case), operator(case, tensors), theirs, exact_result(case, tensors))
    judge.check()


@pytest.mark.parametrize("dtype", FAST)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", PRODUCTS)
def test_products(dtype: torch.dtype, layout: str, shape: tuple[int, ...]) -> None:
    judge = Judge()
    for i, activation in enumerate(("relu", "silu", "none")):
        case = ExcitationCase(dtype, layout, *shape, activation, linear=i == 1, offset=i % 2)
        case = replace(case, gate=("sigmoid", "hardsigmoid", "hardswish")[i], bias=i != 2, seed=i)
        tensors = case.tensors("cuda")
        theirs = composite(case, tensors)
        poison(theirs)
        judge.add(repr(case), operator(case, tensors), theirs, exact_result(case, tensors))
    judge.check()


def test_more_hidden_units_than_the_kernels_keep() -> None:
    case = ExcitationCase(torch.float16, "channels_last", 2, 8, 5, 5, hidden=1025)
    tensors = case.tensors("cuda")
    torch.testing.assert_close(operator(case, tensors), composite(case, tensors))


@pytest.mark.parametrize("layout", DENSE_LAYOUTS)
@pytest.mark.parametrize("batch", [1, 64])
def test_two_kernels(layout: str, batch: int) -> None:
    names = launches(ExcitationCase(torch.float16, layout, batch, 144, 28, 28, 6))
    assert sum(names.values()) == 2, names
    assert all("squeeze_kernel" in name or "excite_kernel" in name for name in names), names


@pytest.mark.parametrize("layout", DENSE_LAYOUTS)
@pytest.mark.parametrize("shape", PRODUCTS)
def test_three_kernels_and_products(layout: str, shape: tuple[int, ...]) -> None:
    names = launches(ExcitationCase(torch.float16, layout, *shape))
    for own in ("channel_means_kernel", "activate_kernel", "scale_kernel"):
        assert sum(count for name, count in names.items() if own in name) == 1, names
    assert not any("squeeze_kernel" in name or "excite_kernel" in name for name in names), names


def launches(case: ExcitationCase) -> dict[str, int]:
    """The kernels of a call, and how often each ran."""
    tensors = case.tensors("cuda")
    squeeze_excitation(*tensors)
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CUDA]) as recorded, torch.no_grad():
        squeeze_excitation(*tensors)
        torch.cuda.synchronize()
    return {event.key: event.count for event in recorded.key_averages() if event.device_time > 0}


@pytest.mark.parametrize("layout", DENSE_LAYOUTS)
@pytest.mark.parametrize("shape", [(1, 240, 28, 28, 10), (33, 240, 28, 28, 10), PRODUCTS[0]])
def test_results_are_the_same_in_every_run(layout: str, shape: tuple[int, ...]) -> None:
    tensors = ExcitationCase(torch.float16, layout, *shape).tensors("cuda")
    with torch.no_grad():
        first = squeeze_excitation(*tensors)
        for _ in range(300):
            assert torch.equal(squeeze_excitation(*tensors), first)


def test_offsets_beyond_32_bits() -> None:
    case = ExcitationCase(torch.float16, "channels_last", 3, 64, 3400, 3400, 8)
    tensors = case.tensors("cuda")
    assert tensors.input.numel() > 1 << 31
    with torch.no_grad():
        output = operator(case, tensors)
        last = tensors._replace(input=tensors.input[2:])
        judge = Judge()
        judge.add("last", output[2:], composite(case, last), exact_result(case, last))
    judge.check()


@pytest.mark.parametrize("layout", DENSE_LAYOUTS)
@pytest.mark.parametrize("shape", [(4, 72, 28, 28, 24), PRODUCTS[0]])
def test_graph_capture_on_a_stream(layout: str, shape: tuple[int, ...]) -> None:
    case = ExcitationCase(torch.float16, layout, *shape, "relu", "hardsigmoid")
    tensors = case.tensors("cuda")
    stream = torch.cuda.Stream()
    with torch.no_grad():
        squeeze_excitation(*tensors)  # builds the library
        stream.wait_stream(torch.cuda.current_stream())
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream):
            output = operator(case, tensors)
        for seed in range(3):
            for own, drawn in zip(tensors, replace(case, seed=seed).tensors("cuda"), strict=True):
                own.copy_(drawn)
            graph.replay()
            torch.cuda.synchronize()
            judge = Judge()
            judge.add(f"{seed}", output, composite(case, tensors), exact_result(case, tensors))
            judge.check()
