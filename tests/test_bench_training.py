"""``dwswap bench models --train``: steps, errors of gradients, record, tables, and the command."""

from __future__ import annotations

import copy
import json
import math
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from bench_model_cases import interrupt_after_one
from tiny_models import Block
from torch import nn

from dwswap.backend import rewrite_graph
from dwswap.bench.model_cases import TRAINED, Case, classifiers, product, training_cases
from dwswap.bench.model_peers import Runner, eager
from dwswap.bench.model_record import ModelRecord
from dwswap.bench.model_results import Measured, ModelResult
from dwswap.bench.model_targets import training_target
from dwswap.bench.models import ModelBench
from dwswap.bench.training import TrainingBench
from dwswap.bench.training_record import TrainingRecord, training_markdown
from dwswap.bench.training_results import TRAINERS, TRAINING_PEERS, TrainingResult, training_peers
from dwswap.bench.training_step import MOMENTUM, RATE, Step, without_randomness
from dwswap.bench.training_subject import TrainingSubject, gradient_error
from dwswap.cli import main

CPU = torch.device("cpu")
HERE = "test_bench_training:small"
CASE = Case("small", 3, "float16", "channels_last", 12)


def small() -> nn.Module:
    """With dropout, and a bias before BatchNorm, whose gradient is zero but for rounding."""
    return nn.Sequential(Block(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 5))


def bench(construct=small, **changes) -> TrainingBench:
    return TrainingBench(CPU, lambda name: construct(), **({"budget": 0.0} | changes))


@pytest.fixture
def nothing_compiles(monkeypatch):
    """Compiled runners are eager ones: to compile takes half a minute here."""
    monkeypatch.setitem(TRAINERS, "compile", Runner("compile", eager, compiled=True))
    ours = Runner("compile(dwswap)", TRAINERS["dwswap"].build, compiled=True)
    for name in ("dwswap_compile", "dwswap_backend"):
        monkeypatch.setitem(TRAINERS, name, ours)


def run(name, us=2000.0, **changes) -> Measured:
    return Measured(name, **({"us": us, "images_per_second": 1e6 * 256 / us} | changes))


def peer(name, plain, captured, compiled, **changes) -> Measured:
    by = {"dwswap": plain, "dwswap_graph": captured, "dwswap_compile": compiled}
    return run(name, speedups=by, **changes)


def result(*peers: Measured, **changes) -> TrainingResult:
    ours = [run("dwswap", 90_000.0, peak_bytes=12_000_000_000)]
    ours += [run("dwswap_graph", 80_000.0), run("dwswap_compile", 70_000.0)]
    values = {
        **CASE._replace(model="mobilenet_v2", batch=256, size=224)._asdict(),
        "summary": "17 of 52",
        "error_limit": 2e-2,
        "runs": [*ours, *peers],
        "profile": [],
        "problem": None,
        "passed": True,
        "loss_limit": 1e-3,
    }
    return TrainingResult(**(values | changes))


# cases, peers, targets


def test_cases():
    cases = training_cases([*TRAINED, "mnasnet1_0"], [], ["float16"], ["contiguous"])
    assert [(case.model, case.batch) for case in cases] == [
        ("mobilenet_v2", 256),
        ("efficientnet_b0", 128),
        ("mnasnet1_0", 128),
    ]
    given = (["a", "b", "a"], [1, 2], ["float16"], ["contiguous"])
    assert training_cases(*given) == product(*given)


def test_classifiers():
    names = classifiers()
    assert {*TRAINED, "convnext_tiny", "maxvit_t"} <= set(names)
    assert not [n for n in names if n.startswith(("quantized", "ssdlite", "deeplab", "lraspp"))]


@pytest.mark.parametrize(
    ("asked", "expected"),
    [
        (["auto"], ["eager", "eager_graph", "compile"]),
        (["all", "none"], ["eager", "eager_graph", "compile"]),
        (["compile", "eager"], ["eager", "compile"]),
        (["eager"], ["eager"]),
        (["none"], []),
    ],
)
def test_peers(asked, expected):
    assert training_peers(asked, cuda=True) == expected
    expected = [name for name in expected if name != "eager_graph"]
    assert training_peers(asked, cuda=False) == expected


def test_peers_of_forwards_only():
    known = r"among none, auto, all, eager, eager_graph, compile, got 'fx_fuse'"
    with pytest.raises(ValueError, match=known):
        training_peers(["eager", "fx_fuse"], cuda=True)


@pytest.mark.parametrize(
    ("case", "peer", "expected"),
    [
        (Case("mobilenet_v2", 256, "float16", "channels_last"), "eager", 1.12),
        (Case("mobilenet_v2", 256, "float16", "contiguous"), "eager", 1.25),
        (Case("efficientnet_b0", 128, "float16", "channels_last"), "eager", 1.08),
        (Case("efficientnet_b0", 128, "float16", "contiguous"), "eager", 1.15),
        (Case("efficientnet_b0", 256, "float16", "contiguous"), "eager", 1.0),
        (Case("mobilenet_v2", 256, "float16", "contiguous", 128), "eager", 1.0),
        (Case("maxvit_t", 8, "bfloat16", "contiguous"), "compile", 0.97),
        (Case("efficientnet_b0", 128, "float16", "contiguous"), "eager_graph", 1.15),
        (Case("maxvit_t", 8, "bfloat16", "contiguous"), "eager_graph", 1.0),
        (Case("maxvit_t", 8, "bfloat16", "contiguous"), "dwswap_compile", None),
    ],
)
def test_targets(case, peer, expected):
    assert training_target(case, peer) == expected


# a step


def test_steps_are_those_of_sgd():
    model = without_randomness(small())
    plain = copy.deepcopy(model)
    images, labels = torch.randn(4, 3, 9, 9), torch.tensor([0, 1, 2, 3])
    step = Step(model, images, labels, torch.float32, 8.0)
    optimizer = torch.optim.SGD(plain.parameters(), lr=RATE, momentum=MOMENTUM)
    for _ in range(3):
        loss = F.cross_entropy(plain(images), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        with torch.no_grad():
            assert torch.equal(step(), loss)
    for ours, theirs, grad in zip(
        model.parameters(), plain.parameters(), step.gradients(), strict=True
    ):
        assert torch.equal(ours, theirs)
        assert torch.equal(grad, theirs.grad)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_step_in_half_precision(dtype):
    model = nn.Sequential(nn.Flatten(), nn.Linear(12, 5), nn.Linear(5, 5))
    model[1].register_parameter("unused", nn.Parameter(torch.ones(2)))
    seen = []
    model[2].register_forward_hook(lambda module, args, output: seen.append(output.dtype))
    images, labels = torch.randn(4, 3, 2, 2), torch.tensor([0, 1, 2, 3])
    exact = torch.autograd.grad(F.cross_entropy(model(images), labels), list(model[2].parameters()))
    step = Step(model, images, labels, dtype, 2.0**10)
    before = model[2].weight.detach().clone()
    assert step().dtype == torch.float32
    assert seen == [torch.float32, dtype]
    # Without the scale of the scaler.
    torch.testing.assert_close(step.gradients()[-2:], [*exact], rtol=0.05, atol=0.01)
    assert not torch.equal(before, model[2].weight)
    assert not step.gradients()[2].any()


def test_a_step_needs_a_module():
    with pytest.raises(TypeError, match=r"model must be a torch\.nn\.Module, got function"):
        Step(lambda x: x, torch.ones(1), torch.ones(1), torch.float32, 1.0)


def test_without_randomness():
    class StochasticDepth(nn.Module):
        p = 0.3

    model = nn.Sequential(nn.Dropout2d(0.2), StochasticDepth(), nn.ReLU()).train()
    assert without_randomness(model) is model
    assert (model[0].p, model[1].p, StochasticDepth.p) == (0.0, 0.0, 0.3)
    assert model[0].training


# errors


def test_gradient_error():
    exact = [torch.full((4,), 2.0, dtype=torch.float64), torch.ones(1, dtype=torch.float64) * 1e-4]
    assert gradient_error(exact, exact) == 0
    # Half of the parameters are off, a hundred times the smaller counts as much as the larger.
    for index in (0, 1):
        off = [grad * 1.01 if i == index else grad for i, grad in enumerate(exact)]
        assert gradient_error(off, exact) == pytest.approx(0.01 / math.sqrt(2))
    assert math.isnan(gradient_error([exact[0], exact[1] * math.nan], exact))
    # What is zero counts in parts of the whole, whose norm is 4.
    zero = [exact[0], torch.tensor([1e-12], dtype=torch.float64)]
    assert gradient_error([exact[0], torch.tensor([0.04])], zero) == pytest.approx(
        0.01 / math.sqrt(2)
    )


def test_the_scale_is_one_at_which_gradients_are_finite(monkeypatch):
    tried = []

    def errors(self, forward):
        tried.append(self.scale)
        if self.scale > 1000:
            raise ValueError("not finite")
        return 0.25, 0.5

    monkeypatch.setattr(TrainingSubject, "step_errors", errors)
    subject = TrainingSubject.make(small().train(), CASE, CPU)
    assert tried == [2.0**power for power in range(16, 8, -1)]
    assert subject.scale == 2.0**8
    eps = torch.finfo(torch.float16).eps
    assert subject.limits == {"error_limit": 0.5 + eps, "loss_limit": 1.0 + eps}
    with pytest.raises(ValueError, match="not finite"):
        TrainingSubject.make(small().train(), CASE._replace(dtype="bfloat16"), CPU)


# measuring


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize(
    "dtype",
    ["float16", *(pytest.param(d, marks=pytest.mark.slow) for d in ("bfloat16", "float32"))],
)
def test_measure(dtype, layout):
    case = CASE._replace(dtype=dtype, layout=layout)
    found = bench(profiled=True).measure(case, ["eager"])
    assert found.passed
    assert isinstance(found, TrainingResult)
    assert (found.case, found.problem) == (case, None)
    assert "1 of 2 convolutions swapped" in found.summary
    assert [r.name for r in found.runs] == ["dwswap", "eager"]
    for entry in found.runs:
        assert entry.reason is None
        assert entry.us > 0
        assert entry.images_per_second == pytest.approx(3e6 / entry.us)
        assert 0 < entry.error <= found.error_limit < 1
        assert entry.loss_error <= found.loss_limit < 0.2
        assert entry.peak_bytes is None
    assert found.run("eager").speedups.keys() == {"dwswap"}
    assert "GEMM, convolution" in {row.family for row in found.profile}


@pytest.mark.usefixtures("nothing_compiles")
def test_compiled_is_compared_with_compiled(monkeypatch):
    resets = []
    monkeypatch.setattr(torch.compiler, "reset", lambda: resets.append(1))
    found = bench().measure(CASE, ["eager", "compile"])
    assert found.passed
    ours = ["dwswap", "dwswap_compile", "dwswap_backend"]
    assert [r.name for r in found.runs] == [*ours, "eager", "compile"]
    assert found.run("compile").speedups.keys() == {*ours}
    assert found.speedups("compile").keys() == {"dwswap_compile", "dwswap_backend"}
    assert found.best_speedup("compile") == found.run("compile").speedups["dwswap_compile"]
    assert found.best_speedup("eager") == found.run("eager").speedups["dwswap"]
    # Ours is checked, of the peer only the time is known; both stay compiled until the end.
    assert None not in (found.run("dwswap_compile").error, found.run("dwswap_backend").error)
    assert found.run("compile").error is None
    assert resets == [1]


def test_steps_are_compared_within_rounds(monkeypatch):
    """A host that is twice as slow in most rounds, but not in the same ones for both."""
    rounds = [[10.0, 10.0], [20.0, 22.0], [20.0, 22.0], [10.0, 22.0], [20.0, 11.0]]
    asked = []

    def time_rounds(calls, device, **how):
        asked.append(how)
        return rounds

    monkeypatch.setattr("dwswap.bench.training.time_rounds", time_rounds)
    found = bench(budget=2.5).measure(CASE, ["eager"])
    assert asked == [{"budget": 2.5, "least": 6}]
    assert (found.run("dwswap").us, found.run("eager").us) == (20.0, 22.0)
    assert found.speedups("eager") == {"dwswap": 1.1}
    assert found.run("eager").within == {}  # five rounds may all be of one kind


def test_the_interval_of_a_ratio_is_shown(monkeypatch):
    rounds = [[10.0, 10.0 + i] for i in range(7)]
    monkeypatch.setattr("dwswap.bench.training.time_rounds", lambda *args, **how: rounds)
    found = bench().measure(CASE, ["eager"])
    assert found.speedups("eager") == {"dwswap": 1.3}
    assert found.run("eager").within == {"dwswap": pytest.approx(0.3)}
    assert "| 1.30 ± 0.30 |" in training_markdown([found])[-1]


def test_each_gets_a_model_in_train_mode_and_in_the_layout(monkeypatch):
    seen = []

    def build(model, argument):
        seen.append((model, argument))
        return model

    monkeypatch.setitem(TRAINERS, "eager", Runner("eager", build))
    bench().measure(CASE, ["eager"])
    (timed, images), (checked, _) = seen
    assert timed.training
    assert (timed[0].dropout.p, checked[0].dropout.p) == (0.5, 0.0)
    assert images.dtype == timed[0].expand.weight.dtype == torch.float32
    for tensor in (images, timed[0].expand.weight):
        assert tensor.is_contiguous(memory_format=torch.channels_last)


def wrong_scores(model: nn.Module) -> nn.Module:
    model.register_forward_hook(lambda module, args, output: output * 1.2)
    return model


def wrong_gradient(model: nn.Module) -> nn.Module:
    """Of one weight out of many."""
    model[0].depthwise.weight.register_hook(lambda grad: grad * 1.2)
    return model


def not_finite(model: nn.Module) -> nn.Module:
    model[0].depthwise.weight.register_hook(lambda grad: grad * math.inf)
    return model


@pytest.mark.parametrize("change", [wrong_scores, wrong_gradient])
def test_wrong_numbers_fail(monkeypatch, change):
    right = TRAINERS["dwswap"].build
    wrong = Runner("wrong", lambda model, argument: change(right(model, argument)))
    monkeypatch.setitem(TRAINERS, "dwswap", wrong)
    found = bench().measure(CASE, ["eager"])
    ours = found.run("dwswap")
    assert not found.passed
    assert ours.reason is None
    assert ours.error > found.error_limit
    assert (ours.loss_error > found.loss_limit) == (change is wrong_scores)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (not_finite, r"ValueError: a loss of 1\.\d+ or gradients that are not finite"),
        (lambda model: lambda x: model(x), "TypeError: model must be a torch.nn.Module"),
        (lambda model: model[:3], "ValueError: gradients of other shapes"),
    ],
)
def test_ours_failing_fails(monkeypatch, change, reason):
    right = TRAINERS["dwswap"].build
    wrong = Runner("wrong", lambda model, argument: change(right(model, argument)))
    monkeypatch.setitem(TRAINERS, "dwswap", wrong)
    found = bench().measure(CASE, [])
    assert not found.passed
    with pytest.raises(AssertionError, match=reason):
        raise AssertionError(found.run("dwswap").reason)


@pytest.mark.parametrize(
    ("model", "got"),
    [
        (lambda: nn.Conv2d(3, 4, 3), "got (3, 4, 10, 10)"),
        (lambda: nn.Sequential(nn.Flatten(), nn.Linear(432, 1)), "got (3, 1)"),
    ],
)
def test_a_model_that_is_no_classifier(model, got):
    # Two images show it.
    found = bench(model).measure(CASE, ["eager"])
    assert (found.runs, found.passed) == ([], False)
    assert found.problem == (
        "the model itself: ValueError: the model's output must be (N, 2 or more) scores, "
        + got.replace("(3,", "(2,")
    )


# the record and the tables


def record(path: Path) -> TrainingRecord:
    return TrainingRecord(path, device="Some GPU", settings={"peers": ["auto"]})


ROWS = [
    result(
        peer("eager", 1.15, 1.3, 1.6, peak_bytes=13_000_000_000),
        peer("eager_graph", 0.9, 1.125, 1.2),
        peer("compile", 0.8, 0.9, 0.96),
    ),
    result(
        peer("eager", 1.05, 1.3, 1.5, peak_bytes=11_000_000_000),
        Measured("compile", reason="no compiler"),
        model="efficientnet_b0",
        batch=128,
    ),
    result(peer("eager", 0.9, 1.2, 1.5), dtype="bfloat16"),
]


def test_markdown():
    assert training_markdown(ROWS) == [
        "Milliseconds per step, and how many times faster dwswap is than each peer if it is run as "
        "that is (in parentheses the target; a CUDA graph shows what the GPU takes where Python "
        "does not keep up; behind ±, half of the interval that holds it with a probability of 95 "
        "%), and the peak memory of a step without graph or compiler:",
        "",
        "| model | batch | dtype | layout | dwswap ms | CUDA graph ms | compile(dwswap) ms "
        "| images/s | over eager | over eager, CUDA graph | over compile | peak MB | eager's |",
        "| --- | ---: | --- | --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
        "| mobilenet_v2 | 256 | float16 | channels_last | 90.00 | 80.00 | 70.00 | 3,657 "
        "| 1.15 (1.12) | 1.12 (1.12) | **0.96 (0.97)** | 12,000 | 13,000 |",
        "| efficientnet_b0 | 128 | float16 | channels_last | 90.00 | 80.00 | 70.00 | 3,657 "
        "| **1.05 (1.08)** |  | failed | **12,000** | 11,000 |",
        "| mobilenet_v2 | 256 | bfloat16 | channels_last | 90.00 | 80.00 | 70.00 | 3,657 "
        "| **0.90** |  |  | 12,000 |  |",
    ]
    assert training_markdown([]) == ["Nothing was measured."]


def test_markdown_of_both_that_compile():
    """The target is of the swapped model; the backend stands beside it."""
    by = {"dwswap_compile": 0.98, "dwswap_backend": 1.4}
    row = result(run("compile", speedups=by))
    row.runs.append(run("dwswap_backend", 50_000.0))
    heads, _, cells = training_markdown([row])[-3:]
    assert "| compile(dwswap) ms | backend=dwswap ms |" in heads
    assert "| 70.00 | 50.00 |" in cells
    assert "| 0.98 / 1.40 (0.97) |" in cells


@pytest.mark.slow
def test_the_backend_is_measured(monkeypatch):
    """Without a double: the graph of a training step goes through our backend."""
    monkeypatch.setitem(TRAINERS, "compile", Runner("compile", eager, compiled=True))
    rewritten = []
    monkeypatch.setattr(
        "dwswap.backend.rewrite_graph",
        lambda graph: rewritten.append(rewrite_graph(graph)) or rewritten[-1],
    )
    found = bench().measure(CASE, ["compile"])
    assert found.passed, found
    assert rewritten[0].swapped
    assert "dwswap_backend" in found.speedups("compile")


def test_record_survives_a_round_trip(tmp_path):
    made = record(tmp_path / "a.json")
    for row in ROWS:
        made.add(row)
    made.save()
    again = record(tmp_path / "a.json")
    again.resume()
    assert again.results == ROWS
    again.finish()
    saved = json.loads(made.path.read_text())
    assert (saved["kind"], saved["complete"]) == ("training", True)
    assert saved["markdown"] == training_markdown(ROWS)


def test_a_record_of_forwards_is_not_gone_on_with(tmp_path):
    made = record(tmp_path / "a.json")
    ModelRecord(made.path, device="Some GPU", settings={"peers": ["auto"]}).save()
    with pytest.raises(ValueError, match="kind: 'models', now 'training'"):
        made.resume()


def test_readme_merges_records(tmp_path, readme_table):
    for name, rows in (("one", ROWS[:1]), ("two", ROWS[1:])):
        made = record(tmp_path / f"{name}.json")
        for row in rows:
            made.add(row)
        made.finish()
    text = readme_table.page(readme_table.newest_records(tmp_path))
    assert text.count("on Some GPU (`dwswap bench models --train`)") == 1
    assert "| 1.15 (1.12)" in text
    assert "**1.05 (1.08)**" in text
    assert "![Times faster than each peer](results/training-some-gpu.png)" in text
    selection = readme_table.selection(readme_table.newest_records(tmp_path))
    assert "**1.05 (1.08)**" in selection
    assert ".png" not in selection
    # Forwards have a table of their own.
    forwards = ModelRecord(tmp_path / "models.json", device="Some GPU", settings={})
    forwards.add(ModelResult(*CASE, "", None, [run("dwswap")], [], None, passed=True))
    forwards.finish()
    text = readme_table.page(readme_table.newest_records(tmp_path))
    assert text.index("bench models`") < text.index("bench models --train")


def test_a_case_has_the_peers_of_all_its_records(tmp_path, readme_table):
    """Those of the record with most peers, of the newer of two, and what others add."""
    for year, *peers in (
        (2020, peer("eager", 1.21, 1.31, 1.41), peer("eager_graph", 0.81, 1.91, 1.01)),
        (2021, peer("eager", 1.22, 1.32, 1.42), Measured("compile", reason="out of memory")),
        (2022, peer("eager", 1.23, 1.33, 1.43), peer("compile", 0.82, 0.92, 1.02)),
        (2023, peer("compile", 0.83, 0.93, 1.03)),
        (2024, peer("eager", 1.25, 1.35, 1.45), Measured("compile", reason="no compiler")),
    ):
        made = record(tmp_path / f"{year}.json")
        made.add(result(*peers))
        made.finish()
        saved = json.loads(made.path.read_text())
        made.path.write_text(json.dumps(saved | {"recorded": f"{year}-01-01T00:00:00+00:00"}))
    text = readme_table.page(readme_table.newest_records(tmp_path))
    assert "| 1.23 (1.12) | 1.91 (1.12) | 1.02 (0.97) |" in text
    for name in ("2020", "2022", "2023"):
        (tmp_path / f"{name}.json").unlink()
    text = readme_table.page(readme_table.newest_records(tmp_path))
    assert "1.25 (1.12)" in text
    assert "1.22" not in text


def test_plot(tmp_path):
    pytest.importorskip("matplotlib")
    pytest.importorskip("PIL")
    from PIL import Image

    from dwswap.bench import model_plot

    path = model_plot.plot(ROWS, tmp_path / "a.png", "title")
    with Image.open(path) as image:
        found = image.convert("RGB").getcolors(image.width * image.height)
    drawn = {"#{:02x}{:02x}{:02x}".format(*pixel) for _, pixel in found}
    colours = model_plot.COLOURS
    assert {colours["eager"], colours["compile"], model_plot.TARGET} <= drawn
    assert {*TRAINING_PEERS} <= colours.keys()


# the command


@pytest.fixture
def wide(monkeypatch):
    """No line is wrapped, so that texts can be looked for; the model of this file can be named."""
    monkeypatch.setenv("COLUMNS", "300")
    monkeypatch.setitem(sys.modules, "test_bench_training", sys.modules[__name__])


def command(folder: Path, *arguments: str) -> int:
    given = ["bench", "models", "--train", "--device", "cpu", "--budget", "0", "--size", "12"]
    model = () if "--models" in arguments else ("--models", HERE)
    return main([*given, "--output", str(folder), *model, *arguments])


@pytest.mark.slow
@pytest.mark.usefixtures("nothing_compiles", "wide")
def test_command(tmp_path, capsys):
    assert command(tmp_path, "--dtype", "bfloat16") == 0
    names = sorted(path.name for path in tmp_path.iterdir())
    assert names == ["training-cpu-part.json", "training-cpu-part.png"]
    saved = json.loads((tmp_path / names[0]).read_text())
    assert (saved["kind"], saved["complete"]) == ("training", True)
    assert [(row["batch"], row["dtype"], row["layout"]) for row in saved["results"]] == [
        (2, "bfloat16", "contiguous"),
        (2, "bfloat16", "channels_last"),
    ]
    assert all(row["passed"] for row in saved["results"])
    rows = [TrainingResult.from_dict(**row) for row in saved["results"]]
    assert saved["markdown"] == training_markdown(rows)
    out = capsys.readouterr().out
    for text in ("compile(dwswap)", "over eager", "peak MB", "1 of 2 convolutions", names[1]):
        assert text in out


@pytest.mark.usefixtures("wide")
def test_command_is_ended_and_resumed(tmp_path, capsys, monkeypatch):
    measured = interrupt_after_one(monkeypatch)
    part = ("--batch", "2", "3", "--dtype", "float32", "--layout", "contiguous", "--peers", "none")
    assert command(tmp_path, *part) == 130
    assert "1 of 2 are in" in capsys.readouterr().out
    measured.append("no more interrupts")
    assert command(tmp_path, *part, "--resume") == 0
    saved = json.loads((tmp_path / "training-cpu-part.json").read_text())
    assert [row["batch"] for row in saved["results"]] == [2, 3]


@pytest.mark.usefixtures("wide")
def test_command_defaults(tmp_path, monkeypatch):
    seen = []

    def measure(self, case, peers):
        seen.append((case, tuple(peers)))
        return result(peer("eager", 2.0, 2.0, 2.0), **case._asdict())

    monkeypatch.setattr(ModelBench, "measure", measure)
    given = ["bench", "models", "--train", "--device", "cpu", "--output", str(tmp_path)]
    assert main(given) == 0
    assert [case for case, _ in seen] == product(
        [*TRAINED], [2], ["float16", "bfloat16"], ["contiguous", "channels_last"]
    )
    assert {peers for _, peers in seen} == {("eager", "compile")}
    seen.clear()
    assert main([*given, "--models", "all", "--select", "2-float16-channels_last"]) == 0
    assert [case.model for case, _ in seen] == classifiers()
    assert {peers for _, peers in seen} == {("eager",)}


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        (["--peers", "fx_fuse"], "--peers: peers of a training step must be among none, auto"),
        (["--max-autotune"], "--max-autotune: is of forwards"),
        (["--models", "mobilenet_v9"], "unknown model 'mobilenet_v9'"),
    ],
)
@pytest.mark.usefixtures("wide")
def test_command_refuses(tmp_path, capsys, arguments, problem):
    assert command(tmp_path, *arguments) == 2
    assert problem in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []
