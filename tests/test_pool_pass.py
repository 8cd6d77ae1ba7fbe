"""Means over height and width: what they absorb, and what must stay as it is."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from test_memory_format import same
from test_shuffle_pass import check_forms
from test_torchvision import build_with_data
from tiny_models import depthwise, image
from torch import Tensor, fx, nn

import dwswap
from dwswap.means import channel_means

CHANNELS = 6
POOLS: dict[str, Callable[[Tensor], Tensor]] = {
    "module": nn.AdaptiveAvgPool2d(1),
    "function": lambda x: F.adaptive_avg_pool2d(x, (1, 1)),
    "mean": lambda x: x.mean([2, 3]),
    "mean of images": lambda x: torch.mean(x, (-1, -2), keepdim=True),
}


@pytest.fixture
def absorbing(monkeypatch: pytest.MonkeyPatch) -> None:
    """On the CPU as on a GPU."""
    monkeypatch.setattr("dwswap.passes.absorbing.has_kernels", lambda tensor: True)


class Head(nn.Module):
    """A depthwise convolution, a convolution, ``behind`` it, a mean and a linear layer."""

    def __init__(
        self, behind: Any = None, pool: Any = POOLS["module"], bias: bool = True, twice: str = ""
    ) -> None:
        super().__init__()
        self.start, self.last = depthwise(), nn.Conv2d(8, CHANNELS, 1, bias=bias)
        self.behind, self.pool, self.twice = behind, pool, twice
        self.classifier = nn.Linear(CHANNELS, 5)

    def forward(self, x: Tensor) -> Any:
        x = hidden = self.last(self.start(x))
        if self.behind is not None:
            x = self.behind(x)
        means = self.classifier(torch.flatten(self.pool(x), 1))
        extra = {"value": x, "input": hidden}.get(self.twice)
        return means if extra is None else (means, extra)


def absorbed(model: nn.Module) -> list[set[str]]:
    """What the means of a graph took."""
    assert isinstance(model, fx.GraphModule)
    found = [node.kwargs for node in model.graph.nodes if node.target is channel_means]
    return [set(kwargs) - {"keepdim"} for kwargs in found]


@pytest.mark.parametrize("keepdim", [False, True])
@pytest.mark.parametrize("unbatched", [False, True])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float16])
def test_function(keepdim: bool, unbatched: bool, dtype: torch.dtype) -> None:
    x, bias = image(CHANNELS).to(dtype), torch.linspace(-1, 1, CHANNELS).to(dtype)
    x = x[0] if unbatched else x
    ours = channel_means(x, bias, activation="relu6", keepdim=keepdim)
    theirs = F.relu6(x + bias[:, None, None]).mean((-2, -1), keepdim)
    torch.testing.assert_close(ours, theirs)
    torch.testing.assert_close(channel_means(x), x.mean((-2, -1)))


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("shape", [(2, 3, 4, 5), (1, 3, 4, 5), (2, 1, 4, 5), (3, 4, 5)])
def test_strides(layout: torch.memory_format, shape: tuple[int, ...]) -> None:
    x = torch.ones(shape)
    x = x.to(memory_format=layout) if x.dim() == 4 else x
    assert channel_means(x, keepdim=True).stride() == F.adaptive_avg_pool2d(x, 1).stride()


def test_gradients() -> None:
    x = image(3, size=4).double().requires_grad_()
    bias = torch.linspace(-1, 1, 3, dtype=torch.float64).requires_grad_()
    call = lambda *given: channel_means(*given, activation="silu")  # noqa: E731
    assert torch.autograd.gradcheck(call, (x, bias))


@pytest.mark.usefixtures("absorbing")
@pytest.mark.parametrize("layout", ["preserve", "channels_last"])
@pytest.mark.parametrize("pool", POOLS)
@pytest.mark.parametrize(
    ("behind", "bias", "keys"),
    [
        (nn.ReLU6(inplace=True), True, {"activation", "bias"}),
        (nn.Hardswish(), False, {"activation"}),
        (None, False, set()),
    ],
)
def test_absorbs(layout: Any, pool: str, behind: Any, bias: bool, keys: set[str]) -> None:
    model = Head(behind, POOLS[pool], bias).eval()
    fast = dwswap.optimize(model, memory_format=layout)
    assert absorbed(fast) == [keys]
    changes = [c for layer in dwswap.report(fast).layers for c in layer.changes]
    changes += [c for found in dwswap.report(fast).elsewhere.values() for c in found]
    pools = [change for change in changes if change.kind == "pool"]
    assert [change.done for change in pools] == [True] * ("activation" in keys)
    assert all("part of the mean" in str(change) for change in pools)
    check_forms(fast, model, compiled=layout == "channels_last" and pool == "module")
    same(pickle.loads(pickle.dumps(fast))(image(8)), fast(image(8)))


def hooked() -> nn.Module:
    pool = nn.AdaptiveAvgPool2d(1)
    pool.register_forward_hook(lambda module, args, result: result * 2)
    return pool


@pytest.mark.usefixtures("absorbing")
@pytest.mark.parametrize(
    "model",
    [
        Head(nn.ReLU(), hooked()),
        Head(nn.ReLU(), nn.AdaptiveAvgPool2d((1, 2)), twice="none"),
        Head(nn.ReLU(), lambda x: x.mean((1, 2))[:, :CHANNELS]),
        Head(nn.ReLU(), nn.AdaptiveMaxPool2d(1)),
        Head(nn.Sequential(nn.ReLU(), nn.MaxPool2d(2))),
    ],
)
def test_leaves_alone(model: Head) -> None:
    if isinstance(model.pool, nn.AdaptiveAvgPool2d) and model.twice == "none":
        model.classifier = nn.Linear(2 * CHANNELS, 5)
    fast = dwswap.optimize(model.eval())
    assert absorbed(fast) == []
    with torch.no_grad():
        same(fast(image(8)), model(image(8)))


@pytest.mark.usefixtures("absorbing")
@pytest.mark.parametrize("twice", ["value", "input"])
@pytest.mark.parametrize("in_place", [False, True])
def test_leaves_what_is_read_elsewhere(twice: str, in_place: bool) -> None:
    model = Head(nn.ReLU(in_place), twice=twice).eval()
    fast = dwswap.optimize(model)
    # Out of place, the activation alone may go where its input is read elsewhere.
    assert absorbed(fast) == [{"activation"} if twice == "input" and not in_place else set()]
    with torch.no_grad():
        torch.testing.assert_close(fast(image(8)), model(image(8)))


@pytest.mark.usefixtures("absorbing")
@torch.no_grad()
def test_autocast_keeps_its_dtype() -> None:
    model = Head(nn.ReLU()).eval()
    fast = dwswap.optimize(model)
    assert absorbed(fast) == [{"activation", "bias"}]
    with torch.autocast("cpu", torch.bfloat16):
        ours, theirs = fast(image(8)), model(image(8))
    assert ours.dtype is theirs.dtype is torch.bfloat16
    torch.testing.assert_close(ours, theirs, rtol=2e-2, atol=2e-2)


@pytest.mark.usefixtures("absorbing")
@pytest.mark.parametrize("layout", ["preserve", "channels_last"])
@pytest.mark.parametrize("pool", ["module", "mean"])
@torch.no_grad()
def test_exports_with_any_batch(layout: Any, pool: str) -> None:
    model = Head(nn.ReLU(), POOLS[pool]).eval()
    fast = dwswap.optimize(model, memory_format=layout)
    assert absorbed(fast) == [{"activation", "bias"}]
    shapes = ({0: torch.export.Dim("batch", min=1, max=64)},)
    program = torch.export.export(fast, (image(8),), dynamic_shapes=shapes)
    for batch in (1, 5):
        x = image(8, batch=batch)
        torch.testing.assert_close(program.module()(x), model(x))


@pytest.mark.usefixtures("absorbing")
def test_restore_refuses_it() -> None:
    fast = dwswap.optimize(Head(nn.ReLU()).eval())
    with pytest.raises(ValueError, match="a mean over height and width absorbed"):
        dwswap.restore(fast, inplace=True)
    assert absorbed(fast) == [{"activation", "bias"}]


@pytest.mark.usefixtures("absorbing")
def test_restore_takes_a_mean_that_absorbed_nothing() -> None:
    model = nn.Sequential(depthwise(bias=False), nn.Conv2d(8, 4, 1, bias=False), POOLS["module"])
    fast = dwswap.optimize(model.eval())
    assert absorbed(fast) == [set()]
    same(dwswap.restore(fast)(image(8)), model(image(8)))


@pytest.mark.usefixtures("absorbing")
@pytest.mark.parametrize("pool", POOLS)
def test_exported_programs_keep_the_mean_of_aten(pool: str) -> None:
    model = Head(nn.ReLU(), POOLS[pool]).eval()
    program = torch.export.export(model, (image(8),))
    fast = dwswap.optimize(program)
    assert absorbed(fast.graph_module) == []
    with torch.no_grad():
        torch.testing.assert_close(fast.module()(image(8)), model(image(8)))


def test_the_cpu_leaves_the_mean_to_aten() -> None:
    assert absorbed(dwswap.optimize(Head(nn.ReLU()).eval())) == []


@pytest.mark.usefixtures("absorbing")
@pytest.mark.parametrize("name", ["mobilenet_v2", "mnasnet0_5", "shufflenet_v2_x0_5"])
def test_networks_end_in_one(name: str) -> None:
    model = build_with_data(name).double()
    fast = dwswap.optimize(model)
    assert absorbed(fast) == [{"activation", "bias"}]
    x = torch.rand(2, 3, 64, 64, dtype=torch.float64)
    with torch.no_grad():
        torch.testing.assert_close(fast(x), model(x), rtol=1e-9, atol=1e-9)
