"""Constant factors after a layer: what is folded, and what must stay."""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from test_fold_batchnorm import Before, changes, optimized
from test_torchvision import models
from test_traps import TaggedTensor
from tiny_models import depthwise, image
from torch import Tensor, nn

import dwswap
from dwswap.bench.random_weights import randomize

PRODUCTS = (operator.mul, torch.mul, torch.ops.aten.mul.Tensor)


class Scaled(nn.Module):
    """``call(factor, layer(x))``, after a depthwise layer."""

    def __init__(
        self,
        layer: nn.Module,
        shape: tuple[int, ...],
        call: Callable[..., Tensor] = torch.mul,
        between: Callable[[Tensor], Tensor] = lambda x: x,
    ) -> None:
        super().__init__()
        self.before, self.layer = Before(), layer
        self.factor = nn.Parameter(torch.rand(shape) - 2)
        self.call, self.between = call, between

    def forward(self, x: Tensor) -> Any:
        return self.call(self.factor, self.between(self.layer(self.before(x))))


def products(fast: Any) -> int:
    return sum(node.target in PRODUCTS for node in fast.graph.nodes)


def last(x: Tensor) -> Tensor:
    return x.permute(0, 2, 3, 1)


class OnLast(nn.Module):
    """A linear layer on ``(N, H, W, C)``."""

    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 6, **options)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(torch.permute(x, [0, 2, 3, 1]))


def first(x: Tensor) -> Tensor:
    return torch.permute(x, (0, 3, 1, 2))


FOLDED: dict[str, Callable[[], nn.Module]] = {
    "layer scale": lambda: Scaled(OnLast(), (6, 1, 1), between=first),
    "layer scale, dropped": lambda: Scaled(
        OnLast(), (6, 1, 1), between=lambda x: F.dropout(first(x), 0.5, False)
    ),
    "no bias": lambda: Scaled(OnLast(bias=False), (6, 1, 1), between=first),
    "there and back": lambda: Scaled(OnLast(), (6,), between=lambda x: last(first(x))),
    "negative dimensions": lambda: Scaled(
        OnLast(), (1, 6, 1, 1), between=lambda x: x.permute(0, -1, 1, -2)
    ),
    "linear": lambda: Scaled(OnLast(), (6,)),
    "dense": lambda: Scaled(nn.Conv2d(8, 6, 3), (6, 1, 1)),
    "mirrored": lambda: Scaled(nn.Conv2d(8, 6, 3), (6, 1, 1), lambda s, x: x * s),
    "one value": lambda: Scaled(nn.Conv2d(8, 6, 3), (1,)),
    "a number": lambda: Scaled(nn.Conv2d(8, 6, 3), ()),
    "one image": lambda: Scaled(
        nn.Sequential(nn.Conv2d(8, 6, 3), nn.BatchNorm2d(6)), (1, 6, 1, 1), between=last_of_four
    ),
    "depthwise": lambda: Scaled(depthwise(multiplier=2), (16, 1, 1)),
    "transposed": lambda: Scaled(nn.ConvTranspose2d(8, 12, 3, groups=4), (12, 1, 1)),
    "BatchNorm first": lambda: Scaled(
        nn.Sequential(nn.Conv2d(8, 6, 1), nn.BatchNorm2d(6)), (6, 1, 1)
    ),
    "twice": lambda: Scaled(nn.Conv2d(8, 6, 3), (6, 1, 1), lambda s, x: s * (s * x)),
}


def last_of_four(x: Tensor) -> Tensor:
    """``x``, with its number of dimensions known."""
    return first(last(x))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", FOLDED)
def test_folded(name: str, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    model = FOLDED[name]().to(dtype)
    fast = optimized(model, image(8).to(dtype))
    assert products(fast) == 0
    found = changes(fast, "scale")
    assert {change.reason for change in found} == {"folded"}
    assert "factor" not in fast.state_dict()
    assert "folded mul" in dwswap.report(fast).render(400)
    with pytest.raises(RuntimeError, match="factor cannot be loaded"):
        fast.load_state_dict(model.state_dict())


def both(scale: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
    return scale * x, x


KEPT: dict[str, tuple[str | None, Callable[[], nn.Module]]] = {
    "other users": ("other_users", lambda: Scaled(nn.Conv2d(8, 6, 3), (6, 1, 1), both)),
    "permuted twice": (None, lambda: Scaled(OnLast(), (6, 1, 1), both, first)),
    "pixels": ("channels", lambda: Scaled(nn.Conv2d(8, 6, 3), (1, 7, 7))),
    "columns": ("channels", lambda: Scaled(nn.Conv2d(8, 6, 3), (7,))),
    "last": ("channels", lambda: Scaled(OnLast(), (7, 6))),
    "broadcast": ("channels", lambda: Scaled(nn.Conv2d(8, 1, 3), (6, 1, 1))),
    "unknown rank": ("rank_unknown", lambda: Scaled(nn.Conv2d(8, 6, 3), (1, 6, 1, 1))),
    "a new dimension": ("rank_unknown", lambda: Scaled(nn.Conv2d(8, 6, 3), (1, 1, 6, 1, 1))),
    "activation": (None, lambda: Scaled(nn.Conv2d(8, 6, 3), (6, 1, 1), between=F.relu)),
    "computed": (None, lambda: Scaled(nn.Conv2d(8, 6, 3), (6, 1, 1), lambda s, x: s.exp() * x)),
    "half": ("dtypes", lambda: _with_factor(lambda t: t.double())),
    "subclass": ("tensor_subclass", lambda: _with_factor(lambda t: t.as_subclass(TaggedTensor))),
    "range": ("not_representable", lambda: _with_factor(lambda t: t * 1e-40)),
    "changed": (
        "changed_in_graph",
        lambda: Scaled(nn.Conv2d(8, 6, 3), (6, 1, 1), lambda s, x: s * x + s.detach().add_(1)),
    ),
}


def _with_factor(change: Callable[[Tensor], Tensor]) -> nn.Module:
    model = Scaled(nn.Conv2d(8, 6, 3), (6, 1, 1))
    model.factor = nn.Parameter(change(model.factor.detach()))
    return model


@pytest.mark.parametrize("name", KEPT)
def test_stays(name: str) -> None:
    reason, make = KEPT[name]
    torch.manual_seed(0)
    fast = dwswap.optimize(make().eval())
    assert [change.reason for change in changes(fast, "scale")] == [reason] * (reason is not None)
    assert products(fast) == 1
    assert "factor" in fast.state_dict()


def test_a_shared_layer_keeps_its_weights_for_the_other_call() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.before, self.layer = Before(), nn.Conv2d(8, 8, 1)
            self.factor = nn.Parameter(torch.rand(8, 1, 1))

        def forward(self, x: Tensor) -> Tensor:
            x = self.factor * self.layer(self.before(x))
            return self.factor * self.layer(F.relu(x)) + self.layer(x).relu()

    fast = optimized(Twice(), image(8))
    assert products(fast) == 0
    # The two calls with the factor share their new weights.
    names = list(fast.state_dict())
    folded = [name for name in names if "folded" in name]
    assert folded == ["layer_folded.weight", "layer_folded.bias"]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    model = Scaled(OnLast(), (6, 1, 1), between=first).to(dtype).eval()
    x = image(8).to(dtype)
    fast = dwswap.optimize(model)
    assert products(fast) == 0
    with torch.no_grad():
        exact = model.double()(x.double())
        error = (fast(x).double() - exact).abs().max()
    assert error <= 4 * torch.finfo(dtype).eps * exact.abs().max()


def test_explain_makes_no_weights() -> None:
    report = dwswap.explain(Scaled(nn.Conv2d(8, 6, 3), (6, 1, 1)).eval())
    assert [c.reason for layer in report.layers for c in layer.changes if c.kind == "scale"] == [
        "folded"
    ]


@pytest.mark.slow
def test_convnext() -> None:
    model = models.convnext_tiny(weights=None)
    images = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    randomize(model, images)
    fast = optimized(model, images)
    assert products(fast) == 0
    assert len(changes(fast, "scale")) == 18
    assert "folded 0 BatchNorm and 18 factors" in str(dwswap.report(fast))
