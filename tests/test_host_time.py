"""The host's share of a call: what makes it short, and what must stay as it was nevertheless."""

from __future__ import annotations

import pytest
import torch
from tiny_models import depthwise, image
from torch import Tensor, fx, nn

import dwswap
from dwswap.inference_graph import InferenceGraph


class Functional(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Sequential(depthwise())
        self.register_buffer("shift", torch.ones(1))

    def forward(self, x: Tensor) -> Tensor:
        weight = self.inner[0].weight
        return torch.conv2d(self.inner(x), weight, padding=1, groups=8) + self.shift


def nested() -> nn.Module:
    return nn.Sequential(nn.Sequential(depthwise(), nn.ReLU()), Functional()).eval()


# --- the code of graphs --------------------------------------------------------------------------


def test_graphs_find_modules_without_getattr():
    model = nested()
    fast = dwswap.optimize(model)
    assert isinstance(fast, InferenceGraph)
    assert 'self._modules["0"]._modules["1"](' in fast.code
    assert 'self._modules["1"]._modules["inner"]._modules["0"].weight' in fast.code
    assert "getattr" not in fast.code
    x = image(8)
    torch.testing.assert_close(fast(x), model(x), rtol=0, atol=1e-6)


def test_what_replaces_a_module_or_a_parameter_is_found():
    fast = dwswap.optimize(nested())
    x = image(8)
    before = fast(x)
    fast.get_submodule("0").add_module("1", nn.Tanh())
    after = fast(x)
    assert not torch.equal(before, after)
    inner = fast.get_submodule("1.inner.0")
    inner.weight = nn.Parameter(torch.zeros_like(inner.weight))
    assert not torch.equal(after, fast(x))
    # Where a parametrization or a replica of DataParallel has its parameters.
    weight = inner.weight.detach()
    del inner.weight
    inner.weight = weight
    assert fast(x).shape == before.shape


def test_a_transformer_of_the_user_runs_first_and_once():
    fast = dwswap.optimize(nested())
    seen = []

    def transformer(body):
        seen.append("getattr(" in "".join(body))
        return body

    with fast.graph.on_generate_code(lambda _: transformer):
        fast.recompile()
    assert seen == [True]
    assert "getattr" not in fast.code
    fast.recompile()
    assert seen == [True]


@pytest.mark.filterwarnings("ignore")
def test_shortened_graphs_compile_and_trace():
    fast = dwswap.optimize(nested())
    x = image(8)
    expected = fast(x)
    for other in (
        torch.compile(fast, fullgraph=True, backend="eager"),
        torch.export.export(fast, (x,)).module(),
        fx.symbolic_trace(fast),
        fx.Transformer(fast).transform(),
    ):
        torch.testing.assert_close(other(x), expected, rtol=0, atol=1e-6)
