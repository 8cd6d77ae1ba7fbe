"""In which layout code that Inductor generates calls the operators."""

from __future__ import annotations

import copy
import importlib
import subprocess
import sys
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch._inductor.config
from torch import Tensor, nn

import dwswap
from dwswap import backward, registration
from dwswap.backend import compile_graph
from dwswap.inductor_layouts import prefer_channels_last
from dwswap.layouts import memory_format

LAYOUTS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}


class Blocks(nn.Module):
    """What Inductor computes itself is in front of both convolutions, and behind the second."""

    def __init__(self) -> None:
        super().__init__()
        self.point = nn.Conv2d(4, 8, 1)
        self.first = nn.Conv2d(8, 8, 3, padding=1, groups=8)
        self.norm = nn.BatchNorm2d(8)
        self.second = nn.Conv2d(8, 8, 3, stride=2, groups=8)

    def forward(self, x: Tensor) -> Tensor:
        y = self.first(self.point(x).exp())
        return self.second((self.norm(y) + y).sin()).mean((2, 3))


@pytest.fixture
def layouts(monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, list[torch.memory_format]]]:
    """Of the images that the operators and their backwards get."""
    seen: dict[str, list[torch.memory_format]] = {}

    def watch(module: Any, name: str, key: str, images: int) -> None:
        plain, seen[key] = getattr(module, name), []

        def watched(*args: Any) -> Any:
            if not args[0].is_meta:
                seen[key] += map(memory_format, args[:images])
            return plain(*args)

        monkeypatch.setattr(module, name, watched)

    watch(registration, "_forward_aten", "forward", 1)
    watch(backward, "backward_aten", "backward", 2)
    norm = importlib.import_module("dwswap.batch_norm")  # which has a function of its name
    watch(norm, "_forward_aten", "norm", 1)
    watch(norm, "_backward_aten", "norm backward", 2)
    torch._dynamo.reset()
    with torch._inductor.config.patch(force_disable_caches=True):  # what is cached is not lowered
        yield seen
    torch._dynamo.reset()


@pytest.mark.parametrize(
    ("traced", "optimized", "called"),
    [
        ("channels_last", False, "channels_last"),
        pytest.param("contiguous", True, "channels_last", marks=pytest.mark.slow),
        pytest.param("contiguous", False, "contiguous", marks=pytest.mark.slow),
    ],
)
@pytest.mark.parametrize("train", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_layouts_are_those_of_the_convolutions_around(
    traced: str, optimized: bool, called: str, train: bool, layouts: dict[str, list[Any]]
) -> None:
    torch.manual_seed(0)
    model = Blocks().to(memory_format=LAYOUTS[traced]).train(train)
    x = torch.randn(2, 4, 9, 8).contiguous(memory_format=LAYOUTS[traced])
    expected = model(x)
    options = {"layout_optimization": optimized, "force_layout_optimization": optimized}
    fast = torch.compile(dwswap.optimize(model, fuse=False), options=options)
    with torch.set_grad_enabled(train):
        y = fast(x)
    torch.testing.assert_close(y, expected)
    assert layouts["forward"] == [LAYOUTS[called]] * 2
    if train:
        expected.pow(2).sum().backward()
        gradients = [parameter.grad.clone() for parameter in model.parameters()]
        model.zero_grad()
        y.pow(2).sum().backward()
        ours = [parameter.grad for parameter in fast.parameters()]
        torch.testing.assert_close(ours, gradients)
        assert layouts["backward"] == [LAYOUTS[called]] * 4


@pytest.mark.slow
@pytest.mark.parametrize("preferred", [True, False])
@pytest.mark.usefixtures("norm_calls")
def test_batch_norm_of_the_backend(preferred: bool, layouts: dict[str, list[Any]]) -> None:
    torch.manual_seed(0)
    model, x = Blocks(), torch.randn(2, 4, 9, 8)
    fast = torch.compile(copy.deepcopy(model), backend=compile_graph)
    with torch._inductor.config.patch(
        layout_optimization=preferred, force_layout_optimization=preferred
    ):
        for each in (fast, model):
            each(x).pow(2).sum().backward()
    for ours, theirs in zip(fast.parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad)
    called = torch.channels_last if preferred else torch.contiguous_format
    counts = {"forward": 2, "backward": 4, "norm": 1, "norm backward": 2}
    assert layouts == {key: [called] * count for key, count in counts.items()}


def test_inductor_is_not_imported_for_it() -> None:
    code = (
        "import sys, torch, dwswap; from torch._subclasses.fake_tensor import FakeTensorMode\n"
        "with FakeTensorMode():\n"
        "    x = torch.empty(1, 4, 5, 5)\n"
        "    assert dwswap.depthwise_conv2d(x, torch.empty(4, 1, 3, 3)).shape[2] == 3\n"
        "assert 'torch._inductor.lowering' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_another_inductor_is_left_as_it_is(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    other = SimpleNamespace(lowerings={})  # without anything else that is known of it
    monkeypatch.setitem(sys.modules, "torch._inductor.lowering", other)
    prefer_channels_last()
    assert "chooses the layouts" in caplog.text
    assert not other.lowerings
