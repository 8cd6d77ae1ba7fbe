"""The first convolution of a network that runs the kernel of dwswap."""

from __future__ import annotations

import copy
import importlib
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from test_fold_batchnorm import changes, norm
from test_memory_format import same
from test_torchvision import models
from tiny_models import depthwise, image
from torch import Tensor, fx, nn
from torch.export import export

import dwswap
from dwswap.bench.random_weights import randomize
from dwswap.layouts import to_layout
from dwswap.stems import stem_conv2d

CHANNELS_LAST = torch.channels_last


@pytest.fixture
def kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a GPU."""
    # By importlib, as the package has the function under the same name.
    module = importlib.import_module("dwswap.passes.swap_stem")
    monkeypatch.setattr(module, "has_kernels", lambda tensor: True)


def optimize(model: nn.Module, **options: Any) -> Any:
    return dwswap.optimize(model.eval(), **{"memory_format": "channels_last", **options})


def calls(fast: Any, target: Any = stem_conv2d) -> list[fx.Node]:
    return list(fast.graph.find_nodes(op="call_function", target=target))


def conv(out: int = 8, **options: Any) -> nn.Conv2d:
    return nn.Conv2d(3, out, **({"kernel_size": 3, "stride": 2, "padding": 1} | options))


class Net(nn.Module):
    """``layers``, then a depthwise layer; ``call`` says how the first is called."""

    def __init__(self, *layers: nn.Module, call: Callable[..., Any] | None = None) -> None:
        super().__init__()
        self.layers = nn.Sequential(*layers)
        self.call = call or (lambda layers, x: layers(x))
        self.end = nn.Sequential(nn.MaxPool2d(1), depthwise())

    def forward(self, x: Tensor) -> Tensor:
        return self.end(self.call(self.layers, x))


def function(layers: nn.Sequential, x: Tensor) -> Tensor:
    return F.silu(F.conv2d(x, layers[0].weight, layers[0].bias, 2, 1))


# Model, and what the epilogue has.
SWAPPED: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "bias": (lambda: Net(conv()), "none"),
    "no bias": (lambda: Net(conv(bias=False)), "none"),
    "pairs": (lambda: Net(conv(stride=(2, 2), padding=(1, 1), dilation=(1, 1))), "none"),
    "norm": (lambda: Net(conv(bias=False), norm()), "none"),
    "norm, silu": (lambda: Net(conv(bias=False), norm(), nn.SiLU()), "silu"),
    "norm, silu in place": (lambda: Net(conv(bias=False), norm(), nn.SiLU(inplace=True)), "silu"),
    "hardswish": (lambda: Net(conv(), nn.Hardswish()), "hardswish"),
    "relu6": (lambda: Net(conv(), nn.ReLU6()), "relu6"),
    "method": (lambda: Net(conv(), call=lambda f, x: f(x).relu_()), "relu"),
    "function": (lambda: Net(conv(), call=function), "silu"),
    "no activation of the operator": (lambda: Net(conv(), nn.ELU()), "none"),
    "read twice": (lambda: Net(conv(), call=lambda f, x: (y := f(x)).relu() + y), "none"),
    "64 channels": (lambda: Net(conv(64), nn.ReLU(), nn.Conv2d(64, 8, 1)), "relu"),
}


@pytest.mark.usefixtures("kernels")
@pytest.mark.parametrize("name", SWAPPED)
def test_swaps(name: str) -> None:
    torch.manual_seed(0)
    make, activation = SWAPPED[name]
    model = make()
    fast = optimize(model)
    (node,) = calls(fast)
    assert node.kwargs.get("activation", "none") == activation
    # The image is read as it comes.
    assert not calls(fast, to_layout)
    assert node.args[0].op == "placeholder"
    assert [change.reason for change in changes(fast, "stem")] == ["stem"]
    assert "runs a kernel of dwswap" in dwswap.report(fast).render(400)
    assert "swapped 1 first convolution" in str(dwswap.report(fast))
    with torch.no_grad():
        for x in (image(), image().to(memory_format=CHANNELS_LAST), image()[:0], image(size=1)):
            for result in (fast, copy.deepcopy(fast), pickle.loads(pickle.dumps(fast))):
                same(result(x), model(x))


@pytest.mark.usefixtures("kernels")
def test_before_a_depthwise_layer_bias_and_activation_are_its_own() -> None:
    model = nn.Sequential(conv(bias=False), norm(), nn.ReLU6(), depthwise()).eval()
    fast = optimize(model)
    (node,) = calls(fast)
    assert node.args[2] is None
    assert not node.kwargs
    with torch.no_grad():
        same(fast(image()), model(image()))


@pytest.mark.usefixtures("kernels")
def test_a_second_reader_of_the_image_keeps_its_conversion() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.other, self.end = conv(), conv(kernel_size=1, padding=0), depthwise()

        def forward(self, x: Tensor) -> Tensor:
            return self.end(self.one(x) + self.other(x))

    model = Two().eval()
    fast = optimize(model)
    (node,) = calls(fast)
    assert calls(fast, to_layout) == [node.args[0]]
    with torch.no_grad():
        same(fast(image()), model(image()))


@pytest.mark.usefixtures("kernels")
def test_weights_in_channels_last_are_enough() -> None:
    model = Net(conv(), nn.SiLU()).to(memory_format=CHANNELS_LAST)
    fast = optimize(model, memory_format="preserve")
    assert len(calls(fast)) == 1
    with torch.no_grad():
        same(fast(image()), model(image()))


class Doubled(nn.Conv2d):
    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input) * 2


def hooked() -> nn.Module:
    layer = conv()
    layer.register_forward_hook(lambda module, args, output: output + 1)
    return layer


def narrow(out: int) -> nn.Module:
    return Net(conv(out), nn.Conv2d(out, 8, 1))


STAYS: dict[str, Callable[[], nn.Module]] = {
    "kernel size": lambda: Net(conv(kernel_size=5, padding=2)),
    "one side": lambda: Net(conv(kernel_size=(3, 1), padding=(1, 0))),
    "stride": lambda: Net(conv(stride=1)),
    "strides": lambda: Net(conv(stride=(2, 1))),
    "no padding": lambda: Net(conv(padding=0)),
    "paddings": lambda: Net(conv(padding=(1, 0))),
    "more padding": lambda: Net(conv(padding=2)),
    "same": lambda: Net(conv(stride=1, padding="same")),
    "valid": lambda: Net(conv(padding="valid")),
    "padding mode": lambda: Net(conv(padding_mode="reflect")),
    "dilation": lambda: Net(conv(dilation=2)),
    "groups": lambda: Net(conv(9, groups=3), nn.Conv2d(9, 8, 1)),
    "channels": lambda: Net(nn.Conv2d(3, 4, 1), nn.Conv2d(4, 8, 3, 2, 1)),
    "transposed": lambda: Net(nn.ConvTranspose2d(3, 8, 3, 2, 1)),
    "odd": lambda: narrow(12),
    "few": lambda: narrow(4),
    "many": lambda: narrow(72),
    "hook": lambda: Net(hooked()),
    "subclass": lambda: Net(Doubled(3, 8, 3, 2, 1)),
    "computed": lambda: Net(
        conv(), call=lambda f, x: F.conv2d(x, f[0].weight.exp(), f[0].bias, 2, 1)
    ),
    "computed bias": lambda: Net(
        conv(), call=lambda f, x: F.conv2d(x, f[0].weight, f[0].bias.exp(), 2, 1)
    ),
}


@pytest.mark.usefixtures("kernels")
@pytest.mark.parametrize("name", STAYS)
def test_stays(name: str) -> None:
    torch.manual_seed(0)
    model = STAYS[name]().eval()
    fast = optimize(model)
    assert not calls(fast)
    assert not changes(fast, "stem")
    with torch.no_grad():
        same(fast(image()), model(image()))


@pytest.mark.usefixtures("kernels")
def test_not_in_nchw() -> None:
    model = SWAPPED["bias"][0]()
    for layout in ("preserve", "contiguous"):
        assert not calls(optimize(model, memory_format=layout))


def test_not_on_the_cpu() -> None:
    assert not calls(optimize(SWAPPED["bias"][0]()))


@pytest.mark.usefixtures("kernels")
def test_not_in_an_exported_program() -> None:
    model = SWAPPED["norm, silu"][0]().eval()
    program = export(model, (image(),))
    fast = dwswap.optimize(program, memory_format="channels_last")
    assert stem_conv2d not in {node.target for node in fast.graph.nodes}
    with torch.no_grad():
        same(fast.module()(image()), model(image()))


@pytest.mark.usefixtures("kernels", "products")
@pytest.mark.parametrize(
    ("name", "activation"),
    [("mobilenet_v2", "none"), ("efficientnet_v2_s", "silu"), ("mobilenet_v3_small", "none")],
)
def test_torchvision(name: str, activation: str) -> None:
    model = getattr(models, name)(weights=None).eval().double()
    images = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0)).double()
    randomize(model, images)
    fast = optimize(model)
    (node,) = calls(fast)
    assert node.kwargs.get("activation", "none") == activation
    assert node.args[0].op == "placeholder"
    assert (node.args[2] is None) == (activation == "none")
    with torch.no_grad():
        same(fast(images), model(images))
