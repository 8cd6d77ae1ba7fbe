"""``torch.compile(model, backend="dwswap")``: which graphs it makes, and what these compute."""

from __future__ import annotations

import copy
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from test_torchvision import DEPTHWISE, DETECTION, build_with_data
from tiny_models import Block, InvertedResidual, depthwise, image
from torch import Tensor, fx, nn

import dwswap
from dwswap import backend
from dwswap.backend import compile_graph, rewrite_graph
from dwswap.report import Report

OPERATOR = torch.ops.dwswap.depthwise_conv2d.default
ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(autouse=True)
def _fresh() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


class Rewritten:
    """A backend that runs our passes and keeps what they made, with or without a compiler."""

    def __init__(self, compiler: Any = None) -> None:
        self.compiler = compiler
        self.graphs: list[fx.GraphModule] = []
        self.reports: list[Report] = []

    def __call__(self, graph_module: fx.GraphModule, inputs: list[Any]) -> Any:
        self.reports.append(rewrite_graph(graph_module))
        self.graphs.append(graph_module)
        return (
            graph_module.forward if self.compiler is None else self.compiler(graph_module, inputs)
        )

    @property
    def targets(self) -> list[Any]:
        (graph_module,) = self.graphs
        return [node.target for node in graph_module.graph.nodes if node.op == "call_function"]

    @property
    def calls(self) -> list[fx.Node]:
        (graph_module,) = self.graphs
        return [node for node in graph_module.graph.nodes if node.target is OPERATOR]


@pytest.fixture
def freezing() -> Iterator[None]:
    with torch._inductor.config.patch(freezing=True):
        yield


def compiled(model: nn.Module, **options: Any) -> Any:
    return torch.compile(model, backend=compile_graph, fullgraph=True, **options)


# --- graphs -------------------------------------------------------------------------------------


def test_without_freezing_nothing_is_folded() -> None:
    model, x, made = InvertedResidual().eval(), image(), Rewritten()
    with torch.no_grad():
        result = torch.compile(model, backend=made, fullgraph=True)(x)
        torch.testing.assert_close(result, model(x))
    assert made.targets.count(OPERATOR) == 1
    assert made.targets.count(F.batch_norm) == 3
    assert not list(made.graphs[0].parameters())


@pytest.mark.usefixtures("freezing")
def test_with_freezing_all_passes_run() -> None:
    model, x, made = InvertedResidual().eval(), image(), Rewritten()
    with torch.no_grad():
        result = torch.compile(model, backend=made, fullgraph=True)(x)
        torch.testing.assert_close(result, model(x))
    assert len(made.targets) == 4
    assert made.calls[0].kwargs["activation"] == made.calls[0].kwargs["input_activation"] == "relu6"


@pytest.mark.usefixtures("freezing")
def test_freezing_folds_nothing_where_gradients_are_recorded() -> None:
    model, x, made = InvertedResidual().eval(), image(), Rewritten()
    torch.compile(model, backend=made, fullgraph=True)(x).sum().backward()
    assert made.targets.count(F.batch_norm) == 3
    assert all(p.grad is not None for p in model.parameters())


class Activated(nn.Module):
    """``act(conv(x))``, and whatever ``after`` makes of both."""

    def __init__(self, act: Any = F.relu, after: Any = None, **options: Any) -> None:
        super().__init__()
        self.conv, self.act, self.after = depthwise(**options), act, after

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x)
        z = self.act(y)
        return z if self.after is None else self.after(y, z)


def test_an_activation_is_absorbed() -> None:
    model, x, made = Activated(F.silu), image(8), Rewritten()
    with torch.no_grad():
        result = torch.compile(model, backend=made, fullgraph=True)(x)
        torch.testing.assert_close(result, model(x))
    assert made.targets == [OPERATOR]
    assert made.calls[0].kwargs == {"activation": "silu"}


@pytest.mark.parametrize(
    ("model", "operators"),
    [
        (Activated(F.elu), 1),
        (Activated(after=lambda y, z: y + z), 1),
        (nn.Sequential(nn.Conv2d(8, 8, 3, groups=4), nn.ReLU()), 0),
        (nn.Sequential(nn.ConvTranspose2d(8, 8, 3, groups=8), nn.ReLU()), 0),
        (nn.Sequential(nn.Conv2d(8, 16, 3), nn.ReLU()), 0),
    ],
)
def test_what_must_stay(model: nn.Module, operators: int) -> None:
    x, made = image(8), Rewritten()
    with torch.no_grad():
        result = torch.compile(model, backend=made, fullgraph=True)(x)
        torch.testing.assert_close(result, model(x))
    assert made.targets.count(OPERATOR) == operators
    assert len(made.targets) >= 2
    assert all("activation" not in call.kwargs for call in made.calls)


def test_gradients_inside_a_region_without() -> None:
    class Switches(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = depthwise()

        def forward(self, x: Tensor) -> Tensor:
            with torch.enable_grad():
                return F.relu(self.conv(x))

    model, x, made = Switches(), image(8), Rewritten()
    with torch.no_grad():
        result = torch.compile(model, backend=made, fullgraph=True)(x)
    assert F.relu in made.targets
    assert result.requires_grad


def test_named_padding() -> None:
    for options in ({"kernel_size": (2, 5), "padding": "same"}, {"padding": "valid"}):
        torch._dynamo.reset()
        model, x, made = depthwise(**options), image(8), Rewritten()
        with torch.no_grad():
            result = torch.compile(model, backend=made, fullgraph=True)(x)
            torch.testing.assert_close(result, model(x))
        assert OPERATOR in made.targets


def test_nothing_is_reported_where_nothing_is_swapped(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", "dwswap")
    with torch.no_grad():
        torch.compile(nn.Conv2d(3, 4, 3), backend=Rewritten())(image())
        assert not [r for r in caplog.records if r.name == "dwswap"]
        torch.compile(Block().eval(), backend=Rewritten())(image())
    (record,) = (r for r in caplog.records if r.name == "dwswap")
    assert "1 of 2 convolutions swapped" in record.message


# --- compiled -----------------------------------------------------------------------------------


@pytest.mark.slow
def test_weights_that_change_in_place_count() -> None:
    torch.manual_seed(0)
    model, other, x = InvertedResidual().eval(), InvertedResidual().eval(), image()
    fast = compiled(model)
    with torch.no_grad():
        torch.testing.assert_close(fast(x), model(x))
        model.load_state_dict(other.state_dict())
        torch.testing.assert_close(fast(x), other(x))
        model.conv[1][0].weight.data.mul_(2)
        assert not torch.allclose(model(x), other(x))
        torch.testing.assert_close(fast(x), model(x))


@pytest.mark.slow
@pytest.mark.usefixtures("freezing")
def test_freezing_with_inductor() -> None:
    model, x = InvertedResidual().eval(), image()
    with torch.no_grad():
        torch.testing.assert_close(compiled(model)(x), model(x))


@pytest.mark.slow
@pytest.mark.parametrize("train", [False, True])
def test_a_second_batch_size_compiles_nothing(train: bool) -> None:
    model = InvertedResidual().train(train)
    reference = copy.deepcopy(model)
    made = Rewritten(torch._dynamo.lookup_backend("inductor"))
    fast = torch.compile(model, backend=made, fullgraph=True)
    with torch.set_grad_enabled(train):
        for batch in (2, 5, 3):
            x = image(batch=batch)
            torch._dynamo.mark_dynamic(x, 0)
            torch.testing.assert_close(fast(x), reference(x))
    assert len(made.graphs) == 1


def test_a_training_step() -> None:
    torch.manual_seed(0)
    check_training(nn.Sequential(depthwise(), nn.BatchNorm2d(8), nn.ReLU6()), image(8), 1)


@pytest.mark.slow
def test_a_training_step_of_a_block() -> None:
    torch.manual_seed(0)
    check_training(InvertedResidual(), image(), 1)


def check_training(model: nn.Module, x: Tensor, swapped: int) -> None:
    """Two steps of SGD, with dwswap and without, in float64: what remains is no rounding."""
    model, x = model.double().train(), x.double()
    plain = copy.deepcopy(model)
    made = Rewritten(torch._dynamo.lookup_backend("inductor"))
    fast = torch.compile(model, backend=made, fullgraph=True)
    for step in (plain, fast):
        optimizer = torch.optim.SGD(step.parameters(), lr=0.01, momentum=0.9)
        for _ in range(2):
            optimizer.zero_grad()
            step(x).square().mean().backward()
            optimizer.step()
    assert made.targets.count(OPERATOR) == swapped
    for ours, theirs in zip(model.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad)
        torch.testing.assert_close(ours, theirs)
    for ours, theirs in zip(model.buffers(), plain.buffers(), strict=True):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.slow
def test_a_training_step_of_mobilenet_v2() -> None:
    model = build_with_data("mobilenet_v2")
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = 0.1  # Dynamo cannot trace the average over all batches
    check_training(model, torch.rand(2, 3, 64, 64), DEPTHWISE["mobilenet_v2"])


@pytest.mark.slow
def test_autocast() -> None:
    model, x = InvertedResidual().eval(), image()
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        ours, theirs = compiled(model)(x), model(x)
    assert ours.dtype == theirs.dtype
    torch.testing.assert_close(ours, theirs, rtol=2e-2, atol=2e-2)


TRACEABLE = sorted(DEPTHWISE.keys() - DETECTION)
SMALL = ("mobilenet_v3_small", "shufflenet_v2_x0_5")


@pytest.mark.parametrize(
    "name", [n if n in SMALL else pytest.param(n, marks=pytest.mark.slow) for n in TRACEABLE]
)
def test_every_model_is_one_graph(name: str) -> None:
    size = 224 if name == "maxvit_t" else 64
    model, x, made = build_with_data(name, size), torch.rand(2, 3, size, size), Rewritten()
    with torch.no_grad():
        ours = torch.compile(model, backend=made, fullgraph=True)(x)
        torch.testing.assert_close(ours, model(x), rtol=1e-4, atol=1e-4)
    assert len(made.calls) == DEPTHWISE[name]


@pytest.mark.slow
def test_mobilenet_v3_with_inductor() -> None:
    model, x = build_with_data("mobilenet_v3_small"), torch.rand(2, 3, 64, 64)
    with torch.no_grad():
        torch.testing.assert_close(compiled(model)(x), model(x), rtol=1e-4, atol=1e-4)


# --- options and entry point --------------------------------------------------------------------


def test_mode_and_options_go_to_inductor(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[dict[str, Any]] = []

    def inductor(graph_module: fx.GraphModule, inputs: Any, config_patches: Any) -> Any:
        seen.append(config_patches)
        return graph_module.forward

    monkeypatch.setattr(torch._dynamo, "lookup_backend", lambda name: inductor)
    model, x = depthwise(), image(8)
    with torch.no_grad():
        compiled(model)(x)
        compiled(model, mode="max-autotune-no-cudagraphs")(x)
        compiled(model, options={"epilogue-fusion": True, "max_autotune": False})(x)
    assert seen[0] == {}
    assert seen[1] == torch._inductor.list_mode_options("max-autotune-no-cudagraphs")
    assert seen[2] == {"epilogue_fusion": True, "max_autotune": False}


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"options": {"fast": True}}, "options must be those of Inductor, got 'fast'"),
        ({"mode": "fastest"}, "mode must be one of default.*, got 'fastest'"),
    ],
)
def test_unknown_options(given: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        backend._inductor_options(**{"mode": None, "options": None} | given)


@pytest.mark.slow
def test_the_entry_point(tmp_path: Path) -> None:
    """As an installed package: its metadata is all that makes the name known."""
    project = (ROOT / "pyproject.toml").read_text()
    section = project.partition("[project.entry-points.torch_dynamo_backends]\n")[2]
    line = section.partition("\n")[0].replace('"', "")
    folder = tmp_path / "dwswap_entry_point-0.dist-info"
    folder.mkdir()
    (folder / "METADATA").write_text(
        "Metadata-Version: 2.1\nName: dwswap_entry_point\nVersion: 0\n"
    )
    (folder / "entry_points.txt").write_text(f"[torch_dynamo_backends]\n{line}\n")
    code = (
        "import torch._dynamo, sys\n"
        "assert 'dwswap' in torch._dynamo.list_backends()\n"
        "assert 'dwswap' not in sys.modules\n"
        "backend = torch._dynamo.lookup_backend('dwswap')\n"
        "print(backend.__module__, backend.__name__)\n"
    )
    paths = [str(tmp_path), str(Path(dwswap.__file__).parents[1]), os.environ.get("PYTHONPATH", "")]
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths))},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "dwswap.backend compile_graph"
