"""``memory_format``: the graph runs in one layout, and nobody outside can tell."""

from __future__ import annotations

import copy
import pickle
from collections import OrderedDict
from collections.abc import Callable
from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from test_absorb_activation import Apply
from test_fold_batchnorm import norm
from test_push_bias import Gated, chain, inverted, pointwise, shuffle
from test_torchvision import build_with_data
from tiny_models import MODES, ControlFlow, depthwise, image, snapshot
from tiny_models import optimized as block
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

import dwswap
from dwswap.example_inputs import Arguments
from dwswap.layouts import memory_format, restored, to_layout
from dwswap.passes import memory_format as memory_format_pass
from dwswap.passes.affine_call import affine_call, value_of
from dwswap.swapped_layers import run_watched

CL, NCHW = torch.channels_last, torch.contiguous_format
FORMATS = {"channels_last": CL, "contiguous": NCHW}


@pytest.fixture
def like_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    """ "auto" does what it does on CUDA."""
    monkeypatch.setattr("dwswap.passes.memory_format._gains", lambda weight: True)


class Layouts(fx.Interpreter):
    """The layouts of the outputs of convolutions."""

    def __init__(self, fast: fx.GraphModule) -> None:
        super().__init__(fast)
        self.found: list[torch.memory_format] = []

    def run_node(self, n: fx.Node) -> Any:
        value = super().run_node(n)
        call = affine_call(self.module, n)
        if call is not None and call.spatial == 2 and value[0, 0].numel() > 1:
            self.found.append(memory_format(value))
        return value


def layouts(fast: nn.Module, x: Tensor) -> set[torch.memory_format]:
    assert isinstance(fast, fx.GraphModule)
    interpreter = Layouts(fast)
    with torch.no_grad():
        interpreter.run(x)
    return set(interpreter.found)


def edges(fast: nn.Module) -> tuple[int, int]:
    """Conversions of inputs and of outputs."""
    assert isinstance(fast, fx.GraphModule)
    targets = [node.target for node in fast.graph.nodes]
    return targets.count(to_layout), targets.count(restored)


def same(own: Any, other: Any) -> None:
    pairs = zip(pytree.tree_leaves(own), pytree.tree_leaves(other), strict=True)
    for ours, theirs in pairs:
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
        # Of dimensions of one element, strides mean nothing.
        strides = [
            [stride for stride, size in zip(t.stride(), t.shape, strict=True) if size > 1]
            for t in (ours, theirs)
        ]
        assert strides[0] == strides[1]


def converted(
    model: nn.Module, x: Tensor | None = None, views: bool = False, **options: Any
) -> Any:
    """The result in channels_last, checked against ``model`` for both layouts of the input.

    Args:
        views: the model itself fails on channels_last inputs.
    """
    options = {"memory_format": "channels_last"} | options
    torch.manual_seed(0)
    model = model.eval()
    before = {name: (v.clone(), v.stride()) for name, v in model.state_dict().items()}
    fast = dwswap.optimize(model, **options)
    x = image(8) if x is None else x
    with torch.no_grad():
        for given in (x, x.to(memory_format=CL)):
            if given is x or not views:
                same(fast(given), model(given))
            assert given.stride() in (x.stride(), x.to(memory_format=CL).stride())
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name][0])
        assert value.stride() == before[name][1]
    return fast


class Many(nn.Module):
    """Outputs of several kinds."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = chain(norm()), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Any:
        y = self.body(x)
        logits = self.head(y.mean((2, 3)))
        return OrderedDict(
            image=y, pair=(y + 1, [logits, logits.softmax(-1)]), pooled=y.mean([2, 3])
        )


RUNS: dict[str, tuple[Callable[[], nn.Module], tuple[int, int]]] = {
    "image": (lambda: chain(norm()), (1, 1)),
    "3 x 3": (lambda: nn.Sequential(nn.Conv2d(8, 8, 3, bias=False), depthwise()), (1, 1)),
    "blocks": (lambda: chain(inverted(), inverted()), (1, 1)),
    "logits": (
        lambda: chain(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Dropout(), nn.Linear(8, 3)),
        (1, 0),
    ),
    "flatten of an image": (lambda: chain(nn.Flatten(), nn.Linear(8 * 81, 3)), (1, 0)),
    "flattened": (lambda: chain(Apply(lambda x: x.flatten(1))), (1, 0)),
    "view": (lambda: chain(Apply(lambda x: x.view(x.size(0), -1)), nn.Linear(8 * 81, 3)), (1, 0)),
    "view of all": (
        lambda: chain(
            Apply(lambda x: x.view(-1, 81).view_as(torch.ones(16, 81))), nn.Linear(81, 2)
        ),
        (1, 0),
    ),
    "scale": (lambda: chain(Gated()), (1, 1)),
    "shuffle": (lambda: chain(Apply(shuffle), pointwise(), depthwise(), nn.ReLU()), (1, 1)),
    "pools": (
        lambda: chain(nn.MaxPool2d(2), nn.AvgPool2d(2), Apply(lambda x: F.interpolate(x, size=7))),
        (1, 1),
    ),
    "concat of parts": (
        lambda: chain(
            Apply(lambda x: torch.cat([x.chunk(2, 1)[1].relu(), x.chunk(2, 1)[0]], dim=1))
        ),
        (1, 1),
    ),
    "pooled": (lambda: chain(nn.AdaptiveAvgPool2d(1)), (1, 1)),
    "in place": (lambda: chain(nn.ReLU(True), pointwise(), nn.ReLU6(True)), (1, 1)),
    "output changed in place": (lambda: chain(Apply(lambda x: (x, F.relu_(x))[0])), (1, 1)),
    "many": (Many, (1, 2)),
    "layer norm of pixels": (
        lambda: chain(
            Apply(lambda x: x.permute(0, 2, 3, 1)), nn.LayerNorm(8), nn.Linear(8, 8), nn.GELU()
        ),
        (1, 0),
    ),
}


@pytest.mark.parametrize("case", RUNS)
def test_runs_in_channels_last(case: str) -> None:
    make, expected = RUNS[case]
    fast = converted(make(), views="view" in case)
    assert edges(fast) == expected
    assert layouts(fast, image(8)) == {CL}
    assert dwswap.report(fast).memory_format.startswith("channels_last (converted: 1 inputs")
    assert "memory format: channels_last" in str(dwswap.report(fast))
    for call in (affine_call(fast, node) for node in fast.graph.nodes):
        weight = None if call is None else value_of(fast, call.weight)
        if weight is not None and weight.dim() == 4 and weight.shape[1] > 1:
            assert memory_format(weight) == CL


MAY_COPY: dict[str, Callable[[Tensor], Tensor]] = {
    "contiguous": lambda x: x.contiguous(),
    "to": lambda x: x.to(memory_format=NCHW),
    "reshape": lambda x: x.reshape(-1),
    "flatten": lambda x: torch.flatten(x, 1),
}


class FlattenedInPlace(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.flatten = nn.Flatten()

    def forward(self, x: Tensor) -> Tensor:
        y = x * 2
        self.flatten(y).clamp_(min=0)
        return y


STAYS: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "output of a view": (lambda: chain(Apply(lambda x: x.permute(0, 2, 3, 1))), "output"),
    "output of a part": (lambda: chain(Apply(lambda x: x.chunk(2, 1)[0])), "output"),
    "strides": (lambda: chain(Apply(lambda x: x.mean((2, 3)) + x.stride(1))), "depends on"),
    "as_strided": (
        lambda: chain(Apply(lambda x: x.as_strided((2, 3), (1, 1))), nn.Linear(3, 2)),
        "depends on",
    ),
    "a view changed in place": (
        lambda: chain(Apply(lambda x: (x, F.relu_(x.view(x.size(0), -1)))[0].mean((2, 3)))),
        "in place",
    ),
    **{
        f"what may be a copy changed in place, {name}": (
            lambda call=call: chain(Apply(lambda x: (y := x * 2, call(y).clamp_(min=0))[0])),
            "in place",
        )
        for name, call in MAY_COPY.items()
    },
    "changed in place before its copy is read": (
        lambda: chain(
            Apply(lambda x: (y := x * 2, (y.contiguous(), y.clamp_(min=0))[0])[1].mean((2, 3))),
            nn.Linear(8, 2),
        ),
        "in place",
    ),
    "what nn.Flatten may copy changed in place": (
        lambda: chain(FlattenedInPlace()),
        "in place",
    ),
    "input changed in place": (
        lambda: nn.Sequential(nn.ReLU(True), Apply(lambda x: x + 0), depthwise(), pointwise()),
        "in place",
    ),
}


@pytest.mark.parametrize("case", STAYS)
def test_stays_with_a_reason(case: str) -> None:
    make, reason = STAYS[case]
    model = make().eval()
    fast = dwswap.optimize(model, memory_format="channels_last")
    assert edges(fast) == (0, 0)
    told = dwswap.report(fast).memory_format
    assert told.startswith("preserve (")
    assert reason in told
    x = image(8)
    with torch.no_grad():
        same(fast(x.clone()), model(x.clone()))


def test_unknown_functions_stay() -> None:
    class Own(nn.Conv2d):
        pass

    fast = dwswap.optimize(chain(Own(8, 8, 1)).eval(), memory_format="channels_last")
    assert "may depend on the layout" in dwswap.report(fast).memory_format


def test_auto_on_the_cpu_preserves() -> None:
    for options in ({}, {"memory_format": "preserve"}):
        fast = dwswap.optimize(chain(nn.Conv2d(8, 8, 3)).eval(), **options)
        assert edges(fast) == (0, 0)
        assert dwswap.report(fast).memory_format == "preserve"
        assert layouts(fast, image(8)) == {NCHW}


@pytest.mark.usefixtures("like_cuda")
def test_auto_on_cuda() -> None:
    fast = converted(chain(inverted()), memory_format="auto")
    assert edges(fast) == (1, 1)
    assert layouts(fast, image(8)) == {CL}
    view = fast(image(8)).view(-1)
    assert view.numel() == 8 * 81 * 2


@pytest.mark.parametrize("capability", [None, (7, 5), (8, 0), (9, 0)])
@pytest.mark.parametrize("tf32", [False, True])
def test_auto_is_for_cuda_and_its_tensor_cores(
    tf32: bool, capability: tuple[int, int] | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", tf32)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: capability is not None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)

    def gains(dtype: torch.dtype, device: str = "cuda:1") -> bool:
        place = torch.device(device)
        weight: Any = SimpleNamespace(is_cuda=place.type == "cuda", device=place, dtype=dtype)
        return memory_format_pass._gains(weight)

    assert gains(torch.float16)
    assert gains(torch.bfloat16)
    assert gains(torch.float32) == (tf32 and capability in ((8, 0), (9, 0)))
    assert not gains(torch.float64)
    assert not any(gains(dtype, "cpu") for dtype in (torch.float32, torch.float16))


@pytest.mark.usefixtures("like_cuda")
def test_layers_are_timed_in_the_format(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[torch.memory_format] = []

    def select(result: nn.Module, report: Any, arguments: Arguments) -> Any:
        run_watched(result, report, arguments, lambda call: seen.append(memory_format(call.input)))
        return result, report

    monkeypatch.setattr("dwswap.rewrite.select_faster", select)
    model = chain(inverted()).eval()
    fast = dwswap.optimize(model, image(8), select="measured")
    assert seen == [CL, CL]
    assert edges(fast) == (1, 1)
    assert dwswap.report(fast).memory_format.startswith("channels_last")
    same(fast(image(8)), model(image(8)))


@pytest.mark.parametrize("asked", FORMATS)
def test_model_in_channels_last(asked: str) -> None:
    model = chain(nn.Conv2d(8, 8, 3), nn.ReLU(), inverted()).to(memory_format=CL)
    fast = converted(model, memory_format=asked)
    assert layouts(fast, image(8)) == layouts(fast, image(8).to(memory_format=CL))
    assert layouts(fast, image(8)) == {FORMATS[asked]}
    model = chain(nn.Conv2d(8, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3).to(memory_format=CL)).eval()
    mixed = dwswap.optimize(model, memory_format=asked)
    assert "several layouts" in dwswap.report(mixed).memory_format
    same(mixed(image(8)), model(image(8)))


def test_inputs_of_other_kinds() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = chain()

        def forward(self, x: Tensor, scale: Tensor) -> Tensor:
            return self.body(x) * scale.sum()

    model = Two().eval()
    fast = dwswap.optimize(model, memory_format="channels_last")
    with torch.no_grad():
        for x in (image(8), image(8)[0]):
            same(fast(x, torch.ones(3)), model(x, torch.ones(3)))
    grey = nn.Sequential(nn.Conv2d(1, 8, 3), depthwise(), pointwise())
    assert layouts(converted(grey, image(1)), image(1)) == {CL}


def test_one_pixel_and_empty_batch() -> None:
    model = chain(inverted())
    fast = converted(model, image(8, size=1))
    with torch.no_grad():
        for x in (image(8)[:0], image(8, batch=1)):
            same(fast(x), model(x))


def test_verify_copies_and_compiles() -> None:
    x = image(8)
    model = chain(inverted(), Apply(shuffle), pointwise()).eval()
    fast = dwswap.optimize(model, x, verify=True, memory_format="channels_last")
    report = dwswap.report(fast)
    assert report.verification is not None
    assert report.verification.passed
    torch._dynamo.reset()
    with torch.no_grad():
        for again in (
            copy.deepcopy(fast),
            dwswap.optimize(fast, memory_format="channels_last"),
            torch.compile(fast, fullgraph=True, backend="aot_eager"),
        ):
            same(again(x), model(x))
    plain = dwswap.optimize(chain(inverted()).eval(), memory_format="channels_last")
    loaded = pickle.loads(pickle.dumps(plain))
    assert edges(loaded) == (1, 1)
    same(loaded(x), plain(x))
    assert "to_layout" in plain.code


@pytest.mark.parametrize("as_graph", [False, True])
def test_inplace(as_graph: bool) -> None:
    model: Any = nn.Sequential(nn.Conv2d(8, 8, 3), depthwise(), pointwise()).eval()
    expected = model(image(8))
    model = fx.symbolic_trace(model) if as_graph else model
    before = snapshot(model)
    fast = dwswap.optimize(model, memory_format="channels_last", inplace=True)
    assert (fast is model) == as_graph
    if not as_graph:
        assert snapshot(model) == before
    same(fast(image(8)), expected)
    assert layouts(fast, image(8)) == {CL}


def test_tied_weights_stay_tied() -> None:
    first, second = nn.Conv2d(8, 8, 3), nn.Conv2d(8, 8, 3)
    second.weight = first.weight
    fast = converted(nn.Sequential(depthwise(), nn.ReLU(), first, nn.ReLU(), second, nn.ReLU()))
    assert fast.get_parameter("2.weight") is fast.get_parameter("4.weight")
    assert fast.get_parameter("2.weight").requires_grad


def test_exported_program() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = chain(inverted())
            self.head = nn.Linear(8 * 81, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.body(x).view(x.shape[0], -1))

    model, x = Net().eval(), image(8)
    program = torch.export.export(model, (x,))
    fast = dwswap.optimize(program.module(), memory_format="channels_last")
    assert layouts(fast, x) == {CL}, dwswap.report(fast).memory_format
    same(fast(x), model(x))


def test_no_graph() -> None:
    model = ControlFlow().eval()
    fast = dwswap.optimize(model, memory_format="channels_last", fuse=True)
    assert dwswap.report(fast).memory_format == (
        "block: channels_last (converted: 1 inputs, 1 outputs)"
    )
    same(fast(image()), model(image()))
    assert fast(image()).is_contiguous()
    model.register_forward_hook(lambda *_: None)
    fast = dwswap.optimize(model, memory_format="channels_last")
    assert "no graph" in dwswap.report(fast).memory_format
    same(fast(image()), model(image()))
    with pytest.raises(ValueError, match='memory_format must be "auto"'):
        dwswap.optimize(model, memory_format="nhwc")  # type: ignore[arg-type]


@pytest.mark.parametrize("how", MODES)
def test_every_mode(how: dict[str, bool]) -> None:
    model, fast = block(how, memory_format="channels_last")
    model.eval()
    fast.eval()
    same(fast(image()), model(image()))


@pytest.mark.usefixtures("like_cuda")
@pytest.mark.parametrize(
    "name",
    [
        *("shufflenet_v2_x0_5", "mobilenet_v3_small", "convnext_tiny", "lraspp_mobilenet_v3_large"),
        *(
            pytest.param(name, marks=pytest.mark.slow)
            for name in ("mobilenet_v2", "mnasnet0_5", "efficientnet_b0")
        ),
    ],
)
def test_torchvision(name: str) -> None:
    model = build_with_data(name)
    fast = dwswap.optimize(model)
    assert dwswap.report(fast).memory_format.startswith("channels_last")
    x = torch.rand(2, 3, 64, 64)
    assert layouts(fast, x) == {CL}
    wide = build_with_data(name).double()
    exact = dwswap.optimize(wide, memory_format="channels_last")
    with torch.no_grad():
        for given in (x.double(), x.double().to(memory_format=CL)):
            pairs = zip(*map(pytree.tree_leaves, (exact(given), wide(given))), strict=True)
            for own, other in pairs:
                assert own.stride() == other.stride()
                assert float((own - other).abs().max() / other.abs().max()) < 1e-12


@torch.no_grad()
def test_vmap_over_a_graph_in_channels_last() -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 1), depthwise(), nn.ReLU()).eval()
    fast = dwswap.optimize(model, memory_format="channels_last")
    x = torch.stack([image(), image() + 1])
    torch.testing.assert_close(torch.vmap(fast)(x), torch.stack([model(each) for each in x]))


@pytest.mark.parametrize("forward", [False, True])
@pytest.mark.parametrize("batched", [False, True])
def test_transforms_over_a_graph_in_channels_last(batched: bool, forward: bool) -> None:
    """``vmap`` inside and outside of others, as for gradients of every image."""
    model = nn.Sequential(nn.Conv2d(3, 8, 1), depthwise(), nn.ReLU()).double().eval()
    fast = dwswap.optimize(model, memory_format="channels_last")
    x = image().double()
    direction = torch.ones_like(x[0])

    def transformed(call: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
        if forward:

            def along(each: Tensor) -> Tensor:
                return torch.func.jvp(call, (each[None],), (direction[None],))[1]
        else:
            along = torch.func.grad(lambda each: call(each[None]).square().sum())
        return torch.func.vmap(along) if batched else lambda x: torch.stack([*map(along, x)])

    torch.testing.assert_close(transformed(fast)(x), transformed(model)(x))


class Early(nn.Module):
    """Returns what it computed before any convolution, too."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.depthwise = nn.Conv2d(8, 8, 1), depthwise()

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        x = torch.relu(x)
        return x, self.depthwise(self.first(x))


class Decoder(nn.Module):
    """Convolutions of a vector: their layout is that of their weights, not of the image."""

    def __init__(self, *rest: nn.Module) -> None:
        super().__init__()
        self.encode, self.linear = nn.Conv2d(8, 8, 3, 2, 1), nn.Linear(8, 8 * 4 * 4)
        self.decode = nn.Sequential(*rest)

    def forward(self, x: Tensor) -> Tensor:
        return self.decode(torch.relu(self.linear(self.encode(x).mean((2, 3)))).view(-1, 8, 4, 4))


class Learned(nn.Module):
    """A constant is the input of the first convolution."""

    def __init__(self) -> None:
        super().__init__()
        self.constant = nn.Parameter(torch.randn(1, 8, 4, 4))
        self.first, self.depthwise, self.other = nn.Conv2d(8, 8, 1), depthwise(), depthwise()

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        constant = self.constant.expand(x.shape[0], -1, -1, -1)
        return self.depthwise(self.first(constant)), self.other(x)


MAKE: list[Callable[[], nn.Module]] = [
    Early,
    Learned,
    lambda: nn.Sequential(depthwise(), nn.ReLU()),
    lambda: Decoder(nn.Conv2d(8, 8, 1), depthwise()),
    lambda: Decoder(depthwise(), nn.Upsample(scale_factor=2), nn.Conv2d(8, 3, 1)),
    lambda: Decoder(nn.ConvTranspose2d(8, 8, 2, 2), depthwise(), nn.Sigmoid()),
]


@pytest.mark.parametrize("asked", ["channels_last", "contiguous"])
@pytest.mark.parametrize("weights", [torch.channels_last, torch.contiguous_format])
@pytest.mark.parametrize("images", [torch.channels_last, torch.contiguous_format])
@pytest.mark.parametrize("make", MAKE)
@torch.no_grad()
def test_outputs_have_the_strides_that_weights_and_images_give_them(
    asked: Any,
    weights: torch.memory_format,
    images: torch.memory_format,
    make: Callable[[], nn.Module],
) -> None:
    model = make().eval().to(memory_format=weights)
    x = image(8).to(memory_format=images)
    fast = dwswap.optimize(model, x, memory_format=asked, verify=True)
    assert dwswap.report(fast).memory_format.startswith(asked)
    for own, expected in zip(*(pytree.tree_leaves(m(x)) for m in (fast, model)), strict=True):
        torch.testing.assert_close(own, expected, check_stride=True)


class SliceInPlace(nn.Module):
    """Returns a slice of the channels, changed in place: it has the strides of the whole."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.depthwise = nn.Conv2d(8, 8, 1), depthwise()

    def forward(self, x: Tensor) -> Tensor:
        one, _ = self.depthwise(self.first(x)).chunk(2, 1)
        return torch.relu_(one)


class Unknown(nn.Module):
    """A convolution of what may have any strides."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = depthwise(), nn.Conv2d(8, 8, 1)
        self.linear = nn.Linear(8, 8 * 4 * 4)

    def forward(self, x: Tensor) -> Tensor:
        rows = self.linear(self.first(x).mean((2, 3))).view(-1, 4, 4, 8)
        return self.second(rows.permute(0, 3, 1, 2))


class Constants(nn.Module):
    """Parameters that have a say in strides."""

    def __init__(self, use: Callable[[Any, Tensor], Any]) -> None:
        super().__init__()
        self.first, self.depthwise, self.last = nn.Conv2d(8, 8, 1), depthwise(), nn.Conv2d(10, 8, 1)
        size = image(8).shape[2:]
        self.position = nn.Parameter(torch.randn(1, 8, *size))
        self.coordinates = nn.Parameter(torch.randn(1, 2, *size))
        self.rows = nn.Parameter(torch.randn(1, *size, 8))
        self.use = use

    def forward(self, x: Tensor) -> Any:
        return self.use(self, self.depthwise(x))


def coordinates(model: Any, y: Tensor) -> Any:
    return model.last(torch.cat([y, model.coordinates.expand(y.shape[0], -1, -1, -1)], 1))


CONSTANTS: list[Callable[[Any, Tensor], Any]] = [
    lambda model, y: model.position + y,
    coordinates,
    lambda model, y: (y, model.first(model.rows.permute(0, 3, 1, 2).sigmoid())),
    lambda model, y: y.chunk(2, 1)[0].flatten(1),
]


@pytest.mark.parametrize("images", [torch.channels_last, torch.contiguous_format])
@pytest.mark.parametrize(
    "make", [SliceInPlace, Unknown, *(partial(Constants, use) for use in CONSTANTS)]
)
@torch.no_grad()
def test_outputs_of_unknown_strides_keep_theirs(
    make: Callable[[], nn.Module], images: torch.memory_format
) -> None:
    model, x = make().eval(), image(8).to(memory_format=images)
    fast = dwswap.optimize(model, x, memory_format="channels_last")
    assert "is not known" in str(dwswap.report(fast).memory_format)
    for own, expected in zip(*(pytree.tree_leaves(m(x)) for m in (fast, model)), strict=True):
        torch.testing.assert_close(own, expected, check_stride=True)


class Conditioned(nn.Module):
    """A style, or tokens, reach a convolution, and are returned as well."""

    def __init__(self, tokens: bool) -> None:
        super().__init__()
        self.tokens = tokens
        self.first, self.depthwise, self.linear = nn.Conv2d(8, 8, 1), depthwise(), nn.Linear(5, 8)

    def forward(self, x: Tensor, style: Tensor) -> tuple[Tensor, Tensor]:
        scale = self.linear(style).mean(1) if self.tokens else self.linear(style)
        return self.depthwise(self.first(x + scale[:, :, None, None])), torch.relu(style)


@pytest.mark.parametrize("tokens", [False, True])
@pytest.mark.parametrize("images", [torch.channels_last, torch.contiguous_format])
@torch.no_grad()
def test_inputs_beside_images_are_returned_as_they_are(
    tokens: bool, images: torch.memory_format
) -> None:
    model = Conditioned(tokens).eval().to(memory_format=torch.channels_last)
    x = image(8).to(memory_format=images)
    style = torch.randn(x.shape[0], 7, 5) if tokens else torch.randn(x.shape[0], 5)
    fast = dwswap.optimize(model, (x, style), memory_format="channels_last")
    assert dwswap.report(fast).memory_format.startswith("channels_last")
    for own, expected in zip(fast(x, style), model(x, style), strict=True):
        torch.testing.assert_close(own, expected, check_stride=True)


class Siamese(nn.Module):
    """Two images, by the same layers."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.depthwise = nn.Conv2d(8, 8, 1), depthwise()

    def forward(self, x: Tensor, y: Tensor) -> list[Tensor]:
        return [torch.relu(self.depthwise(self.first(each))) for each in (x, y)]


@pytest.mark.parametrize("asked", ["channels_last", "contiguous"])
@torch.no_grad()
def test_images_in_different_layouts(asked: Any) -> None:
    model = Siamese().eval()
    given = (image(8), image(8).to(memory_format=torch.channels_last))
    fast = dwswap.optimize(model, given, memory_format=asked)
    assert dwswap.report(fast).memory_format.startswith(asked)
    for inputs in (given, given[::-1]):
        for own, expected in zip(fast(*inputs), model(*inputs), strict=True):
            torch.testing.assert_close(own, expected, check_stride=True)
