"""Pointwise convolutions as matrix products on the GPU: numbers, strides, NaN, kernels."""

from __future__ import annotations

import copy
import os
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from export_models import build_model
from numerics import Judge
from test_pointwise_product import Body, products
from test_push_bias import pointwise
from torch import Tensor, nn
from torch.export import Dim, export

import dwswap
from dwswap.bench.kernel_families import GEMM, profile
from dwswap.pointwise import pointwise_product

DEVICE = os.environ.get("DWSWAP_FUZZ_DEVICE", "cuda")
pytestmark = [] if DEVICE == "cpu" else [pytest.mark.gpu]

HALF = [torch.float16, torch.bfloat16]
LAYOUTS = [torch.channels_last, torch.contiguous_format]
CHANNELS = [(58, 58), (116, 122), (24, 58), (3, 5), (1, 6), (6, 1), (464, 1024), (320, 1280)]
ACTIVATIONS: dict[str, Callable[[], nn.Module]] = {
    "relu": nn.ReLU,
    "relu in place": lambda: nn.ReLU(True),
    "relu6": lambda: nn.ReLU6(True),
    "silu": nn.SiLU,
    "hardswish": nn.Hardswish,
    "none": nn.Identity,
}
aten = torch.ops.aten


@pytest.fixture(autouse=True)
def _fresh() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def randn(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, device=DEVICE).to(dtype)


def strides(tensor: Tensor) -> list[int]:
    """Of dimensions of one element, they mean nothing."""
    pairs = zip(tensor.stride(), tensor.shape, strict=True)
    return [stride for stride, size in pairs if size > 1]


@torch.no_grad()
def judge_model(fast: Any, model: nn.Module, *inputs: Tensor, what: str) -> None:
    exact_model, judge = copy.deepcopy(model).double(), Judge()
    for x in inputs:
        ours, theirs = fast(x), model(x)
        assert strides(ours) == strides(theirs)
        judge.add(what, ours, theirs, exact_model(x.double()))
    judge.check()


@pytest.mark.parametrize("dtype", HALF, ids=str)
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(("channels", "out"), CHANNELS)
@torch.no_grad()
def test_function(channels: int, out: int, bias: bool, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    judge = Judge()
    offset = randn(out, dtype=dtype) if bias else None
    for batch, side in ((1, 28), (5, 14), (5, 7), (1, 1), (3, 1)):
        weight = (randn(out, channels, 1, 1) / channels**0.5).to(dtype)
        wide = randn(batch, 2 * channels, side, side, dtype=dtype)
        for layout in LAYOUTS:
            w, image = (t.to(memory_format=layout) for t in (weight, wide))
            for x in (image[:, channels:].contiguous(memory_format=layout), image[:, channels:]):
                theirs, exact = (
                    F.conv2d(*(None if t is None else t.to(kind) for t in (x, w, offset)))
                    for kind in (dtype, torch.float64)
                )
                ours = pointwise_product(x, w, offset)
                assert strides(ours) == strides(theirs), f"{batch} {side} {layout} {x.stride()}"
                # Some have few results: judged together.
                judge.add(f"{channels} to {out}", ours, theirs, exact)
    judge.check()


@pytest.mark.parametrize("dtype", HALF, ids=str)
@torch.no_grad()
def test_nan_stays(dtype: torch.dtype) -> None:
    x = randn(5, 58, 14, 14, dtype=dtype).to(memory_format=torch.channels_last)
    x[1, :, 2, 3] = float("nan")
    result = pointwise_product(x, randn(58, 58, 1, 1, dtype=dtype), randn(58, dtype=dtype))
    expected = torch.zeros_like(result, dtype=torch.bool)
    expected[1, :, 2, 3] = True
    assert result.isnan().equal(expected)


@pytest.mark.gpu
@torch.no_grad()
def test_one_kernel() -> None:
    """The bias is no kernel of its own, and some of the channels are not copied."""
    wide = randn(64, 116, 28, 28, dtype=torch.float16).to(memory_format=torch.channels_last)
    weight, bias = (randn(*s, dtype=torch.float16) for s in ((58, 58, 1, 1), (58,)))
    for x in (wide[:, 58:].contiguous(memory_format=torch.channels_last), wide[:, 58:]):

        def call(x: Tensor = x) -> Tensor:
            return pointwise_product(x, weight, bias)

        call()
        rows = profile(call, torch.device("cuda"))
        assert [(row.family, row.kernels) for row in rows] == [(GEMM, 1)], rows


@pytest.mark.parametrize("dtype", HALF, ids=str)
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("channels", [58, 116, 64])
def test_graphs(channels: int, activation: str, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    build = ACTIVATIONS[activation]
    model = Body(pointwise(8, channels), build(), pointwise(channels, 24, bias=False), nn.ELU())
    model = model.eval().to(DEVICE, dtype)
    fast = dwswap.optimize(model, memory_format="channels_last")
    # With nothing between them they are one.
    one = activation == "none" and DEVICE == "cuda"
    assert products(fast) == (1 if channels % 8 == 0 or one else 2)
    images = [randn(n, 8, 14, 14, dtype=dtype) for n in (1, 5)]
    images += [x.to(memory_format=torch.channels_last) for x in images]
    judge_model(fast, model, *images, what=f"{channels} {activation}")


@pytest.mark.gpu
def test_float32_stays() -> None:
    model = Body(pointwise(), nn.ReLU()).eval().cuda()
    assert products(dwswap.optimize(model, memory_format="channels_last")) == 0


@pytest.mark.gpu
def test_another_dtype_or_device_later() -> None:
    model = Body(pointwise(8, 58), nn.ReLU()).eval().cuda().half()
    fast = dwswap.optimize(model)
    assert products(fast) == 1
    x = randn(2, 8, 14, 14)
    with torch.no_grad():
        for device in ("cuda", "cpu"):
            ours, theirs = (copy.deepcopy(m).to(device).float() for m in (fast, model))
            torch.testing.assert_close(ours(x.to(device)), theirs(x.to(device)))
        with torch.autocast("cuda", torch.float16):
            torch.testing.assert_close(fast(x), model(x), rtol=1e-2, atol=1e-2)
    leaf = x.half().requires_grad_()
    ours, theirs = (torch.autograd.grad(m(leaf).float().sum(), leaf)[0] for m in (fast, model))
    torch.testing.assert_close(ours, theirs, rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("dtype", HALF, ids=str)
def test_shufflenet(dtype: torch.dtype) -> None:
    model = build_model("shufflenet_v2_x1_0", DEVICE, dtype)
    options: dict[str, Any] = {"memory_format": "channels_last"}
    fast = dwswap.optimize(model, **options)
    # Without a bias those of 58 and of 116 channels, which are no multiple of 8.
    assert products(fast) == (26 if DEVICE == "cuda" else 20 + 12)
    images = [randn(n, 3, 64, 64, dtype=dtype) for n in (1, 5)]
    images += [x.to(memory_format=torch.channels_last) for x in images]
    judge_model(fast, model, *images, what="graph")
    judge_model(torch.compile(fast, fullgraph=True), model, *images, what="compiled")
    if DEVICE == "cuda":
        captured = dwswap.optimize(model, cuda_graph=True, **options)
        judge_model(captured, model, *images, what="captured")
    verified = dwswap.optimize(model, images[1], verify=True, **options)
    assert dwswap.report(verified).verification.passed, str(dwswap.report(verified))


def test_shufflenet_as_a_program() -> None:
    model = build_model("shufflenet_v2_x1_0", DEVICE, torch.float16)
    images = [randn(n, 3, 64, 64, dtype=torch.float16) for n in (2, 1, 5)]
    program = export(model, (images[0],), dynamic_shapes=({0: Dim("batch", min=1, max=64)},))
    fast = dwswap.optimize(program, memory_format="channels_last")
    targets = [node.target for node in fast.graph.nodes]
    assert (targets.count(aten.addmm.default), targets.count(aten.mm.default)) == (20, 12)
    judge_model(fast.module(), model, *images, what="program")
