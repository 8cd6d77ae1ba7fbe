"""A depthwise and a pointwise convolution as one call where no kernel of ours runs, how the kernel
would cut them, and the pass that makes such calls."""

from __future__ import annotations

import copy
import dataclasses
import importlib
import itertools
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from numerics import ACTIVATIONS
from test_fold_batchnorm import changes
from test_memory_format import same
from test_torchvision import models
from tiny_models import InvertedResidual, depthwise, image
from torch import Tensor, fx, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.export import export
from torch.library import opcheck

import dwswap
from dwswap import verify
from dwswap.activations import PAIRS
from dwswap.bench.random_weights import randomize
from dwswap.ops import depthwise_conv2d
from dwswap.pointwise import pointwise_residual
from dwswap.report import LayerErrors
from dwswap.separable import choose_cut, fits, separable_conv2d
from dwswap.swapped_layers import LayerCall

NAMED = torch.ops.dwswap._separable_conv2d.default
APART = torch.ops.dwswap._separable_conv2d_apart.default
H200 = (132, 232448)
"""Multiprocessors, and bytes of shared memory of a block."""


@pytest.fixture
def kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """As in half precision on a GPU."""
    monkeypatch.setattr("dwswap.passes.pointwise_call.suits", lambda tensor: True)


@dataclasses.dataclass(frozen=True)
class Given:
    """Operands of the function, but for its options."""

    input: Tensor
    weight: Tensor
    bias: Tensor | None
    input_bias: Tensor | None
    point_weight: Tensor
    point_bias: Tensor | None
    residual: Tensor | None

    def each(self) -> list[Tensor | None]:
        return [getattr(self, field.name) for field in dataclasses.fields(self)]

    def map(self, function: Callable[[Tensor], Tensor]) -> Given:
        return Given(*(None if t is None else function(t) for t in self.each()))


def draw(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64)


def tensors(
    kernel: int = 3, stride: int = 1, added: str = "residual", biases: bool = True
) -> Given:
    height, width = ((side - 1) // stride + 1 for side in (6, 7))
    return Given(
        draw(2, 8, 6, 7),
        draw(8, 1, kernel, kernel, seed=1),
        draw(8, seed=2) if biases else None,
        draw(8, seed=3) if biases else None,
        draw(16, 8, 1, 1, seed=4),
        draw(16, seed=5) if added == "bias" else None,
        draw(2, 16, height, width, seed=6) if added == "residual" else None,
    )


def theirs(
    given: Given,
    stride: int = 1,
    before: str = "none",
    behind: str = "none",
    table: Any = ACTIVATIONS,
    padding: int | None = None,
) -> Tensor:
    bias = given.input_bias
    x = given.input if bias is None else given.input + bias[:, None, None]
    padding = given.weight.shape[-1] // 2 if padding is None else padding
    hidden = F.conv2d(table[before](x), given.weight, given.bias, stride, padding, 1, x.shape[1])
    output = F.conv2d(table[behind](hidden), given.point_weight, given.point_bias)
    return output if given.residual is None else given.residual + output


def ours(given: Given, stride: int = 1, before: str = "none", behind: str = "none") -> Tensor:
    return separable_conv2d(
        given.input,
        given.weight,
        given.bias,
        given.point_weight,
        given.point_bias,
        given.residual,
        stride=stride,
        padding=given.weight.shape[-1] // 2,
        input_bias=given.input_bias,
        input_activation=before,
        activation=behind,
    )


def arguments(given: Given, stride: int, before: str, behind: str, *cut: int) -> tuple[Any, ...]:
    """Of the operator."""
    return (
        *(given.input, given.weight, given.bias, given.input_bias),
        *(stride, given.weight.shape[-1] // 2, PAIRS[before, behind]),
        *(given.point_weight, given.point_bias, given.residual, *(cut or (8, 1))),
    )


def test_fits() -> None:
    shapes = [((96, 1, 3, 3), (24, 96, 1, 1)), ((8, 1, 5, 5), (8, 8, 1, 1))]
    assert all(fits(*map(torch.empty, both)) for both in shapes)
    for both in (
        ((96, 1, 3, 3), (24, 48, 1, 1)),
        ((12, 1, 3, 3), (24, 12, 1, 1)),
        ((96, 1, 3, 3), (20, 96, 1, 1)),
        ((96, 1, 3, 5), (24, 96, 1, 1)),
        ((96, 1, 7, 7), (24, 96, 1, 1)),
        ((96, 2, 3, 3), (24, 96, 1, 1)),
    ):
        assert not fits(*map(torch.empty, both))


@pytest.mark.parametrize(
    ("shape", "outputs", "kernel", "stride", "cut"),
    [
        ((1, 96, 112, 112), 24, 3, 2, (32, 1)),
        ((1, 144, 56, 56), 24, 3, 1, None),  # 32 pixels of 144 channels are too many for a block
        ((1, 144, 56, 56), 32, 3, 2, (16, 2)),
        ((1, 192, 28, 28), 32, 3, 1, (16, 2)),
        ((1, 384, 14, 14), 64, 3, 1, (8, 4)),
        ((1, 576, 14, 14), 160, 3, 2, (8, 6)),
        ((1, 960, 7, 7), 320, 3, 1, (8, 8)),
        ((1, 120, 28, 28), 40, 5, 1, (16, 2)),
        ((2, 960, 7, 7), 160, 3, 1, (8, 8)),
        ((4, 384, 14, 14), 64, 3, 1, (16, 2)),
        ((4, 960, 7, 7), 320, 3, 1, None),  # too many weights for each of the blocks
        ((1, 32, 112, 112), 16, 3, 1, None),  # more tiles than multiprocessors
        ((256, 384, 14, 14), 64, 3, 1, None),
        ((0, 384, 14, 14), 64, 3, 1, None),
    ],
)
def test_cut(
    shape: tuple[int, ...], outputs: int, kernel: int, stride: int, cut: tuple[int, int] | None
) -> None:
    assert choose_cut(shape, outputs, kernel, stride, kernel // 2, *H200) == cut


def test_no_cut_without_clusters() -> None:
    assert choose_cut((1, 384, 14, 14), 64, 3, 1, 1, 0, 0) is None


def test_cuts_are_of_one_wave() -> None:
    found = 0
    for batch, channels, side, outputs, kernel, stride, device in itertools.product(
        (1, 2, 8, 64),
        (8, 24, 40, 136, 960, 2048, 8192),
        (1, 2, 5, 7, 13, 28, 57, 112),
        (8, 24, 160, 1280),
        (3, 5),
        (1, 2),
        (H200, (170, 101376), (1, 101376)),
    ):
        shape = (batch, channels, side, side)
        cut = choose_cut(shape, outputs, kernel, stride, kernel // 2, *device)
        if cut is None:
            continue
        found += 1
        across = (side - 1) // stride + 1
        pairs = batch * across * ((across + 1) // 2)
        assert cut.pixels in (8, 16, 32)
        assert 1 <= cut.slices <= 8
        assert -(-2 * pairs // cut.pixels) * cut.slices <= device[0]
    assert found > 1000


@pytest.mark.parametrize("added", ["residual", "bias", "nothing"])
def test_values(added: str) -> None:
    for kernel, stride, biases in itertools.product((3, 5), (1, 2), (False, True)):
        for before, behind in itertools.product(ACTIVATIONS, ACTIVATIONS):
            given = tensors(kernel, stride, added, biases)
            expected = theirs(given, stride, before, behind)
            torch.testing.assert_close(ours(given, stride, before, behind), expected)
            named = NAMED(*arguments(given, stride, before, behind))
            torch.testing.assert_close(named, expected)
    empty = tensors(added=added)
    residual = None if empty.residual is None else empty.residual[:0]
    empty = dataclasses.replace(empty, input=empty.input[:0], residual=residual)
    assert ours(empty).shape == (0, 16, 6, 7)


@pytest.mark.parametrize("operator", [NAMED, APART], ids=str)
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_pytorch_can_work_with_it(
    operator: torch._ops.OpOverload, layout: torch.memory_format
) -> None:
    given = tensors(3, 2).map(lambda t: t if t.dim() != 4 else t.to(memory_format=layout))
    whole = arguments(given, 2, "relu6", "relu")
    real = operator(*whole)
    with FakeTensorMode(allow_non_fake_inputs=False) as mode:
        fake = operator(*arguments(given.map(mode.from_tensor), 2, "relu6", "relu"))
    meta = operator(*arguments(given.map(lambda t: t.to("meta")), 2, "relu6", "relu"))
    for other in (fake, meta):
        assert (other.shape, other.stride(), other.dtype) == (real.shape, real.stride(), real.dtype)
    opcheck(operator, whole)


def test_gradients_and_vmap() -> None:
    given = tensors()
    names = [
        field.name for field in dataclasses.fields(given) if getattr(given, field.name) is not None
    ]
    primals = tuple(getattr(given, name).clone().requires_grad_() for name in names)

    def call(*values: Tensor) -> Tensor:
        return ours(dataclasses.replace(given, **dict(zip(names, values, strict=True))), 1, "silu")

    assert torch.autograd.gradcheck(call, primals)
    residual = given.residual
    assert residual is not None
    before = residual.clone()
    call(*primals)
    assert torch.equal(residual, before)
    images = torch.stack([given.input, 2 * given.input])
    batched = torch.vmap(lambda x: ours(dataclasses.replace(given, input=x), 1, "relu"))(images)
    single = [ours(dataclasses.replace(given, input=x), 1, "relu") for x in images]
    torch.testing.assert_close(batched, torch.stack(single))


@torch.no_grad()
def test_autocast_is_that_of_aten() -> None:
    for added in ("bias", "nothing"):
        given = tensors(added=added).map(Tensor.float)
        with torch.autocast("cpu", torch.bfloat16):
            result, expected = ours(given), theirs(given)
        assert result.dtype == expected.dtype == torch.bfloat16
        exact = theirs(tensors(added=added))
        error, usual = ((each.double() - exact).norm() for each in (result, expected))
        assert error <= 1.5 * usual


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
        lambda: Separable(call=lambda m, x: m.point(m.depth(x)).relu()),
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


@pytest.mark.usefixtures("kernels")
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


@pytest.mark.usefixtures("kernels")
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


@pytest.mark.usefixtures("kernels")
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
            fast = dwswap.optimize(model, x, memory_format="channels_last", verify=True)
        assert dwswap.report(fast).layers[1].reason == "verify_failed"
        same(fast(x), model(x))


@pytest.mark.usefixtures("kernels")
@torch.no_grad()
def test_restored() -> None:
    model, x = FUSED["bare"][0]().eval(), image(8)
    fast = optimize(model)
    plain = dwswap.restore(fast)
    assert calls(fast)
    assert not calls(plain)
    targets = {node.target for node in plain.graph.nodes}
    assert depthwise_conv2d not in targets
    same(plain(x), model(x))
    with pytest.raises(ValueError, match="absorbed its neighbours"):
        dwswap.restore(optimize(FUSED["relu6"][0]()))


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


@pytest.mark.usefixtures("kernels")
@pytest.mark.parametrize("name", STAYS)
@torch.no_grad()
def test_stays(name: str) -> None:
    torch.manual_seed(0)
    model = STAYS[name]().eval()
    fast = optimize(model)
    assert not calls(fast)
    assert not changes(fast, "separable")
    same(fast(image(8)), model(image(8)))


@pytest.mark.usefixtures("kernels")
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
    for batch in (1, 3):
        same(fast(image(8, batch=batch)), model(image(8, batch=batch)))


def test_not_on_the_cpu() -> None:
    assert not calls(optimize(Separable()))


@pytest.mark.usefixtures("kernels")
@torch.no_grad()
def test_not_in_an_exported_program() -> None:
    model = Separable().eval()
    fast = dwswap.optimize(export(model, (image(8),)), memory_format="channels_last")
    assert separable_conv2d not in {node.target for node in fast.graph.nodes}
    same(fast.module()(image(8)), model(image(8)))


@pytest.mark.usefixtures("kernels")
@torch.no_grad()
def test_compiles() -> None:
    torch._dynamo.reset()
    model = nn.Sequential(InvertedResidual(8), InvertedResidual(8), nn.Conv2d(8, 8, 1)).eval()
    fast = optimize(model)
    assert len(calls(fast)) == 2
    compiled = torch.compile(fast, fullgraph=True, backend="aot_eager")
    same(compiled(image(8)), model(image(8)))


@pytest.mark.usefixtures("kernels")
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
