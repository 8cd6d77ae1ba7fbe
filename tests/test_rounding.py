"""How folded weights are rounded: next to the exact ones, and without a shift of means."""

from __future__ import annotations

import copy
import importlib
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from tiny_models import depthwise
from torch import Tensor, nn

import dwswap
from dwswap.bench.random_weights import randomize
from dwswap.passes.rounding import Moments, rounded

folding = importlib.import_module("dwswap.passes.folding")
push_bias = importlib.import_module("dwswap.passes.push_bias")

HALF = [torch.float16, torch.bfloat16]


def spacing(exact: Tensor, dtype: torch.dtype) -> Tensor:
    """Of the values of ``dtype`` around ``exact``, in float64."""
    info = torch.finfo(dtype)
    size = exact.abs().clamp_min(info.smallest_normal)
    return torch.exp2(size.log2().floor()) * info.eps


def moments(channels: int, low: float = 0.2) -> Moments:
    generator = torch.Generator().manual_seed(5)
    mean = low + torch.rand(channels, generator=generator, dtype=torch.float64)
    return Moments(mean, torch.full_like(mean, 0.5))


def layer(*shape: int, channels: int | None = None) -> list[Tensor]:
    torch.manual_seed(3)
    weight = torch.randn(shape, dtype=torch.float64)
    return [weight, torch.randn(channels or shape[0], dtype=torch.float64)]


def moved(new: list[Tensor], exact: list[Tensor], mean: Tensor) -> Tensor:
    """What the mean outputs of a layer without groups, ``(out, in, *taps)``, are off by."""
    weight, bias = (a.double() - b for a, b in zip(new, exact, strict=True))
    return weight.view(*weight.shape[:2], -1).sum(2) @ mean + bias


def nearest(exact: Any, dtype: torch.dtype, *_: Any) -> list[Tensor]:
    return [tensor.to(dtype) for tensor in exact]


# --- one layer ----------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("scale", [1.0, 1e-6, 3e-39])
def test_every_weight_is_one_of_its_two_neighbours(dtype: torch.dtype, scale: float) -> None:
    exact = [t * scale for t in layer(40, 30, 3, 3)]
    new = rounded(exact, dtype, moments(30))
    assert [t.dtype for t in new] == [dtype, dtype]
    assert torch.equal(new[1], exact[1].to(dtype))
    error = (new[0].double() - exact[0]).abs()
    assert (error <= spacing(exact[0], dtype)).all()
    flips = (new[0] != exact[0].to(dtype)).double().mean()
    assert flips < 0.1


@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("columns", [(64,), (96, 1, 1), (16, 3, 3), (600,)])
def test_the_mean_output_stays(dtype: torch.dtype, columns: tuple[int, ...]) -> None:
    exact, expected = layer(50, *columns), moments(columns[0])
    new = rounded(exact, dtype, expected)
    before = moved(nearest(exact, dtype), exact, expected.mean)
    after = moved(new, exact, expected.mean)
    assert after.norm() < 0.15 * before.norm()
    assert (after.abs() <= before.abs() + 1e-12).all()


@pytest.mark.parametrize(("dtype", "scale"), [(torch.float16, 1e-6), (torch.bfloat16, 1e-39)])
def test_subnormal_weights(dtype: torch.dtype, scale: float) -> None:
    exact, expected = [t * scale for t in layer(50, 64)], moments(64)
    exact[1] = exact[1].to(dtype).double()
    after = moved(rounded(exact, dtype, expected), exact, expected.mean)
    assert after.norm() < 0.2 * moved(nearest(exact, dtype), exact, expected.mean).norm()


def test_the_weights_make_up_for_the_rounding_of_the_bias() -> None:
    exact, expected = layer(50, 64), moments(64)
    exact[1] *= 8
    new = rounded(exact, torch.float16, expected)
    bias = (new[1].double() - exact[1]).norm()
    assert moved(new, exact, expected.mean).norm() < 0.2 * bias
    alone = rounded(exact[:1], torch.float16, expected)
    assert moved([*alone, new[1]], exact, expected.mean).norm() > 0.8 * bias


def test_no_more_is_flipped_than_the_mean_is_worth() -> None:
    """Of what is 0 on the average, flips would only make the errors larger."""
    exact = layer(50, 64)
    small = Moments(torch.full((64,), 1e-4, dtype=torch.float64), torch.ones(64).double())
    new = rounded(exact, torch.float16, small)
    square, other = ((t.double() - exact[0]).square().sum() for t in (new[0], exact[0].half()))
    assert square <= 1.01 * other


@pytest.mark.parametrize("dtype", HALF)
def test_without_known_means_the_errors_of_an_output_add_up_to_nothing(dtype: torch.dtype) -> None:
    exact = layer(50, 8, 3, 3)
    new = rounded(exact, dtype)
    sums, before = ((t.double() - exact[0]).flatten(1).sum(1) for t in (new[0], exact[0].to(dtype)))
    assert sums.norm() < 0.15 * before.norm()
    broken = Moments(torch.full((8,), math.nan).double(), torch.full((8,), math.inf).double())
    assert rounded(exact, dtype, broken)[0].isfinite().all()


def test_one_mean_for_all_channels() -> None:
    exact = layer(50, 64)
    half = torch.tensor(0.5, dtype=torch.float64)
    alike = Moments(half.expand(64), half.expand(64))
    assert torch.equal(
        rounded(exact, torch.float16, Moments(half, half))[0],
        rounded(exact, torch.float16, alike)[0],
    )


@pytest.mark.parametrize("groups", [1, 2, 4])
@pytest.mark.parametrize("transposed", [False, True])
def test_groups(groups: int, transposed: bool) -> None:
    """As the layers of each group alone."""
    exact = layer(*((64, 12, 3, 3) if transposed else (48, 64 // groups, 3, 3)))
    out = 12 * groups if transposed else 48
    exact[1] = torch.randn(out, dtype=torch.float64)
    expected = moments(64)
    new = rounded(exact, torch.float16, expected, groups, transposed)
    assert new[0].shape == exact[0].shape
    for i in range(groups):
        weight = exact[0].chunk(groups)[i]
        weight = weight.transpose(0, 1) if transposed else weight
        mean, deviation = (t.chunk(groups)[i] for t in (expected.mean, expected.deviation))
        part = [weight, exact[1].chunk(groups)[i]]
        alone = rounded(part, torch.float16, Moments(mean, deviation))[0]
        found = new[0].chunk(groups)[i]
        assert torch.equal(found.transpose(0, 1) if transposed else found, alone)
    assert not torch.equal(new[0], exact[0].half())


@pytest.mark.parametrize("multiplier", [1, 3])
def test_depthwise(multiplier: int) -> None:
    exact, expected = layer(32 * multiplier, 1, 5, 5), moments(32)
    new = rounded(exact, torch.float16, expected, 32)
    mean = expected.mean.repeat_interleave(multiplier)

    def off(tensors: list[Tensor]) -> Tensor:
        weight, bias = (a.double() - b for a, b in zip(tensors, exact, strict=True))
        return weight.flatten(1).sum(1) * mean + bias

    assert off(new).norm() < 0.3 * off(nearest(exact, torch.float16)).norm()


def test_what_is_left_to_the_nearest_value() -> None:
    exact = layer(50, 64)
    for dtype in (torch.float32, torch.float64):
        assert torch.equal(rounded(exact, dtype, moments(64))[0], exact[0].to(dtype))
    held = [t.half().double() for t in exact]
    assert torch.equal(rounded(held, torch.float16, moments(64))[0], held[0].half())
    assert rounded([t.to("meta") for t in exact], torch.float16, moments(64))[0].is_meta
    assert rounded([exact[0][:, :0], exact[1]], torch.float16)[0].shape == (50, 0)


def test_no_weight_becomes_infinite() -> None:
    largest = torch.finfo(torch.float16).max
    exact = [torch.full((4, 64), largest + 10, dtype=torch.float64)]
    assert torch.equal(rounded(exact, torch.float16)[0], torch.full((4, 64), largest).half())


def test_strides_stay_and_results_repeat() -> None:
    exact = layer(16, 8, 3, 3)
    image = [exact[0].to(memory_format=torch.channels_last), exact[1]]
    new = rounded(image, torch.float16, moments(8))
    assert new[0].is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(new[0], rounded(exact, torch.float16, moments(8))[0])


# --- models -------------------------------------------------------------------------------------


def error(model: nn.Module, x: Tensor, exact: Tensor) -> Tensor:
    """Of the folded weights and biases alone: what they compute in float64."""
    with torch.no_grad():
        return dwswap.optimize(model).double()(x) - exact


@pytest.mark.parametrize("activation", [nn.ReLU, nn.Identity])
@pytest.mark.parametrize(
    "behind",
    [
        lambda: nn.Conv2d(64, 24, 1),
        lambda: nn.Conv2d(64, 24, 3, groups=2, bias=False),
        lambda: nn.ConvTranspose2d(64, 24, 3, 3, groups=2),
    ],
    ids=["pointwise", "groups", "transposed"],
)
def test_the_mean_of_what_a_small_net_gives(
    behind: Callable[[], nn.Module],
    activation: Callable[[], nn.Module],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    torch.manual_seed(0)
    first = (nn.Conv2d(3, 64, 3), nn.BatchNorm2d(64), nn.ReLU())
    second = (depthwise(64, padding=0), nn.BatchNorm2d(64), activation())
    model = nn.Sequential(*first, *second, behind(), nn.BatchNorm2d(24))
    x = torch.randn(8, 3, 24, 24)
    randomize(model, x)
    with torch.no_grad():
        model[4].bias.uniform_(0.5, 1.5)
        model[7].running_mean.zero_()
        model[7].bias.mul_(8)  # whose rounding is the larger part of what is to be made up for
    x, model = x.half().double(), model.half()
    with torch.no_grad():
        exact = copy.deepcopy(model).double()(x)
    after = error(model, x, exact)
    monkeypatch.setattr(folding, "rounded", nearest)
    before = error(model, x, exact)
    assert after.mean((0, 2, 3)).norm() < 0.5 * before.mean((0, 2, 3)).norm()
    assert after.norm() < before.norm()


def test_shufflenet(monkeypatch: pytest.MonkeyPatch) -> None:
    torchvision = pytest.importorskip("torchvision")
    torch.manual_seed(0)
    model = torchvision.models.shufflenet_v2_x0_5()
    randomize(model, torch.randn(4, 3, 128, 128))
    model, x = model.half(), torch.randn(4, 3, 128, 128).half().double()
    with torch.no_grad():
        exact = copy.deepcopy(model).double()(x)
    after = error(model, x, exact).norm()
    monkeypatch.setattr(folding, "rounded", nearest)
    assert after < 0.8 * error(model, x, exact).norm()


def of_linear_layers() -> tuple[nn.Module, Tensor, Tensor]:
    """A projection whose bias moves into the layer behind it; an input and its exact output."""
    torch.manual_seed(0)
    first = (nn.Conv2d(3, 64, 3), nn.BatchNorm2d(64), nn.ReLU())
    projection = (depthwise(64, padding=0), nn.BatchNorm2d(64), nn.ReLU(), nn.Conv2d(64, 24, 1))
    expansion = (nn.BatchNorm2d(24), nn.Conv2d(24, 96, 1), nn.BatchNorm2d(96))
    model = nn.Sequential(*first, *projection, *expansion)
    x = torch.randn(8, 3, 24, 24)
    randomize(model, x)
    with torch.no_grad():
        model[7].bias.mul_(40)
    x, model = x.half().double(), model.half()
    with torch.no_grad():
        return model, x, copy.deepcopy(model).double()(x)


def test_weights_make_up_for_the_rounding_of_pushed_biases(monkeypatch: pytest.MonkeyPatch) -> None:
    model, x, exact = of_linear_layers()
    after = error(model, x, exact)
    monkeypatch.setattr(push_bias, "exact_tensors", lambda *_: {})
    before = error(model, x, exact)
    assert after.mean((0, 2, 3)).norm() < 0.5 * before.mean((0, 2, 3)).norm()
    assert after.norm() < before.norm()


def test_a_weight_that_another_call_reads_is_rounded_once() -> None:
    """The same block twice: the second call has another bias to make up for."""

    class Twice(nn.Module):
        def __init__(self, model: nn.Module) -> None:
            super().__init__()
            self.first, self.rest = model[:7], model[7:]

        def forward(self, x: Tensor) -> Tensor:
            y = self.first(x)
            return self.rest(y) + self.rest(2 * y)

    model, x, _ = of_linear_layers()
    twice = Twice(model)
    with torch.no_grad():
        exact = copy.deepcopy(twice).double()(x)
        fast: Any = dwswap.optimize(twice)
        found = fast.double()(x)
    assert (found - exact).abs().max() < 4 * torch.finfo(torch.float16).eps * exact.abs().max()
