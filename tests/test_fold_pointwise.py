"""Pointwise convolutions in a row become one, where that is no more work."""

from __future__ import annotations

import copy
import importlib
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from test_backend import Rewritten
from test_fold_batchnorm import changes, norm
from tiny_models import depthwise, image
from torch import Tensor, nn
from torch.export import export

import dwswap
from dwswap.passes.affine_call import affine_call


@pytest.fixture(autouse=True)
def suits(monkeypatch: pytest.MonkeyPatch) -> None:
    """As in half precision on a GPU."""
    # By importlib, as the package has the function under the same name.
    module = importlib.import_module("dwswap.passes.fold_pointwise")
    monkeypatch.setattr(module, "suits", lambda tensor: True)


class Net(nn.Module):
    """A depthwise layer, ``layers`` as ``call`` says, a depthwise layer."""

    def __init__(self, *layers: nn.Module, call: Callable[..., Any] | None = None) -> None:
        super().__init__()
        self.start, self.layers, self.end = depthwise(), nn.Sequential(*layers), depthwise()
        self.call = call or (lambda layers, x: layers(x))

    def forward(self, x: Tensor) -> Tensor:
        return self.end(self.call(self.layers, self.start(x)))


def conv(channels: int = 8, out: int = 8, **options: Any) -> nn.Conv2d:
    return nn.Conv2d(channels, out, **({"kernel_size": 1} | options))


def pointwise(fast: Any) -> int:
    calls = [affine_call(fast, node) for node in fast.graph.nodes]
    return sum(call is not None and not call.depthwise for call in calls)


def wide(model: nn.Module) -> nn.Module:
    """In float64, with statistics and biases that show."""
    torch.manual_seed(0)
    for name, tensor in model.double().eval().state_dict().items():
        if "running_var" in name:
            tensor.uniform_(0.5, 2)
        elif "bias" in name or "running_mean" in name:
            tensor.uniform_(-3, 3)
    return model


# Model, and how many layers that are not depthwise are left.
FOLDED: dict[str, tuple[Callable[[], nn.Module], int]] = {
    "two": (lambda: Net(conv(8, 4), conv(4, 8)), 1),
    "no bias": (lambda: Net(conv(8, 4, bias=False), conv(4, 8, bias=False)), 1),
    "first bias": (lambda: Net(conv(8, 4), conv(4, 8, bias=False)), 1),
    "second bias": (lambda: Net(conv(8, 4, bias=False), conv(4, 8)), 1),
    "three": (lambda: Net(conv(8, 4), conv(4, 6), conv(6, 8)), 1),
    "bottleneck": (
        lambda: Net(conv(8, 4, bias=False), norm(4), conv(4, 8, bias=False), norm(), nn.ReLU6()),
        1,
    ),
    "stride behind": (lambda: Net(conv(8, 4), conv(4, 8, stride=2)), 1),
    "identity between": (lambda: Net(conv(8, 4), nn.Identity(), nn.Dropout(), conv(4, 8)), 1),
    "forms": (lambda: Net(conv(8, 4, padding="same"), conv(4, 8, padding="valid")), 1),
    "functions": (
        lambda: Net(
            conv(8, 4),
            conv(4, 8),
            call=lambda f, x: F.conv2d(F.conv2d(x, f[0].weight, f[0].bias), f[1].weight),
        ),
        1,
    ),
    "called twice": (
        lambda: Net(conv(8, 4), conv(4, 8), call=lambda f, x: f[1](f[0](f[1](f[0](x))))),
        1,
    ),
}


@pytest.mark.parametrize("name", FOLDED)
@torch.no_grad()
def test_folds(name: str) -> None:
    make, left = FOLDED[name]
    model = wide(make())
    before = copy.deepcopy(model.state_dict())
    fast = dwswap.optimize(model)
    assert pointwise(fast) == left
    folded = [str(change) for change in changes(fast, "layer")]
    assert folded
    assert all(change in dwswap.report(fast).render(400) for change in folded)
    x = image(8).double()
    for each in (fast, copy.deepcopy(fast), pickle.loads(pickle.dumps(fast))):
        torch.testing.assert_close(each(x), model(x), rtol=1e-12, atol=1e-12)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    # What nothing reads any more is gone.
    assert not any("layers.0." in key for key in fast.state_dict())


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize("which", [(0,), (1,), (0, 1)])
@torch.no_grad()
def test_keeps_channels_last(which: tuple[int, ...], dtype: torch.dtype) -> None:
    model = nn.Sequential(conv(8, 4, bias=False), conv(4, 8, bias=False), depthwise())
    for i in which:
        model[i].to(memory_format=torch.channels_last)
    model.eval().to(dtype)
    fast = dwswap.optimize(model)
    assert pointwise(fast) == 1
    for x in (image(8).to(dtype), image(8).to(dtype, memory_format=torch.channels_last)):
        assert fast(x).stride() == model(x).stride()


def hooked() -> nn.Module:
    layer = conv(8, 4)
    layer.register_forward_hook(lambda module, args, output: output + 1)
    return layer


class Doubled(nn.Conv2d):
    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input) * 2


STAYS: dict[str, Callable[[], nn.Module]] = {
    "activation": lambda: Net(conv(8, 4), nn.ReLU(), conv(4, 8)),
    "read elsewhere": lambda: Net(
        conv(),
        conv(),
        call=lambda f, x: f[1](y := f[0](x)) + y,
    ),
    "kernel": lambda: Net(conv(8, 4), conv(4, 8, kernel_size=3, padding=1)),
    "kernel in front": lambda: Net(conv(8, 4, kernel_size=3, padding=1), conv(4, 8)),
    "groups": lambda: Net(conv(8, 4), conv(4, 8, groups=2)),
    "groups in front": lambda: Net(conv(8, 4, groups=2), conv(4, 8)),
    "stride": lambda: Net(conv(8, 4, stride=2), conv(4, 8)),
    "padding": lambda: Net(conv(8, 4), conv(4, 8, padding=1)),
    "padding in front": lambda: Net(conv(8, 4, padding=1), conv(4, 8)),
    "hook": lambda: Net(hooked(), conv(4, 8)),
    "hook behind": lambda: Net(conv(4, 8), hooked(), call=lambda f, x: f[0](f[1](x))),
    "subclass": lambda: Net(conv(8, 4), Doubled(4, 8, 1)),
    "transposed": lambda: Net(conv(8, 4), nn.ConvTranspose2d(4, 8, 1)),
    "computed": lambda: Net(
        conv(8, 4), conv(4, 8), call=lambda f, x: F.conv2d(f[0](x), f[1].weight.exp())
    ),
    "much more arithmetic": lambda: Net(conv(8, 2), conv(2, 8)),
    "many channels": lambda: Net(conv(8, 200), conv(200, 140), conv(140, 200), conv(200, 8)),
}


@pytest.mark.parametrize("name", STAYS)
@torch.no_grad()
def test_stays(name: str) -> None:
    model = wide(STAYS[name]())
    x = image(8).double()
    if name == "many channels":
        model.layers[0], model.layers[3] = nn.Conv2d(8, 200, 3, padding=1), nn.Conv2d(200, 8, 3)
        model = wide(model)
    fast = dwswap.optimize(model)
    assert not changes(fast, "layer")
    torch.testing.assert_close(fast(x), model(x), rtol=1e-12, atol=1e-12)


@torch.no_grad()
def test_skipped_layers_stay() -> None:
    model = wide(FOLDED["two"][0]())
    for path in ("layers.0", "layers.1"):
        fast = dwswap.optimize(model, skip=lambda module, where, path=path: where == path)
        assert pointwise(fast) in (1, 2)
        torch.testing.assert_close(fast(image(8).double()), model(image(8).double()))


@torch.no_grad()
def test_overflow_stays() -> None:
    model = Net(conv(8, 4, bias=False), conv(4, 8, bias=False)).half().eval()
    for layer in model.layers:
        layer.weight.fill_(600.0)
    fast = dwswap.optimize(model)
    assert pointwise(fast) == 2


@torch.no_grad()
def test_half_precision_is_rounded_once() -> None:
    """From what batch norms left before it was rounded."""
    torch.manual_seed(0)
    model = Net(*(conv(8, 6, bias=False), norm(6), conv(6, 8, bias=False), norm()), nn.ReLU())
    model = wide(model).half()
    fast = dwswap.optimize(model)
    assert pointwise(fast) == 1
    (call,) = (
        call
        for node in fast.graph.nodes
        if (call := affine_call(fast, node)) is not None and not call.depthwise
    )
    weight = fast.get_parameter(str(call.weight.target))
    exact = _folded(model.layers[2], model.layers[3]) @ _folded(model.layers[0], model.layers[1])
    off = (weight.flatten(1).double() - exact).abs()
    # One of the two neighbours.
    assert (off <= torch.finfo(torch.half).eps * exact.abs() + 2**-24).all()


def _folded(layer: nn.Conv2d, norm: nn.BatchNorm2d) -> Tensor:
    scale = norm.weight.double() / (norm.running_var.double() + norm.eps).sqrt()
    return layer.weight.flatten(1).double() * scale[:, None]


@torch.no_grad()
def test_exported_programs() -> None:
    model = FOLDED["bottleneck"][0]().eval()
    fast = dwswap.optimize(export(model, (image(8),)))
    convolutions = [n for n in fast.graph.nodes if n.target is torch.ops.aten.conv2d.default]
    assert len(convolutions) == 1
    torch.testing.assert_close(fast.module()(image(8)), model(image(8)))


@torch.no_grad()
def test_in_front_of_a_compiler() -> None:
    torch._dynamo.reset()
    model = FOLDED["bottleneck"][0]().eval()
    backend = Rewritten()
    compiled = torch.compile(model, backend=backend, fullgraph=True)
    with torch._inductor.config.patch(freezing=True):
        torch.testing.assert_close(compiled(image(8)), model(image(8)))
    assert backend.targets.count(torch.conv2d) == 1


def test_not_on_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    assert pointwise(dwswap.optimize(FOLDED["two"][0]().eval())) == 2


def test_training_keeps_both() -> None:
    model = FOLDED["two"][0]().train()
    fast = dwswap.optimize(model)
    assert not changes(fast, "layer")
    assert set(fast.state_dict()) == set(model.state_dict())
