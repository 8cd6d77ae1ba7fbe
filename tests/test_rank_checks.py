"""BatchNorm with a forward of its own, which checks how many dimensions its input has."""

from __future__ import annotations

import operator
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from tiny_models import depthwise, image
from torch import Tensor, fx, nn

import dwswap
from dwswap.bench.random_weights import randomize


class NormAct(nn.BatchNorm2d):
    """As timm's ``BatchNormAct2d``."""

    def __init__(self, channels: int, act: nn.Module | None = None, rank: int = 4) -> None:
        super().__init__(channels)
        self.act, self.rank = act or nn.ReLU6(), rank
        nn.init.uniform_(self.running_mean, -1, 1)
        nn.init.uniform_(self.running_var, 0.5, 2)

    def forward(self, x: Tensor) -> Tensor:
        torch._assert(x.ndim == self.rank, f"expected 4D input (got {x.ndim}D input)")
        x = F.batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias)
        return self.act(x)


class Residual(nn.Module):
    """An inverted residual with squeeze-and-excitation."""

    def __init__(self) -> None:
        super().__init__()
        self.expand, self.first = nn.Conv2d(8, 16, 1, bias=False), NormAct(16)
        self.depthwise, self.second = depthwise(16, bias=False), NormAct(16)
        self.reduce, self.grow = nn.Conv2d(16, 4, 1), nn.Conv2d(4, 16, 1)
        self.project, self.third = nn.Conv2d(16, 8, 1, bias=False), NormAct(8, nn.Identity())

    def forward(self, x: Tensor) -> Tensor:
        y = self.second(self.depthwise(self.first(self.expand(x))))
        y = y * self.grow(F.relu(self.reduce(y.mean((2, 3), keepdim=True)))).sigmoid()
        y = self.third(self.project(y))
        y += x
        return y


def checks(fast: nn.Module) -> list[str]:
    """What is checked."""
    assert isinstance(fast, fx.GraphModule)
    found = fast.graph.find_nodes(op="call_function", target=torch._assert)
    return [node.args[0].args[0].args[0].name for node in found]


def folds(fast: nn.Module) -> int:
    layers = dwswap.report(fast).layers
    return sum(c.kind == "batchnorm" and c.done for layer in layers for c in layer.changes)


@torch.no_grad()
def test_norms_are_folded_and_the_input_is_checked_once() -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 3), NormAct(8), Residual(), Residual())
    x = image(3)
    randomize(model, x)
    fast = dwswap.optimize(model)
    assert dwswap.report(fast).mode == "graph"
    assert folds(fast) == 7
    assert checks(fast) == ["input_1"]
    assert not fast.graph.find_nodes(op="call_function", target=F.batch_norm)
    assert all(node.users or node.target is torch._assert for node in list(fast.graph.nodes)[:-1])
    torch.testing.assert_close(fast(x), model(x), rtol=1e-4, atol=1e-4)
    for each in (model, fast):
        with pytest.raises(AssertionError, match=r"4D input|input_1 must have 4 dimensions"):
            each(x[0])


@torch.no_grad()
def test_an_activation_behind_the_norm_is_absorbed() -> None:
    model = nn.Sequential(depthwise(), NormAct(8)).eval()
    fast = dwswap.optimize(model)
    (layer,) = dwswap.report(fast).layers
    assert {(c.kind, c.reason) for c in layer.changes} == {
        ("batchnorm", "folded"),
        ("activation", "absorbed"),
    }
    torch.testing.assert_close(fast(image(8)), model(image(8)))


class Reshaped(nn.Module):
    """A number of dimensions that follows from no other value."""

    def __init__(self, reshape: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.reshape, self.depthwise, self.norm = reshape, depthwise(), NormAct(8)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.depthwise(self.reshape(x)))


@pytest.mark.parametrize(
    ("reshape", "checked"),
    [
        (lambda x: x.unflatten(1, (8, 1)).flatten(1, 2), "flatten"),
        (lambda x: x.mean((2, 3))[..., None, None], "getitem"),
        (lambda x: operator.matmul(x, x), "matmul"),
        (torch.sigmoid, "x"),
        (lambda x: x + 2, "x"),
    ],
)
@torch.no_grad()
def test_what_is_checked(reshape: Callable[[Tensor], Tensor], checked: str) -> None:
    model = Reshaped(reshape).eval()
    fast = dwswap.optimize(model)
    assert checks(fast) == [checked]
    assert folds(fast) == 1
    torch.testing.assert_close(fast(image(8)), model(image(8)))


class Sums(nn.Module):
    """A sum has as many dimensions as the larger of two values."""

    def __init__(self) -> None:
        super().__init__()
        self.depthwise, self.norm = depthwise(), NormAct(8)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return self.norm(self.depthwise(x + y))


@torch.no_grad()
def test_a_sum_of_two_values_is_checked_itself() -> None:
    model = Sums().eval()
    fast = dwswap.optimize(model)
    assert checks(fast) == ["add"]
    torch.testing.assert_close(fast(image(8), image(8)[0]), model(image(8), image(8)[0]))


@torch.no_grad()
def test_a_check_that_never_holds() -> None:
    model = nn.Sequential(depthwise(), NormAct(8, rank=5)).eval()
    fast = dwswap.optimize(model)
    assert folds(fast) == 0
    for each in (model, fast):
        with pytest.raises(AssertionError):
            each(image(8))


def test_other_checks_stay() -> None:
    class Checked(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.depthwise, self.norm = depthwise(), nn.BatchNorm2d(8)

        def forward(self, x: Tensor) -> Tensor:
            y = self.depthwise(x)
            torch._assert(y.shape[1] == 8, "channels")
            return self.norm(y)

    fast = dwswap.optimize(Checked().eval())
    assert len(fast.graph.find_nodes(op="call_function", target=torch._assert)) == 1
    assert folds(fast) == 0


@torch.no_grad()
def test_norms_that_are_no_batch_norm_stay_whole() -> None:
    class Own(nn.BatchNorm2d):
        def forward(self, x: Tensor) -> Tensor:
            if x.sum() > 0:
                return super().forward(x)
            return x

    model = nn.Sequential(depthwise(), Own(8), nn.ReLU()).eval()
    fast = dwswap.optimize(model)
    assert dwswap.report(fast).mode == "graph"
    assert type(fast.get_submodule("1")) is Own
    torch.testing.assert_close(fast(image(8)), model(image(8)))


@torch.no_grad()
@pytest.mark.parametrize(
    "name",
    [
        pytest.param("mobilenetv2_050", marks=pytest.mark.slow),
        pytest.param("efficientnet_lite0", marks=pytest.mark.slow),
        "mobilenetv3_small_050",
        "lcnet_050",
    ],
)
def test_timm(name: str) -> None:
    timm = pytest.importorskip("timm")
    model = timm.create_model(name).eval()
    x = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    randomize(model, x)
    fast = dwswap.optimize(model)
    norms = sum(isinstance(module, nn.BatchNorm2d) for module in model.modules())
    assert folds(fast) == norms
    assert checks(fast) == ["x"]
    torch.testing.assert_close(fast(x), model(x), rtol=1e-3, atol=1e-3)


@torch.no_grad()
def test_a_norm_that_saves_its_state_in_its_own_way_stays_whole() -> None:
    class Saving(NormAct):
        def _save_to_state_dict(self, *args: object, **options: object) -> None:
            super()._save_to_state_dict(*args, **options)

    model = nn.Sequential(depthwise(), Saving(8), nn.ReLU()).eval()
    fast = dwswap.optimize(model)
    assert dwswap.report(fast).mode == "graph"
    assert folds(fast) == 0
    torch.testing.assert_close(fast(image(8)), model(image(8)))
