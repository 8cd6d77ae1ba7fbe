"""Pointwise convolutions as matrix products with a bias."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from test_exported_program import DIALECTS, Dialect, check, targets
from test_memory_format import same
from test_push_bias import pointwise
from test_torchvision import build_with_data
from tiny_models import depthwise, image
from torch import Tensor, fx, nn
from torch._subclasses import FakeTensorMode
from torch.export import Dim, export

import dwswap
from dwswap.bench.kernel_families import GEMM, family
from dwswap.export import load, save
from dwswap.pointwise import pointwise_product, suits
from dwswap.separable import separable_conv2d

aten = torch.ops.aten
CHANNELS_LAST = torch.channels_last


def products(model: nn.Module) -> int:
    """How many products a graph has, alone or behind a depthwise convolution."""
    assert isinstance(model, fx.GraphModule)
    return sum(
        node.target is pointwise_product
        or (node.target is separable_conv2d and node.args[4] is not None)
        for node in model.graph.nodes
    )


def optimize(model: nn.Module, **options: Any) -> Any:
    return dwswap.optimize(model, **{"memory_format": "channels_last", **options})


class Body(nn.Module):
    """A depthwise convolution and an activation, then ``body(x)``."""

    def __init__(self, *layers: nn.Module, forward: Callable[..., Any] | None = None) -> None:
        super().__init__()
        self.start, self.relu = depthwise(), nn.ReLU()
        self.layers = nn.Sequential(*layers)
        self.body = forward or (lambda layers, x: layers(x))

    def forward(self, x: Tensor) -> Any:
        return self.body(self.layers, self.relu(self.start(x)))


@pytest.fixture
def convolutions(monkeypatch: pytest.MonkeyPatch) -> list[Tensor]:
    """The inputs of the calls of ``F.conv2d``."""
    seen: list[Tensor] = []
    original = F.conv2d
    monkeypatch.setattr(F, "conv2d", lambda x, *args: (seen.append(x), original(x, *args))[1])
    return seen


# --- the function -------------------------------------------------------------------------------


@pytest.mark.usefixtures("products")
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("layout", [CHANNELS_LAST, torch.contiguous_format])
@pytest.mark.parametrize(("channels", "out"), [(8, 6), (1, 6), (8, 1), (1, 1)])
def test_function(layout: torch.memory_format, channels: int, out: int, bias: bool) -> None:
    weight, offset = torch.randn(out, channels, 1, 1), torch.randn(out) if bias else None
    for size, batch in ((5, 3), (5, 1), (1, 3), (1, 1), (5, 0)):
        x = image(channels, size=size, batch=batch).to(memory_format=layout)
        for w in (weight, weight.to(memory_format=CHANNELS_LAST)):
            same(pointwise_product(x, w, offset), F.conv2d(x, w, offset))


@pytest.mark.usefixtures("products")
def test_products_are_taken(convolutions: list[Tensor]) -> None:
    """And of some of the channels without a copy."""
    weight, bias = torch.randn(6, 4, 1, 1), torch.randn(6)
    wide = image(8).to(memory_format=CHANNELS_LAST)
    for x in (wide[:, :4], wide[:, 4:], wide[:1, 4:], wide[:, :4].contiguous()):
        x = x.contiguous(memory_format=CHANNELS_LAST) if x.stride(1) != 1 else x
        result = pointwise_product(x, weight, bias)
        assert not convolutions
        same(result, F.conv2d(x, weight, bias))
        convolutions.clear()


@pytest.mark.usefixtures("products")
def test_convolutions_stay(convolutions: list[Tensor]) -> None:
    weight, bias = torch.randn(6, 4, 1, 1), torch.randn(6)
    x = image(4).to(memory_format=CHANNELS_LAST)
    others = (image(4), x[0], x[:, :, ::2], x[:, :, :, 1:], x[:0])
    for other in (*others, x[:, :1].expand(-1, 4, -1, -1)):
        same(pointwise_product(other, weight, bias), F.conv2d(other, weight, bias))
        assert len(convolutions) == 2
        convolutions.clear()
    with torch.autocast("cpu", torch.bfloat16):
        assert pointwise_product(x, weight, bias).dtype == torch.bfloat16
    leaves = [t.clone().requires_grad_() for t in (x, weight, bias)]
    (gradient,) = torch.autograd.grad(pointwise_product(*leaves).sum(), leaves[1])
    (expected,) = torch.autograd.grad(F.conv2d(*leaves).sum(), leaves[1])
    same(gradient, expected)
    assert len(convolutions) == 3
    with pytest.raises(RuntimeError):
        pointwise_product(x, weight.half(), bias)
    with torch.no_grad():
        pointwise_product(*leaves)
    assert len(convolutions) == 4  # that of another dtype


def test_half_precision_on_cuda_only() -> None:
    with FakeTensorMode():
        for device, dtypes in {
            "cuda": {torch.float16: True, torch.bfloat16: True, torch.float32: False},
            "cpu": {torch.float16: False},
        }.items():
            for dtype, expected in dtypes.items():
                assert suits(torch.empty(2, device=device, dtype=dtype)) is expected


# --- the pass -----------------------------------------------------------------------------------

REWRITTEN: dict[str, tuple[Callable[[], nn.Module], int]] = {
    "bias": (lambda: Body(pointwise()), 1),
    "relu": (lambda: Body(pointwise(), nn.ReLU()), 1),
    "relu in place": (lambda: Body(pointwise(), nn.ReLU(True)), 1),
    "F.relu": (lambda: Body(pointwise(), forward=lambda f, x: F.relu(f(x))), 1),
    "relu_": (lambda: Body(pointwise(), forward=lambda f, x: f(x).relu_()), 1),
    "clamp": (lambda: Body(pointwise(), forward=lambda f, x: f(x).clamp(min=0)), 1),
    "relu6": (lambda: Body(pointwise(), nn.ReLU6(True)), 1),
    "silu": (lambda: Body(pointwise(), nn.SiLU()), 1),
    "hardswish": (lambda: Body(pointwise(), nn.Hardswish()), 1),
    "elu": (lambda: Body(pointwise(), nn.ELU()), 1),
    "read twice": (
        lambda: Body(pointwise(), forward=lambda f, x: (y := f(x), y.relu())[1] + F.elu(y)),
        1,
    ),
    "returned": (lambda: Body(pointwise(), forward=lambda f, x: (y := f(x), F.relu(y))), 1),
    # The changed value is the one that is returned.
    "changed and read": (
        lambda: Body(pointwise(), forward=lambda f, x: (y := f(x), F.relu_(y), y)[1:]),
        1,
    ),
    "odd channels": (lambda: Body(pointwise(8, 6, bias=False), nn.ReLU()), 1),
    "odd channels before": (
        lambda: Body(pointwise(8, 6), nn.ReLU(), pointwise(6, 8, bias=False), nn.ELU()),
        2,
    ),
    "called twice": (lambda: Body(pointwise(), forward=lambda f, x: f(f(x).relu()).relu()), 2),
    "input changed after": (
        lambda: Body(
            pointwise(), forward=lambda f, x: (y := f(x), x.add_(1), F.relu(y))[2] * F.elu(x)
        ),
        1,
    ),
    "BatchNorm": (lambda: Body(pointwise(bias=False), nn.BatchNorm2d(8), nn.ReLU(True)), 1),
}


@pytest.mark.usefixtures("products")
@pytest.mark.parametrize("case", REWRITTEN)
def test_rewrites(case: str) -> None:
    build, expected = REWRITTEN[case]
    model = build().eval()
    keys = model.state_dict().keys()
    fast = optimize(model)
    assert products(fast) == expected
    if case != "BatchNorm":
        assert fast.state_dict().keys() == keys
    with torch.no_grad():
        for x in (image(8), image(8).to(memory_format=CHANNELS_LAST), image(8)[:0]):
            same(fast(x), model(x))
    same(fast(image(8)), model(image(8)))


def hooked(module: nn.Module) -> nn.Module:
    module.register_forward_hook(lambda module, args, output: None)
    return module


STAYS: dict[str, Callable[[], nn.Module]] = {
    "multiples of 8": lambda: Body(pointwise(bias=False), nn.ReLU()),
    "stride": lambda: Body(pointwise(stride=2), nn.ReLU()),
    "stride of a side": lambda: Body(pointwise(stride=(1, 2)), nn.ReLU()),
    "padding": lambda: Body(pointwise(padding=1), nn.ReLU()),
    "groups": lambda: Body(pointwise(groups=2), nn.ReLU()),
    "3x3": lambda: Body(nn.Conv2d(8, 6, 3), nn.ReLU()),
    "transposed": lambda: Body(nn.ConvTranspose2d(8, 6, 1), nn.ReLU()),
    "depthwise": lambda: Body(depthwise(kernel_size=1, padding=0), nn.Tanh()),
    "linear": lambda: Body(nn.Flatten(), nn.Linear(648, 6), nn.ReLU()),
    "computed bias": lambda: Body(
        pointwise(), forward=lambda f, x: F.conv2d(x, f[0].weight, f[0].bias + 1).relu()
    ),
    "computed weight": lambda: Body(
        pointwise(), forward=lambda f, x: F.conv2d(x, f[0].weight + 1, f[0].bias).relu()
    ),
}


@pytest.mark.usefixtures("products")
@pytest.mark.parametrize("case", STAYS)
def test_leaves_alone(case: str) -> None:
    model = STAYS[case]().eval()
    fast = optimize(model)
    assert products(fast) == 0
    same(fast(image(8)), model(image(8)))


@pytest.mark.usefixtures("products")
@pytest.mark.parametrize("layout", ["preserve", "contiguous"])
def test_in_another_layout(layout: str) -> None:
    model = Body(pointwise(), nn.ReLU()).eval()
    assert products(optimize(model, memory_format=layout)) == 0
    model = model.to(memory_format=CHANNELS_LAST)
    fast = optimize(model, memory_format=layout)
    assert products(fast) == (1 if layout == "preserve" else 0)
    for x in (image(8), image(8).to(memory_format=CHANNELS_LAST)):
        same(fast(x), model(x))


def test_not_on_the_cpu() -> None:
    assert products(optimize(Body(pointwise(), nn.ReLU()).eval())) == 0


@pytest.mark.usefixtures("products")
def test_hooks() -> None:
    model = Body(pointwise(), hooked(nn.ReLU())).eval()
    assert products(optimize(model)) == 1
    assert products(optimize(Body(hooked(pointwise()), nn.ReLU()).eval())) == 0


@pytest.mark.usefixtures("products")
def test_a_residual_sum_comes_first() -> None:
    class Sum(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.start, self.middle, self.end = depthwise(6), depthwise(6), nn.ReLU()
            self.body = pointwise(6, 6, bias=False)

        def forward(self, x: Tensor) -> Tensor:
            x = self.start(x)
            return self.end(x + self.body(self.middle(x)))

    fast = optimize(Sum().eval())
    assert products(fast) == 0
    assert "pointwise_residual" in str(fast.code)


@pytest.mark.usefixtures("products")
def test_report() -> None:
    odd = pointwise(8, 6, bias=False)
    layers = [pointwise(), nn.ReLU(), odd, nn.ELU(), pointwise(6, 8), nn.SiLU()]
    model = Body(*layers).eval()
    fast = optimize(model)
    report = dwswap.report(fast)
    found = {
        layer.path: [c for c in layer.changes if c.kind == "pointwise"] for layer in report.layers
    }
    assert [[c.reason for c in changes] for changes in found.values()] == [
        [],
        ["epilogue"],
        ["product"],
        ["epilogue"],
    ]
    assert all(change.done for changes in found.values() for change in changes)
    assert [str(changes[0]) for changes in found.values() if changes] == [
        "its bias in the epilogue of the matrix product",
        "became a matrix product",
        "its bias in the epilogue of the matrix product",
    ]
    assert "6 channels" in found["layers.2"][0].detail
    # The first ReLU is gone, the depthwise convolution and the first product are one call, and the
    # layout is converted at both ends.
    assert (report.calls_before, report.calls_after) == (8, 8)
    assert "made 3 pointwise convolutions matrix products" in str(report)
    explained = dwswap.explain(model)
    assert "matrix products" not in str(explained)  # it is asked for no layout, and is on the CPU


@pytest.mark.parametrize("name", ["aten::addmm", "aten::mm"])
def test_products_are_of_the_family_of_convolutions(name: str) -> None:
    assert family(name) == GEMM


# --- the result ---------------------------------------------------------------------------------


def net() -> nn.Module:
    torch.manual_seed(0)
    layers = [pointwise(8, 6, bias=False), nn.ELU(), pointwise(6, 8), nn.ReLU6(True)]
    return Body(pointwise(), nn.ReLU(True), *layers, pointwise()).eval()


@pytest.mark.usefixtures("products")
def test_copies_and_compiles() -> None:
    model = net()
    fast = optimize(model)
    assert products(fast) == 4
    torch._dynamo.reset()
    compiled = torch.compile(fast, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        for result in (copy.deepcopy(fast), pickle.loads(pickle.dumps(fast)), compiled):
            for x in (image(8), image(8, batch=1), image(8)[:0]):
                same(result(x), model(x))
    x = image(8).requires_grad_()
    (ours,), (theirs,) = (torch.autograd.grad(m(x).sum(), x) for m in (fast, model))
    torch.testing.assert_close(ours, theirs)
    assert dwswap.report(optimize(model, example_inputs=image(8), verify=True)).verification.passed


@pytest.mark.usefixtures("products")
@pytest.mark.parametrize("format", ["pt2", "aten", pytest.param("onnx", marks=pytest.mark.slow)])
def test_files(tmp_path: Path, format: str) -> None:
    if format == "onnx":
        pytest.importorskip("onnxscript")
        pytest.importorskip("onnxruntime")
    model = net()
    path = tmp_path / ("m.onnx" if format == "onnx" else "m.pt2")
    path = save(optimize(model), path, image(8), format=format, dynamic_batch=True)
    loaded: Any = load(path)
    with torch.no_grad():
        for x in (image(8), image(8, batch=1), image(8, batch=5)):
            torch.testing.assert_close(loaded(x), model(x))
    if format != "onnx":
        x = image(8).requires_grad_()
        (ours,), (theirs,) = (torch.autograd.grad(m(x).sum(), x) for m in (loaded, model))
        torch.testing.assert_close(ours, theirs)


@pytest.mark.usefixtures("products")
@pytest.mark.parametrize("layout", ["channels_last", "preserve"])
@pytest.mark.parametrize("dialect", DIALECTS)
def test_exported_programs(dialect: Dialect, layout: str) -> None:
    model, x = net(), image(8)
    shapes = ({0: Dim("batch", min=1, max=16), 2: Dim("height", min=2, max=64)},)
    fast = dwswap.optimize(
        dialect(export(model, (x,), dynamic_shapes=shapes)), memory_format=layout
    )
    made = layout == "channels_last"
    assert targets(fast).count(aten.addmm.default) == (3 if made else 0)
    assert targets(fast).count(aten.mm.default) == (1 if made else 0)
    if made:
        assert aten.conv2d.default not in targets(fast)
        assert aten.convolution.default not in targets(fast)
        done = [c for layer in dwswap.report(fast).layers for c in layer.changes]
        assert len([c for c in done if c.kind == "pointwise"]) == 4
    again = dwswap.optimize(fast, memory_format=layout)
    for other in (x, image(8, size=5, batch=1), image(8, batch=3)):
        other = other[:, :, :, :1].expand(-1, -1, -1, 9).contiguous()
        check(fast, model, other)
        check(again, model, other)
    x = image(8).requires_grad_()
    (ours,), (theirs,) = (torch.autograd.grad(m(x).sum(), x) for m in (fast.module(), model))
    torch.testing.assert_close(ours, theirs)


@pytest.mark.usefixtures("products")
def test_shufflenet() -> None:
    model = build_with_data("shufflenet_v2_x1_0").double()
    fast = optimize(model)
    # The last of each branch and of the model; before depthwise layers, which take the bias, those
    # of 58 channels and the first of stage 3, whose 116 are no multiple of 8 either.
    assert products(fast) == 20 + 12
    x = torch.rand(2, 3, 64, 64, dtype=torch.float64)
    with torch.no_grad():
        expected = model(x)
        assert float((fast(x) - expected).abs().max() / expected.abs().max()) < 1e-12
