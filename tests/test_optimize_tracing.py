"""What becomes a graph, and what does not because a graph would do something else."""

from __future__ import annotations

import contextlib
import copy
import operator
import pickle
import random
import threading
import types
from collections import OrderedDict, defaultdict
from typing import Any

import pytest
import torch
from tiny_models import Block, ControlFlow, depthwise, image, snapshot
from torch import Tensor, fx, nn
from torch import is_grad_enabled as records_gradients
from torch import no_grad as without_gradients

import dwswap
from dwswap import DepthwiseConv2d, rewrite


def test_hooks_of_the_root_and_of_inlined_modules_rule_out_a_graph() -> None:
    for hooked in (lambda m: m, lambda m: m.inner):
        model = nn.Sequential()
        model.inner = nn.Sequential(depthwise())
        model.eval()
        hooked(model).register_forward_hook(lambda _m, _args, output: output + 1)
        fast = dwswap.optimize(model)
        report = dwswap.report(fast)
        assert report.mode == "substitution"
        assert "forward hook" in str(report.not_traced)
        x = image(8)
        torch.testing.assert_close(fast(x), model(x))


def test_untraceable_model_is_substituted() -> None:
    model = ControlFlow().eval()
    fast = dwswap.optimize(model, fuse=False)
    assert type(fast) is ControlFlow
    assert type(fast.block) is Block
    assert type(fast.block.depthwise) is DepthwiseConv2d
    torch.testing.assert_close(fast(image()), model(image()))


def test_submodules_of_an_untraceable_model_become_graphs() -> None:
    model = ControlFlow().eval()
    fast = dwswap.optimize(model)
    report = dwswap.report(fast)
    assert type(fast) is ControlFlow
    assert isinstance(fast.block, fx.GraphModule)
    assert (report.mode, report.traced) == ("substitution", ("block",))
    assert [layer.path for layer in report.swapped] == ["block.depthwise"]
    assert {change.kind for change in report.swapped[0].changes if change.done} == {
        *("batchnorm", "activation", "input_bias")
    }
    assert report.calls_before == 4
    assert report.calls_after == 2
    assert "control flow" in str(report.not_traced)
    assert "control flow" in str(report)
    assert "\n" not in str(report.not_traced)
    for again in (fast, copy.deepcopy(fast), pickle.loads(pickle.dumps(fast))):
        torch.testing.assert_close(again(image()), model(image()), rtol=0, atol=1e-5)
    again = dwswap.optimize(fast)
    assert [layer.reason for layer in dwswap.report(again).swapped] == ["already_swapped"]
    assert dwswap.report(again).swapped[0].path.startswith("block.")
    with pytest.raises(ValueError, match="BatchNorm was folded"):
        dwswap.restore(fast)
    with pytest.raises(RuntimeError, match="optimized for inference"):
        fast.train()


class Stages(nn.Module):
    """Its stages are in a list as well, by which its forward calls them."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = (nn.Sequential(depthwise(), nn.BatchNorm2d(8)) for _ in range(2))
        self.stages = [self.one, self.two]

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        for stage in self.stages:
            x = stage(x)
        return x if mask is None else x * mask


def test_submodules_that_a_list_holds_stay_what_they_are() -> None:
    model, x = Stages().eval(), image(8)
    for fast in (dwswap.optimize(model), dwswap.optimize(model, x, verify=True)):
        torch.testing.assert_close(fast(x), model(x))
        assert len(dwswap.report(fast).swapped) == 2


class Reparameterized(Block):
    """With an attribute that has the name of what a graph omits."""

    def __init__(self) -> None:
        super().__init__()
        self.inference_mode = True

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) if self.inference_mode else x


class Entered(Reparameterized):
    def forward(self, x: Tensor) -> Tensor:
        with torch.inference_mode(self.inference_mode):
            return super().forward(x)


@pytest.mark.parametrize(("cls", "mode"), [(Reparameterized, "graph"), (Entered, "substitution")])
def test_data_that_has_the_name_of_a_mode(cls: type[nn.Module], mode: str) -> None:
    model, x = cls().eval(), image()
    fast = dwswap.optimize(model)
    assert dwswap.report(fast).mode == mode
    torch.testing.assert_close(fast(x), model(x))


@pytest.mark.parametrize("train", [True, False])
def test_submodules_that_were_swapped_before_become_graphs(train: bool) -> None:
    model = ControlFlow().train(train)
    swapped = dwswap.optimize(model, fuse=train)
    fast = dwswap.optimize(swapped.eval())
    report = dwswap.report(fast)
    assert [layer.reason for layer in report.swapped] == ["already_swapped"]
    assert report.traced == dwswap.explain(swapped).traced == ("block",)
    assert report.calls_after == 2
    torch.testing.assert_close(fast(image()), model.eval()(image()), rtol=0, atol=1e-5)


class Optional_(Block):
    def forward(self, x: Tensor, offset: Tensor | None = None) -> Tensor:
        x = super().forward(x)
        return x if offset is None else x + offset


class Context(Block):
    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            return super().forward(x)


class RenamedContext(Block):
    def forward(self, x: Tensor) -> Tensor:
        with without_gradients():
            return super().forward(x)


class RenamedQuestion(Block):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x * 2 if records_gradients() else x)


class Contexts:
    low = torch.autocast

    @staticmethod
    def frozen() -> Any:
        return torch.no_grad()


class StaticContext(Block):
    def forward(self, x: Tensor) -> Tensor:
        with Contexts.frozen():
            return super().forward(x)


class AttributeContext(Block):
    def forward(self, x: Tensor) -> Tensor:
        with Contexts.low("cpu", enabled=False):
            return super().forward(x)


class Decorated(Block):
    @torch.no_grad()
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x)


class HelperContext(Block):
    def forward(self, x: Tensor) -> Tensor:
        return self.helper(x)

    def helper(self, x: Tensor) -> Tensor:
        return helper(super(), x)


def helper(block: Any, x: Tensor) -> Tensor:
    with torch.autocast("cpu", enabled=False):
        return block.forward(x)


class OwnDict(Block):
    def forward(self, x: Tensor) -> Any:
        return defaultdict(int, output=super().forward(x))


class TypeTest(Block):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x if isinstance(x, Tensor) else x[0])


class Counting(Block):
    calls = 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return super().forward(x)


class CountingBuffer(Block):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return super().forward(x)


class Remembering(Block):
    def __init__(self) -> None:
        super().__init__()
        self.seen: list[Tensor] = []

    def forward(self, x: Tensor) -> Tensor:
        self.seen.append(x)
        return super().forward(x)


class Noisy(Block):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + torch.rand(1) + random.random()


class ExtraState(Block):
    def get_extra_state(self) -> str:
        return "extra"

    def set_extra_state(self, state: str) -> None:
        assert state == "extra"


class Variadic(Block):
    def forward(self, *xs: Tensor) -> Tensor:  # type: ignore[override]
        return super().forward(xs[0])


class OwnCall(Block):
    def __call__(self, x: Tensor) -> Tensor:
        return super().__call__(x) * 2


class ListTest(Block):
    def forward(self, x: Any) -> Tensor:
        return super().forward(x[0] if isinstance(x, (list, tuple)) else x)


Alias = Tensor
kind = type


class AliasTest(Block):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x * 2 if isinstance(x, Alias) else x)


class LambdaTest(Block):
    def forward(self, x: Tensor) -> Tensor:
        double = lambda t: t * 2 if isinstance(t, Tensor) else t  # noqa: E731
        return super().forward(double(x))


class ParameterTest(Block):
    def forward(self, x: Tensor) -> Tensor:
        x = super().forward(x)
        return x * 2 if isinstance(self.expand.weight, nn.Parameter) else x


class JitTypeTest(Block):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x * 2 if torch.jit.isinstance(x, Tensor) else x)


elsewhere = types.ModuleType("elsewhere")
exec(
    "import torch\n"
    "def double(x):\n    return x * 2 if isinstance(x, torch.Tensor) else x\n"
    "def context():\n    return torch.autocast('cpu', dtype=torch.bfloat16)",
    elsewhere.__dict__,
)


class ElsewhereTest(Block):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(elsewhere.double(x))


class ElsewhereContext(Block):
    def forward(self, x: Tensor) -> Tensor:
        with elsewhere.context():
            return super().forward(x)


class InferenceMode(Block):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x * 2 if torch.is_inference_mode_enabled() else x)


class ExactType(Block):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x * 2 if kind(x) is Tensor else x)


class CallableTest(Block):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x * 2 if [t for t in (x,) if callable(t)] else x)


class HasAttribute(Block):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x * 2 if hasattr(x, "mask") else x)


class GetAttribute(Block):
    def forward(self, x: Tensor) -> Tensor:
        mask = getattr(x, "mask", None)
        return super().forward(x if mask is None else x * mask)


class SetsData(Block):
    def forward(self, x: Tensor) -> Tensor:
        x.data = x.data.clamp(0, 0.1)
        return super().forward(x)


class Swallowing(Block):
    def forward(self, x: Tensor) -> Tensor:
        try:
            if x.sum() < 1e30:
                x = x * 3
        except Exception:
            pass
        return super().forward(x)


class SwallowingLength(Block):
    def forward(self, x: Tensor) -> Tensor:
        with contextlib.suppress(Exception):
            x = x * len(x)
        return super().forward(x)


class SwallowingTypeTest(Block):
    def forward(self, x: Tensor) -> Tensor:
        with contextlib.suppress(Exception):
            x = x * 3 if isinstance(x, Tensor) else x
        return super().forward(x)


class Lookup(Block):
    """Of an input that may be missing: in the trace every lookup gives something."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind

    def forward(self, inputs: dict[str, Tensor]) -> Tensor:
        x = super().forward(inputs["x"])
        scale = inputs.get("scale") if self.kind == "get" else inputs.pop("scale", None)
        return x if scale is None else x * scale


@torch.fx.wrap
def scale_if_any(x: Tensor) -> Tensor | None:
    return None


class WrappedLookup(Block):
    def forward(self, x: Tensor) -> Tensor:
        scale = scale_if_any(x)
        x = super().forward(x)
        return x if scale is None else x * scale


class Catching(Block):
    def forward(self, inputs: dict[str, Tensor]) -> Tensor:
        try:
            scale: Any = inputs["scale"]
        except KeyError:
            scale = 1.0
        return super().forward(inputs["x"]) * scale


class CatchingAll(Block):
    def forward(self, inputs: dict[str, Tensor]) -> Tensor:
        try:
            scale: Any = inputs["scale"]
        except:  # noqa: E722
            scale = 1.0
        return super().forward(inputs["x"]) * scale


class Finally(Block):
    """Errors pass through; so does a ``with``."""

    def forward(self, x: Tensor) -> Tensor:
        try:
            with torch.profiler.record_function("block"):
                return super().forward(x)
        finally:
            x * 2


class PastNames(Block):
    """Reads a weight past its name."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind

    def forward(self, x: Tensor) -> Tensor:
        y = super().forward(x)
        if self.kind == "sum":
            return y + sum(p.sum() for p in self.expand.parameters())
        if self.kind == "state_dict":
            return y + self.state_dict()["expand.weight"].sum()
        return y + self.expand._parameters["weight"].sum()


class FirstWeight(Block):
    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind

    def forward(self, x: Tensor) -> Tensor:
        y, first = super().forward(x), next(self.parameters())
        if self.kind == "tensor":
            return y + first.sum()
        if self.kind == "list":
            return y + first.tolist()[0][0][0][0]
        return y + (first.sum().item() if self.kind == "number" else first.data[:1, :1])


class DecoratedHelper(Block):
    def forward(self, x: Tensor) -> Tensor:
        return self.features(x)

    @torch.autocast("cpu", dtype=torch.bfloat16)
    def features(self, x: Tensor) -> Tensor:
        return Block.forward(self, x)


class DecoratedProperty(Block):
    @property
    @torch.no_grad()
    def scale(self) -> Tensor:
        return self.norm.weight.mean()

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * self.scale


@contextlib.contextmanager
def low_precision() -> Any:
    with torch.autocast("cpu", dtype=torch.bfloat16):
        yield


class WrappedContext(Block):
    def forward(self, x: Tensor) -> Tensor:
        with low_precision():
            return super().forward(x)


class LocalContext(Block):
    def forward(self, x: Tensor) -> Tensor:
        def run() -> Tensor:
            with torch.autocast("cpu", dtype=torch.bfloat16):
                return Block.forward(self, x)

        return run()


class WithUnused(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Sequential(depthwise())
        self.unused = nn.ModuleList([nn.ReLU()])

    def forward(self, x: Tensor) -> Tensor:
        return self.unused[0](self.inner(x))


class OwnLoading(Block):
    def _load_from_state_dict(self, state_dict: Any, prefix: str, *args: Any) -> None:
        for key in list(state_dict):
            state_dict[key.replace("old", "expand")] = state_dict.pop(key)
        super()._load_from_state_dict(state_dict, prefix, *args)


@pytest.mark.parametrize(
    ("cls", "reason"),
    [
        (OwnCall, "overrides __call__"),
        *(
            (c, "tests the type of a value")
            for c in (ListTest, AliasTest, LambdaTest, ParameterTest, JitTypeTest, ElsewhereTest)
        ),
        (ExactType, "calls kind"),
        (CallableTest, "calls callable"),
        (HasAttribute, "has the attribute mask"),
        (GetAttribute, "has the attribute mask"),
        (SetsData, "sets the attribute data"),
        (Swallowing, "catches errors, which a graph would not"),
        (SwallowingLength, "uses suppress, which a graph omits"),
        (SwallowingTypeTest, "uses suppress, which a graph omits"),
        (DecoratedHelper, "features of the model (DecoratedHelper) has a decorator of torch.amp"),
        (DecoratedProperty, "scale of the model (DecoratedProperty) has a decorator of torch"),
        *((c, "autocast") for c in (WrappedContext, LocalContext, ElsewhereContext)),
        (OwnLoading, "overrides _load_from_state_dict"),
        (Optional_, "may be None"),
        (Context, "no_grad"),
        (RenamedContext, "uses no_grad as without_gradients"),
        (RenamedQuestion, "uses is_grad_enabled as records_gradients"),
        (InferenceMode, "uses is_inference_mode_enabled"),
        (StaticContext, "in another mode of autograd or autocast"),
        (AttributeContext, "in another mode of autograd or autocast"),
        (Decorated, "decorated"),
        (HelperContext, "helper of the model (HelperContext) uses autocast"),
        (OwnDict, "defaultdict"),
        (TypeTest, "tests the type of a value"),
        (Counting, "changes the attribute calls"),
        (CountingBuffer, "buffer"),
        (Remembering, "changes the attribute seen"),
        (Noisy, "random"),
        (ExtraState, "_extra_state"),
        (Variadic, "fixed list of arguments"),
    ],
)
def test_what_a_graph_would_do_differently_is_not_traced(cls: type[Block], reason: str) -> None:
    model = cls().eval()
    torch.manual_seed(3)
    states = random.getstate(), torch.get_rng_state()
    before = snapshot(model)
    fast = dwswap.optimize(model)
    report = dwswap.report(fast)
    assert (report.mode, type(fast)) == ("substitution", cls)
    assert reason in str(report.not_traced)
    assert len(report.swapped) == 1
    assert snapshot(model) == before
    assert random.getstate() == states[0]
    assert torch.equal(torch.get_rng_state(), states[1])
    outputs = []
    for m in (model, fast):
        torch.manual_seed(3)
        random.seed(3)
        outputs.append(m(image()))
    ours, expected = outputs
    torch.testing.assert_close(ours, expected, rtol=0, atol=1e-6)


class KeywordBehindDefault(Block):
    def forward(self, x: Tensor, scale: float = 1.0, *, shift: Tensor) -> Tensor:  # type: ignore[override]
        return super().forward(x) * scale + shift


def test_a_keyword_without_a_default_behind_one_rules_out_a_graph() -> None:
    model, x, shift = KeywordBehindDefault().eval(), image(), torch.ones(1)
    for subject in (model, nn.ModuleDict({"inner": model}).eval()):
        fast = dwswap.optimize(subject)
        assert len(dwswap.report(fast).swapped) == 1
    reason = "shift without a default behind scale with one"
    assert reason in str(dwswap.report(dwswap.optimize(model)).not_traced)
    torch.testing.assert_close(dwswap.optimize(model)(x, shift=shift), model(x, shift=shift))


def test_hooks_on_the_state_rule_out_a_graph() -> None:
    for register in (
        "register_state_dict_pre_hook",
        "register_load_state_dict_post_hook",
        "register_load_state_dict_pre_hook",
        "register_state_dict_post_hook",
    ):
        for hooked in (lambda m: m, lambda m: m.inner, lambda m: m.unused):
            model = WithUnused().eval()
            calls: list[str] = []
            getattr(hooked(model), register)(lambda *_, calls=calls: calls.append("called"))
            fast = dwswap.optimize(model)
            assert "has a hook on saving or loading" in str(dwswap.report(fast).not_traced)
            fast.load_state_dict(fast.state_dict())
            assert calls


@pytest.mark.parametrize("inplace", [True, False])
def test_compiled_modules_rule_out_a_graph(inplace: bool) -> None:
    for compiled in (lambda m: m, lambda m: m.block, lambda m: m.block.norm):
        model = nn.Sequential(OrderedDict(block=Block())).eval()
        compiled(model).compile(backend="eager")
        fast = dwswap.optimize(model, inplace=inplace)
        report = dwswap.report(fast)
        assert report.mode == "substitution"
        assert "compiled in place" in str(report.not_traced)
        assert (compiled(fast)._compiled_call_impl is not None) == inplace
        if compiled(model) is model:
            assert report.traced == ("block",)
        else:
            assert type(fast.block.depthwise) is DepthwiseConv2d


def test_attributes_that_forward_read_cannot_be_set() -> None:
    class Scaled(Block):
        def __init__(self) -> None:
            super().__init__()
            self.scale = 2.0
            self.title = "unused"

        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) * self.scale

    for model, path in ((Scaled(), ""), (nn.Sequential(Scaled()), "0")):
        fast = dwswap.optimize(model.eval())
        for copied in (fast, copy.deepcopy(fast), pickle.loads(pickle.dumps(fast))):
            graph = copied.get_submodule(path)
            assert graph.scale == 2
            with pytest.raises(AttributeError, match=r"scale cannot be set: .* value 2\.0"):
                graph.scale = 3.0
            assert graph.scale == 2
            graph.title = "set"
            assert graph.title == "set"


def test_tensors_that_were_folded_cannot_be_set() -> None:
    class Scaled(nn.Module):
        def __init__(self, folded: bool) -> None:
            super().__init__()
            self.conv, self.scale, self.folded = depthwise(), torch.full((8, 1, 1), 2.0), folded

        def forward(self, x: Tensor) -> Tensor:
            y = self.conv(x)
            return y * self.scale if self.folded else y.sigmoid() * self.scale

    model = Scaled(folded=False).eval()
    fast = dwswap.optimize(model)
    fast.scale = model.scale = torch.full((8, 1, 1), 3.0)
    torch.testing.assert_close(fast(image(8)), model(image(8)))
    fast = dwswap.optimize(Scaled(folded=True).eval())
    with pytest.raises(AttributeError, match="scale cannot be set"):
        fast.scale = torch.full((8, 1, 1), 3.0)


def test_what_a_graph_has_absorbed_takes_no_hooks_and_is_not_replaced() -> None:
    model = nn.Sequential(nn.Sequential(depthwise(), nn.BatchNorm2d(8), nn.ReLU()))
    model[0].add_module("out", nn.Conv2d(8, 3, 1))
    x = image(8)
    fast = dwswap.optimize(model.eval())
    for made in (fast, copy.deepcopy(fast), pickle.loads(pickle.dumps(fast))):
        inlined = made.get_submodule("0")
        for absorbed in ("0", "1", "2"):
            with pytest.raises(AttributeError, match=f"{absorbed} cannot be set"):
                setattr(inlined, absorbed, nn.Sigmoid())
        for module in (inlined, made.get_submodule("0.0_folded")):
            for kind in ("forward", "forward_pre", "full_backward", "full_backward_pre"):
                with pytest.raises(RuntimeError, match="would not be called"):
                    getattr(module, f"register_{kind}_hook")(print)
        torch.testing.assert_close(made(x), model(x))
        seen: list[str] = []
        called = made.get_submodule("0.out")
        called.register_forward_hook(lambda *_, seen=seen: seen.append("out"))
        made(x)
        inlined.out = nn.Identity()
        assert seen == ["out"]
        assert made(x).shape == (2, 8, 9, 9)


class Headed(nn.Module):
    """A bias passes ``pool`` and ``flat``; nothing calls ``head`` itself."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.dw, self.act = nn.Conv2d(8, 8, 1), depthwise(), nn.ReLU6()
        self.out, self.pool, self.flat = nn.Conv2d(8, 8, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten()
        self.head = nn.Sequential(nn.Dropout(), nn.Linear(8, 4))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.flat(self.pool(self.out(self.act(self.dw(self.stem(x)))))))


@pytest.mark.parametrize(
    ("where", "new"),
    [
        ("head", nn.Sequential(nn.Dropout(), nn.Linear(8, 4), nn.Softmax(1))),
        ("head", nn.Linear(8, 4)),
        ("head", nn.Identity()),
        ("dw", depthwise(stride=2)),
        ("stem", nn.Conv2d(8, 8, 1)),
        ("pool", nn.AdaptiveMaxPool2d(1)),
        ("flat", nn.Flatten()),
        ("dw.scale", nn.Parameter(torch.ones(8))),
        ("head.2", nn.Softmax(1)),
    ],
)
def test_what_a_graph_would_not_use_cannot_be_set(where: str, new: Any) -> None:
    model = Headed().eval()
    fast = dwswap.optimize(model)
    for made in (fast, copy.deepcopy(fast), pickle.loads(pickle.dumps(fast))):
        owner, _, name = where.rpartition(".")
        with pytest.raises(AttributeError, match=f"{name} cannot be set: "):
            setattr(made.get_submodule(owner), name, new)
        if owner == "head":
            with pytest.raises(AttributeError, match=f"{name} cannot be set: "):
                made.get_submodule(owner).add_module(name, new)
        torch.testing.assert_close(made(image(8)), model(image(8)))


def test_what_a_graph_calls_and_reads_can_be_set() -> None:
    model = Headed().eval()
    fast = dwswap.optimize(model)
    copied = copy.deepcopy(fast)
    copied.head = fast.head  # as DataParallel does
    weight = nn.Parameter(torch.zeros_like(model.dw.weight))
    fast.dw.weight = model.dw.weight = weight
    torch.testing.assert_close(fast(image(8)), model(image(8)))
    torch.nn.utils.parametrize.register_parametrization(fast.dw, "weight", nn.Softplus())
    model.dw.weight = nn.Parameter(nn.Softplus()(weight.detach()))
    torch.testing.assert_close(fast(image(8)), model(image(8)))


def test_errors_say_what_a_graph_does_not_have() -> None:
    fast = dwswap.optimize(Headed().eval())
    for module, name in ((fast, "features"), (fast.head, "append"), (fast, "pool")):
        with pytest.raises(AttributeError, match=f"'{name}': dwswap.optimize made a graph"):
            getattr(module, name)
        assert not hasattr(module, name)


def test_global_hooks_and_patched_forward_rule_out_a_graph() -> None:
    model = Block().eval()
    handle = nn.modules.module.register_module_forward_hook(lambda *_: None)
    try:
        assert "global" in str(dwswap.explain(model).not_traced)
    finally:
        handle.remove()
    model.forward = lambda x: Block.forward(model, x) + 1  # type: ignore[method-assign]
    fast = dwswap.optimize(model, inplace=True)
    assert dwswap.report(fast).mode == "substitution"


def test_buffers_are_read_when_the_graph_runs() -> None:
    class Scaled(Block):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("scale", torch.ones(()))
            self.register_buffer("hidden", torch.ones(()), persistent=False)
            self.plain = torch.ones(())

        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) * (self.scale * 2 + self.hidden) + self.plain * 2

    model = Scaled().eval()
    fast = dwswap.optimize(model)
    assert dwswap.report(fast).mode == "graph"
    keys = ["scale", "expand.weight", "expand.bias", "depthwise_folded.weight"]
    assert list(fast.state_dict()) == [*keys, "depthwise_folded.bias"]
    x = image()
    for m in (model, fast):
        m.scale.fill_(5)
    for result in (fast, copy.deepcopy(fast), pickle.loads(pickle.dumps(fast))):
        torch.testing.assert_close(result(x), model(x), rtol=0, atol=1e-4)
        assert list(result.state_dict()) == list(fast.state_dict())


def test_ordered_dict_outputs_stay_ordered_dicts() -> None:
    class Named(Block):
        def forward(self, x: Tensor) -> Any:
            x = super().forward(x)
            return OrderedDict([("b", x), ("a", {"c": [x + 1, (x,)]})])

    model = Named().eval()
    fast = dwswap.optimize(model)
    assert dwswap.report(fast).mode == "graph"
    compiled = torch.compile(fast, fullgraph=True, backend="eager")
    for result in (fast, copy.deepcopy(fast), pickle.loads(pickle.dumps(fast)), compiled):
        output = result(image())
        assert type(output) is OrderedDict
        assert list(output) == ["b", "a"]
        torch.testing.assert_close(output, model(image()))


class Outer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.graph = Block()

    def forward(self, x: Tensor) -> Tensor:
        return self.graph(x)


@torch.no_grad()
def test_modules_under_names_that_a_graph_has_of_its_own() -> None:
    model = Outer().eval()
    fast = dwswap.optimize(model)
    report = dwswap.report(fast)
    assert report.traced == ("graph",)
    assert "has graph, which a graph has for its own use" in str(report.not_traced)
    assert dwswap.explain(model).traced == report.traced
    torch.testing.assert_close(fast(image()), model(image()))


@pytest.mark.parametrize("name", ["code", "meta", "_code", "recompile"])
def test_unused_modules_under_such_names(name: str) -> None:
    model = Block().eval()
    setattr(model, name, nn.Identity())
    assert dwswap.report(dwswap.optimize(model)).mode == "substitution"


@pytest.mark.parametrize(("value", "mode"), [({"classes": 3}, "substitution"), (object(), "graph")])
def test_attributes_under_such_names(value: Any, mode: str) -> None:
    model = Block().eval()
    model.meta = value
    fast = dwswap.optimize(model)
    assert dwswap.report(fast).mode == mode
    assert mode == "graph" or fast.meta == value


@pytest.mark.parametrize(
    "model",
    [Lookup("get"), Lookup("pop"), Catching(), CatchingAll(), WrappedLookup()],
    ids=lambda m: type(m).__name__,
)
def test_what_may_be_missing_rules_out_a_graph(model: nn.Module) -> None:
    fast = dwswap.optimize(model.eval())
    assert dwswap.report(fast).mode == "substitution"

    def given() -> Any:
        return image() if isinstance(model, WrappedLookup) else {"x": image()}

    torch.testing.assert_close(fast(given()), model(given()))


def test_a_finally_leaves_a_graph() -> None:
    model = Finally().eval()
    fast = dwswap.optimize(model)
    assert dwswap.report(fast).mode == "graph"
    torch.testing.assert_close(fast(image()), model(image()))


PAST_NAMES: list[Any] = [(PastNames, kind) for kind in ("sum", "state_dict", "attribute")]
PAST_NAMES += [(FirstWeight, kind) for kind in ("tensor", "number", "list", "data")]


@pytest.mark.parametrize(("cls", "kind"), PAST_NAMES)
@pytest.mark.parametrize("frozen", [False, True])
@torch.no_grad()
def test_weights_that_are_read_past_their_names_stay_current(
    frozen: bool, cls: Any, kind: str
) -> None:
    """A graph had what was computed from them as a constant."""
    model, other = cls(kind).eval(), cls(kind).eval()
    with torch.set_grad_enabled(not frozen):
        fast = dwswap.optimize(model.requires_grad_(not frozen))
    assert "computes with parameters" in str(dwswap.report(fast).not_traced)
    fast.load_state_dict(other.state_dict())
    torch.testing.assert_close(fast(image()), other(image()))


class Kind(Block):
    def forward(self, x: Tensor) -> Tensor:
        first = next(self.parameters())
        return super().forward(x.to(first.device, first.dtype) + first.new_ones(1))


@torch.no_grad()
def test_kinds_of_weights_leave_a_graph() -> None:
    model = Kind().eval()
    fast = dwswap.optimize(model)
    assert dwswap.report(fast).mode == "graph"
    torch.testing.assert_close(fast(image()), model(image()))


class OfNumPy(Block):
    def __init__(self, number: Any) -> None:
        super().__init__()
        self.number = number

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * self.number


@pytest.mark.parametrize(
    ("kind", "mode"),
    [
        ("float64", "graph"),
        ("float32", "graph"),
        ("int64", "graph"),
        ("complex128", "substitution"),
    ],
)
@torch.no_grad()
def test_numbers_of_numpy(kind: str, mode: str) -> None:
    model = OfNumPy(getattr(pytest.importorskip("numpy"), kind)(2.5)).eval()
    fast = dwswap.optimize(model)
    assert dwswap.report(fast).mode == mode
    torch.testing.assert_close(fast(image()), model(image()))


def test_graphs_that_fail_leave_a_swap_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """As a detection may, where the order of two boxes hangs on a rounding."""

    def round_otherwise(graph_module: fx.GraphModule, context: Any) -> None:
        output = graph_module.graph.output_node()
        with graph_module.graph.inserting_before(output):
            output.args = (graph_module.graph.call_function(torch.add, (output.args[0], 1e-2)),)

    monkeypatch.setattr(rewrite, "INFERENCE_PASSES", (*rewrite.INFERENCE_PASSES, round_otherwise))
    model, x = ControlFlow().eval(), image()
    for inplace in (False, True):
        fast = dwswap.optimize(model, x, verify=True, inplace=inplace)
        report = dwswap.report(fast)
        assert report.verification is not None
        assert report.verification.passed
        assert report.traced == ()
        assert "with graphs in block 1 outputs failed" in report.verification.notes[-1]
        assert "control flow" in str(report.not_traced)
        assert type(fast.block.depthwise) is DepthwiseConv2d
        assert "block.norm.weight" in fast.state_dict()
        assert (fast is model) == inplace


class Augmented(nn.Module):
    """Augmented assignments, which change a tensor, and a number not."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind, self.first, self.second = kind, depthwise(), depthwise()

    def forward(self, x: Tensor) -> Any:
        if self.kind == "input":
            x += x
        y = self.first(x)
        if self.kind == "view":
            half = y[:, :4]
            half += 1.0
            half -= 0.5
            half *= 2.0
            half /= 3.0
            half **= 2
        if self.kind == "other name":
            z = y
            z += x
            return self.second(z), y
        if self.kind == "function":
            operator.iadd(y[:, :4], 1.0)
        if self.kind == "sizes":
            height, rows = y.shape[2], y.size(2)
            half_height = height
            half_height //= 2
            half_height += 1
            rows *= 8
            return self.second(y).reshape(-1, rows, height)[..., :half_height]
        if self.kind == "product":
            y @= y
        z = self.second(y)
        z += y
        return z


@pytest.mark.parametrize(
    "kind", ["input", "view", "other name", "function", "sizes", "product", "sum"]
)
@torch.no_grad()
def test_augmented_assignments_change_what_they_change(kind: str) -> None:
    model = Augmented(kind).eval()
    fast = dwswap.optimize(model)
    assert dwswap.report(fast).mode == "graph"
    given, ours = image(8), image(8)
    expected = model(given)
    torch.testing.assert_close(fast(ours), expected)
    assert torch.equal(ours, given)
    assert torch.equal(given, image(8)) == (kind != "input")


def test_random_numbers_of_numpy_rule_out_a_graph() -> None:
    numpy = pytest.importorskip("numpy")

    class Noisy(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = depthwise()

        def forward(self, x: Tensor) -> Tensor:
            return self.conv(x) + float(numpy.random.randn())

    state = numpy.random.get_state()
    report = dwswap.report(dwswap.optimize(Noisy().eval()))
    assert "random" in str(report.not_traced)
    first = numpy.random.randn()
    numpy.random.set_state(state)
    assert numpy.random.randn() == first


def test_threads_trace_one_after_another() -> None:
    modes: list[str] = []

    def run(model: nn.Module) -> None:
        modes.append(dwswap.report(dwswap.optimize(model)).mode)

    models = [nn.Sequential(*(depthwise() for _ in range(30))).eval() for _ in range(4)]
    threads = [threading.Thread(target=run, args=(model,)) for model in models]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert modes == ["graph"] * 4


@pytest.mark.filterwarnings("ignore:.*torch.jit")
def test_frozen_script_modules_have_no_mode() -> None:
    frozen = torch.jit.freeze(torch.jit.script(nn.Sequential(depthwise(), nn.ReLU()).eval()))
    model = nn.Sequential(depthwise(), frozen).eval()
    fast = dwswap.optimize(model, image(8))
    assert len(dwswap.report(fast).swapped) == 1
    assert torch.equal(fast(image(8)), model(image(8)))
    # Its forward has no signature that arguments could be compared with.
    assert not dwswap.explain(frozen, image(8)).swapped


@pytest.mark.filterwarnings("ignore:.*torch.jit")
def test_script_modules_are_calls_in_a_graph() -> None:
    """Their methods become attributes with the first call, which is no state of the model."""

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.script = depthwise(), torch.jit.script(nn.ReLU())

        def forward(self, x: Tensor) -> Tensor:
            return self.script(self.conv(x))

    model = Model().eval()
    fast = dwswap.optimize(model)
    assert dwswap.report(fast).mode == "graph"
    assert torch.equal(fast(image(8)), model(image(8)))


def _accumulated(y: Tensor) -> Tensor:
    total = torch.zeros(1, 8, 1, 1)
    total += y.mean((0, 2, 3), keepdim=True)
    return total


def _filled(y: Tensor) -> Tensor:
    filled = torch.zeros(2, 2, 8, 9, 9)
    filled[0] = y
    return filled


def _copied(y: Tensor) -> Tensor:
    copied = torch.zeros(2, 8, 9, 9)
    copied[1:].copy_(y[1:])
    return copied + 1


def _written(y: Tensor) -> Tensor:
    out = torch.zeros(2, 8, 9, 9)
    torch.add(y, 1, out=out)
    return out * 2


def _of_its_own(y: Tensor) -> tuple[Tensor, list[Tensor]]:
    return y, [torch.zeros(4)]


@pytest.mark.parametrize("behind", [_accumulated, _filled, _copied, _written, _of_its_own])
def test_tensors_that_a_forward_makes_are_new_in_every_call(behind) -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = depthwise()

        def forward(self, x: Tensor) -> Any:
            return behind(self.conv(x))

    model = Model().eval()
    fast = dwswap.optimize(model)
    assert "a tensor that it makes" in str(dwswap.report(fast).not_traced)
    x = torch.randn(2, 8, 9, 9)
    with torch.no_grad():
        for _ in range(3):
            torch.testing.assert_close(fast(x), model(x))


def test_tensors_that_a_forward_makes_and_reads_are_constants() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = depthwise()

        def forward(self, x: Tensor) -> Tensor:
            y = self.conv(x) * torch.linspace(0, 1, 9).view(1, 1, 1, 9)
            return y.add_(torch.ones(8, 1, 1))

    model = Model().eval()
    fast = dwswap.optimize(model)
    assert dwswap.report(fast).mode == "graph"
    x = torch.randn(2, 8, 9, 9)
    with torch.no_grad():
        for _ in range(2):
            torch.testing.assert_close(fast(x), model(x))
