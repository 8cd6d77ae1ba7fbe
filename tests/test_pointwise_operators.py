"""The operators of pointwise products where aten computes them, and what calls them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from functorch.compile import make_boxed_func
from test_memory_format import same
from tiny_models import image
from torch import Tensor, fx, nn
from torch._dynamo.backends.common import aot_autograd
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.library import opcheck

from dwswap import build, pointwise
from dwswap.pointwise import pointwise_product, pointwise_residual

NAMED = torch.ops.dwswap._pointwise_product.default
ATEN = torch.ops.dwswap._pointwise_product_aten.default
RESIDUAL = torch.ops.dwswap._pointwise_residual_.default
CHANNELS_LAST = torch.channels_last
LAYOUTS = ("channels_last", "contiguous", "part")
aten = torch.ops.aten


def laid_out(x: Tensor, layout: str) -> Tensor:
    if layout == "contiguous":
        return x.contiguous()
    wide = torch.cat([x, x], 1).contiguous(memory_format=CHANNELS_LAST)
    part = wide[:, x.shape[1] :]
    return part if layout == "part" else part.contiguous(memory_format=CHANNELS_LAST)


def given(layout: str = "channels_last", bias: bool = True) -> tuple[Tensor, Tensor, Tensor | None]:
    generator = torch.Generator().manual_seed(1)
    weight = torch.randn(6, 8, 1, 1, generator=generator)
    offset = torch.randn(6, generator=generator) if bias else None
    return laid_out(image(8), layout), weight, offset


def residual(layout: str = "channels_last") -> Tensor:
    return laid_out(image(6), layout)


def test_schemas() -> None:
    for operator, name in ((NAMED, "_pointwise_product"), (ATEN, "_pointwise_product_aten")):
        expected = f"dwswap::{name}(Tensor input, Tensor weight, Tensor? bias) -> Tensor"
        assert str(operator._schema) == expected
    assert str(RESIDUAL._schema) == (
        "dwswap::_pointwise_residual_(Tensor input, Tensor weight, Tensor(a!) residual) -> bool"
    )


# --- aten in the place of the kernels ------------------------------------------------------------


@pytest.mark.usefixtures("products")
@pytest.mark.parametrize("operator", [NAMED, ATEN], ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("bias", [False, True])
def test_product(operator: Any, layout: str, bias: bool) -> None:
    x, weight, offset = given(layout, bias)
    same(operator(x, weight, offset), F.conv2d(x, weight, offset))
    assert operator(x[:0], weight, offset).shape == (0, 6, 9, 9)


@pytest.mark.usefixtures("products")
@pytest.mark.parametrize("layout", ["channels_last", "part"])
def test_residual_in_place(layout: str) -> None:
    x, weight, _ = given()
    for taps in (weight, weight.flatten(1)):
        other = residual(layout)
        expected, version = other + F.conv2d(x, weight), other._version
        assert RESIDUAL(x, taps, other) is True
        torch.testing.assert_close(other, expected)
        assert other._version > version


@pytest.mark.usefixtures("products")
def test_residual_left_alone() -> None:
    x, weight, _ = given()
    other = residual()
    cases = {
        "another layout": (x, weight, residual("contiguous")),
        "the input's": (x.contiguous(), weight, other),
        "one image": (x, weight, other[:1]),
        "one pixel": (x, weight, other[:, :, :1, :1]),
        "another dtype": (x, weight, other.double()),
        "no image": (x[:0], weight, other[:0]),
    }
    for case, tensors in cases.items():
        before = tensors[2].clone()
        assert RESIDUAL(*tensors) is False, case
        assert torch.equal(tensors[2], before), case


def test_residual_of_what_has_no_product_is_left_alone() -> None:
    other = residual()
    assert RESIDUAL(*given()[:2], other) is False
    assert torch.equal(other, residual())


@pytest.mark.usefixtures("products")
@pytest.mark.parametrize("layout", LAYOUTS)
def test_fake_tensors_tell_the_truth(layout: str) -> None:
    x, weight, bias = given(layout)
    with FakeTensorMode(allow_non_fake_inputs=False) as mode:
        fakes = [mode.from_tensor(t) for t in (x, weight, bias, residual())]
        results = [operator(*fakes[:3]) for operator in (NAMED, ATEN)]
        summed = RESIDUAL(*fakes[:2], fakes[3])
    real = NAMED(x, weight, bias)
    for fake in results:
        assert (fake.shape, fake.dtype, fake.stride()) == (real.shape, real.dtype, real.stride())
    assert summed is RESIDUAL(x, weight, residual())


def test_fake_tensors_on_cuda_are_those_of_products() -> None:
    """Of a convolution, strides of dimensions of one element would be others."""
    with FakeTensorMode(), torch.device("cuda"):
        x = torch.empty(2, 8, 1, 1, dtype=torch.float16, memory_format=CHANNELS_LAST)
        weight = torch.empty(6, 8, 1, 1, dtype=torch.float16)
        assert NAMED(x, weight, None).stride() == (6, 1, 6, 6)
        other = torch.empty(2, 6, 1, 1, dtype=torch.float16, memory_format=CHANNELS_LAST)
        assert RESIDUAL(x, weight, other) is True
        assert RESIDUAL(x, weight, other.float()) is False


@pytest.mark.usefixtures("products")
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("bias", [False, True])
def test_opcheck(layout: str, bias: bool) -> None:
    tensors = given(layout, bias)
    for operator in (NAMED, ATEN):
        opcheck(operator, tensors)
    # Not test_aot_dispatch_dynamic: see the schema.
    utilities = ("test_schema", "test_autograd_registration", "test_faketensor")
    opcheck(RESIDUAL, (*tensors[:2], residual()), test_utils=utilities)


# --- what calls the operators --------------------------------------------------------------------


@pytest.fixture
def called(monkeypatch: pytest.MonkeyPatch, products: None) -> list[str]:
    """Which operators run, as if there were a library of them."""
    names: list[str] = []

    def recorded(name: str) -> Callable[..., Any]:
        operator = getattr(pointwise, name)
        return lambda *args: (names.append(name), operator(*args))[1]

    for name in ("product_operator", "residual_operator"):
        monkeypatch.setattr(pointwise, name, recorded(name))
    monkeypatch.setattr(build, "load", lambda: True)
    return names


def test_plain_calls_are_of_operators(called: list[str]) -> None:
    x, weight, bias = given()
    for context in (torch.no_grad(), torch.inference_mode()):
        with context:
            same(pointwise_product(x, nn.Parameter(weight), bias), F.conv2d(x, weight, bias))
            other = residual()
            assert pointwise_residual(x, weight, other) is other
    assert called == 2 * ["product_operator", "residual_operator"]
    same(other, residual() + F.conv2d(x, weight))


def test_what_an_operator_declines_is_a_sum(called: list[str]) -> None:
    x, weight, _ = given("contiguous")
    same(pointwise_residual(x, weight, residual()), residual() + F.conv2d(x, weight))
    assert called == ["residual_operator"]


def test_others_are_not(called: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    x, weight, bias = given()
    other = residual()

    def both(x: Tensor, other: Tensor, weight: Tensor = weight) -> tuple[Tensor, Tensor]:
        return pointwise_product(x, weight, bias), pointwise_residual(x, weight, other + 0)

    with torch.autocast("cpu", torch.bfloat16):
        assert both(x, other)[0].dtype == torch.bfloat16
    assert all(result.requires_grad for result in both(x, other, nn.Parameter(weight)))
    torch.vmap(both)(torch.stack([x, x]), torch.stack([other, other]))
    torch.func.jvp(both, (x, other), (x, other))
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        both(mode.from_tensor(x), mode.from_tensor(other))
    monkeypatch.setattr(build, "load", lambda: False)
    both(x, other)
    assert not called


def test_versions_count_what_an_operator_changes(
    called: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else autograd would not see that what it saved for a gradient is another now."""
    monkeypatch.setattr(pointwise, "residual_operator", lambda *args: True)
    x, weight, _ = given()
    scale, other = torch.ones(1, requires_grad=True), residual()
    loss = (scale * other).sum()
    with torch.no_grad():
        assert pointwise_residual(x, weight, other) is other
        with torch.inference_mode():
            inference = residual()
        assert pointwise_residual(x, weight, inference) is inference
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


# --- compiled, exported and traced ---------------------------------------------------------------


class Layers(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        _, weight, bias = given()
        self.weight, self.back = nn.Parameter(weight), nn.Parameter(weight.transpose(0, 1).clone())
        self.bias = nn.Parameter(bias)

    def forward(self, x: Tensor) -> Tensor:
        hidden = pointwise_product(pointwise_product(x, self.weight, self.bias), self.back)
        return pointwise_residual(hidden, self.weight, x[:, :6] + 1)


def compiled(model: nn.Module, x: Tensor) -> fx.GraphModule:
    graphs: list[fx.GraphModule] = []

    def keep(graph: fx.GraphModule, inputs: Sequence[Any]) -> Any:
        graphs.append(graph)
        return make_boxed_func(graph.forward)

    torch._dynamo.reset()
    torch.compile(model, fullgraph=True, backend=aot_autograd(fw_compiler=keep))(x)
    return graphs[0]


def exported(model: nn.Module, x: Tensor) -> fx.GraphModule:
    return torch.export.export(model, (x,)).run_decompositions({}).graph_module


def traced(model: nn.Module, x: Tensor) -> fx.GraphModule:
    return make_fx(model)(x)


@torch.no_grad()
@pytest.mark.parametrize("form", [compiled, exported, traced])
def test_graphs_have_products_of_aten(
    form: Callable[[nn.Module, Tensor], fx.GraphModule], called: list[str]
) -> None:
    x, model = image(8).to(memory_format=CHANNELS_LAST), Layers()
    targets = [node.target for node in form(model, x).graph.nodes]
    assert targets.count(aten.mm.default) == 1
    assert sum(t in (aten.addmm.default, aten.addmm_.default) for t in targets) == 2
    assert not {NAMED, ATEN, RESIDUAL} & set(targets)
    assert not called


@pytest.mark.filterwarnings("ignore")
@torch.no_grad()
def test_traces_of_jit_have_products_of_aten(called: list[str]) -> None:
    x, model = image(8).to(memory_format=CHANNELS_LAST), Layers()
    graph = torch.jit.trace(model, x, check_trace=False).inlined_graph
    kinds = {node.kind() for node in graph.nodes()}
    assert {"aten::mm", "aten::addmm", "aten::addmm_"} <= kinds
    assert not called
