"""Layer normalizations over channels that run the kernel of dwswap."""

from __future__ import annotations

import copy
import importlib
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from test_fold_batchnorm import changes
from test_memory_format import same
from test_torchvision import models
from tiny_models import depthwise, image
from torch import Tensor, nn

import dwswap
from dwswap.bench.random_weights import randomize
from dwswap.norms import channel_norm


@pytest.fixture
def kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a GPU."""
    # By importlib, as the package has the function under the same name.
    module = importlib.import_module("dwswap.passes.swap_layer_norm")
    monkeypatch.setattr(module, "has_kernels", lambda tensor: True)


def swapped(fast: Any) -> int:
    return len(fast.graph.find_nodes(op="call_function", target=channel_norm))


class OnLast(nn.Module):
    """``norm`` on ``(N, H, W, C)`` behind a depthwise layer."""

    def __init__(self, norm: Any, call: Callable[..., Tensor] | None = None) -> None:
        super().__init__()
        self.conv, self.norm, self.call = depthwise(), norm, call
        self.weight = nn.Parameter(torch.rand(8))
        self.bias = nn.Parameter(torch.rand(8))

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x).permute(0, 2, 3, 1)
        if self.call is not None:
            return self.call(x, self.weight, self.bias)
        return self.norm(x)


def affine(norm: nn.Module) -> nn.Module:
    for parameter in norm.parameters():
        nn.init.uniform_(parameter, -1, 1)
    return norm


def with_weight(norm: nn.LayerNorm, weight: Any, register: bool) -> nn.LayerNorm:
    del norm.weight
    if register:
        norm.register_buffer("weight", weight)
    else:
        norm.weight = weight
    return norm


SWAPPED: dict[str, Callable[[], nn.Module]] = {
    "module": lambda: OnLast(affine(nn.LayerNorm(8))),
    "module, no bias": lambda: OnLast(affine(nn.LayerNorm(8, bias=False))),
    "eps": lambda: OnLast(affine(nn.LayerNorm([8], eps=0.5))),
    "function": lambda: OnLast(None, lambda x, w, b: F.layer_norm(x, (8,), w, b, 0.1)),
    "keywords": lambda: OnLast(None, lambda x, w, b: F.layer_norm(x, [8], weight=w, eps=0.1)),
    "buffer": lambda: OnLast(with_weight(nn.LayerNorm(8), torch.full((8,), 2.0), True)),
    "image": lambda: nn.Sequential(depthwise(), affine(models.convnext.LayerNorm2d(8))),
}


@pytest.mark.usefixtures("kernels")
@pytest.mark.parametrize("name", SWAPPED)
def test_swaps(name: str) -> None:
    torch.manual_seed(0)
    model = SWAPPED[name]().eval()
    fast = dwswap.optimize(model)
    assert swapped(fast) == 1
    assert [change.reason for change in changes(fast, "layer_norm")] == ["rows"]
    assert "runs a kernel of dwswap" in dwswap.report(fast).render(400)
    assert list(fast.state_dict()) == list(model.state_dict())
    with torch.no_grad():
        for x in (image(8), image(8).to(memory_format=torch.channels_last), image(8)[:0]):
            for result in (fast, copy.deepcopy(fast), pickle.loads(pickle.dumps(fast))):
                same(result(x), model(x))


class Doubled(nn.LayerNorm):
    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input) * 2


def hooked() -> nn.Module:
    norm = nn.LayerNorm(8)
    norm.register_forward_hook(lambda module, args, output: output + 1)
    return norm


STAYS: dict[str, Callable[[], nn.Module]] = {
    "two dimensions": lambda: OnLast(nn.LayerNorm((9, 8))),
    "no weight": lambda: OnLast(nn.LayerNorm(8, elementwise_affine=False)),
    "subclass": lambda: OnLast(Doubled(8)),
    "hook": lambda: OnLast(hooked()),
    "plain": lambda: OnLast(with_weight(nn.LayerNorm(8), torch.full((8,), 2.0), False)),
    "computed": lambda: OnLast(None, lambda x, w, b: F.layer_norm(x, (8,), w.exp(), b)),
    "shape": lambda: OnLast(None, lambda x, w, b: F.layer_norm(x, x.shape[-1:], w, b)),
}


@pytest.mark.usefixtures("kernels")
@pytest.mark.parametrize("name", STAYS)
def test_stays(name: str) -> None:
    model = STAYS[name]().eval()
    fast = dwswap.optimize(model)
    assert swapped(fast) == 0
    with torch.no_grad():
        same(fast(image(8)), model(image(8)))


def test_not_on_the_cpu() -> None:
    assert swapped(dwswap.optimize(SWAPPED["module"]().eval())) == 0


@pytest.mark.usefixtures("kernels", "products")
def test_convnext() -> None:
    model = models.convnext_tiny(weights=None)
    images = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    randomize(model, images)
    fast = dwswap.optimize(model, memory_format="channels_last")
    # A norm per block, that of the stem, three before a convolution, that of the head.
    assert swapped(fast) == 18 + 5
    assert "swapped 23 LayerNorm" in str(dwswap.report(fast))
    with torch.no_grad():
        same(fast(images), model(images))
