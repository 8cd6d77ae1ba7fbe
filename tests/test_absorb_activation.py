"""Activations and biases beside depthwise convolutions: what the operator takes over, what not."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from test_fold_batchnorm import changes, norm, optimized
from tiny_models import depthwise, image
from torch import Tensor, fx, nn

import dwswap
from dwswap import depthwise_conv2d
from dwswap.activations import ACTIVATIONS

aten = torch.ops.aten
Call = Callable[[Tensor], Tensor]


class Apply(nn.Module):
    """A function as a layer."""

    def __init__(self, call: Call) -> None:
        super().__init__()
        self.call = call

    def forward(self, x: Tensor) -> Tensor:
        return self.call(x)


def operators(fast: nn.Module) -> list[tuple[str, str, bool]]:
    """Of each call of the operator: input activation, activation, whether it has an input bias."""
    assert isinstance(fast, fx.GraphModule)
    return [
        (
            node.kwargs.get("input_activation", "none"),
            node.kwargs.get("activation", "none"),
            node.kwargs.get("input_bias") is not None,
        )
        for node in fast.graph.nodes
        if node.target is depthwise_conv2d
    ]


def calls(fast: nn.Module) -> list[Any]:
    assert isinstance(fast, fx.GraphModule)
    return [node.target for node in fast.graph.nodes if node.op.startswith("call")]


def reasons(fast: nn.Module, kind: str) -> list[str]:
    return [change.reason for change in changes(fast, kind)]


FORMS: dict[str, tuple[str, Callable[[], nn.Module] | Call]] = {
    "nn.ReLU": ("relu", nn.ReLU),
    "nn.ReLU in place": ("relu", lambda: nn.ReLU(inplace=True)),
    "nn.ReLU6": ("relu6", lambda: nn.ReLU6(inplace=True)),
    "nn.Hardtanh": ("relu6", lambda: nn.Hardtanh(0, 6)),
    "nn.Hardswish": ("hardswish", nn.Hardswish),
    "nn.SiLU": ("silu", lambda: nn.SiLU(inplace=True)),
    "nn.GELU": ("gelu", nn.GELU),
    "nn.GELU tanh": ("gelu_tanh", lambda: nn.GELU("tanh")),
    "nn.Hardsigmoid": ("hardsigmoid", nn.Hardsigmoid),
    "nn.Sigmoid": ("sigmoid", nn.Sigmoid),
    **{
        f"F {i}": (name, lambda call=call: Apply(call))
        for i, (name, call) in enumerate(
            [
                ("relu", F.relu),
                ("relu", lambda x: F.relu(x, True)),
                ("relu", lambda x: F.relu_(x)),
                ("relu6", lambda x: F.relu6(input=x, inplace=True)),
                ("relu6", lambda x: F.hardtanh(x, 0, 6)),
                ("relu6", lambda x: F.hardtanh_(x, min_val=0.0, max_val=6.0)),
                ("hardswish", F.hardswish),
                ("silu", lambda x: F.silu(x, inplace=True)),
                ("gelu", F.gelu),
                ("gelu_tanh", lambda x: F.gelu(x, approximate="tanh")),
                ("hardsigmoid", F.hardsigmoid),
                ("sigmoid", F.sigmoid),
            ]
        )
    },
    **{
        f"torch {i}": (name, lambda call=call: Apply(call))
        for i, (name, call) in enumerate(
            [
                ("relu", torch.relu),
                ("relu", torch.relu_),
                ("relu", lambda x: torch.clamp(x, min=0)),
                ("relu", lambda x: torch.clamp_min(x, 0.0)),
                ("relu6", lambda x: torch.clamp(x, 0, 6)),
                ("relu6", lambda x: torch.clip(x, 0.0, max=6.0)),
                ("sigmoid", torch.sigmoid),
                ("sigmoid", torch.special.expit),
            ]
        )
    },
    **{
        f"method {i}": (name, lambda call=call: Apply(call))
        for i, (name, call) in enumerate(
            [
                ("relu", lambda x: x.relu()),
                ("relu", lambda x: x.relu_()),
                ("relu", lambda x: x.clamp(min=0)),
                ("relu", lambda x: x.clamp_min_(0)),
                ("relu6", lambda x: x.clamp(0, 6)),
                ("relu6", lambda x: x.clamp_(0, 6)),
                ("sigmoid", lambda x: x.sigmoid()),
            ]
        )
    },
    **{
        f"aten {i}": (name, lambda call=call: Apply(call))
        for i, (name, call) in enumerate(
            [
                ("relu", aten.relu_.default),
                ("relu6", lambda x: aten.hardtanh.default(x, 0, 6)),
                ("hardswish", aten.hardswish_.default),
                ("gelu_tanh", lambda x: aten.gelu.default(x, approximate="tanh")),
                ("silu", aten.silu),
            ]
        )
    },
}


@pytest.mark.parametrize("name", FORMS)
def test_absorbed_on_both_sides(name: str) -> None:
    activation, make = FORMS[name]
    torch.manual_seed(0)
    after = optimized(nn.Sequential(depthwise(), make()), 4 * image(8))
    assert operators(after) == [("none", activation, False)]
    assert calls(after) == [depthwise_conv2d]
    (change,) = changes(after, "activation")
    assert (change.done, change.name, change.reason) == (True, activation, "absorbed")

    before = optimized(nn.Sequential(nn.Conv2d(8, 8, 1), make(), depthwise()), 4 * image(8))
    assert operators(before) == [(activation, "none", True)]
    assert calls(before) == [torch.conv2d, depthwise_conv2d]
    assert reasons(before, "input_activation") == reasons(before, "input_bias") == ["absorbed"]
    assert {c.name for c in changes(before, "input_activation")} == {activation}


def test_every_activation_of_the_table_is_absorbed() -> None:
    assert {name for name, _ in FORMS.values()} == ACTIVATIONS.keys() - {"none"}


class Block(nn.Sequential):
    """Pointwise, depthwise, pointwise with BatchNorm, as in MobileNetV2."""

    def __init__(self, **options: Any) -> None:
        super().__init__(
            *(nn.Conv2d(3, 8, 1, bias=False), norm(), nn.ReLU6(inplace=True)),
            *(depthwise(bias=False, **options), norm(), nn.ReLU6(inplace=True)),
            *(nn.Conv2d(8, 4, 1, bias=False), norm(4)),
        )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("options", [{}, {"stride": 2}, {"padding": "same"}, {"padding": 0}])
def test_block(options: dict[str, Any], dtype: torch.dtype) -> None:
    """Padding is zero after the bias and the activation, not their value at zero."""
    torch.manual_seed(0)
    x = image().to(dtype)
    fast = optimized(Block(**options).to(dtype), x)
    assert operators(fast) == [("relu6", "relu6", True)]
    assert calls(fast) == [torch.conv2d, depthwise_conv2d, torch.conv2d]
    report = dwswap.report(fast)
    assert (report.calls_before, report.calls_after) == (8, 3)
    first, second, third = report.layers
    assert [str(change) for change in first.changes] == ["folded 1", "gave its bias to 3"]
    assert [str(change) for change in second.changes] == [
        "folded 4",
        "absorbed relu6 after it",
        "absorbed relu6 before it",
        "absorbed the bias of 0",
    ]
    assert [str(change) for change in third.changes] == [
        "folded 7",
        "keeps its bias (not_linear: output is not linear)",
    ]
    verified = dwswap.optimize(fast, x, verify=True)
    assert operators(verified) == operators(fast)
    torch._dynamo.reset()
    for again in (
        copy.deepcopy(fast),
        pickle.loads(pickle.dumps(fast)),
        torch.compile(fast, fullgraph=True, backend="aot_eager"),
    ):
        torch.testing.assert_close(again(x), fast(x), rtol=0, atol=1e-6)
    assert "activation = 'relu6'" in fast.code


def test_keys_stay_where_nothing_is_folded() -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 1), nn.ReLU(), depthwise(), nn.SiLU()).eval()
    fast = optimized(model, image())
    assert list(fast.state_dict()) == list(model.state_dict())
    other = nn.Sequential(nn.Conv2d(3, 8, 1), nn.ReLU(), depthwise(), nn.SiLU()).eval()
    fast.load_state_dict(other.state_dict())
    torch.testing.assert_close(fast(image()), other(image()), rtol=0, atol=1e-5)
    shared = dwswap.optimize(model, inplace=True)
    assert all(p is q for p, q in zip(shared.parameters(), model.parameters(), strict=True))
    with torch.no_grad():
        model[0].bias.add_(1)
        model[2].weight.mul_(2)
    torch.testing.assert_close(shared(image()), model(image()), rtol=0, atol=1e-5)
    with pytest.raises(ValueError, match="absorbed its neighbours"):
        dwswap.restore(fast)


def test_between_two_depthwise_layers_it_is_computed_once() -> None:
    fast = optimized(nn.Sequential(depthwise(), nn.SiLU(), depthwise()), image(8))
    assert operators(fast) == [("none", "silu", False)]
    assert [type(m) for m in (fast.get_submodule("2"),)] == [dwswap.DepthwiseConv2d]


def test_bias_without_an_activation() -> None:
    fast = optimized(nn.Sequential(nn.Conv2d(3, 8, 1), norm(), depthwise()), image())
    assert operators(fast) == [("none", "none", True)]


@pytest.mark.parametrize(
    "producer",
    [nn.Conv2d(8, 8, 3, groups=4), nn.ConvTranspose2d(8, 8, 3, groups=2), nn.Conv2d(8, 8, 1)],
)
def test_bias_of_any_convolution(producer: nn.Module) -> None:
    fast = optimized(nn.Sequential(producer, nn.GELU(), depthwise(multiplier=2)), image(8))
    assert operators(fast) == [("gelu", "none", True)]


def test_an_activation_of_a_value_that_is_read_elsewhere() -> None:
    """Out of place it is the same wherever it is computed."""

    class Residual(nn.Module):
        def __init__(self, call: Call) -> None:
            super().__init__()
            self.conv, self.call = depthwise(), call

        def forward(self, x: Tensor) -> Tensor:
            y = x + 1
            return self.conv(self.call(y)) + y

    fast = optimized(Residual(F.relu), image(8))
    assert operators(fast) == [("relu", "none", False)]
    fast = optimized(Residual(F.relu_), image(8))
    assert operators(fast) == []
    assert reasons(fast, "input_activation") == ["in_place"]


def test_shared_layers_are_absorbed_per_call() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.point, self.conv = nn.Conv2d(8, 8, 1), depthwise()

        def forward(self, x: Tensor) -> Tensor:
            x = self.conv(self.point(x).relu()).sigmoid()
            return self.point(self.conv(self.point(x)))

    model = Twice()
    fast = optimized(model, image(8))
    assert operators(fast) == [("relu", "sigmoid", True), ("none", "none", True)]
    assert list(fast.state_dict()) == list(model.state_dict())
    assert type(fast.get_submodule("point")) is nn.Conv2d


def test_exports_and_saves(tmp_path: Any) -> None:
    x = image()
    fast = dwswap.optimize(Block().eval())
    program = torch.export.export(fast, (x,))
    torch.testing.assert_close(program.module()(x), fast(x), rtol=0, atol=1e-6)
    again = dwswap.optimize(program.module())
    torch.testing.assert_close(again(x), fast(x), rtol=0, atol=1e-6)
    torch.save(fast, tmp_path / "model.pt")
    loaded = torch.load(tmp_path / "model.pt", weights_only=False)
    assert torch.equal(loaded(x), fast(x))
    assert dwswap.report(loaded) == dwswap.report(fast)


@pytest.mark.parametrize("inplace", [True, False])
def test_graph_modules_are_fused_in_place(inplace: bool) -> None:
    """With a block that has two names, and is called under both."""
    block = nn.Sequential(nn.Conv2d(8, 8, 1), norm(), nn.ReLU6(), depthwise(), norm(), nn.SiLU())
    model = nn.Sequential(block, nn.MaxPool2d(2), block).eval()
    traced = fx.symbolic_trace(model)
    x = image(8)
    expected = model(x)
    fast = dwswap.optimize(traced, inplace=inplace)
    assert (fast is traced) == inplace
    assert operators(fast) == [("relu6", "silu", True)] * 2
    assert not any(isinstance(m, nn.BatchNorm2d) for m in fast.modules())
    assert inplace or any(isinstance(m, nn.BatchNorm2d) for m in traced.modules())
    for again in (fast, copy.deepcopy(fast), pickle.loads(pickle.dumps(fast))):
        torch.testing.assert_close(again(x), expected, rtol=0, atol=1e-4)
    assert dwswap.optimize(fast, inplace=True) is fast
    torch.testing.assert_close(fast(x), expected, rtol=0, atol=1e-4)


# --- must stay --------------------------------------------------------------------------------


class Graph(nn.Module):
    """``call(x, point, conv)`` with a pointwise and a depthwise convolution."""

    def __init__(self, call: Callable[..., Tensor], **options: Any) -> None:
        super().__init__()
        self.point, self.conv = nn.Conv2d(8, 8, 1), depthwise(**options)
        self.call = call

    def forward(self, x: Tensor) -> Tensor:
        return self.call(x, self.point, self.conv)


def _later_change(x: Tensor, point: nn.Module, conv: nn.Module) -> Tensor:
    y = x + 1
    hidden = F.relu(y)
    y.add_(1)
    return conv(hidden) + y


def _activation_of_a_view(x: Tensor, point: nn.Module, conv: nn.Module) -> Tensor:
    y = x + 1
    hidden = F.relu_(y.view(x.shape))
    return conv(hidden) + y


def _in_place_then_read(x: Tensor, point: nn.Module, conv: nn.Module) -> Tensor:
    y = conv(x)
    F.relu_(y)
    return y * 2


def _two(x: Tensor, point: nn.Module, conv: nn.Module) -> Tensor:
    y = conv(x)
    return y.relu() + y.sigmoid()


KEPT: dict[str, tuple[str, str, Callable[..., Tensor]]] = {
    "unknown": ("activation", "unknown_activation", lambda x, p, c: F.mish(c(x))),
    "other bounds": ("activation", "unknown_activation", lambda x, p, c: c(x).clamp(0, 5)),
    "upper bound": ("activation", "unknown_activation", lambda x, p, c: c(x).clamp(max=6)),
    "computed bound": (
        "activation",
        "unknown_activation",
        lambda x, p, c: c(x).clamp(0, x.size(1)),
    ),
    "hardtanh": ("activation", "unknown_activation", lambda x, p, c: F.hardtanh(c(x))),
    "output read twice": ("activation", "other_users", lambda x, p, c: F.relu(y := c(x)) + y),
    "in place, then read": ("activation", "other_users", _in_place_then_read),
    "unknown before": ("input_activation", "unknown_activation", lambda x, p, c: c(p(x).tanh())),
    "activation read twice": (
        "input_activation",
        "other_users",
        lambda x, p, c: c(y := F.relu(p(x))) + y,
    ),
    "two depthwise readers": (
        "input_activation",
        "other_users",
        lambda x, p, c: c(y := F.relu(p(x))) + c(y).sin(),
    ),
    "in place, a view": ("input_activation", "in_place", _activation_of_a_view),
    "changed afterwards": ("input_activation", "changed_between", _later_change),
    "producer read twice": (
        "input_bias",
        "other_users",
        lambda x, p, c: c(F.relu(y := p(x))) + y,
    ),
}


@pytest.mark.parametrize("name", KEPT)
def test_stays(name: str) -> None:
    kind, reason, call = KEPT[name]
    torch.manual_seed(0)
    model = Graph(call)
    fast = optimized(model, 3 * image(8))
    found = changes(fast, kind)
    assert found
    assert {(change.done, change.reason) for change in found} == {(False, reason)}
    assert all("{" not in change.detail for change in found)
    assert reason in dwswap.report(fast).render(400)


class PreActivation(nn.Conv2d):
    """A leaf of a trace that changes its input."""

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(F.relu(input, inplace=True))


class PreActivationInside(nn.Conv2d):
    def _conv_forward(self, input: Tensor, *tensors: Any) -> Tensor:
        return super()._conv_forward(input.clamp_(-1, 1), *tensors)


class Named(nn.Conv2d):
    """A leaf that does what torch.nn's does."""


@fx.wrap
def quantized(x: Tensor, steps: Tensor | int) -> Tensor:
    return x.mul_(steps).round_().div_(steps)


@pytest.mark.parametrize("other", [PreActivation, PreActivationInside, quantized, Named])
def test_code_that_may_change_its_input_unseen(other: Any) -> None:
    class Beside(Graph):
        def forward(self, x: Tensor) -> Tensor:
            hidden = self.point(x) * 2
            gates = hidden.sigmoid()
            other = quantized(hidden, 8) if self.last is None else self.last(hidden)
            return other + self.conv(gates)

    model = Beside(F.relu)
    model.last = other(8, 8, 1) if isinstance(other, type) else None
    fast = optimized(model, image(8))
    reason = "absorbed" if other is Named else "changed_between"
    assert reasons(fast, "input_activation") == [reason]


def test_parameters_that_code_may_change_unseen() -> None:
    def call(x: Tensor, point: nn.Module, conv: nn.Module) -> Tensor:
        return quantized(x * 2, point.bias) + conv(F.relu(point(x)))

    fast = optimized(Graph(call), image(8)[:, :, :8, :8])
    assert reasons(fast, "input_bias") == ["changed_in_graph"]


def test_two_activations_of_one_output() -> None:
    fast = optimized(Graph(_two), image(8))
    assert operators(fast) == []
    assert reasons(fast, "activation") == ["other_users", "other_users"]


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths")
def test_asymmetric_padding_excludes_a_change_of_the_input() -> None:
    model = Graph(lambda x, p, c: c(F.relu(p(x))).relu(), kernel_size=2, padding="same")
    fast = optimized(model, image(8))
    assert operators(fast) == [("none", "relu", False)]
    assert reasons(fast, "input_activation") == ["asymmetric_padding"]
    model = Graph(lambda x, p, c: c(p(x)), kernel_size=2, padding="same")
    assert reasons(optimized(model, image(8)), "input_bias") == ["asymmetric_padding"]


def _hooked(module: nn.Module) -> nn.Module:
    module.register_forward_hook(lambda *_: None)
    return module


def test_layers_with_hooks_stay() -> None:
    model = nn.Sequential(depthwise(), _hooked(nn.ReLU()), depthwise())
    fast = optimized(model, image(8))
    assert operators(fast) == []
    assert reasons(fast, "activation") == reasons(fast, "input_activation") == ["forward_hook"]
    model = nn.Sequential(_hooked(nn.Conv2d(3, 8, 1)), nn.ReLU(), depthwise())
    fast = optimized(model, image())
    assert operators(fast) == [("relu", "none", False)]
    assert reasons(fast, "input_bias") == ["forward_hook"]
    # What the hook has kept is to change, too.
    model = nn.Sequential(_hooked(nn.Conv2d(3, 8, 1)), nn.ReLU(inplace=True), depthwise())
    fast = optimized(model, image())
    assert reasons(fast, "input_activation") == ["in_place"]


def test_a_kept_convolution_absorbs_nothing() -> None:
    model = nn.Sequential(depthwise(), nn.ReLU(), nn.Conv2d(8, 8, 1), nn.ReLU(), depthwise())
    fast = optimized(model, image(8), skip=lambda module, path: path == "4")
    assert operators(fast) == [("none", "relu", False)]
    assert "3" in [str(node.target) for node in fast.graph.nodes]
    assert changes(fast, "input_bias") == []


def test_a_bias_that_the_forward_changes_stays() -> None:
    class Moving(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = depthwise()
            self.register_buffer("weight", torch.randn(8, 8, 1, 1))
            self.register_buffer("bias", torch.randn(8))

        def forward(self, x: Tensor) -> Tensor:
            y = F.conv2d(x, self.weight, self.bias)
            self.bias.add_(1)
            return self.conv(y)

    model, x = Moving().eval(), image(8)
    fast = dwswap.optimize(model, x)
    assert reasons(fast, "input_bias") == ["changed_in_graph"]
    for _ in range(2):
        torch.testing.assert_close(fast(x), model(x), rtol=0, atol=1e-5)


def test_fuse_false_absorbs_nothing() -> None:
    for source in (Block().eval(), fx.symbolic_trace(Block().eval())):
        fast = dwswap.optimize(source, fuse=False)
        assert [layer.changes for layer in dwswap.report(fast).layers] == [(), (), ()]
        assert dwswap.report(fast).calls_after is None
        torch.testing.assert_close(fast(image()), source(image()), rtol=0, atol=1e-5)


def test_layer_that_fails_verify_is_put_back(monkeypatch: pytest.MonkeyPatch) -> None:
    from dwswap import registration

    right = registration.apply
    model, x = nn.Sequential(Block(), nn.Conv2d(4, 8, 1), dwswap.DepthwiseConv2d(8, 8, 3)), image()
    model.eval()
    expected = model(x)

    def wrong(*args: Any) -> Tensor:
        output = right(*args)
        return output + 1e-2 if args[-1] == "relu6" else output

    monkeypatch.setattr(registration, "apply", wrong)
    fast = dwswap.optimize(model, x, verify=True)
    report = dwswap.report(fast)
    assert report.verification is not None
    assert report.verification.passed, str(report)
    layers = {layer.path: layer for layer in report.layers}
    assert layers["0.3"].reason == "verify_failed"
    assert [str(change) for change in layers["0.3"].changes] == ["folded 0.4"]
    assert F.relu6 in calls(fast)
    torch.testing.assert_close(fast(x), expected, rtol=0, atol=1e-4)
