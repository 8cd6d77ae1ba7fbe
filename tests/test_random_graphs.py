"""Random graphs of convolutions, norms, activations, views and in-place changes stay the same."""

from __future__ import annotations

import pickle
import random
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from test_fold_batchnorm import changes, norm
from tiny_models import depthwise, image
from torch import Tensor, nn

import dwswap
from dwswap.backend import rewrite_graph

LAYERS: list[Callable[[], nn.Module]] = [
    *(depthwise, depthwise, lambda: depthwise(bias=False), norm, norm),
    *(lambda: nn.Conv2d(8, 8, 1), lambda: nn.Conv2d(8, 8, 3, padding=1, groups=4, bias=False)),
    *(nn.ReLU, lambda: nn.ReLU6(inplace=True), lambda: nn.Hardswish(inplace=True)),
    *(lambda: nn.Mish(inplace=True), nn.Identity),
]
FUNCTIONS: list[Callable[[Tensor], Tensor]] = [
    *(F.relu, F.relu_, torch.sigmoid, torch.tanh, lambda x: x.clamp(0, 6)),
    *(lambda x: x.clamp_(0, 6), lambda x: F.gelu(x, approximate="tanh")),
    *(lambda x: x.view(x.shape), lambda x: x.mul_(0.5)),
]


class Net(nn.Module):
    """Steps that each take a value made before, mostly the last one; layers may be shared."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        draw = random.Random(seed)
        self.layers = nn.ModuleList()
        self.steps: list[tuple[str, int, int]] = []
        for last in range(draw.randint(4, 14)):
            source = last if draw.random() < 0.75 else draw.randint(0, last)
            kinds = ["layer", "shared", "function", "add", "add_"]
            kind = draw.choices(kinds, [12, 2, 6, 2, 1])[0]
            if kind == "layer" or not self.layers:
                self.layers.append(draw.choice(LAYERS)())
                step = "layer", len(self.layers) - 1
            elif kind == "shared":
                step = "layer", draw.randrange(len(self.layers))
            else:
                step = kind, draw.randrange(len(FUNCTIONS) if kind == "function" else last + 1)
            self.steps.append((*step, source))

    def forward(self, x: Tensor) -> Any:
        values = [x + 0]
        for kind, which, source in self.steps:
            value = values[source]
            if kind == "layer":
                values.append(self.layers[which](value))
            elif kind == "function":
                values.append(FUNCTIONS[which](value))
            elif kind == "add":
                values.append(value + values[which])
            else:
                values.append(value.add_(values[which]))
        return values[-1], values[len(values) // 2]


def check(own: Any, expected: Any, what: str) -> None:
    for one, other in zip(own, expected, strict=True):
        # aten multiplies by a float32 sixth in hardswish.
        torch.testing.assert_close(
            one, other, rtol=1e-6, atol=1e-6, msg=lambda text: f"{what}: {text}"
        )


@pytest.mark.parametrize(
    "first", [0, *(pytest.param(first, marks=pytest.mark.slow) for first in (50, 100, 150))]
)
def test_outputs_stay(first: int) -> None:
    x = image(8, size=6).double()
    done = 0
    for seed in range(first, first + 50):
        torch.manual_seed(seed)
        model = Net(seed).eval().double()
        with torch.no_grad():
            expected = model(x)
            fast = dwswap.optimize(model)
            done += sum(c.done for k in ("batchnorm", "activation") for c in changes(fast, k))
            results = {"optimized": fast, "pickled": pickle.loads(pickle.dumps(fast))}
            results["again"] = dwswap.optimize(fast)
            for how, result in results.items():
                check(result(x), expected, f"seed {seed}, {how}")
    assert done > 10


@pytest.mark.parametrize(
    "first", [0, *(pytest.param(first, marks=pytest.mark.slow) for first in range(10, 60, 10))]
)
@pytest.mark.parametrize("decompose", [False, True])
def test_outputs_of_exported_programs_stay(first: int, decompose: bool) -> None:
    x = image(8, size=6).double()
    done = 0
    for seed in range(first, first + 10):
        torch.manual_seed(seed)
        model = Net(seed).eval().double()
        program = torch.export.export(model, (x,))
        program = program.run_decompositions() if decompose else program
        with torch.no_grad():
            expected = model(x)
            for layout in ("preserve", "channels_last"):
                fast = dwswap.optimize(program, memory_format=layout)
                changed = [c for layer in dwswap.report(fast).layers for c in layer.changes]
                done += sum(c.done for c in changed)
                check(fast.module()(x), expected, f"seed {seed}, {layout}")
    assert done > 5


@pytest.mark.slow
@pytest.mark.parametrize("freezing", [False, True])
def test_outputs_of_compiled_graphs_stay(freezing: bool) -> None:
    def compiler(graph_module: torch.fx.GraphModule, inputs: Any) -> Any:
        rewrite_graph(graph_module)
        return graph_module.forward

    x = image(8, size=6).double()
    for seed in range(30):
        torch.manual_seed(seed)
        torch._dynamo.reset()
        model = Net(seed).eval().double()
        with torch.no_grad(), torch._inductor.config.patch(freezing=freezing):
            expected = model(x)
            own = torch.compile(model, backend=compiler, fullgraph=True)(x)
            check(own, expected, f"seed {seed}")
