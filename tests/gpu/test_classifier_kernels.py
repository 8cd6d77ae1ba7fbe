"""The CUDA kernel of a linear layer on the means of one image."""

from __future__ import annotations

import copy
import itertools
import os

import pytest
import torch
from cases import place
from export_models import build_model
from numerics import ACTIVATIONS, WIDE_ACTIVATIONS, Judge, poison
from test_classifiers import ours, theirs
from test_interleave_kernels import draw
from torch import Tensor

import dwswap
from dwswap.bench.kernel_families import GEMM, profile
from dwswap.classifiers import pooled_linear

DEVICE = os.environ.get("DWSWAP_FUZZ_DEVICE", "cuda")
pytestmark = [] if DEVICE == "cpu" else [pytest.mark.gpu]

HALVES = (torch.float16, torch.bfloat16)
EACH = pytest.mark.parametrize("dtype", HALVES, ids=str)
# Of networks; one vector; shares of blocks that are empty, and that the channels do not fill.
CHANNELS = (1280, 8, 16, 72, 520, 576, 960, 1024, 1536, 2048)
OUTPUTS = (1000, 8, 16, 128, 136, 1280, 10000)
SIZES = ((7, 7), (1, 1), (1, 2), (16, 16), (3, 11), (10, 10))


def inputs(
    channels: int, size: tuple[int, int], outputs: int, dtype: torch.dtype, case: int
) -> list[Tensor | None]:
    """Input, weight, bias, input_bias; the biases also misaligned, with gaps, and none."""
    x = place(draw((1, channels, *size), dtype, case), "channels_last")
    # So that results are in the range where activations bend.
    weight = (draw((channels, outputs), dtype, case + 1) / (3 * channels**0.5)).t()
    biases = []
    for length, kind in ((outputs, case % 4), (channels, case // 4 % 4)):
        values = draw((2 * length + 1,), dtype, case + 2)
        biases.append((values[:length], None, values[1 : length + 1], values[1::2])[kind])
    return [x, weight, *biases]


def expected(given: list[Tensor | None], before: str, behind: str) -> Tensor:
    wide = given[0].dtype == torch.float64
    return theirs(given, before, behind, WIDE_ACTIVATIONS if wide else ACTIVATIONS)


def add(judge: Judge, given: list[Tensor | None], before: str, behind: str) -> None:
    usual = expected(given, before, behind)
    poison(usual)
    result = ours(given, before, behind)
    assert result.is_contiguous()
    exact = expected([None if t is None else t.double() for t in given], before, behind)
    shapes = [None if t is None else (tuple(t.shape), t.stride()) for t in given]
    judge.add(f"{shapes} {before} {behind}", result, usual, exact)


@EACH
@torch.no_grad()
def test_values(dtype: torch.dtype) -> None:
    judge = Judge()
    problems = itertools.product(CHANNELS, SIZES, OUTPUTS)
    for case, (channels, size, outputs) in enumerate(problems):
        names = tuple(ACTIVATIONS)
        before, behind = names[case % len(names)], names[case // len(names) % len(names)]
        if outputs < 64:  # two largest errors of so few say nothing
            continue
        add(judge, inputs(channels, size, outputs, dtype, case), before, behind)
    judge.check()


@EACH
@torch.no_grad()
def test_integers_are_exact(dtype: torch.dtype) -> None:
    """Means of a number of pixels that is a power of 2."""
    for case, (channels, outputs, size) in enumerate(
        itertools.product(CHANNELS, OUTPUTS, ((1, 1), (2, 4), (16, 16)))
    ):
        given = [
            None if t is None else (4 * t).round().clamp(-2, 2)
            for t in inputs(channels, size, outputs, dtype, case)
        ]
        x, weight, bias, input_bias = given
        # Few that are not 0, so that sums fit the dtype.
        x = x[..., :1, :1].expand_as(x).contiguous(memory_format=torch.channels_last)
        weight = torch.where(torch.arange(channels, device=DEVICE) % 37 == case % 7, weight, 0)
        weight = weight.t().contiguous().t()
        given = [x, weight, bias, input_bias]
        exact = expected([None if t is None else t.double() for t in given], "relu", "none")
        assert torch.equal(ours(given, "relu").double(), exact), (channels, outputs, size)


@EACH
@torch.no_grad()
def test_not_a_number(dtype: torch.dtype) -> None:
    for value in (float("nan"), float("inf")):
        for channels, channel in ((72, 0), (72, 71), (1280, 640)):
            given = inputs(channels, (7, 7), 136, dtype, 1)
            given[0][0, channel, 6, 2] = value
            given[1][5] = 0  # an infinity becomes NaN
            result = ours(given, "relu")
            assert torch.equal(result.isnan(), expected(given, "relu", "none").isnan())
            assert not result.isfinite().any()
    clean = inputs(72, (7, 7), 136, dtype, 0)
    again = [ours(clean, "silu") for _ in range(20)]
    assert again[0].isfinite().all()
    assert all(torch.equal(result, again[0]) for result in again)


@EACH
@torch.no_grad()
def test_nothing_beside_the_tensors_is_read(dtype: torch.dtype) -> None:
    for channels, outputs in ((72, 136), (520, 8), (8, 1000)):
        given = inputs(channels, (5, 3), outputs, dtype, 0)
        padded = []
        for t in given:
            buffer = torch.full((t.numel() + 256,), float("nan"), dtype=dtype, device=DEVICE)
            padded.append(buffer.as_strided(t.shape, t.stride(), 128).copy_(t))
        assert torch.equal(ours(padded, "relu6", "relu"), ours(given, "relu6", "relu"))


@EACH
@torch.no_grad()
def test_what_has_no_kernel_runs_apart(dtype: torch.dtype) -> None:
    given = [(4 * t).round().clamp(-2, 2) for t in inputs(16, (8, 8), 64, dtype, 0)]
    x, weight, bias, input_bias = given
    exact = expected([t.double() for t in given], "relu", "none")
    large = x.repeat(1, 1, 3, 3)
    forms = (
        [x.contiguous(), *given[1:]],
        [x, weight.contiguous(), bias, input_bias],
        [place(x, "offset_channels_last"), *given[1:]],
        [large.contiguous(memory_format=torch.channels_last), *given[1:]],
        [x.float(), *(t.float() for t in given[1:])],
    )
    for form in forms:
        torch.testing.assert_close(ours(form, "relu").double(), exact, rtol=1e-2, atol=1e-2)
    both = ours([x.repeat(2, 1, 1, 1), *given[1:]], "relu")
    torch.testing.assert_close(both.double(), exact.repeat(2, 1), rtol=1e-2, atol=1e-2)
    empty = ours([x[:0], *given[1:]])
    assert empty.shape == (0, 64)
    leaf = x.clone().requires_grad_()
    with torch.enable_grad():
        (gradient,) = torch.autograd.grad(ours([leaf, *given[1:]]).sum(), leaf)
    assert gradient.shape == x.shape


@pytest.mark.gpu
@torch.no_grad()
def test_bad_input_is_named() -> None:
    x, weight, bias, input_bias = inputs(16, (7, 7), 64, torch.float16, 0)
    for form, message in (
        ([x, weight, bias[:5], input_bias], r"bias must be 1-D of length 64, got shape \[5\]"),
        ([x, weight, bias, input_bias[:3]], r"input_bias must be 1-D of length 16, got shape"),
        ([x, weight.float(), bias, input_bias], "weight must have the input's dtype Half"),
        ([x, weight.cpu(), bias, input_bias], "weight must be on the input's device, cuda:0"),
    ):
        with pytest.raises(RuntimeError, match=message):
            ours(form)
    with pytest.raises(RuntimeError, match="failed for shapes"):
        ours([x[:, :8], weight, bias, input_bias[:8]])


@pytest.mark.gpu
@torch.no_grad()
def test_one_kernel() -> None:
    given = inputs(1280, (7, 7), 1000, torch.float16, 0)
    ours(given)
    (row,) = profile(lambda: ours(given, "relu6"), torch.device("cuda"))
    assert (row.family, row.kernels) == (GEMM, 1)
    assert "pooled_linear" in row.largest


@pytest.mark.gpu
@EACH
@torch.no_grad()
def test_graph_capture_on_a_stream(dtype: torch.dtype) -> None:
    given = inputs(1280, (7, 7), 1000, dtype, 0)
    stream = torch.cuda.Stream()
    ours(given)  # builds the library
    stream.wait_stream(torch.cuda.current_stream())
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        output = ours(given, "relu6")
    for seed in range(3):
        for tensor in given:
            tensor.copy_(draw(tuple(tensor.shape), dtype, seed))
        graph.replay()
        torch.cuda.synchronize()
        assert torch.equal(output, ours(given, "relu6"))


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["mobilenet_v2", "mobilenet_v3_small", "shufflenet_v2_x1_0"])
@torch.no_grad()
def test_models_run_it(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = build_model(name, DEVICE, torch.float16)
    fast = dwswap.optimize(model)
    (node,) = fast.graph.find_nodes(op="call_function", target=pooled_linear)
    assert "input_activation" in node.kwargs
    judge = Judge()
    for batch in (1, 2):
        x = draw((batch, 3, 96, 96), torch.float16, batch)
        exact = copy.deepcopy(model).double()(x.double())
        judge.add(f"{name} {batch}", fast(x), model(x), exact)
    judge.check()
    kernels = []
    for portable in ("0", "1"):
        monkeypatch.setenv("DWSWAP_PORTABLE", portable)
        rows = profile(lambda: fast(x[:1]), torch.device("cuda"))
        kernels.append(sum(row.kernels for row in rows))
    # Without it the mean and the layer, and the activation behind it, are kernels of their own.
    assert kernels[0] < kernels[1]
