"""A refused train() of a model with graphs inside leaves it as it was."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from tiny_models import ControlFlow, Functional, depthwise, image
from torch import Tensor, fx, nn
from torch.export import export

import dwswap

REFUSED = pytest.raises(RuntimeError, match="optimized for inference")


class Outer(nn.Module):
    """Of its parts ``inner.1.block`` alone becomes a graph."""

    def __init__(self, before: nn.Module | None = None) -> None:
        super().__init__()
        self.before = before or nn.Sequential(nn.Dropout(), nn.Dropout())
        self.inner = nn.Sequential(nn.Dropout(), ControlFlow())
        self.behind = nn.Dropout()

    def forward(self, x: Tensor) -> Tensor:
        if x.sum() > 1e30:
            return x
        return self.behind(self.inner(x))


def modes(model: nn.Module) -> dict[str, bool]:
    return {path: module.training for path, module in model.named_modules()}


def saved(model: nn.Module) -> Any:
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


COPIES = [lambda m: m, copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m)), saved]
AGAIN = [dwswap.optimize, lambda m: dwswap.optimize(m, inplace=True)]


@pytest.mark.parametrize("options", [{}, {"inplace": True}, {"cuda_graph": True}])
@pytest.mark.parametrize("copied", COPIES + AGAIN)
def test_every_mode_is_as_it_was(copied: Callable[[Any], Any], options: dict[str, Any]) -> None:
    fast = copied(dwswap.optimize(Outer().eval(), **options))
    assert isinstance(fast.inner[1].block, fx.GraphModule)
    assert (type(fast), type(fast.inner)) == (Outer, nn.Sequential)
    fast.before[1].train()
    fast.behind.train()
    before = modes(fast)
    assert sum(before.values()) == 2
    for path in ("", "inner", "inner.1", "inner.1.block"):
        with REFUSED:
            fast.get_submodule(path).train()
        assert modes(fast) == before
    assert fast.eval() is fast
    assert not any(modes(fast).values())


def test_a_copy_has_a_mode_of_its_own() -> None:
    fast = dwswap.optimize(Outer().eval())
    for copied in COPIES[1:]:
        other = copied(fast)
        other.behind.train()
        fast.eval()
        assert other.behind.training
        assert other.eval() is other
        assert not other.behind.training


def test_around_the_model() -> None:
    fast: Any = dwswap.optimize(Outer().eval())
    fast.behind.train()
    before = modes(fast)
    whole = nn.Sequential(nn.Dropout(), fast)
    with REFUSED:
        whole.train()
    assert modes(fast) == before
    assert not any(modes(whole.eval()).values())


@pytest.mark.parametrize("inplace", [False, True])
def test_a_restored_model(inplace: bool) -> None:
    """It keeps its graphs, without the operator, where nothing was folded into others."""
    block = nn.Sequential(Functional(_convolved), depthwise())
    fast: Any = dwswap.restore(dwswap.optimize(ControlFlow(block).eval()), inplace=inplace)
    assert isinstance(fast.block, fx.GraphModule)
    with REFUSED:
        fast.train()
    assert not any(modes(fast).values())


def _convolved(x: Tensor, weight: Tensor, bias: Tensor, channels: int) -> Tensor:
    return F.conv2d(x, weight, bias, groups=channels)


def test_without_its_graph_a_model_trains() -> None:
    fast: Any = dwswap.optimize(Outer().eval())
    fast.inner[1].block = nn.Dropout()
    assert fast.train() is fast
    assert all(modes(fast).values())


@pytest.mark.parametrize("options", [{"fuse": False}, {"skip": lambda module, path: True}])
def test_a_model_without_graphs_is_not_guarded(options: dict[str, Any]) -> None:
    fast = dwswap.optimize(Outer().eval(), **options)
    assert not any("train" in module.__dict__ for module in fast.modules())
    assert all(modes(fast.train()).values())


class Counting(Outer):
    """Changes more than flags."""

    count = 0

    def train(self, mode: bool = True) -> Counting:
        self.count = int(mode)
        return super().train(mode)


class Frozen(Outer):
    """Trains what is behind the graph."""

    def train(self, mode: bool = True) -> Frozen:
        super().train(False)
        self.training = self.behind.training = mode
        return self


def test_a_train_of_its_own() -> None:
    fast: Any = dwswap.optimize(Counting().eval())
    with REFUSED:
        fast.train()
    assert not any(modes(fast).values())
    assert fast.count == 0

    fast = dwswap.optimize(Frozen().eval())
    assert fast.train() is fast
    assert {path for path, mode in modes(fast).items() if mode} == {"", "behind"}
    before = modes(fast)
    with REFUSED:
        fast.inner.train()
    assert modes(fast) == before


def test_a_train_that_was_put_on_the_model_is_kept() -> None:
    model = Outer().eval()
    model.inner.train = lambda mode=True: model.inner  # type: ignore[method-assign]
    fast = dwswap.optimize(model, inplace=True)
    assert fast.train() is fast
    assert not any(modes(fast.inner).values())


def test_beside_torchscript() -> None:
    scripted = torch.jit.script(nn.Sequential(nn.Dropout(), nn.ReLU()).eval())
    for before in (scripted, torch.jit.freeze(scripted)):
        fast = dwswap.optimize(Outer(before).eval())
        with REFUSED:
            fast.train()
        assert not any(getattr(module, "training", False) for module in fast.modules())


class NoGrad(ControlFlow):
    """A graph would lose its context manager; ``torch.compile`` and ``torch.export`` do not."""

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            return self.block(x)


@pytest.mark.parametrize("strict", [False, True])
def test_export_and_compile(strict: bool) -> None:
    fast = dwswap.optimize(NoGrad().eval())
    assert "train" in fast.__dict__
    program = export(fast, (image(),), strict=strict)
    torch.testing.assert_close(program.module()(image()), fast(image()))
    compiled = torch.compile(fast, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(image()), fast(image()))
