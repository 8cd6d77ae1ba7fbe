"""Squeeze-and-excitation in models: what becomes one call, and what must stay as it is."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from cases import ACTIVATION_NAMES
from numerics import ACTIVATIONS
from test_fold_batchnorm import changes
from test_memory_format import same
from test_torchvision import build_with_data
from tiny_models import depthwise, image
from torch import Tensor, fx, nn
from torch.nn.utils import parametrize

import dwswap
from dwswap.ops import squeeze_excitation

torchvision_ops = pytest.importorskip("torchvision").ops

CHANNELS, HIDDEN = 8, 3


class Excitation(nn.Module):
    """A depthwise convolution and squeeze-and-excitation, with each step to be replaced."""

    def __init__(self, linear: bool = False, bias: bool = True, **steps: Any) -> None:
        super().__init__()
        self.depthwise = depthwise(CHANNELS)
        pointwise: Any = nn.Linear if linear else lambda c, k, **o: nn.Conv2d(c, k, 1, **o)
        self.reduce = steps.pop("reduce", None) or pointwise(CHANNELS, HIDDEN, bias=bias)
        self.expand = steps.pop("expand", None) or pointwise(HIDDEN, CHANNELS, bias=bias)
        default: dict[str, Any] = {
            "pool": nn.AdaptiveAvgPool2d(1),
            "to_matrix": lambda x, means: means,
            "activation": nn.SiLU(),
            "gate": nn.Sigmoid(),
            "to_image": lambda x, gates: gates,
            "product": lambda x, gates: x * gates,
        }
        assert not steps.keys() - default.keys()
        for name, step in {**default, **steps}.items():
            setattr(self, name, step)

    def forward(self, x: Tensor) -> Any:
        x = self.depthwise(x)
        hidden = self.activation(self.reduce(self.to_matrix(x, self.pool(x))))
        return self.product(x, self.to_image(x, self.gate(self.expand(hidden))))


class Flatten(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.flatten = nn.Flatten()

    def forward(self, x: Tensor, means: Tensor) -> Tensor:
        return self.flatten(means)


def fused(model: nn.Module) -> list[fx.Node]:
    assert isinstance(model, fx.GraphModule)
    return [node for node in model.graph.nodes if node.target is squeeze_excitation]


def check_fused(model: nn.Module, count: int = 1, x: Tensor | None = None) -> nn.Module:
    model = model.eval()
    fast = dwswap.optimize(model)
    assert len(fused(fast)) == count
    x = image(CHANNELS) if x is None else x
    with torch.no_grad():
        for given in (x, x.to(memory_format=torch.channels_last)):
            same(fast(given), model(given))
    return fast


def check_left(model: nn.Module, reason: str | None, x: Tensor | None = None) -> None:
    """``reason`` None: it is nothing that the report would speak of."""
    fast = check_fused(model, 0, x)
    found = [change.reason for change in changes(fast, "squeeze_excitation")]
    assert found == ([] if reason is None else [reason])


# --- what becomes one call ----------------------------------------------------------------------

POOLS: dict[str, Callable[[Tensor], Tensor]] = {
    "module of a pair": nn.AdaptiveAvgPool2d((1, 1)),
    "function": lambda x: F.adaptive_avg_pool2d(x, 1),
    "function by name": lambda x: F.adaptive_avg_pool2d(x, output_size=(1, 1)),
    "aten": lambda x: torch.ops.aten.adaptive_avg_pool2d(x, [1, 1]),
    "mean": lambda x: x.mean((2, 3), keepdim=True),
    "mean from behind": lambda x: x.mean([-1, -2], True),
    "torch.mean": lambda x: torch.mean(x, dim=(2, 3), keepdim=True),
    "aten.mean": lambda x: torch.ops.aten.mean.dim(x, [2, 3], True),
}
FLATTENERS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "flatten": lambda x, means: means.flatten(1),
    "torch.flatten": lambda x, means: torch.flatten(means, 1),
    "nn.Flatten": Flatten(),
    "size(0)": lambda x, means: means.view(x.size(0), CHANNELS),
    "size()": lambda x, means: means.reshape(x.size()[0], -1),
    "shape": lambda x, means: means.view((x.shape[0], x.shape[1])),
}
COLUMNS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "view": lambda x, gates: gates.view(x.size(0), CHANNELS, 1, 1),
    "view of shape": lambda x, gates: gates.view(x.shape[0], x.shape[1], 1, 1),
    "getitem": lambda x, gates: gates[:, :, None, None],
    "unsqueeze": lambda x, gates: gates.unsqueeze(-1).unsqueeze(-1),
    "unsqueeze in place of dims": lambda x, gates: gates.unsqueeze(2).unsqueeze(3),
}
PRODUCTS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "gates first": lambda x, gates: gates * x,
    "torch.mul": lambda x, gates: torch.mul(x, gates),
    "method": lambda x, gates: x.mul(gates),
    "aten": lambda x, gates: torch.ops.aten.mul.Tensor(gates, x),
}


@pytest.mark.parametrize("pool", POOLS.values(), ids=POOLS)
@pytest.mark.parametrize("bias", [False, True])
def test_pools(pool: Callable[[Tensor], Tensor], bias: bool) -> None:
    fast = check_fused(Excitation(pool=pool, bias=bias))
    (change,) = changes(fast, "squeeze_excitation")
    assert change.done
    assert (change.reason, change.subject) == ("absorbed", "expand")
    assert "one call with expand" in str(change)
    assert "made 1 squeeze-and-excitations one call each" in str(dwswap.report(fast))


@pytest.mark.parametrize("activation", [a for a in ACTIVATION_NAMES if a != "none"])
@pytest.mark.parametrize("gate", ["sigmoid", "hardsigmoid"])
def test_activations(activation: str, gate: str) -> None:
    fast = check_fused(Excitation(activation=ACTIVATIONS[activation], gate=ACTIVATIONS[gate]))
    assert fused(fast)[0].kwargs == {"activation": activation, "gate": gate}


@pytest.mark.parametrize("flatten", FLATTENERS.values(), ids=FLATTENERS)
@pytest.mark.parametrize("column", COLUMNS.values(), ids=COLUMNS)
def test_linear_layers(
    flatten: Callable[[Tensor, Tensor], Tensor], column: Callable[[Tensor, Tensor], Tensor]
) -> None:
    check_fused(Excitation(linear=True, to_matrix=flatten, to_image=column))


def test_linear_layers_after_a_mean() -> None:
    model = Excitation(linear=True, pool=lambda x: x.mean((2, 3)), to_image=COLUMNS["getitem"])
    check_fused(model)


@pytest.mark.parametrize(
    "between",
    [
        lambda x: F.max_pool2d(F.relu(x), 2),
        lambda x: torch.cat([x[:, :4], F.conv2d(x[:, 4:], torch.ones(4, 1, 1, 1), groups=4)], 1),
        lambda x: x + x * 2,
        lambda x: x.permute(0, 1, 3, 2),
    ],
)
def test_images_are_known_by_what_made_them(between: Callable[[Tensor], Tensor]) -> None:
    class Between(Excitation):
        def forward(self, x: Tensor) -> Tensor:
            x = between(nn.functional.conv2d(x, self.reduce_first))
            hidden = self.activation(self.reduce(x.mean((-2, -1))))
            return self.depthwise(x * self.gate(self.expand(hidden))[:, :, None, None])

    model = Between(linear=True)
    model.reduce_first = nn.Parameter(torch.randn(CHANNELS, CHANNELS, 1, 1))
    check_fused(model)


@pytest.mark.parametrize("product", PRODUCTS.values(), ids=PRODUCTS)
def test_products(product: Callable[[Tensor, Tensor], Tensor]) -> None:
    check_fused(Excitation(product=product))


def test_in_place_activations_inside() -> None:
    check_fused(Excitation(activation=nn.ReLU(inplace=True), gate=nn.Hardsigmoid(inplace=True)))
    check_fused(Excitation(activation=F.relu_, gate=torch.sigmoid_))


def test_dropout_and_identities_inside() -> None:
    check_fused(Excitation(activation=nn.Sequential(nn.Identity(), nn.ReLU(), nn.Dropout())))


def test_batchnorm_inside_is_folded_first() -> None:
    model = Excitation(activation=nn.Sequential(nn.BatchNorm2d(HIDDEN), nn.ReLU()))
    check_fused(model)


def test_the_module_of_torchvision() -> None:
    block = torchvision_ops.SqueezeExcitation(
        CHANNELS, HIDDEN, activation=nn.Hardswish, scale_activation=nn.Hardsigmoid
    )
    model = nn.Sequential(depthwise(CHANNELS), nn.ReLU(), block, nn.Conv2d(CHANNELS, 4, 1)).eval()
    fast = dwswap.optimize(model)
    assert [n.kwargs for n in fused(fast)] == [{"activation": "hardswish", "gate": "hardsigmoid"}]
    assert {n.target for n in fast.graph.nodes if n.op == "call_module"} <= {"3"}
    report = dwswap.report(fast)
    assert (report.calls_before, report.calls_after) == (9, 3)
    with torch.no_grad():
        same(fast(image(CHANNELS)), model(image(CHANNELS)))


def test_a_block_that_is_called_twice_and_one_image() -> None:
    block = torchvision_ops.SqueezeExcitation(CHANNELS, HIDDEN)
    model = nn.Sequential(depthwise(CHANNELS), block, depthwise(CHANNELS), block)
    fast = check_fused(model, 2)
    assert [n.args[1].target for n in fused(fast)] == ["1.fc1.weight"] * 2
    with torch.no_grad():
        same(fast(image(CHANNELS)[0]), model(image(CHANNELS)[0]))


def test_an_inner_tensor_of_the_input_that_is_read_elsewhere() -> None:
    """The value that is scaled may have other users."""
    check_fused(Excitation(product=lambda x, gates: x * gates + x))


def test_weights_are_those_of_the_layers() -> None:
    model = Excitation(bias=False).eval()
    fast = dwswap.optimize(model, inplace=True)
    assert fast.get_parameter("reduce.weight") is model.reduce.weight
    assert list(fast.state_dict()) == list(Excitation(bias=False).state_dict())
    with torch.no_grad():
        model.reduce.weight.zero_()
        half = model.depthwise(image(CHANNELS)) * 0.5
        torch.testing.assert_close(fast(image(CHANNELS)), half)


def test_an_exported_program() -> None:
    model = Excitation(pool=POOLS["mean"]).eval()
    program = torch.export.export(model, (image(CHANNELS),))
    fast = dwswap.optimize(program.module())
    assert len(fused(fast)) == 1
    with torch.no_grad():
        same(fast(image(CHANNELS)), model(image(CHANNELS)))


def test_the_result_is_an_ordinary_graph() -> None:
    model = Excitation().eval()
    fast = dwswap.optimize(model)
    x = image(CHANNELS)
    torch._dynamo.reset()
    compiled = torch.compile(fast, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        for other in (copy.deepcopy(fast), pickle.loads(pickle.dumps(fast)), compiled):
            same(other(x), model(x))
        again = dwswap.optimize(fast)
        assert len(fused(again)) == 1
        same(again(x), model(x))


@pytest.mark.parametrize("layout", ["channels_last", "contiguous"])
def test_memory_format(layout: Any) -> None:
    model = Excitation().eval()
    fast = dwswap.optimize(model, memory_format=layout)
    assert dwswap.report(fast).memory_format == f"{layout} (converted: 1 inputs, 1 outputs)"
    with torch.no_grad():
        for x in (image(CHANNELS), image(CHANNELS).to(memory_format=torch.channels_last)):
            same(fast(x), model(x))
            assert fast(x).stride() == model(x).stride()


def test_verify() -> None:
    fast = dwswap.optimize(Excitation().eval(), image(CHANNELS), verify=True)
    assert len(fused(fast)) == 1
    verification = dwswap.report(fast).verification
    assert verification is not None
    assert verification.passed


def test_explain_says_the_same() -> None:
    model = Excitation().eval()
    explained = dwswap.explain(model)
    done = dwswap.report(dwswap.optimize(model))
    assert [layer.changes for layer in explained.layers] == [layer.changes for layer in done.layers]
    assert explained.calls_after == done.calls_after


def test_restore_refuses() -> None:
    fast = dwswap.optimize(Excitation().eval())
    with pytest.raises(ValueError, match="squeeze-and-excitation became calls of an operator"):
        dwswap.restore(fast)
    assert len(fused(fast)) == 1


@pytest.mark.parametrize(
    ("name", "count"), [("mobilenet_v3_small", 9), ("efficientnet_b0", 16), ("mnasnet0_5", 0)]
)
def test_models(name: str, count: int) -> None:
    model = build_with_data(name).double()
    fast = dwswap.optimize(model)
    assert len(fused(fast)) == count
    x = torch.rand(2, 3, 64, 64, dtype=torch.float64)
    with torch.no_grad():
        expected = model(x)
        assert float((fast(x) - expected).abs().max() / expected.abs().max()) < 1e-12


def test_timm() -> None:
    timm = pytest.importorskip("timm")
    model = timm.create_model("efficientnet_b0").eval()
    assert len(fused(dwswap.optimize(model))) == 16


# --- what stays ---------------------------------------------------------------------------------


def test_no_fuse_and_train_mode() -> None:
    for fast in (
        dwswap.optimize(Excitation().eval(), fuse=False),
        dwswap.optimize(Excitation().train()),
    ):
        assert isinstance(fast, Excitation)


@pytest.mark.parametrize("name", ["pool", "reduce", "activation", "expand", "gate"])
def test_an_inner_value_that_is_read_elsewhere(name: str) -> None:
    class Reader(Excitation):
        def forward(self, x: Tensor) -> Any:
            x = self.depthwise(x)
            value, kept = x, x
            for step in ("pool", "reduce", "activation", "expand", "gate"):
                value = getattr(self, step)(value)
                kept = value if step == name else kept
            return x * value, kept.exp()

    model = Reader().eval()
    fast = dwswap.optimize(model)
    assert not fused(fast)
    assert [c.reason for c in changes(fast, "squeeze_excitation")] == ["other_users"]
    with torch.no_grad():
        for own, expected in zip(fast(image(CHANNELS)), model(image(CHANNELS)), strict=True):
            same(own, expected)


@pytest.mark.parametrize(
    "pool",
    [
        nn.AdaptiveAvgPool2d((1, None)),
        nn.AdaptiveAvgPool2d(9),
        nn.AdaptiveMaxPool2d(1),
        nn.AvgPool2d(9),
        lambda x: x.mean(3, keepdim=True),
        lambda x: x.mean((1, 2, 3), keepdim=True).expand(-1, CHANNELS, 1, 1),
        lambda x: x.mean((2, 3), keepdim=True, dtype=torch.float32),
        lambda x: F.adaptive_avg_pool2d(x, (1, 3)).mean((2, 3), keepdim=True),
    ],
)
def test_other_pools(pool: Callable[[Tensor], Tensor]) -> None:
    model = Excitation(pool=pool).eval()
    fast = dwswap.optimize(model)
    assert not fused(fast)
    with torch.no_grad():
        same(fast(image(CHANNELS)), model(image(CHANNELS)))


def test_a_pool_that_is_known_has_its_reason() -> None:
    check_left(Excitation(pool=nn.AdaptiveAvgPool2d((1, None))), "no_pool")
    check_left(Excitation(pool=nn.Identity()), None)


def test_another_tensor_is_scaled() -> None:
    check_left(Excitation(product=lambda x, gates: (x + 1) * gates), "other_input")


@pytest.mark.parametrize("gate", ["relu", "hardswish", "gelu", "silu"])
def test_other_gates(gate: str) -> None:
    check_left(Excitation(gate=ACTIVATIONS[gate]), "gate")


def test_activations_that_the_operator_does_not_have() -> None:
    check_left(Excitation(gate=nn.Tanh()), "unknown_activation")
    check_left(Excitation(activation=nn.ELU()), "unknown_activation")
    check_left(Excitation(gate=nn.Softmax(1)), None)


@pytest.mark.parametrize(
    ("steps", "reason"),
    [
        ({"reduce": nn.Conv2d(CHANNELS, 4, 1, groups=2), "expand": nn.Conv2d(4, 8, 1)}, ""),
        ({"expand": nn.Conv2d(HIDDEN, CHANNELS, 3, padding=1)}, ""),
        (
            {
                "reduce": nn.Conv2d(CHANNELS, HIDDEN, 1, padding=1),
                "expand": nn.Conv2d(HIDDEN, CHANNELS, 3),
            },
            "",
        ),
        ({"expand": nn.Conv2d(HIDDEN, 1, 1)}, "gates"),
        ({"expand": nn.ConvTranspose2d(HIDDEN, CHANNELS, 1)}, "call_form"),
        ({"reduce": nn.Linear(1, 1), "expand": nn.Conv2d(CHANNELS, CHANNELS, 1)}, "call_form"),
    ],
)
def test_other_layers(steps: dict[str, nn.Module], reason: str) -> None:
    check_left(Excitation(**steps), reason or "not_pointwise")


def test_depthwise_layers() -> None:
    check_left(Excitation(reduce=depthwise(8), expand=nn.Conv2d(8, 8, 1)), None)
    check_left(Excitation(reduce=nn.Conv2d(8, 8, 1), expand=depthwise(8)), None)


def test_linear_layers_along_other_dimensions() -> None:
    model = Excitation(linear=True, to_matrix=lambda x, means: means.permute(0, 2, 3, 1))
    model.to_image = lambda x, gates: gates.permute(0, 3, 1, 2)
    check_left(model, None)


def test_a_view_by_the_size_of_another_tensor() -> None:
    class Other(Excitation):
        def forward(self, x: Tensor) -> Tensor:
            other = x.permute(3, 1, 2, 0)
            x = self.depthwise(x)
            means = self.pool(x).view(other.size(0), CHANNELS)
            return x * self.gate(self.expand(self.activation(self.reduce(means))))[:, :, None, None]

    check_left(Other(linear=True), None, image(CHANNELS, batch=9))


def test_changes_in_place() -> None:
    check_left(Excitation(product=lambda x, gates: x.mul_(gates)), "in_place")

    class Between(Excitation):
        def forward(self, x: Tensor) -> Tensor:
            x = self.depthwise(x)
            means = self.pool(x)
            x.mul_(2)
            return x * self.gate(self.expand(self.activation(self.reduce(means))))

    check_left(Between(), "changed_between")


def test_hooks_and_parametrizations() -> None:
    for name in ("pool", "reduce", "activation", "gate"):
        model = Excitation()
        getattr(model, name).register_forward_hook(lambda m, args, output: output + 1)
        check_left(model, "forward_hook")

    class Doubled(nn.Module):
        def forward(self, weight: Tensor) -> Tensor:
            return weight * 2

    model = Excitation()
    parametrize.register_parametrization(model.expand, "weight", Doubled())
    check_left(model, None)


def test_weights_that_are_computed_or_changed() -> None:
    class Computed(Excitation):
        def forward(self, x: Tensor) -> Tensor:
            x = self.depthwise(x)
            hidden = F.conv2d(self.pool(x), self.reduce.weight * 2)
            return x * self.gate(self.expand(self.activation(hidden)))

    class Changed(Excitation):
        def forward(self, x: Tensor) -> Tensor:
            x = self.depthwise(x)
            means = self.pool(x)
            self.scaled.mul_(1)
            hidden = F.conv2d(means, self.scaled)
            return x * self.gate(self.expand(self.activation(hidden)))

    check_left(Computed(), "computed")
    model = Changed()
    model.register_buffer("scaled", torch.randn(HIDDEN, CHANNELS, 1, 1))
    check_left(model, "changed_between")


def test_videos() -> None:
    """Means over the last two of five dimensions are as good for a linear layer."""

    class Video(Excitation):
        def forward(self, x: Tensor) -> Tensor:
            x = self.depthwise(x.flatten(0, 1)).unflatten(0, x.shape[:2])
            gates = self.gate(self.expand(self.activation(self.reduce(x.mean((-2, -1))))))
            return x * gates.unsqueeze(-1).unsqueeze(-1)

    model, x = Video(linear=True).eval(), image(CHANNELS)[None]
    for options in ({}, {"example_inputs": x, "verify": True}):
        fast = dwswap.optimize(model, **options)
        assert [c.reason for c in changes(fast, "squeeze_excitation")] == ["not_image"]
        with torch.no_grad():
            same(fast(x), model(x))


def test_a_value_of_unknown_rank_stays_without_example_inputs() -> None:
    class Last(Excitation):
        def forward(self, x: Tensor) -> Tensor:
            hidden = self.activation(self.reduce(x.mean((-2, -1))))
            return self.depthwise(x * self.gate(self.expand(hidden))[:, :, None, None])

    model = Last(linear=True).eval()
    check_left(model, "not_image")
    assert len(fused(dwswap.optimize(model, image(CHANNELS)))) == 1
    check_fused(nn.Sequential(nn.BatchNorm2d(CHANNELS), nn.ReLU(), model))


def test_dtypes_that_differ() -> None:
    """Such a model does not run; explain must not fail on it either."""
    model = Excitation(expand=nn.Conv2d(HIDDEN, CHANNELS, 1).double()).eval()
    (change,) = (
        c
        for layer in dwswap.explain(model).layers
        for c in layer.changes
        if c.kind == "squeeze_excitation"
    )
    assert change.reason == "dtypes"
