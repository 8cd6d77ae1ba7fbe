"""What returns its input as it is leaves the graph."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from test_absorb_activation import Apply
from test_torchvision import models
from tiny_models import depthwise, image
from torch import fx, nn

import dwswap
from dwswap.passes.count_calls import does_nothing

GONE: dict[str, Callable[[], nn.Module]] = {
    "dropout": nn.Dropout,
    "by channels": lambda: nn.Dropout2d(0.3),
    "identity": nn.Identity,
    "function": lambda: Apply(lambda x: F.dropout(x, 0.5, False)),
    "keyword": lambda: Apply(lambda x: F.dropout(x, training=False)),
}


def left(fast: Any) -> int:
    assert isinstance(fast, fx.GraphModule)
    return sum(does_nothing(fast, node) for node in fast.graph.nodes)


def check(model: nn.Module, count: int, **options: Any) -> Any:
    model = model.eval()
    fast = dwswap.optimize(model, **options)
    assert left(fast) == count
    x = image(8)
    with torch.no_grad():
        for result in (fast, copy.deepcopy(fast)):
            torch.testing.assert_close(result(x), model(x))
    return fast


@pytest.mark.parametrize("name", GONE)
def test_gone(name: str) -> None:
    fast = check(nn.Sequential(depthwise(), GONE[name](), nn.PReLU()), 0)
    assert [*fast.state_dict()] == ["0.weight", "0.bias", "2.weight"]


def test_stochastic_depth() -> None:
    from torchvision.ops import StochasticDepth

    check(nn.Sequential(depthwise(), StochasticDepth(0.2, "row"), nn.PReLU()), 0)


def test_the_activation_behind_is_absorbed() -> None:
    fast = check(nn.Sequential(depthwise(), nn.Dropout(), nn.ReLU()), 0)
    assert len(fast.graph.find_nodes(op="call_module")) == 0


def _hooked() -> nn.Module:
    module = nn.Identity()
    module.register_forward_hook(lambda module, args, output: output + 1)
    return module


@pytest.mark.parametrize(
    ("module", "stay"),
    [
        (lambda: nn.Sequential(_hooked(), nn.PReLU()), 1),  # a call that does something
        (nn.Dropout, 1),  # what is returned
        (lambda: nn.Sequential(Apply(lambda x: F.dropout(x, 0.0)), nn.PReLU()), 0),  # in train mode
    ],
)
def test_stays(module: Callable[[], nn.Module], stay: int) -> None:
    check(nn.Sequential(depthwise(), module()), stay)


@pytest.mark.usefixtures("products")
def test_residual_sums_behind_stochastic_depth() -> None:
    from dwswap.pointwise import pointwise_residual

    model = models.efficientnet_b0(weights=None).eval()
    fast = dwswap.optimize(model, memory_format="channels_last")
    assert left(fast) == 0
    assert len(fast.graph.find_nodes(op="call_function", target=pointwise_residual)) == 9
