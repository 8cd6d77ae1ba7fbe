"""Biases that move forward through what is linear, and those that must stay."""

from __future__ import annotations

import copy
import pickle
import random
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from test_absorb_activation import Apply
from test_fold_batchnorm import changes, norm
from test_torchvision import build, models
from tiny_models import depthwise, image
from torch import Tensor, fx, nn
from torch.nn.modules.batchnorm import _BatchNorm

import dwswap
from dwswap.passes.affine_call import affine_call

# Layers with a bias in the optimized models, but for depthwise ones.
LEFT = {
    "mobilenet_v2": ["the head", "the classifier"],
    "mnasnet0_5": ["the head", "the classifier"],
    "efficientnet_b0": ["the head", "the classifier"],
    "shufflenet_v2_x0_5": ["the stem", "the head", "the classifier", *["before relu"] * 19],
    "mobilenet_v3_small": ["the head", *["the classifier"] * 2],
}


def biases(fast: nn.Module) -> list[bool]:
    """Of each convolution and linear layer in order, whether it has a bias; not of depthwise."""
    assert isinstance(fast, fx.GraphModule)
    calls = [affine_call(fast, node) for node in fast.graph.nodes]
    return [call.bias is not None for call in calls if call is not None and not call.depthwise]


def input_biases(fast: nn.Module) -> list[bool]:
    assert isinstance(fast, fx.GraphModule)
    calls = [affine_call(fast, node) for node in fast.graph.nodes]
    return [c.option("input_bias") is not None for c in calls if c is not None and c.depthwise]


def pushed(model: nn.Module, x: Tensor | None = None) -> Any:
    """The result, checked to be the same function."""
    torch.manual_seed(0)
    model = model.eval().double()
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            nn.init.uniform_(parameter, -3, 3)
    x = image(8).double() if x is None else x.double()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    fast = dwswap.optimize(model)
    with torch.no_grad():
        expected = model(x)
        for result in (fast, copy.deepcopy(fast)):
            torch.testing.assert_close(result(x), expected, rtol=1e-12, atol=1e-12)
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name])
    return fast


def reasons(fast: nn.Module) -> list[str]:
    return [change.reason for change in changes(fast, "bias")]


def pointwise(channels: int = 8, out: int = 8, **options: Any) -> nn.Conv2d:
    return nn.Conv2d(channels, out, 1, **options)


class OnLast(nn.Module):
    """``layer`` on ``(N, H, W, C)``."""

    def __init__(self, *layers: nn.Module) -> None:
        super().__init__()
        self.layers = nn.Sequential(*layers)

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(torch.permute(x, [0, 2, 3, 1])).permute(0, 3, -3, 2)


class Residual(nn.Module):
    """``x + body(x)``."""

    def __init__(self, *body: nn.Module, combine: Callable[..., Tensor] = torch.add) -> None:
        super().__init__()
        self.body = nn.Sequential(*body)
        self.combine = combine

    def forward(self, x: Tensor) -> Tensor:
        return self.combine(x, self.body(x))


def inverted(**options: Any) -> Residual:
    layers = [pointwise(8, 16), norm(16), nn.ReLU6(True), depthwise(16), norm(16), nn.ReLU6(True)]
    return Residual(*layers, pointwise(16, 8), norm(8), **options)


def chain(*layers: nn.Module) -> nn.Sequential:
    """``layers`` after a depthwise layer and a projection with a bias."""
    return nn.Sequential(depthwise(), nn.ReLU(), pointwise(), *layers)


# Layers -> for the projection and each convolution or linear layer in them, whether a bias stays.
PUSHED: dict[str, tuple[Callable[[], nn.Module], list[bool]]] = {
    "pointwise": (lambda: chain(pointwise()), [False, True]),
    "two": (lambda: chain(pointwise(), pointwise(8, 4)), [False, False, True]),
    "no bias between": (lambda: chain(pointwise(bias=False), pointwise()), [False, False, True]),
    "grouped": (lambda: chain(pointwise(8, 12, groups=4)), [False, True]),
    "strided, wide": (lambda: chain(nn.Conv2d(8, 4, 3, stride=2)), [False, True]),
    "valid": (lambda: chain(nn.Conv2d(8, 4, (2, 3), padding="valid")), [False, True]),
    "same": (lambda: chain(nn.Conv2d(8, 4, 1, padding="same")), [False, True]),
    "depthwise": (lambda: chain(depthwise()), [False]),
    "depthwise, doubled": (lambda: chain(depthwise(multiplier=2), pointwise(16, 8)), [False, True]),
    "depthwise, between": (lambda: chain(pointwise(), depthwise(), nn.ReLU()), [False, False]),
    "permuted": (
        lambda: chain(OnLast(nn.Linear(8, 6)), nn.Conv2d(6, 4, 1)),
        [False, False, True],
    ),
    "permuted, depthwise": (lambda: chain(OnLast(nn.Linear(8, 8)), depthwise()), [False, False]),
    "dropout": (lambda: chain(nn.Dropout(0.5), nn.Identity(), pointwise()), [False, True]),
    "F.dropout": (lambda: chain(Apply(lambda x: F.dropout(x, 0.5, False)), pointwise()), [0, 1]),
    "pool": (
        lambda: chain(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Dropout(), nn.Linear(8, 5)),
        [False, True],
    ),
    "pool to 3": (lambda: chain(nn.AdaptiveAvgPool2d((3, 3)), pointwise()), [False, True]),
    "F.pool": (
        lambda: chain(
            Apply(lambda x: F.adaptive_avg_pool2d(x, (1, 1)).flatten(1)), nn.Linear(8, 5)
        ),
        [False, True],
    ),
    "mean": (lambda: chain(Apply(lambda x: x.mean([2, 3])), nn.Linear(8, 5)), [False, True]),
    "mean, kept": (
        lambda: chain(Apply(lambda x: torch.mean(x, (-1, -2), keepdim=True)), pointwise()),
        [False, True],
    ),
    "linear": (
        lambda: chain(Apply(lambda x: x.mean((2, 3))), nn.Linear(8, 6), nn.Linear(6, 5)),
        [False, False, True],
    ),
    "twice": (lambda: chain(Residual(pointwise()), depthwise()), [False, False]),
    "doubled": (lambda: chain(Apply(lambda x: x + x), depthwise()), [False]),
    "a number": (lambda: chain(Apply(lambda x: x + 2.5), depthwise()), [False]),
    "residual, one keeps it": (
        lambda: chain(Residual(pointwise(), pointwise()), nn.ReLU()),
        [False, False, True],
    ),
    "parallel": (
        lambda: nn.Sequential(depthwise(), nn.ReLU(), Parallel(pointwise(), pointwise())),
        [True, False],
    ),
    "parallel, one without": (
        lambda: chain(nn.ReLU(), Parallel(pointwise(bias=False), pointwise()), nn.ReLU()),
        [True, False, True],
    ),
    "three blocks": (
        lambda: chain(inverted(), inverted(), inverted(), pointwise(8, 4), nn.ReLU6()),
        [False] * 7 + [True],
    ),
    "three blocks, then relu": (
        lambda: chain(inverted(), inverted(), inverted(), nn.ReLU6()),
        [False] * 6 + [True],
    ),
    "three blocks, left and right": (
        lambda: chain(
            inverted(combine=lambda x, y: y + x),
            inverted(),
            inverted(combine=lambda x, y: x.add(y)),
        ),
        [False] * 6 + [True],
    ),
}


class Parallel(nn.Module):
    def __init__(self, *branches: nn.Module) -> None:
        super().__init__()
        self.branches = nn.ModuleList(branches)

    def forward(self, x: Tensor) -> Tensor:
        return self.branches[0](x) + self.branches[1](x)


@pytest.mark.parametrize("case", PUSHED)
def test_pushes(case: str) -> None:
    make, expected = PUSHED[case]
    fast = pushed(make())
    assert biases(fast) == expected
    moved = [change for change in changes(fast, "bias") if change.reason == "pushed"]
    assert all(change.done for change in moved)


def cat(x: Tensor) -> Tensor:
    return torch.cat([x, x], 1)


def shuffle(x: Tensor) -> Tensor:
    n, c, h, w = x.shape
    return x.view(n, 2, c // 2, h, w).transpose(1, 2).contiguous().view(n, c, h, w)


class Gated(nn.Module):
    """The scale of squeeze-and-excitation."""

    def __init__(self, gate: Callable[[Tensor], Tensor] = torch.sigmoid) -> None:
        super().__init__()
        self.fc1, self.fc2 = pointwise(8, 2), pointwise(2, 8)
        self.gate = gate

    def forward(self, x: Tensor) -> Tensor:
        return self.gate(self.fc2(F.relu(self.fc1(x.mean((2, 3), keepdim=True))))) * x


KEPT: dict[str, tuple[Callable[[], nn.Module], list[bool], str]] = {
    "relu": (lambda: chain(nn.ReLU(), pointwise()), [True, True], "not_linear"),
    "output": (lambda: chain(), [True], "not_linear"),
    "padding": (lambda: chain(nn.Conv2d(8, 4, 3, padding=1)), [True, True], "not_constant"),
    "same": (lambda: chain(nn.Conv2d(8, 4, 3, padding="same")), [True, True], "not_constant"),
    "transposed": (lambda: chain(nn.ConvTranspose2d(8, 4, 2)), [True, True], "not_constant"),
    "no bias there": (lambda: chain(pointwise(bias=False)), [True, False], "bias_there"),
    "asymmetric depthwise": (
        lambda: chain(depthwise(kernel_size=2, padding="same")),
        [True],
        "not_constant",
    ),
    "concat": (lambda: chain(Apply(cat), pointwise(16, 4)), [True, True], "not_linear"),
    "shuffle": (lambda: chain(Apply(shuffle), pointwise()), [True, True], "not_linear"),
    "gate": (lambda: chain(Gated(torch.tanh), pointwise()), [True] * 4, "not_linear"),
    "squeeze-and-excitation": (
        lambda: chain(Gated(), pointwise()),
        [True, True],
        "not_linear",
    ),
    "product": (lambda: chain(Apply(lambda x: x * x), pointwise()), [True, True], "not_linear"),
    "average": (lambda: chain(nn.AvgPool2d(3, 1, 1), pointwise()), [True, True], "not_linear"),
    "mean of channels": (
        lambda: chain(Apply(lambda x: x.mean((1, 2), keepdim=True) + x), pointwise()),
        [True, True],
        "not_linear",
    ),
    "flatten of an image": (
        lambda: chain(nn.Flatten(), nn.Linear(8 * 81, 3)),
        [True, True],
        "not_linear",
    ),
    "in place and read elsewhere": (
        lambda: chain(Apply(lambda x: x.add_(1) + x), pointwise()),
        [True, True],
        "not_linear",
    ),
    "alpha": (
        lambda: chain(Apply(lambda x: torch.add(x, x, alpha=2)), pointwise()),
        [True, True],
        "not_linear",
    ),
    "one channel": (
        lambda: nn.Sequential(
            depthwise(), pointwise(8, 1), Apply(lambda x: x + torch.ones(8, 1, 1)), pointwise()
        ),
        [True, True],
        "not_linear",
    ),
    "a view changed in place": (
        lambda: chain(Apply(lambda x: F.dropout(x, 0.5, False).relu_()), pointwise()),
        [True, True],
        "not_linear",
    ),
}


@pytest.mark.parametrize("case", KEPT)
def test_keeps(case: str) -> None:
    make, expected, reason = KEPT[case]
    fast = pushed(make())
    assert biases(fast) == expected
    assert not any(input_biases(fast)[1:])
    assert reason in reasons(fast)
    assert "pushed" not in reasons(fast)


class Readers(nn.Module):
    """A projection that is read twice."""

    def __init__(self, *readers: nn.Module) -> None:
        super().__init__()
        self.start, self.readers = chain(), nn.ModuleList(readers)

    def forward(self, x: Tensor) -> Any:
        x = self.start(x)
        return [reader(x) for reader in self.readers]


def test_every_reader_makes_up_for_it() -> None:
    fast = pushed(Readers(pointwise(), depthwise(), nn.Conv2d(8, 2, 3)))
    assert biases(fast) == [False, True, True]
    assert input_biases(fast) == [False, True]
    layers = {layer.path: layer for layer in dwswap.report(fast).layers}
    (change,) = layers["start.2"].changes
    assert str(change) == "gave its bias to readers.0"
    assert change.detail == "made up for by the bias of 3 layers after it"


@pytest.mark.parametrize("other", [nn.ReLU(), nn.Identity(), nn.Conv2d(8, 2, 3, padding=1)])
def test_one_reader_that_cannot_keeps_it(other: nn.Module) -> None:
    fast = pushed(Readers(pointwise(), depthwise(), other))
    assert biases(fast)[0]
    assert input_biases(fast) == [False, False]


def test_shared_layers_get_biases_of_their_own() -> None:
    shared = pointwise()
    fast = pushed(chain(shared, nn.ReLU(), shared, depthwise(), shared))
    # projection, then the calls of the shared layer: before relu, before depthwise, the last
    assert biases(fast) == [False, True, False, True]
    weights = [n for n in fast.graph.nodes if n.op == "get_attr" and n.target.endswith("weight")]
    assert len({id(fast.get_parameter(str(n.target))) for n in weights}) == 4


def test_functional_and_computed_bias() -> None:
    class Functional(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.start = chain()
            self.weight, self.bias = nn.Parameter(torch.randn(5, 8)), nn.Parameter(torch.randn(5))

        def forward(self, x: Tensor) -> Tensor:
            x = self.start(x).mean((2, 3))
            return F.linear(x, self.weight, self.bias) + F.linear(x, self.weight, self.bias * 2)

    fast = pushed(Functional())
    assert biases(fast) == [True, True, True]
    assert reasons(fast) == ["not_linear"]


def test_hooks_and_skip() -> None:
    model = chain(pointwise(), depthwise()).eval()
    fast = dwswap.optimize(model, skip=lambda module, path: path == "4")
    assert biases(fast) == [False, True, True]  # the last is the skipped one
    # A hook on the layer that would have to make up for the bias.
    model = chain(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 5)).eval()
    model[-1].register_forward_pre_hook(lambda module, args: (args[0].relu(),))
    fast = pushed(model)
    assert biases(fast) == [True, True]


def test_names_of_modules_mean_nothing() -> None:
    class Named(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.start, self.contiguous, self.mean = chain(), nn.ReLU(), nn.Sigmoid()
            self.end = pointwise()

        def forward(self, x: Tensor) -> Tensor:
            x = self.start(x)
            return self.end(self.contiguous(x)) + self.mean(self.start(x))

    assert biases(pushed(Named())) == [True] * 3


def test_exported_program() -> None:
    model = chain(inverted(), inverted(), pointwise(8, 4)).eval().double()
    x = image(8).double()
    fast = dwswap.optimize(torch.export.export(model, (x,)).module())
    assert biases(fast) == [False] * 5 + [True]
    with torch.no_grad():
        torch.testing.assert_close(fast(x), model(x), rtol=1e-12, atol=1e-12)


def test_what_does_not_fit_stays() -> None:
    model = chain(pointwise(), nn.ReLU()).half().eval()
    with torch.no_grad():
        model[2].bias.fill_(6e4)
        model[3].weight.fill_(1)
    fast = dwswap.optimize(model)
    assert biases(fast) == [True, True]
    assert "overflow" in reasons(fast)
    assert biases(dwswap.optimize(model.float())) == [False, True]


def test_again_and_explain() -> None:
    model = chain(inverted(), inverted()).eval()
    fast = dwswap.optimize(model)
    again = dwswap.optimize(fast)
    assert biases(again) == biases(fast) == [False] * 4 + [True]
    x = image(8)
    loaded = pickle.loads(pickle.dumps(fast))
    torch.testing.assert_close(loaded(x), fast(x))
    torch.testing.assert_close(again(x), fast(x))
    told = dwswap.explain(model)
    done = dwswap.report(fast)
    assert [layer.changes for layer in told.layers] == [layer.changes for layer in done.layers]
    assert "pushed 2 biases on" in str(done)
    with torch.device("meta"):
        assert "pushed 2 biases on" in str(dwswap.explain(chain(inverted(), inverted()).eval()))
    assert biases(dwswap.optimize(model, inplace=True)) == [False] * 4 + [True]


def test_compiles() -> None:
    torch._dynamo.reset()
    fast = pushed(chain(inverted(), inverted(), pointwise()))
    compiled = torch.compile(fast, fullgraph=True, backend="aot_eager")
    x = image(8).double()
    with torch.no_grad():
        torch.testing.assert_close(compiled(x), fast(x))


class Net(nn.Module):
    """Steps that each take values made before; most of what is made is linear."""

    def __init__(self, draw: random.Random) -> None:
        super().__init__()
        self.layers = nn.ModuleList([depthwise()])
        self.steps: list[tuple[Any, ...]] = [("layer", 0, 0)]
        makers: list[Callable[[], nn.Module]] = [
            *[pointwise] * 5,
            *(lambda: pointwise(bias=False), lambda: pointwise(groups=2), depthwise, nn.ReLU),
            *(lambda: nn.Conv2d(8, 8, 3, padding=1), nn.Identity, nn.Dropout),
        ]
        for last in range(1, draw.randint(4, 16)):
            source = last if draw.random() < 0.7 else draw.randint(0, last)
            kind = draw.choices(["layer", "shared", "add"], [6, 1, 3])[0]
            if kind == "layer":
                self.layers.append(draw.choice(makers)())
                self.steps.append(("layer", len(self.layers) - 1, source))
            elif kind == "shared":
                self.steps.append(("layer", draw.randrange(len(self.layers)), source))
            else:
                self.steps.append(("add", draw.randint(0, last), source))
        self.outputs = {len(self.steps), draw.randint(1, len(self.steps))}

    def forward(self, x: Tensor) -> Any:
        values = [x]
        for kind, which, source in self.steps:
            other = values[source]
            values.append(self.layers[which](other) if kind == "layer" else values[which] + other)
        return [values[i] for i in sorted(self.outputs)]


@pytest.mark.parametrize(
    "first", [0, *(pytest.param(first, marks=pytest.mark.slow) for first in (60, 120, 180))]
)
def test_random_graphs(first: int) -> None:
    fewer = 0
    for seed in range(first, first + 60):
        torch.manual_seed(seed)
        model = Net(random.Random(seed)).eval().double()
        x = image(8, size=5).double()
        with torch.no_grad():
            fast = dwswap.optimize(model)
            expected = model(x)
            scale = max(float(y.abs().max()) for y in expected)
            for own, other in zip(fast(x), expected, strict=True):
                torch.testing.assert_close(own, other, rtol=0, atol=1e-11 * scale, msg=f"{seed}")
        calls = [affine_call(fast, node) for node in fast.graph.nodes]
        before = sum(
            isinstance(model.layers[which], nn.Conv2d)
            and model.layers[which].bias is not None
            and model.layers[which].groups < 8
            for kind, which, _ in model.steps
            if kind == "layer"
        )
        after = sum(c is not None and not c.depthwise and c.bias is not None for c in calls)
        assert after <= before, seed
        fewer += before - after
    assert fewer > 60


@pytest.mark.parametrize("name", LEFT)
def test_torchvision(name: str) -> None:
    torch.manual_seed(0)
    model = build(name).eval().double()
    for module in model.modules():
        if isinstance(module, _BatchNorm):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.uniform_(module.bias, -0.5, 0.5)
            nn.init.uniform_(module.running_mean, -0.5, 0.5)
            nn.init.uniform_(module.running_var, 0.5, 1.5)
    x = torch.rand(2, 3, 64, 64, dtype=torch.float64)
    fast = dwswap.optimize(model)
    with torch.no_grad():
        expected = model(x)
        error = float((fast(x) - expected).abs().max() / expected.abs().max())
    assert error < 1e-12
    assert sum(biases(fast)) == len(LEFT[name])


def test_mobilenet_head_and_classifier_only() -> None:
    fast = dwswap.optimize(models.mobilenet_v2().eval())
    calls = [affine_call(fast, node) for node in fast.graph.nodes]
    left = [c for c in calls if c is not None and not c.depthwise and c.bias is not None]
    shapes = [tuple(fast.get_parameter(str(c.weight.target)).shape[:2]) for c in left[:1]]
    assert shapes == [(1280, 320)]
    assert left[1].module is not None
    assert sum(input_biases(fast)) == 17
