"""Weights of classifiers are laid out for few rows, and nothing else is."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from tiny_models import depthwise, image
from torch import Tensor, nn

import dwswap


@pytest.fixture(autouse=True)
def suits(monkeypatch: pytest.MonkeyPatch) -> None:
    """As in half precision on a GPU."""
    monkeypatch.setattr("dwswap.passes.pointwise_call.suits", lambda tensor: True)


class Classifier(nn.Module):
    """What ``head`` makes of a vector of 8 for each image."""

    def __init__(self, head: nn.Module) -> None:
        super().__init__()
        self.conv, self.head = depthwise(), head

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.flatten(F.adaptive_avg_pool2d(self.conv(x), 1), 1))


class Tied(nn.Module):
    """Two layers of one weight."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(8, 8), nn.Linear(8, 8, bias=False)
        self.second.weight = self.first.weight
        self.between = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.between(self.first(x)))


class Functional(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(5, 8))

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight)


class ReadElsewhere(nn.Module):
    """A view that the other layout forbids."""

    def __init__(self, read: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.linear, self.read = nn.Linear(8, 5), read

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x) + self.read(self.linear.weight)


class OfEmbedding(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.linear = nn.Embedding(5, 8), nn.Linear(8, 5)
        self.linear.weight = self.embedding.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x + self.embedding(torch.zeros(1, dtype=torch.long)))


class OnPixels(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.linear = depthwise(), nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(self.conv(x).permute(0, 2, 3, 1))


def laid_out(model: nn.Module) -> dict[str, bool]:
    """Whether the outputs of an input are side by side, of every weight that is a matrix."""
    state = model.state_dict()
    return {k: v.stride() == (1, v.shape[0]) for k, v in state.items() if v.dim() == 2}


LAID_OUT: dict[str, Callable[[], nn.Module]] = {
    "linear": lambda: Classifier(nn.Linear(8, 5)),
    "no bias": lambda: Classifier(nn.Linear(8, 5, bias=False)),
    "several": lambda: Classifier(nn.Sequential(nn.Linear(8, 6), nn.ReLU(), nn.Linear(6, 5))),
    "tied": lambda: Classifier(Tied()),
    "function": lambda: Classifier(Functional()),
}
LEFT: dict[str, Callable[[], nn.Module]] = {
    "pixels": OnPixels,
    "view": lambda: Classifier(ReadElsewhere(lambda w: w.view(-1)[:5])),
    "embedding": lambda: Classifier(OfEmbedding()),
}


def built(make: Callable[[], nn.Module]) -> nn.Module:
    torch.manual_seed(0)
    return make().eval()


@pytest.mark.parametrize("make", LAID_OUT.values(), ids=LAID_OUT)
def test_lays_out(make: Callable[[], nn.Module]) -> None:
    model, x = built(make), image(8)
    before = {name: value.stride() for name, value in model.state_dict().items()}
    fast: Any = dwswap.optimize(model)
    found = laid_out(fast)
    assert found
    assert all(found.values()), found
    with torch.no_grad():
        torch.testing.assert_close(fast(x), model(x))
    assert set(fast.state_dict()) == set(before)
    for name, value in model.state_dict().items():
        assert value.stride() == before[name]
        assert torch.equal(fast.state_dict()[name], value)


@pytest.mark.parametrize("make", LEFT.values(), ids=LEFT)
def test_leaves(make: Callable[[], nn.Module]) -> None:
    model, x = built(make), image(8)
    fast = dwswap.optimize(model)
    assert not any(laid_out(fast).values())
    with torch.no_grad():
        torch.testing.assert_close(fast(x), model(x))


def test_lays_out_what_reads_means(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whose number of dimensions only the call tells, as in ShuffleNet."""
    monkeypatch.setattr("dwswap.passes.absorbing.has_kernels", lambda tensor: True)

    class Means(Classifier):
        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.last(self.conv(x)).relu().mean([2, 3]))

    model = Means(nn.Linear(8, 5))
    model.last = nn.Conv2d(8, 8, 1)
    fast = dwswap.optimize(model.eval())
    assert laid_out(fast) == {"head.weight": True}
    with torch.no_grad():
        torch.testing.assert_close(fast(image(8)), model(image(8)))


def test_leaves_what_does_not_suit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    fast = dwswap.optimize(built(LAID_OUT["linear"]))
    assert not any(laid_out(fast).values())


def test_tied_weights_stay_tied() -> None:
    fast: Any = dwswap.optimize(built(LAID_OUT["tied"]))
    assert fast.head.first.weight is fast.head.second.weight


def test_the_layout_outlives_copies_and_files() -> None:
    model = built(LAID_OUT["linear"])
    fast = dwswap.optimize(model)
    assert all(laid_out(copy.deepcopy(fast)).values())
    file = io.BytesIO()
    torch.save(fast, file)
    file.seek(0)
    loaded = torch.load(file, weights_only=False)
    assert all(laid_out(loaded).values())
    other = built(lambda: Classifier(nn.Linear(8, 5)))
    with torch.no_grad():
        other.head.weight.mul_(2)
        loaded.load_state_dict(other.state_dict())
        assert all(laid_out(loaded).values())
        torch.testing.assert_close(loaded(image(8)), other(image(8)))
