"""``example_inputs`` and hooks: optimizing calls none of them, and claims nothing behind them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from tiny_models import ControlFlow, depthwise, image
from torch import Tensor, fx, nn
from torch.nn.modules import module as module_globals

import dwswap
from dwswap.export.pt2 import load_program, save_pt2

Shape = tuple[int, ...]


class Inner(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = depthwise()
        self.norm = nn.BatchNorm2d(8)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.norm(self.conv(x)))


class Net(nn.Module):
    """A layer before what gets hooks, and one behind it."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 8, 1)
        self.box = nn.Sequential(Inner())
        self.last = depthwise()

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.box(self.first(x)))


REGISTER: dict[str, Callable[[nn.Module, list[str]], Any]] = {
    "hook": lambda m, calls: m.register_forward_hook(lambda *_: calls.append("hook")),
    "hook with kwargs": lambda m, calls: m.register_forward_hook(
        lambda module, args, kwargs, output: calls.append("hook"), with_kwargs=True
    ),
    "hook always": lambda m, calls: m.register_forward_hook(
        lambda *_: calls.append("hook"), always_call=True
    ),
    "pre-hook": lambda m, calls: m.register_forward_pre_hook(lambda *_: calls.append("hook")),
    "pre-hook with kwargs": lambda m, calls: m.register_forward_pre_hook(
        lambda module, args, kwargs: calls.append("hook"), with_kwargs=True
    ),
}
PATHS = {
    "root": "",
    "container": "box",
    "block": "box.0",
    "conv": "box.0.conv",
    "norm": "box.0.norm",
}
USES: dict[str, Callable[[nn.Module], Any]] = {
    "optimize": lambda model: dwswap.optimize(model, image()),
    "inplace": lambda model: dwswap.optimize(model, image(), inplace=True),
    "swap": lambda model: dwswap.optimize(model, image(), fuse=False),
    "train": lambda model: dwswap.optimize(model.train(), image()),
    "explain": lambda model: dwswap.explain(model, image()),
}


def shapes(report: dwswap.Report) -> list[Shape | None]:
    return [layer.input_shape for layer in report.layers]


@pytest.mark.parametrize("use", USES)
@pytest.mark.parametrize("path", PATHS.values(), ids=PATHS)
@pytest.mark.parametrize("kind", REGISTER)
def test_hooks_are_not_called_and_stay(kind: str, path: str, use: str) -> None:
    calls: list[str] = []
    model = Net().eval()
    REGISTER[kind](model.get_submodule(path), calls)
    result = USES[use](model)
    assert calls == []
    model(image())
    assert calls == ["hook"]
    if use != "explain":
        result(image())
        assert calls == ["hook", "hook"]


@pytest.mark.parametrize("path", ["", "box_0_conv", "first"])
@pytest.mark.parametrize("kind", REGISTER)
def test_hooks_of_a_graph_are_not_called(kind: str, path: str) -> None:
    calls: list[str] = []
    model = fx.symbolic_trace(Net().eval())
    module = model.get_submodule(path.replace("_", "."))
    REGISTER[kind](module, calls)
    fast = dwswap.optimize(model, image())
    assert calls == []
    fast(image())
    assert calls == ["hook"]


@pytest.fixture(params=["hook", "pre-hook"])
def global_calls(request: pytest.FixtureRequest) -> Iterator[list[str]]:
    calls: list[str] = []
    register: Any = {
        "hook": module_globals.register_module_forward_hook,
        "pre-hook": module_globals.register_module_forward_pre_hook,
    }[request.param]
    handle = register(lambda *_: calls.append(request.param))
    yield calls
    handle.remove()


@pytest.mark.parametrize("use", USES)
def test_global_hooks_are_not_called(use: str, global_calls: list[str]) -> None:
    result = USES[use](Net().eval())
    assert global_calls == []
    report = result if use == "explain" else dwswap.report(result)
    assert shapes(report) == [None] * 3
    assert report.swapped


def test_hooks_are_not_called_where_values_decide() -> None:
    """A run on fake tensors fails, and one on real tensors follows."""
    calls: list[str] = []
    model = nn.Sequential(ControlFlow(), depthwise()).eval()
    model[1].register_forward_hook(lambda *_: calls.append("hook"))
    report = dwswap.explain(model, image())
    assert shapes(report) == [(2, 3, 9, 9), (2, 8, 9, 9), (2, 8, 9, 9)]
    assert calls == []


def test_hooks_are_not_called_where_the_model_fails() -> None:
    calls: list[str] = []
    model = Net().eval()
    REGISTER["hook always"](model, calls)
    with pytest.raises(ValueError, match="example_inputs must be inputs that Net accepts"):
        dwswap.explain(model, image(4))
    assert calls == []


def test_hooks_of_backward_are_not_called() -> None:
    class Gradient(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = depthwise()

        def forward(self, x: Tensor) -> Tensor:
            with torch.enable_grad():
                x = x.detach().requires_grad_()
                return torch.autograd.grad(self.conv(x).sum(), x)[0]

    calls: list[str] = []
    model = Gradient().eval()
    model.conv.register_full_backward_hook(lambda *_: calls.append("hook"))
    model.conv.register_full_backward_pre_hook(lambda *_: calls.append("pre-hook"))
    assert shapes(dwswap.explain(model, image(8))) == [(2, 8, 9, 9)]
    assert calls == []
    model(image(8))
    assert calls == ["pre-hook", "hook"]


@pytest.mark.parametrize(
    ("kind", "path", "known"),
    [
        ("hook", "", 3),
        ("hook", "box", 2),
        ("hook", "box.0.conv", 2),
        ("hook", "first", 1),
        ("pre-hook", "", 0),
        ("pre-hook", "box", 1),
        ("pre-hook", "box.0.conv", 1),
        ("pre-hook", "last", 2),
    ],
)
def test_shapes_are_known_up_to_a_hook(kind: str, path: str, known: int) -> None:
    all_shapes = shapes(dwswap.explain(Net().eval(), image()))
    model = Net().eval()
    REGISTER[kind](model.get_submodule(path), [])
    for report in (dwswap.explain(model, image()), dwswap.report(dwswap.optimize(model, image()))):
        assert shapes(report) == all_shapes[:known] + [None] * (3 - known)
        assert len(report.swapped) == 2 - (path in ("box.0.conv", "last"))
        assert str(report)


def test_hooks_that_change_shapes() -> None:
    model = Net().eval()
    model.box.register_forward_hook(lambda module, args, output: output[:, :, ::2])
    fast = dwswap.optimize(model, image())
    assert shapes(dwswap.report(fast)) == [(2, 3, 9, 9), (2, 8, 9, 9), None]
    torch.testing.assert_close(fast(image()), model(image()), rtol=0, atol=1e-5)


def test_hooks_without_which_a_model_fails() -> None:
    model = Net().eval()
    model.register_forward_pre_hook(lambda module, args: (args[0].movedim(-1, 1),))
    images = image().movedim(1, -1)
    assert shapes(dwswap.explain(model, images)) == [None] * 3
    fast = dwswap.optimize(model, images)
    torch.testing.assert_close(fast(images), model(images), rtol=0, atol=1e-5)


class ComputedWeight(nn.Module):
    """Whether this is depthwise hangs on a shape that only a run tells."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(8, 1, 3, 3))
        self.made = nn.Dropout()

    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(x, self.made(self.weight * 2), groups=8)


def _half(_: nn.Module, args: tuple[Tensor, ...], *output: Tensor) -> Tensor:
    return (*output, *args)[0][:, :, ::2]


@pytest.mark.parametrize("traced", [False, True])
def test_shapes_in_a_graph_are_known_up_to_a_hook(traced: bool) -> None:
    def layer(register: str, path: str) -> dwswap.Layer:
        model: nn.Module = ComputedWeight().eval()
        if traced:
            model = fx.symbolic_trace(model)
        getattr(model.get_submodule(path), register)(_half)
        fast = dwswap.optimize(model, image(8))
        torch.testing.assert_close(fast(image(8)), model(image(8)), rtol=0, atol=1e-5)
        (found,) = dwswap.report(fast).layers
        return found

    for register in ("register_forward_pre_hook", "register_forward_hook"):
        found = layer(register, "made")
        assert (found.reason, found.input_shape) == ("weight_unknown", (2, 8, 9, 9))
    if traced:  # others are no graph when they have a hook on the root
        found = layer("register_forward_pre_hook", "")
        assert (found.reason, found.input_shape) == ("weight_unknown", None)


def test_a_model_does_not_catch_the_end_of_the_run() -> None:
    class Tries(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one = depthwise()
            self.other = depthwise()

        def forward(self, x: Tensor) -> Tensor:
            try:
                return self.one(x)
            except Exception:
                return self.other(x)

    model = Tries().eval()
    model.one.register_forward_hook(lambda *_: None)
    assert shapes(dwswap.explain(model, image(8))) == [(2, 8, 9, 9), None]


@pytest.mark.filterwarnings("ignore:.*weight_norm.* is deprecated:FutureWarning")
@pytest.mark.filterwarnings("ignore:Lazy modules:UserWarning")
def test_what_torch_does_in_a_hook_is_done() -> None:
    """Such a hook computes a weight, or makes it."""
    makers: dict[str, Callable[[], nn.Module]] = {
        "weight_norm": lambda: nn.utils.weight_norm(nn.Conv2d(3, 8, 1)),
        "pruned": lambda: nn.utils.prune.l1_unstructured(nn.Conv2d(3, 8, 1), "weight", 2),
        "lazy": lambda: nn.LazyConv2d(8, 1),
    }
    for name, make in makers.items():
        model = nn.Sequential(ControlFlow(make()), depthwise()).eval()
        assert shapes(dwswap.explain(model, image())) == [(2, 3, 9, 9), (2, 8, 9, 9)], name


def test_a_loaded_program_checks_its_arguments_in_a_hook(tmp_path: Path) -> None:
    save_pt2(torch.export.export(Net().eval(), (image(),)), tmp_path / "net.pt2")
    module: Any = load_program(tmp_path / "net.pt2")
    assert None not in shapes(dwswap.explain(module, image()))
