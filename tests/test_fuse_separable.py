"""The pass that makes one call of a depthwise and a pointwise convolution, and what undoes it."""

from __future__ import annotations

import copy
import importlib
import itertools
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from test_fold_batchnorm import changes
from test_memory_format import same
from test_separable import NAMED
from test_torchvision import models
from tiny_models import InvertedResidual, depthwise, image
from torch import Tensor, fx, nn
from torch.export import export

import dwswap
from dwswap import verify
from dwswap.bench.random_weights import randomize
from dwswap.convolution_call import SWAPPED
from dwswap.ops import depthwise_conv2d
from dwswap.pointwise import pointwise_product, pointwise_residual
from dwswap.report import LayerErrors
from dwswap.separable import separable_conv2d
from dwswap.swapped_layers import LayerCall


class Separable(nn.Module):
    """A pointwise, a depthwise and a pointwise convolution; ``call`` says how."""

    def __init__(
        self,
        *,
        act: nn.Module | None = None,
        bias: bool = False,
        depth: nn.Module | None = None,
        point: nn.Module | None = None,
        call: Callable[[Any, Tensor], Any] | None = None,
    ) -> None:
        super().__init__()
        self.first, self.depth = nn.Conv2d(8, 8, 1), depth or depthwise()
        self.act, self.point = act or nn.ReLU6(), point or nn.Conv2d(8, 16, 1, bias=bias)
        self.call = call or (lambda m, x: m.point(m.act(m.depth(m.act(m.first(x))))).relu())

    def forward(self, x: Tensor) -> Any:
        return self.call(self, x)


def bare(model: Any, x: Tensor) -> Tensor:
    return model.point(model.depth(x)).relu()


def residual(model: Any, x: Tensor) -> Tensor:
    start = model.first(x)
    return (start + model.point(model.act(model.depth(start)))).relu()


def optimize(model: nn.Module) -> Any:
    return dwswap.optimize(model.eval(), memory_format="channels_last")


def calls(fast: Any) -> list[fx.Node]:
    return list(fast.graph.find_nodes(op="call_function", target=separable_conv2d))


CLAMPED = {"stride", "padding", "input_bias", "input_activation", "activation"}
FUSED: dict[str, tuple[Callable[[], nn.Module], set[str], str]] = {
    "relu6": (Separable, CLAMPED, "nothing"),
    "relu": (lambda: Separable(act=nn.ReLU(), bias=True), CLAMPED, "bias"),
    "bare": (
        lambda: Separable(call=bare),
        {"stride", "padding"},
        "nothing",
    ),
    "residual": (
        lambda: Separable(point=nn.Conv2d(8, 8, 1, bias=False), call=residual),
        {"stride", "padding", "activation"},
        "residual",
    ),
    "stride": (lambda: Separable(depth=depthwise(stride=2)), CLAMPED, "nothing"),
    "5 x 5": (lambda: Separable(depth=depthwise(kernel_size=5, padding=2)), CLAMPED, "nothing"),
    "no padding": (lambda: Separable(depth=depthwise(padding=0, bias=False)), CLAMPED, "nothing"),
    "functional": (
        lambda: Separable(call=lambda m, x: F.conv2d(m.act(m.depth(x)), m.point.weight).relu()),
        {"stride", "padding", "activation"},
        "nothing",
    ),
}


@pytest.mark.usefixtures("products")
@pytest.mark.parametrize("name", FUSED)
@torch.no_grad()
def test_fuses(name: str) -> None:
    torch.manual_seed(0)
    make, options, added = FUSED[name]
    model = make().eval()
    fast = optimize(model)
    (node,) = calls(fast)
    assert set(node.kwargs) == options
    assert not fast.graph.find_nodes(op="call_function", target=depthwise_conv2d)
    assert not fast.graph.find_nodes(op="call_function", target=pointwise_residual)
    point_bias, rest = node.args[4:]
    assert (point_bias is not None, rest is not None) == (added == "bias", added == "residual")
    (change,) = changes(fast, "separable")
    assert change.done
    assert f"one call with {change.subject} after it" in dwswap.report(fast).render(400)
    for batch, each in itertools.product(
        (1, 3, 0), (fast, copy.deepcopy(fast), pickle.loads(pickle.dumps(fast)))
    ):
        same(each(image(8, batch=batch)), model(image(8, batch=batch)))
    program = export(fast, (image(8),))
    assert NAMED not in {n.target for n in program.graph.nodes}
    same(program.module()(image(8)), model(image(8)))


@pytest.mark.usefixtures("products")
@pytest.mark.parametrize("name", FUSED)
@torch.no_grad()
def test_verified_and_put_back(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    block = FUSED[name][0]()
    model = nn.Sequential(block, nn.ELU(), depthwise(block.point.out_channels)).eval()
    x = image(8)
    fast = dwswap.optimize(model, x, memory_format="channels_last", verify=True)
    assert calls(fast)
    layers = {layer.path: layer for layer in dwswap.report(fast).layers}
    assert layers["0.depth"].errors is not None
    assert layers["0.depth"].errors.passed

    def fail(call: LayerCall) -> LayerErrors:
        return LayerErrors(float(call.point_weight is not None), 0.0, 0.0)

    monkeypatch.setattr(verify, "_compare_layer", fail)
    kept = dwswap.optimize(model, x, memory_format="channels_last", verify=True)
    assert not calls(kept)
    layers = {layer.path: layer for layer in dwswap.report(kept).layers}
    assert layers["0.depth"].reason == "verify_failed"
    assert layers["2"].reason == "depthwise"
    assert not changes(kept, "separable")
    same(kept(x), model(x))


@pytest.mark.usefixtures("products")
@torch.no_grad()
def test_a_wrong_result_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """The whole call is compared, its pointwise convolution and residual with it."""
    model, x = FUSED["residual"][0]().eval(), image(8)
    for wrong in (
        lambda output, args: output + 0.1,
        lambda output, args: output - args[5],
        lambda output, args: output.contiguous(),
    ):
        with monkeypatch.context() as patch:

            def broken(*args: Any, wrong: Any = wrong, **options: Any) -> Tensor:
                copied = [*args[:5], args[5].clone()]
                return wrong(separable_conv2d(*args, **options), copied)

            broken.__name__ = "separable_conv2d"
            for name in ("passes.fuse_separable", "passes.unswap_calls", "swapped_layers"):
                module = importlib.import_module(f"dwswap.{name}")
                patch.setattr(module, "separable_conv2d", broken)
            patch.setattr("dwswap.passes.unswap_calls.SWAPPED", (*SWAPPED, broken))
            fast = dwswap.optimize(model, x, memory_format="channels_last", verify=True)
        assert dwswap.report(fast).layers[1].reason == "verify_failed"
        same(fast(x), model(x))


@pytest.mark.usefixtures("products")
@torch.no_grad()
def test_restored() -> None:
    for make in (FUSED["bare"][0], lambda: Separable(bias=True, call=bare)):
        model, x = make().eval(), image(8)
        fast = optimize(model)
        plain = dwswap.restore(fast)
        assert calls(fast)
        targets = {node.target for node in plain.graph.nodes}
        assert targets.isdisjoint({separable_conv2d, depthwise_conv2d})
        assert (pointwise_product in targets) == (model.point.bias is not None)
        same(plain(x), model(x))
        again = optimize(plain)
        assert "depthwise" in [layer.reason for layer in dwswap.report(again).layers]
        assert calls(again)
        same(again(x), model(x))
    with pytest.raises(ValueError, match="absorbed its neighbours"):
        dwswap.restore(optimize(FUSED["relu6"][0]()))


@pytest.mark.usefixtures("products")
@torch.no_grad()
def test_optimized_again() -> None:
    model, x = FUSED["residual"][0]().eval(), image(8)
    fast = optimize(model)
    again = optimize(fast)
    assert len(calls(again)) == 1
    reasons = [layer.reason for layer in dwswap.report(again).layers]
    assert reasons == ["already_swapped"]
    same(again(x), model(x))


def hooked() -> nn.Module:
    layer = nn.Conv2d(8, 16, 1)
    layer.register_forward_hook(lambda module, args, output: output + 1)
    return layer


def changed_between(model: Any, x: Tensor) -> Tensor:
    start = model.first(x)
    hidden = model.depth(start)
    start.mul_(2)
    return model.point(hidden) + start.mean()


STAYS: dict[str, Callable[[], nn.Module]] = {
    "silu": lambda: Separable(act=nn.SiLU()),
    "outputs": lambda: Separable(point=nn.Conv2d(8, 12, 1, bias=False)),
    "channels": lambda: Separable(
        depth=depthwise(4),
        point=nn.Conv2d(4, 16, 1, bias=False),
        call=lambda m, x: m.point(m.depth(x[:, :4])),
    ),
    "hook": lambda: Separable(point=hooked()),
    "kernel": lambda: Separable(depth=depthwise(kernel_size=7, padding=3)),
    "oblong": lambda: Separable(depth=depthwise(kernel_size=(3, 5), padding=(1, 2))),
    "stride 3": lambda: Separable(depth=depthwise(stride=3)),
    "two strides": lambda: Separable(depth=depthwise(stride=(1, 2))),
    "dilation": lambda: Separable(depth=depthwise(dilation=2, padding=2)),
    "padding": lambda: Separable(depth=depthwise(padding=3)),
    "same": lambda: Separable(depth=depthwise(padding="same")),
    "multiplier": lambda: Separable(depth=depthwise(8, 2), point=nn.Conv2d(16, 16, 1, bias=False)),
    "groups": lambda: Separable(point=nn.Conv2d(8, 16, 1, groups=2, bias=False)),
    "strided": lambda: Separable(point=nn.Conv2d(8, 16, 1, stride=2, bias=False)),
    "3 x 3": lambda: Separable(point=nn.Conv2d(8, 16, 3, bias=False)),
    "read elsewhere": lambda: Separable(
        call=lambda m, x: m.point(y := m.depth(x)).relu() + y.mean()
    ),
    "activation between": lambda: Separable(call=lambda m, x: m.point(F.elu(m.depth(x)))),
    "computed": lambda: Separable(call=lambda m, x: F.conv2d(m.depth(x), m.point.weight.exp())),
    "changed between": lambda: Separable(call=changed_between),
}


@pytest.mark.usefixtures("products")
@pytest.mark.parametrize("name", STAYS)
@torch.no_grad()
def test_stays(name: str) -> None:
    torch.manual_seed(0)
    model = STAYS[name]().eval()
    fast = optimize(model)
    assert not calls(fast)
    assert not changes(fast, "separable")
    same(fast(image(8)), model(image(8)))


@pytest.mark.usefixtures("products")
@torch.no_grad()
def test_a_residual_that_is_read_in_between_stays_right() -> None:
    """What ``first`` computes is changed by the sum of one block while another still reads it."""

    def call(model: Any, x: Tensor) -> Tensor:
        start = model.first(x)
        hidden = model.depth(start)
        total = start + model.point(model.other(start))
        return total + model.last(hidden)

    model = Separable(point=nn.Conv2d(8, 8, 1, bias=False), call=call)
    model.other, model.last = depthwise(), nn.Conv2d(8, 8, 1, bias=False)
    fast = optimize(model)
    assert len(calls(fast)) == 1
    for batch in (1, 3):
        same(fast(image(8, batch=batch)), model(image(8, batch=batch)))
    same(optimize(fast)(image(8)), model(image(8)))


def test_not_on_the_cpu() -> None:
    assert not calls(optimize(Separable()))


@pytest.mark.usefixtures("products")
@torch.no_grad()
def test_not_in_an_exported_program() -> None:
    model = Separable().eval()
    fast = dwswap.optimize(export(model, (image(8),)), memory_format="channels_last")
    assert separable_conv2d not in {node.target for node in fast.graph.nodes}
    same(fast.module()(image(8)), model(image(8)))


@pytest.mark.usefixtures("products")
@torch.no_grad()
def test_compiles() -> None:
    torch._dynamo.reset()
    model = nn.Sequential(InvertedResidual(8), InvertedResidual(8), nn.Conv2d(8, 8, 1)).eval()
    fast = optimize(model)
    assert len(calls(fast)) == 2
    compiled = torch.compile(fast, fullgraph=True, backend="aot_eager")
    same(compiled(image(8)), model(image(8)))


@pytest.mark.usefixtures("products")
@pytest.mark.parametrize(("name", "count"), [("mobilenet_v2", 17), ("mnasnet1_0", 17)])
@torch.no_grad()
def test_torchvision(name: str, count: int) -> None:
    model = getattr(models, name)(weights=None).eval().double()
    images = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0)).double()
    randomize(model, images)
    fast = optimize(model)
    assert len(calls(fast)) == count
    expected = model(images)
    assert (fast(images) - expected).abs().max() <= 1e-9 * expected.abs().max()
