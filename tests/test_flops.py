"""What ``torch.utils.flop_counter`` says of optimized models, and of our operators."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode, flop_registry

import dwswap
from dwswap.activations import PAIRS
from dwswap.flops import register

torchvision = pytest.importorskip("torchvision")

OPERATORS = torch.ops.dwswap
NONE = PAIRS["none", "none"]


@pytest.fixture(autouse=True, scope="module")
def _registered() -> None:
    register()


def flops(call: Any, *args: Any, **kwargs: Any) -> int:
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        call(*args, **kwargs)
    return counter.get_total_flops()


@pytest.mark.parametrize(
    "name", ["mobilenet_v2", "mobilenet_v3_small", "efficientnet_b0", "shufflenet_v2_x0_5"]
)
def test_an_optimized_model_counts_as_its_original(name: str) -> None:
    model = torchvision.models.get_model(name).eval()
    x = torch.randn(2, 3, 64, 64)
    expected = flops(model, x)
    assert flops(dwswap.optimize(model), x) == pytest.approx(expected, rel=1e-6)
    assert flops(dwswap.optimize(model, fuse=False), x) == expected


def convolution(x: Tensor, weight: Tensor, **how: Any) -> int:
    return flops(F.conv2d, x, weight, **how)


def test_a_convolution_counts_as_that_of_aten() -> None:
    x, weight = torch.randn(2, 8, 9, 7), torch.randn(16, 1, 3, 5)
    geometry = {"stride": (2, 1), "padding": (1, 2), "dilation": (1, 1)}
    expected = convolution(x, weight, groups=8, **geometry)
    assert expected > 0
    args = (x, weight, None, *geometry.values())
    assert flops(OPERATORS.depthwise_conv2d, *args) == expected
    assert flops(OPERATORS.depthwise_conv2d, *args, activation="relu") == expected
    assert flops(OPERATORS.depthwise_conv2d, x[0], *args[1:]) == expected / 2
    module = dwswap.DepthwiseConv2d(8, 16, (3, 5), (2, 1), (1, 2))
    assert flops(module, x) == expected


def test_gradients_count_each_like_the_forward() -> None:
    x, weight = torch.randn(2, 8, 9, 7), torch.randn(8, 1, 3, 3)
    geometry = ([1, 1], [1, 1], [1, 1])
    forward = convolution(x, weight, padding=1, groups=8)
    both, first, second = (True, True, True), (True, False, False), (False, True, True)
    for mask, times in ((both, 2), (first, 1), (second, 1), ((False, False, True), 0)):
        found = flops(OPERATORS._depthwise_conv2d_backward, x, x, weight, *geometry, mask)
        assert found == times * forward


def test_what_fused_layers_take_together() -> None:
    x = torch.randn(2, 8, 9, 7)
    reduce, expand, point = (
        torch.randn(4, 8, 1, 1),
        torch.randn(8, 4, 1, 1),
        torch.randn(6, 8, 1, 1),
    )
    pooled = x.mean((2, 3), keepdim=True)
    layers = convolution(pooled, reduce) + convolution(x[:, :4, :1, :1], expand)
    args = (x, reduce, None, expand, None, "relu", "sigmoid")
    assert flops(OPERATORS.squeeze_excitation, *args) == layers

    assert flops(OPERATORS._pointwise_product, x, point, None) == convolution(x, point)
    linear = torch.randn(10, 8)
    found = flops(OPERATORS._pooled_linear, x, linear, None, None, NONE)
    assert found == flops(F.linear, torch.randn(2, 8), linear)
    image, stem = torch.randn(2, 3, 9, 7), torch.randn(12, 3, 3, 3)
    found = flops(OPERATORS._stem_conv2d, image, stem, None, NONE)
    assert found == convolution(image, stem, stride=2, padding=1)

    weight = torch.randn(8, 1, 3, 3)
    found = flops(
        *(OPERATORS._separable_conv2d, x, weight, None, None, 1, 1, NONE),
        *(point, None, None, 16, 1),
    )
    assert found == convolution(x, weight, padding=1, groups=8) + convolution(x, point)


def test_a_loaded_program_counts(tmp_path: Any) -> None:
    """In a process that has optimized nothing."""
    model = nn.Sequential(nn.Conv2d(4, 4, 3, groups=4, bias=False)).eval()
    x = torch.randn(1, 4, 8, 8)
    path = tmp_path / "model.pt2"
    dwswap.export.save(dwswap.optimize(model), path, x)
    code = (
        "import sys, torch, dwswap\n"
        "from torch.utils.flop_counter import FlopCounterMode\n"
        "fast = dwswap.export.load(sys.argv[1])\n"
        "with FlopCounterMode(display=False) as counter:\n"
        "    fast(torch.randn(1, 4, 8, 8))\n"
        "print(counter.get_total_flops())\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(path)], capture_output=True, text=True, check=True
    )
    assert int(done.stdout) == flops(model, x) > 0


def test_a_formula_of_the_users_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(flop_registry, OPERATORS.depthwise_conv2d, lambda *_, **__: 7)
    model = dwswap.optimize(nn.Sequential(nn.Conv2d(4, 4, 3, groups=4)).eval())
    assert flops(model, torch.randn(1, 4, 8, 8)) == 7


def test_importing_dwswap_does_not_import_the_counter() -> None:
    code = "import sys, dwswap; print('torch.utils.flop_counter' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
