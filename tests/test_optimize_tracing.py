"""What becomes a graph, and what does not because a graph would do something else."""

from __future__ import annotations

import copy
import pickle
import random
from collections import OrderedDict, defaultdict
from typing import Any

import pytest
import torch
from tiny_models import Block, ControlFlow, depthwise, image, snapshot
from torch import Tensor, nn

import dwswap
from dwswap import DepthwiseConv2d


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
    fast = dwswap.optimize(model)
    report = dwswap.report(fast)
    assert type(fast) is ControlFlow
    assert type(fast.block) is Block
    assert type(fast.block.depthwise) is DepthwiseConv2d
    assert "control flow" in str(report.not_traced)
    assert "control flow" in str(report)
    assert "\n" not in str(report.not_traced)
    torch.testing.assert_close(fast(image()), model(image()))


class Optional_(Block):
    def forward(self, x: Tensor, offset: Tensor | None = None) -> Tensor:
        x = super().forward(x)
        return x if offset is None else x + offset


class Context(Block):
    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
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


@pytest.mark.parametrize(
    ("cls", "reason"),
    [
        (Optional_, "may be None"),
        (Context, "no_grad"),
        (Decorated, "decorated"),
        (HelperContext, "helper of the model (HelperContext) uses autocast"),
        (OwnDict, "defaultdict"),
        (TypeTest, "tests for Tensor"),
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
    torch.manual_seed(3)
    expected = model(image())
    torch.manual_seed(3)
    torch.testing.assert_close(fast(image()), expected, rtol=0, atol=1)


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
    assert list(fast.state_dict()) == list(model.state_dict())
    x = image()
    for m in (model, fast):
        m.scale.fill_(5)
    for result in (fast, copy.deepcopy(fast), pickle.loads(pickle.dumps(fast))):
        torch.testing.assert_close(result(x), model(x))
        assert list(result.state_dict()) == list(model.state_dict())


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
