"""The residual sum as part of a matrix product."""

from __future__ import annotations

import copy
import operator
import pickle
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from test_memory_format import same
from test_push_bias import chain, inverted, pointwise
from test_torchvision import build_with_data, models
from tiny_models import depthwise, image
from torch import Tensor, nn

import dwswap
from dwswap.bench.random_weights import randomize
from dwswap.pointwise import pointwise_residual
from dwswap.separable import separable_conv2d


def fused(fast: nn.Module) -> int:
    """How many sums are part of a product, alone or behind a depthwise convolution."""
    return sum(
        node.target is pointwise_residual
        or (node.target is separable_conv2d and node.args[5] is not None)
        for node in fast.graph.nodes
    )


@pytest.mark.usefixtures("products")
@pytest.mark.parametrize("layout", [torch.channels_last, torch.contiguous_format])
@pytest.mark.parametrize("size", [1, 5])
@pytest.mark.parametrize("residual", ["full", "one image", "one channel", "one pixel", "part"])
def test_function(layout: torch.memory_format, size: int, residual: str) -> None:
    x = image(8, size=size).to(memory_format=layout)
    weight, wide = torch.randn(6, 8, 1, 1), image(12, size=size).to(memory_format=layout)
    other = wide[:, 6:] if residual == "part" else wide[:, 6:].clone()
    other = {"one image": other[:1], "one channel": other[:, :1]}.get(residual, other)
    other = other[:, :, :1, :1] if residual == "one pixel" else other
    expected = other + F.conv2d(x, weight)
    same(pointwise_residual(x, weight, other.clone()), expected)
    low = (t.bfloat16() for t in (x, weight, other))
    with torch.autocast("cpu", torch.bfloat16):
        assert pointwise_residual(x, weight, other).dtype == (other + F.conv2d(x, weight)).dtype
    assert pointwise_residual(*low).dtype == torch.bfloat16
    assert pointwise_residual(x[:0], weight, other[:0]).shape[0] == 0


@pytest.mark.usefixtures("products")
def test_gradients_are_recorded() -> None:
    x, other = (image(4).to(memory_format=torch.channels_last) for _ in range(2))
    weight = torch.randn(4, 4, 1, 1, requires_grad=True)
    before = other.clone()
    result = pointwise_residual(x, weight, other)
    assert other.equal(before)
    same(torch.autograd.grad(result.sum(), weight)[0][0, :, 0, 0], x.sum((0, 2, 3)))
    with torch.no_grad():
        assert pointwise_residual(x, weight, other) is other
    same(other, result.detach())


def test_not_on_the_cpu() -> None:
    model = chain(inverted(), inverted(), pointwise()).eval()
    assert fused(dwswap.optimize(model, memory_format="channels_last")) == 0


@pytest.mark.usefixtures("products")
def test_fuses() -> None:
    model = chain(pointwise(), inverted(), inverted(combine=lambda x, y: y + x), pointwise()).eval()
    fast = dwswap.optimize(model, memory_format="channels_last")
    assert fused(fast) == 2
    torch._dynamo.reset()
    with torch.no_grad():
        for x in (image(8), image(8).to(memory_format=torch.channels_last), image(8)[:0]):
            compiled = torch.compile(fast, fullgraph=True, backend="aot_eager")
            for result in (fast, copy.deepcopy(fast), compiled):
                same(result(x), model(x))
        same(dwswap.optimize(model)(image(8)), model(image(8)))
    plain = dwswap.optimize(chain(inverted(), pointwise()).eval(), memory_format="channels_last")
    same(pickle.loads(pickle.dumps(plain))(image(8)), plain(image(8)))


@pytest.mark.usefixtures("products")
@pytest.mark.parametrize(
    "body",
    [
        pointwise(),  # before the output: has a bias
        nn.Conv2d(8, 8, 3, padding=1, bias=False),
        nn.Conv2d(8, 8, 1, groups=2, bias=False),
        nn.Conv2d(8, 8, 1, stride=2, bias=False),
        depthwise(bias=False),
    ],
)
def test_leaves_alone(body: nn.Module) -> None:
    class Sum(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.start, self.body = depthwise(), body

        def forward(self, x: Tensor) -> Tensor:
            x = self.start(x)
            return x[:, :, :1, :1] + self.body(x)

    model = Sum().eval()
    fast = dwswap.optimize(model)
    assert fused(fast) == 0
    same(fast(image(8)), model(image(8)))


@pytest.mark.usefixtures("products")
@pytest.mark.parametrize("case", ["input", "output", "read later", "view", "alone"])
def test_the_residual_must_be_spare(case: str) -> None:
    class Sum(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.start, self.body, self.end = depthwise(), pointwise(bias=False), depthwise()

        def forward(self, x: Tensor) -> Tensor:
            y = x if case == "input" else self.start(x)
            if case == "view":
                y = y[:, :, 1:]
            result = y + self.body(self.end(y))
            if case == "read later":
                result = result * y
            return (result, y) if case == "output" else result

    model = Sum().eval()
    fast = dwswap.optimize(model, memory_format="channels_last")
    assert fused(fast) == (case == "alone")
    x = image(8)
    checked = dwswap.optimize(model, x, memory_format="channels_last", verify=True)
    assert fused(checked) == (case == "alone")
    verification = dwswap.report(checked).verification
    assert verification is not None
    assert verification.passed
    with torch.no_grad():
        expected = model(x)
        for own, other in zip(fast(x), expected, strict=True):
            same(own, other)


@pytest.mark.usefixtures("products")
@pytest.mark.parametrize("combine", [torch.add, lambda x, y: y + x, operator.iadd])
def test_the_residual_may_be_what_the_layer_reads(combine: Callable[..., Tensor]) -> None:
    class Sum(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.start, self.body = pointwise(bias=False), pointwise(bias=False)
            self.end = depthwise()

        def forward(self, x: Tensor) -> Tensor:
            x = self.start(x)
            return self.end(combine(x, self.body(x)))

    model = Sum().eval()
    fast = dwswap.optimize(model, memory_format="channels_last")
    assert fused(fast) == 0
    with torch.no_grad():
        same(fast(image(8)), model(image(8)))


@pytest.mark.usefixtures("products")
def test_input_changed_in_between() -> None:
    class Sum(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.start, self.body = depthwise(), pointwise(bias=False)

        def forward(self, x: Tensor) -> Tensor:
            x = self.start(x)
            y = self.body(x)
            return F.relu_(x) + y

    model = Sum().eval()
    fast = dwswap.optimize(model)
    assert fused(fast) == 0
    same(fast(image(8)), model(image(8)))


@pytest.mark.usefixtures("products")
def test_mobilenet() -> None:
    model = build_with_data("mobilenet_v2").double()
    fast = dwswap.optimize(model, memory_format="channels_last")
    assert fused(fast) == 10
    x = torch.rand(2, 3, 64, 64, dtype=torch.float64)
    with torch.no_grad():
        expected = model(x)
        assert float((fast(x) - expected).abs().max() / expected.abs().max()) < 1e-12


class Next(nn.Module):
    """A block as ConvNeXt has it: its linear layers are on ``(N, H, W, C)``."""

    def __init__(self, order: tuple[int, ...] = (0, 3, 1, 2), **options: bool) -> None:
        super().__init__()
        self.conv, self.norm = depthwise(), nn.LayerNorm(8)
        self.expand, self.project = nn.Linear(8, 16), nn.Linear(16, 8, **options)
        self.order = order
        nn.init.uniform_(self.conv.bias, -1, 1)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(self.conv(x).permute(0, 2, 3, 1))
        y = self.project(F.gelu(self.expand(y)))
        return x + torch.permute(y, self.order)


@pytest.mark.usefixtures("products")
def test_linear_layers() -> None:
    model = nn.Sequential(nn.Conv2d(8, 8, 1), Next(), Next(), Next(), nn.PReLU()).eval()
    fast = dwswap.optimize(model, memory_format="channels_last")
    # The last one keeps the biases of all.
    assert fused(fast) == 2
    with torch.no_grad():
        for x in (image(8), image(8).to(memory_format=torch.channels_last), image(8)[:0]):
            for result in (fast, copy.deepcopy(fast), pickle.loads(pickle.dumps(fast))):
                same(result(x), model(x))


@pytest.mark.usefixtures("products")
@pytest.mark.parametrize("order", [(0, 3, 2, 1), (0, 3, -3, 2)])
def test_of_linear_layers_the_image_must_be_meant(order: tuple[int, ...]) -> None:
    model = nn.Sequential(nn.Conv2d(8, 8, 1), Next(order, bias=False), nn.PReLU()).eval()
    fast = dwswap.optimize(model, memory_format="channels_last")
    assert fused(fast) == (order == (0, 3, -3, 2))
    with torch.no_grad():
        same(fast(image(8)), model(image(8)))


@pytest.mark.usefixtures("products")
@pytest.mark.parametrize("norm", [nn.LayerNorm(9), nn.Identity()])
def test_onto_a_normalized_image(norm: nn.Module) -> None:
    model = nn.Sequential(nn.PReLU(), norm, Next(bias=False), nn.PReLU()).eval()
    fast = dwswap.optimize(model, memory_format="channels_last")
    assert fused(fast) == isinstance(norm, nn.LayerNorm)
    with torch.no_grad():
        same(fast(image(8)), model(image(8)))


@pytest.mark.slow
@pytest.mark.usefixtures("products")
def test_convnext() -> None:
    model = models.convnext_tiny(weights=None)
    images = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    randomize(model, images)
    fast = dwswap.optimize(model, memory_format="channels_last")
    # Of each of the four stages the last block keeps the biases.
    assert fused(fast) == 18 - 4
    with torch.no_grad():
        same(fast(images), model(images))
