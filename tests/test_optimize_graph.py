"""The swap of convolutions in functional form: which calls, and which not."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from tiny_models import Block, ControlFlow, Functional, OwnForward, image
from torch import Tensor, fx, nn

import dwswap
from dwswap import depthwise_conv2d
from dwswap.convolution_call import find_calls

aten = torch.ops.aten
Call = Callable[..., Tensor]

SWAPPED: dict[str, Call] = {
    "torch.conv2d": lambda x, w, b, c: torch.conv2d(x, w, b, 1, 1, 1, c),
    "F.conv2d keywords": lambda x, w, b, c: F.conv2d(
        x, w, groups=c, stride=2, dilation=(2, 1), bias=b, padding=[2, 1]
    ),
    "no bias": lambda x, w, b, c: F.conv2d(x, w, None, 2, groups=c),
    "same": lambda x, w, b, c: F.conv2d(x, w, b, padding="same", groups=c),
    "valid": lambda x, w, b, c: F.conv2d(x, w, b, padding="valid", groups=c),
    "aten.conv2d": lambda x, w, b, c: aten.conv2d(x, w, b, [1], [1], [1], c),
    "aten.conv2d.default": lambda x, w, b, c: aten.conv2d.default(
        x, w, b, [2, 1], [1, 0], [1, 1], c
    ),
    "aten.conv2d.padding": lambda x, w, b, c: aten.conv2d.padding(
        x, w, b, [1, 1], "same", [2, 2], c
    ),
    "aten.convolution": lambda x, w, b, c: aten.convolution.default(
        x, w, b, [1, 1], [1, 1], [1, 1], False, [0, 0], c
    ),
    "torch.convolution": lambda x, w, b, c: torch.convolution(
        x, w, b, (1, 1), (1, 1), (1, 1), False, (0, 0), c
    ),
}

KEPT: dict[str, tuple[str, Call]] = {
    "dense": ("not_depthwise", lambda x, w, b, c: F.conv2d(x, w.repeat(1, c, 1, 1), b)),
    "grouped": (
        "weight_unknown",
        lambda x, w, b, c: F.conv2d(x, w.repeat(1, 2, 1, 1), b, groups=c // 2),
    ),
    "computed weight": ("weight_unknown", lambda x, w, b, c: F.conv2d(x, w * 2, b, groups=c)),
    "dynamic groups": (
        "groups_unknown",
        lambda x, w, b, c: F.conv2d(x, w, b, groups=x.shape[1]),
    ),
    "transposed": (
        "transposed",
        lambda x, w, b, c: F.conv_transpose2d(x, w, b, groups=c),
    ),
    "aten transposed": (
        "transposed",
        lambda x, w, b, c: aten.convolution.default(
            x, w, b, [1, 1], [0, 0], [1, 1], True, [0, 0], c
        ),
    ),
    "1-D": (
        "not_conv2d",
        lambda x, w, b, c: F.conv1d(x.flatten(2), w.flatten(2), b, groups=c).unsqueeze(-1),
    ),
}


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths")
@pytest.mark.parametrize("name", SWAPPED)
@pytest.mark.parametrize("multiplier", [1, 2])
@pytest.mark.parametrize("kernel", [2, 3])
def test_swapped(name: str, multiplier: int, kernel: int) -> None:
    model = Functional(SWAPPED[name], multiplier=multiplier, kernel=kernel).eval()
    x = image(8)
    expected = model(x)

    fast = dwswap.optimize(model)

    (layer,) = dwswap.report(fast).layers
    assert (layer.kind, layer.decision, layer.reason) == ("functional", "swapped", "depthwise")
    assert (layer.groups, layer.weight_shape) == (8, (8 * multiplier, 1, kernel, kernel))
    (node,) = (n for n in fast.graph.nodes if n.target is depthwise_conv2d)
    assert not [n for n in find_calls(fast) if n.layer.reason == "depthwise"]
    assert node.kwargs["groups"] == 8
    torch.testing.assert_close(fast(x), expected, rtol=0, atol=1e-5)
    for again in (copy.deepcopy(fast), pickle.loads(pickle.dumps(fast)), dwswap.optimize(fast)):
        assert any(n.target is depthwise_conv2d for n in again.graph.nodes)
        torch.testing.assert_close(again(x), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", KEPT)
def test_kept(name: str) -> None:
    reason, call = KEPT[name]
    model = Functional(call).eval()
    report = dwswap.explain(model)
    assert report.mode == "unchanged"
    (layer,) = report.layers
    assert (layer.kind, layer.decision, layer.reason) == ("functional", "kept", reason)
    # Next to one that is swapped it stays as it is.
    both = nn.Sequential(model, Functional(SWAPPED["torch.conv2d"])).eval()
    fast = dwswap.optimize(both)
    assert [layer.reason for layer in dwswap.report(fast).layers] == [reason, "depthwise"]
    torch.testing.assert_close(fast(image(8)), both(image(8)), rtol=0, atol=1e-5)


def test_single_channel_is_dense() -> None:
    model = Functional(lambda x, w, b, c: F.conv2d(x, w, b), channels=1).eval()
    (layer,) = dwswap.explain(model).layers
    assert layer.reason == "single_channel"


def test_arguments_that_are_no_nodes() -> None:
    graph = fx.Graph()
    x = graph.placeholder("x")
    graph.output(graph.call_function(torch.conv2d, (x, 3, None, 1, 0, 1, 2)))
    (layer,) = dwswap.explain(fx.GraphModule({}, graph)).layers
    assert layer.reason == "arguments_unknown"


def test_example_inputs_tell_the_shape_of_a_computed_weight() -> None:
    model = Functional(KEPT["computed weight"][1]).eval()
    x = image(8)
    fast = dwswap.optimize(model, x)
    (layer,) = dwswap.report(fast).layers
    assert (layer.decision, layer.input_shape) == ("swapped", (2, 8, 9, 9))
    assert layer.weight_shape == (8, 1, 3, 3)
    torch.testing.assert_close(fast(x), model(x), rtol=0, atol=1e-5)
    grouped = Functional(KEPT["grouped"][1]).eval()
    assert [layer.reason for layer in dwswap.explain(grouped, x).layers] == ["not_depthwise"]


def test_depthwise_op_of_decompositions() -> None:
    """aten._conv_depthwise2d has no CPU kernel, so this looks at the graph only."""

    def call(x: Tensor, w: Tensor, b: Tensor, c: int) -> Tensor:
        return aten._conv_depthwise2d.default(x, w, [3, 3], b, [1, 1], [1, 1], [1, 1])

    model = Functional(call).to("meta").eval()
    assert dwswap.explain(model).layers[0].reason == "groups_unknown"
    report = dwswap.explain(model, image(8).to("meta"))
    assert [(layer.reason, layer.groups) for layer in report.layers] == [("depthwise", 8)]


def test_skip_gets_the_module_that_makes_the_call() -> None:
    call = SWAPPED["torch.conv2d"]
    model = nn.Sequential(Functional(call), Functional(call)).eval()
    asked: list[Any] = []

    def skip(module: nn.Module, path: str) -> bool:
        asked.append((module, path))
        return path == "1"

    fast = dwswap.optimize(model, skip=skip)
    assert asked == [(model[0], "0"), (model[1], "1")]
    assert [layer.reason for layer in dwswap.report(fast).layers] == ["depthwise", "skipped"]
    assert [layer.path for layer in dwswap.report(fast).layers] == ["0.conv2d", "1.conv2d_1"]
    swapped, _ = (n for n in fast.graph.nodes if "nn_module_stack" in n.meta and "conv" in n.name)
    assert swapped.target is depthwise_conv2d  # with the meta of the node that it replaced


def test_a_call_of_the_operator_in_a_model_is_one_node() -> None:
    model = Functional(lambda x, w, b, c: depthwise_conv2d(x, w, b, padding=1)).eval()
    fast = dwswap.optimize(model)
    (layer,) = dwswap.report(fast).layers
    assert layer.reason == "already_swapped"
    torch.testing.assert_close(fast(image(8)), model(image(8)))
    restored = dwswap.restore(fast)
    torch.testing.assert_close(restored(image(8)), model(image(8)), rtol=0, atol=1e-6)


def test_compiles_without_graph_break() -> None:
    torch._dynamo.reset()
    model = Functional(SWAPPED["same"]).eval()
    compiled = torch.compile(dwswap.optimize(model), fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(image(8)), model(image(8)), rtol=0, atol=1e-5)


class Mixed(nn.Module):
    """A module with a functional call in one child, and a child that a parent indexes."""

    def __init__(self) -> None:
        super().__init__()
        self.items = nn.Sequential(
            Functional(SWAPPED["torch.conv2d"]), Functional(KEPT["dense"][1])
        )
        self.own = OwnForward(8, 8, 3, padding=1, groups=8)
        self.block = Block()

    def forward(self, x: Tensor) -> Tensor:
        for item in self.items:
            x = item(x)
        return self.own(x)


class Indexing(ControlFlow):
    """Looks into its child, which a graph would not allow."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(self.block.items[0](x) if x.sum() > 1e30 else x)


@pytest.mark.parametrize("inplace", [True, False])
def test_a_child_that_is_looked_into_gets_the_smallest_graphs(inplace: bool) -> None:
    model = Indexing(Mixed()).eval()
    x = image(8)
    expected = model(x)
    weight = model.block.items[0].weight

    fast = dwswap.optimize(model, inplace=inplace)

    report = dwswap.report(fast)
    assert report.mode == "substitution"
    assert report.traced == ("block.items.0", "block.own")
    assert (fast is model) == inplace
    assert type(fast.block) is Mixed
    assert type(fast.block.items) is nn.Sequential
    assert isinstance(fast.block.items[0], fx.GraphModule)
    assert fast.block.own.stride == (1, 1)
    assert (fast.block.items[0].weight is weight) == inplace
    assert [(layer.path, layer.reason) for layer in report.layers] == [
        ("block.block.expand", "not_depthwise"),
        ("block.block.depthwise", "depthwise"),
        ("block.items.1.conv2d_1", "not_depthwise"),
        ("block.items.0.conv2d", "depthwise"),
        ("block.own.conv2d", "depthwise"),
    ]
    assert list(fast.state_dict()) == list(model.state_dict())
    torch.testing.assert_close(fast(x), expected, rtol=0, atol=1e-5)
    for again in (copy.deepcopy(fast), dwswap.optimize(fast)):
        torch.testing.assert_close(again(x), expected, rtol=0, atol=1e-5)
    with pytest.raises(ValueError, match=r"has absorbed its neighbours \(activation\)"):
        dwswap.restore(fast)
    with pytest.raises(RuntimeError, match="optimized for inference"):
        fast.train()


def test_untraceable_subclass_alone_is_kept() -> None:
    from tiny_models import UntraceableConv

    model = nn.Sequential(UntraceableConv(8, 8, 3, groups=8), nn.ReLU()).eval()
    report = dwswap.explain(model)
    assert [(layer.decision, layer.reason) for layer in report.layers] == [("kept", "subclass")]
    assert report.not_traced is None
