"""``dwswap bench models``: cases, peers, measurements, record, tables, picture, and the command."""

from __future__ import annotations

import json
import math
import sys
import weakref
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from torch import nn

from dwswap.bench import latency, model_peers, models, random_weights
from dwswap.bench.kernel_families import FamilyTime
from dwswap.bench.latency import MemoryMeter, time_stream
from dwswap.bench.model_cases import ACCEPTED, Case, choose, defaults, depthwise_models, product
from dwswap.bench.model_peers import EAGER, OURS, RUNNERS, Runner, chosen_peers
from dwswap.bench.model_record import ModelRecord
from dwswap.bench.model_results import Measured, ModelResult
from dwswap.bench.model_subject import Subject
from dwswap.bench.model_summary import case_rows, markdown, profile_rows
from dwswap.bench.model_targets import target
from dwswap.bench.models import ModelBench
from dwswap.bench.training_results import TRAINING_PEERS
from dwswap.cli import bench_models, main

CPU = torch.device("cpu")
HERE = "test_bench_models:small"
CASE = Case("small", 3, "float32", "channels_last", 16)


class Small(nn.Module):
    """One block of a MobileNet."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8), nn.ReLU6())
        self.depthwise = nn.Conv2d(8, 8, 3, groups=8, bias=False)
        self.norm = nn.BatchNorm2d(8)
        self.head = nn.Linear(8, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.norm(self.depthwise(self.stem(x))).relu().mean((2, 3)))


def small() -> nn.Module:
    return Small()


def bench(**changes) -> ModelBench:
    return ModelBench(CPU, lambda name: small(), **({"budget": 0.0} | changes))


def run(name, us=2000.0, plain=2.0, graph=2.5, **changes) -> Measured:
    values = {
        "images_per_second": 1e6 * 256 / us,
        "speedups": {} if name in OURS else dict(zip(OURS, (plain, graph), strict=True)),
        "build_s": 0.5,
        "first_call_s": 1.0,
        "peak_bytes": 50_000_000,
        "error": 1e-3,
        "error_ratio": 1.0,
    }
    return Measured(name, us=us, **(values | changes))


def result(*runs: Measured, **changes) -> ModelResult:
    values = {
        "model": "mobilenet_v2",
        "batch": 256,
        "dtype": "float16",
        "layout": "channels_last",
        "size": 224,
        "summary": "17 of 52",
        "error_limit": 2e-3,
        "runs": [run("dwswap", 1000.0), run("dwswap_graph", 800.0), *runs],
        "profile": [FamilyTime("depthwise", 600.0, 60.0, 17.0, "kernel")],
        "problem": None,
        "passed": True,
    }
    return ModelResult(**(values | changes))


@pytest.fixture
def wide(monkeypatch):
    """No line is wrapped, so that texts can be looked for; the model of this file can be named."""
    monkeypatch.setenv("COLUMNS", "300")
    monkeypatch.setitem(sys.modules, "test_bench_models", sys.modules[__name__])


def command(folder: Path, *arguments: str) -> int:
    given = ["bench", "models", "--device", "cpu", "--budget", "0", "--output", str(folder)]
    given += ["--size", "16", "--dtype", "float32"]
    model = () if "--models" in arguments else ("--models", HERE)
    peers = () if "--peers" in arguments else ("--peers", "eager")
    return main([*given, *model, *peers, *arguments])


# cases and peers


def test_the_38_models():
    names = depthwise_models()
    assert len(names) == 38
    assert {*ACCEPTED, "maxvit_t", "ssdlite320_mobilenet_v3_large"} <= set(names)


def test_default_cases():
    cases = defaults()
    assert len(cases) == len(set(cases)) == 7 * 3 + 1
    assert Case("mobilenet_v2", 256, "float32", "contiguous", 224) in cases
    assert {(c.dtype, c.layout) for c in cases[1:]} == {("float16", "channels_last")}
    # One model after the other: weights are made once per model.
    assert len([c for c, d in pairwise(cases) if c.model != d.model]) == 6


def test_choose():
    cases = defaults()
    assert [str(c) for c in choose(cases, "v2-n256-float32")] == [
        "mobilenet_v2-n256-float32-contiguous"
    ]
    assert len(choose(cases, "-n1-")) == 7
    assert len(choose(cases, "mobilenet*n32-")) == 2
    assert str(CASE) == "small-n3-float32-channels_last-16px"
    with pytest.raises(ValueError, match=r"no case fits 'resnet'; there are 22, such as mobilenet"):
        choose(cases, "resnet")


def test_products_hold_each_case_once():
    assert len(product(["a", "b", "a"], [1, 2, 1], ["float16"], ["contiguous"])) == 4


@pytest.mark.parametrize(
    ("asked", "batch", "expected"),
    [
        (["none"], 1, []),
        (["eager"], 1, [*EAGER]),
        (["auto"], 1, [*EAGER, "eager_graph", "fx_fuse", "reduce_overhead"]),
        (["auto"], 256, [*EAGER, "eager_graph", "fx_fuse", "compile", "dwswap_compile"]),
        (["compile", "eager_nchw"], 1, ["eager_nchw", "compile"]),
        (["max_autotune"], 1, ["max_autotune"]),
        (["all"], 1, [name for name in RUNNERS if name not in (*OURS, "max_autotune")]),
    ],
)
def test_peers(asked, batch, expected):
    assert chosen_peers(asked, batch, cuda=True) == expected


def test_peers_elsewhere():
    on_cpu = chosen_peers(["all"], 1, cuda=False, max_autotune=True)
    assert on_cpu == [*EAGER, "fx_fuse", "compile", "dwswap_compile"]
    assert "compile" in chosen_peers(["auto"], 1, cuda=False)
    assert "max_autotune" in chosen_peers(["none"], 1, cuda=True, max_autotune=True)


def test_optimize_gets_what_it_takes(monkeypatch):
    seen = []

    def optimize(model, *, cuda_graph=False):
        seen.append(cuda_graph)
        return model

    monkeypatch.setattr(model_peers, "optimize", optimize)
    assert RUNNERS["dwswap_graph"].build("model", None) == "model"
    assert RUNNERS["dwswap"].build("model", None) == "model"
    model_peers.optimize_with("model", memory_format="auto")
    assert seen == [True, False, False]
    monkeypatch.setattr(model_peers, "optimize", lambda model: model)
    monkeypatch.setattr(model_peers, "Captured", lambda model, argument: f"{model} in a graph")
    assert RUNNERS["dwswap_graph"].build("model", None) == "model in a graph"


def test_a_captured_model_lives_as_long_as_its_graph(monkeypatch):
    class Graph:
        replay = staticmethod(lambda: None)

    monkeypatch.setattr(model_peers, "capture", lambda call: (Graph, call()))
    model, images = small(), torch.rand(2, 3, 8, 8)
    weight = weakref.ref(model.head.weight)
    forward = model_peers.Captured(model, images)
    del model
    assert forward(images).shape == (2, 5)
    assert weight() is not None


def test_a_list_of_images_is_not_captured():
    with pytest.raises(TypeError, match="one tensor as input, got list"):
        model_peers.Captured(small(), [torch.rand(3, 8, 8)])


def test_random_layer_scales():
    model = nn.Sequential(nn.Conv2d(3, 4, 1))
    model.register_parameter("layer_scale", nn.Parameter(torch.full((4, 1, 1), 1e-6)))
    random_weights.randomize(model, torch.rand(2, 3, 4, 4))
    assert model.layer_scale.min() >= 0.1
    assert model.layer_scale.requires_grad


# time and memory


def test_time_stream(monkeypatch):
    calls = []
    clock = iter(range(100))
    monkeypatch.setattr(latency.time, "perf_counter", lambda: 0.5 * next(clock))
    timing = time_stream(lambda: calls.append(1), "cpu", budget=5.0)
    # Half a second per stream of calls, so 0.25 per call: 4 calls fill a fifth of the budget.
    assert timing.method == "wall clock over 4 calls"
    assert len(calls) == 1 + 2 + 5 * 4
    assert timing.microseconds == 0.5e6 / 4
    # A call that takes as long as the budget is timed once.
    calls.clear()
    assert time_stream(lambda: calls.append(1), "cpu", budget=0.5).samples == 1
    assert len(calls) == 1 + 1
    # One that takes longer than anything needs to settle is called once.
    calls.clear()
    clock = iter(range(0, 1000, 3))
    timing = time_stream(lambda: calls.append(1), "cpu", budget=0.5)
    assert (timing.samples, timing.microseconds, len(calls)) == (1, 1.5e6, 1)


def test_time_stream_records_no_graph():
    x = torch.ones(3, requires_grad=True)
    outputs = []
    timing = time_stream(lambda: outputs.append(x * 2), "cpu", budget=0.0)
    assert not any(y.requires_grad for y in outputs)
    assert 0 < timing.fastest <= timing.microseconds <= timing.slowest


def test_very_slow_calls_get_one_round(monkeypatch):
    rounds = []
    original = models.time_side_by_side

    def spy(*args, **kwargs):
        rounds.append(kwargs["rounds"])
        return original(*args, **kwargs)

    monkeypatch.setattr(models, "time_side_by_side", spy)
    bench().measure(CASE, ["eager_nchw"])
    monkeypatch.setattr(models, "VERY_SLOW", 0.0)
    bench().measure(CASE, ["eager_nchw"])
    assert rounds == [3, 1]


def test_peak_memory_counts_the_idle_part_of_graphs(monkeypatch):
    def segment(pool, total, allocated):
        return {"segment_pool_id": pool, "total_size": total, "allocated_size": allocated}

    segments = [segment((0, 0), 900, 100), segment((0, 1), 50, 20)]
    for name, value in {
        "synchronize": None,
        "reset_peak_memory_stats": None,
        "memory_allocated": 100 + 20,
        "max_memory_allocated": 400,
        "memory_snapshot": segments,
    }.items():
        monkeypatch.setattr(torch.cuda, name, lambda *args, value=value: value)
    meter = MemoryMeter(torch.device("cuda"))
    segments.append(segment((0, 2), 1000, 300))
    assert meter.peak(lambda: None) == (400 + 30 + 700) - (120 + 30)
    assert MemoryMeter(CPU).peak(lambda: None) is None


# measuring


def test_measure():
    steps = []
    found = bench(profiled=True, step=steps.append).measure(CASE, [*EAGER, "fx_fuse"])
    assert found.passed
    assert found.problem is None
    assert found.case == CASE
    assert "1 of 2 convolutions swapped" in found.summary
    assert [r.name for r in found.runs] == ["dwswap", *EAGER, "fx_fuse"]
    for entry in found.runs:
        assert entry.reason is None
        assert entry.us > 0
        assert entry.images_per_second == pytest.approx(3e6 / entry.us)
        assert min(entry.build_s, entry.first_call_s) >= 0
        assert 0 < entry.error < 1e-5
        assert entry.error <= found.error_limit
        assert 0 < entry.rms_error < 1e-5
        assert entry.peak_bytes is None
    assert found.run("dwswap").speedups == {}
    assert all(set(r.speedups) == {"dwswap"} for r in found.runs[1:])
    # Eager in the user's layout is what the errors are compared with.
    assert found.run("eager_channels_last").error_ratio == 1.0
    assert {"GEMM, convolution"} <= {row.family for row in found.profile}
    assert len(steps) == 5


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_measure_half_precision(dtype, layout):
    found = bench().measure(CASE._replace(dtype=dtype, layout=layout), ["eager_nchw"])
    assert found.passed
    assert found.run("dwswap").error > 1e-5


def test_measure_without_peers():
    found = bench().measure(CASE, [])
    assert [(r.name, r.us > 0) for r in found.runs] == [("dwswap", True)]
    assert found.profile == []


def test_each_gets_a_model_and_an_input_in_its_layout(monkeypatch):
    seen = {}

    def spy(layout):
        def build(model, argument):
            seen[layout] = (model, argument)
            return model

        return Runner("spy", build, layout=layout)

    for layout in ("contiguous", "channels_last", None):
        monkeypatch.setitem(RUNNERS, str(layout), spy(layout))
    bench().measure(CASE, ["contiguous", "channels_last", "None"])
    for layout in ("contiguous", "channels_last"):
        memory_format = models.LAYOUTS[layout]
        model, x = seen[layout]
        assert x.is_contiguous(memory_format=memory_format)
        assert model.stem[0].weight.is_contiguous(memory_format=memory_format)
    assert seen[None][1].is_contiguous(memory_format=torch.channels_last)
    assert len({id(model) for model, _ in seen.values()}) == 3
    norms = [model.norm.running_var for model, _ in seen.values()]
    assert all(not torch.allclose(var, torch.ones(8)) for var in norms)


def test_weights_are_made_once_per_model():
    made = []
    subject = ModelBench(CPU, lambda name: made.append(name) or small(), budget=0.0)
    for name, batch in (("a", 1), ("a", 2), ("b", 1)):
        subject.measure(CASE._replace(model=name, batch=batch), [])
    assert made == ["a", "b"]


@torch.no_grad()
@pytest.mark.parametrize(("batch", "batches"), [(1, 8), (3, 3), (8, 1), (20, 1)])
def test_eight_images_at_least_are_compared(batch, batches):
    subject = Subject.make(small().eval(), CASE._replace(batch=batch), CPU)
    assert [x.shape for x in subject.batches] == [(batch, 3, 16, 16)] * batches
    assert len({float(x[0, 0, 0, 0]) for x in subject.batches}) == batches
    assert 6 < len(subject.exact[0]) < 10
    assert subject.deviations(subject.model) == (subject.eager_error, subject.eager_rms_error)
    # An error in the last image of the last batch is found, in an output written over as well.
    last, output = subject.batches[-1], torch.empty(batch, 5)

    def forward(x):
        output.copy_(subject.model(x))
        if x is last:
            output[-1] += 1
        return output

    assert subject.deviations(forward)[0] > 100 * subject.eager_error


def raises(*args):
    raise RuntimeError("no such thing\nsecond line")


@pytest.mark.parametrize(
    ("build", "reason"),
    [
        (raises, "RuntimeError: no such thing"),
        (lambda model, argument: raises, "RuntimeError: no such thing"),
        (lambda model, argument: lambda x: model(x)[:1], "ValueError: outputs of other shapes"),
        (lambda model, argument: lambda x: model(x) * math.nan, "ValueError: outputs that are not"),
    ],
)
def test_a_peer_that_fails_is_recorded(monkeypatch, build, reason):
    monkeypatch.setitem(RUNNERS, "compile", Runner("compile", build, compiled=True))
    found = bench().measure(CASE, ["compile", "eager_nchw"])
    assert found.passed
    assert found.run("compile").reason.startswith(reason)
    assert "\n" not in found.run("compile").reason
    assert found.run("compile").us is None
    assert found.run("eager_nchw").speedups["dwswap"] > 0


def test_a_peer_that_fails_while_it_is_timed(monkeypatch):
    calls = []

    def build(model, argument):
        return lambda x: raises() if len(calls) > 3 else calls.append(1) or model(x)

    monkeypatch.setitem(RUNNERS, "compile", Runner("compile", build))
    found = bench().measure(CASE, ["compile"])
    assert found.run("compile").reason == "RuntimeError: no such thing"
    assert found.run("dwswap").us > 0


def test_ours_failing_fails(monkeypatch):
    monkeypatch.setitem(RUNNERS, "dwswap", Runner("dwswap", raises))
    found = bench().measure(CASE, ["eager_nchw"])
    assert not found.passed
    assert found.run("dwswap").reason == "RuntimeError: no such thing"
    assert found.run("eager_nchw").us > 0
    assert found.run("eager_nchw").speedups == {}


@pytest.mark.parametrize("name", ["dwswap", "dwswap_compile"])
def test_wrong_numbers_fail(monkeypatch, name):
    wrong = Runner("wrong", lambda model, argument: lambda x: model(x) * 1.001)
    monkeypatch.setitem(RUNNERS, name, wrong)
    found = bench().measure(CASE, ["dwswap_compile"] if name != "dwswap" else [])
    assert not found.passed
    assert found.run(name).error == pytest.approx(1e-3, rel=0.1)
    assert found.run(name).rms_error == pytest.approx(1e-3, rel=0.1)
    assert found.run(name).error_ratio > 100


def test_a_model_that_fails_is_recorded():
    found = ModelBench(CPU, raises, budget=0.0).measure(CASE, ["eager_nchw"])
    assert (found.runs, found.passed) == ([], False)
    assert found.problem == "the model itself: RuntimeError: no such thing"


@pytest.mark.slow
def test_detection_is_compared_by_its_features(monkeypatch):
    from dwswap.cli.models import construct, find

    name = "ssdlite320_mobilenet_v3_large"
    subject = ModelBench(CPU, lambda n: construct(find(n), n, meta=False), budget=0.0)
    found = subject.measure(Case(name, 1, "float32", "contiguous", 64), ["eager_nchw", "fx_fuse"])
    assert found.passed
    assert found.run("dwswap").error > 0
    assert found.run("eager_nchw").error_ratio == 1.0
    assert "TraceError" in found.run("fx_fuse").reason
    # Of what has no features to show, only the time is known.
    hidden = Runner("hidden", lambda model, argument: lambda images: model(images))
    monkeypatch.setitem(RUNNERS, "compile", hidden)
    found = subject.measure(found.case, ["compile"])
    assert found.run("compile").us > 0
    assert found.run("compile").error is None


# the record and the tables


def record(path: Path, **settings) -> ModelRecord:
    return ModelRecord(path, device="Some GPU", settings={"peers": ["auto"]} | settings)


def test_record_survives_a_round_trip(tmp_path):
    made = record(tmp_path / "a.json")
    rows = [result(run("compile")), result(Measured("compile", reason="no compiler"), batch=1)]
    for row in rows:
        made.add(row)
    made.save()
    again = record(tmp_path / "a.json")
    again.resume()
    assert again.results == rows
    assert again.left([row.case for row in rows] + [CASE]) == [CASE]
    again.finish()
    saved = json.loads((tmp_path / "a.json").read_text())
    assert (saved["kind"], saved["complete"]) == ("models", True)
    assert saved["markdown"] == markdown(rows)
    made.save()
    with pytest.raises(ValueError, match="settings peers"):
        record(tmp_path / "a.json", peers=["all"]).resume()


def test_speedups_of_a_result():
    eager = [run("eager_nchw", plain=3.0, graph=5.0), run("eager_channels_last", plain=2.0)]
    subject = result(*eager, Measured("compile", reason="failed"))
    assert subject.speedups("eager_nchw") == {"dwswap": 3.0, "dwswap_graph": 5.0}
    assert subject.speedups("eager") == {"dwswap": 2.0, "dwswap_graph": 2.5}
    assert subject.best_speedup("eager") == 2.5
    assert subject.speedups("compile") == {}
    assert subject.best_speedup("fx_fuse") is None


@pytest.mark.parametrize(
    ("case", "peer", "expected"),
    [
        (Case("mobilenet_v2", 256, "float16", "channels_last"), "compile", 1.9),
        (Case("mobilenet_v2", 256, "float16", "channels_last"), "max_autotune", 1.75),
        (Case("mobilenet_v2", 32, "float16", "channels_last"), "reduce_overhead", 1.8),
        (Case("shufflenet_v2_x1_0", 1, "float16", "channels_last"), "reduce_overhead", 1.3),
        (Case("mnasnet1_0", 256, "float16", "channels_last"), "compile", 1.25),
        (Case("convnext_tiny", 256, "float16", "channels_last"), "compile", 1.1),
        (Case("convnext_tiny", 1, "float16", "channels_last"), "reduce_overhead", None),
        (Case("mobilenet_v2", 256, "float32", "contiguous"), "eager_nchw", 3.0),
        (Case("mobilenet_v2", 256, "float32", "contiguous"), "compile", 1.4),
        (Case("mobilenet_v2", 256, "float16", "channels_last", 128), "compile", None),
        (Case("maxvit_t", 1, "bfloat16", "contiguous"), "eager", 1.0),
        (Case("maxvit_t", 1, "bfloat16", "contiguous"), "compile", None),
    ],
)
def test_targets(case, peer, expected):
    assert target(case, peer) == expected


def cells(table, row) -> dict[str, tuple[str, bool]]:
    heads, rows = table
    return dict(zip(heads, rows[row], strict=True))


def test_table_of_a_case():
    subject = result(
        run("eager_channels_last", peak_bytes=40_000_000),
        run("compile", 1500.0, 1.5, 1.875),
        Measured("max_autotune", reason="OutOfMemoryError: [GPU 0]"),
    )
    ours = cells(case_rows(subject), 0)
    assert ours["ms"] == ("1.000", False)
    assert ours["images/s"] == ("256,000", False)
    assert ours["peak MB"] == ("50", True)  # more than eager's
    assert ours["build s"] == ("0.5", False)
    compiled = cells(case_rows(subject), 3)
    assert compiled["dwswap faster"] == ("1.50", True)  # below 1.9
    assert compiled["cuda_graph faster"] == ("1.88", True)
    failed = cells(case_rows(subject), 4)
    assert failed["note"] == ("OutOfMemoryError: [GPU 0]", True)
    assert failed["ms"] == ("", False)
    slow = replace(subject, runs=[run("dwswap", build_s=5.5, error_ratio=1.3)])
    assert cells(case_rows(slow), 0)["build s"] == ("5.5", True)
    assert cells(case_rows(slow), 0)["RMS of eager's"] == ("1.30", True)
    assert cells(profile_rows(subject), 0)["percent"] == ("60.0", False)


def test_markdown():
    rows = [
        result(
            run("eager_nchw", plain=3.0, graph=4.0),
            run("eager_channels_last"),
            run("compile", plain=1.8, graph=1.85),
        ),
        result(run("eager_nchw", plain=0.9, graph=0.95), model="maxvit_t", batch=1),
        result(Measured("eager_nchw", reason="OOM"), model="maxvit_t", batch=32),
    ]
    assert markdown(rows) == [
        "Milliseconds per call, and how many times faster dwswap is than each, without / with "
        "`cuda_graph=True` (the better one's target in parentheses):",
        "",
        "| model | batch | dtype | layout | dwswap ms | cuda_graph ms | images/s "
        "| over eager NCHW | over eager channels_last | over compile |",
        "| --- | ---: | --- | --- | ---: | ---: | ---: | ---: | ---: | ---: |",
        "| mobilenet_v2 | 256 | float16 | channels_last | 1.000 | 0.800 | 320,000 "
        "| 3.00 / 4.00 | 2.00 / 2.50 | **1.80 / 1.85 (1.9)** |",
        "",
        "How many times faster than eager in the better of NCHW and channels_last, without / with "
        "`cuda_graph=True`:",
        "",
        "| model | dtype | layout | batch 1 | batch 32 | batch 256 |",
        "| --- | --- | --- | ---: | ---: | ---: |",
        "| mobilenet_v2 | float16 | channels_last |  |  | 2.00 / 2.50 |",
        "| maxvit_t | float16 | channels_last | **0.90 / 0.95** |  |  |",
    ]
    assert markdown([]) == ["Nothing was measured."]


def test_readme_merges_records(tmp_path, readme_table):
    one, two = record(tmp_path / "one.json"), record(tmp_path / "two.json")
    one.add(result(run("eager_nchw"), run("compile", plain=1.95, graph=2.05)))
    one.save()
    assert readme_table.section(tmp_path) == readme_table.NOTHING
    one.finish()
    # The same case with fewer peers, and another case.
    two.add(result(run("eager_nchw", plain=7.0, graph=8.0)))
    two.add(result(run("eager_nchw"), run("reduce_overhead"), batch=1))
    two.finish()
    text = readme_table.section(tmp_path)
    assert text.count("`dwswap bench models`") == 1
    assert "1.95 / 2.05 (1.9) |" in text
    assert "2.00 / 2.50 (1.8) |" in text
    assert "7.00" not in text
    assert "(benchmarks/results/models-some-gpu.png)" in text
    assert "eager.png" not in text
    two.add(result(run("eager_nchw"), model="vgg"))
    two.finish()
    assert "(benchmarks/results/models-some-gpu-eager.png)" in readme_table.section(tmp_path)
    two.add(result(batch=32, passed=False))
    two.finish()
    with pytest.raises(ValueError, match="failed its check"):
        readme_table.section(tmp_path)


def test_the_headline_of_the_readme(tmp_path, readme_table):
    assert readme_table.headline(tmp_path) == readme_table.NOTHING
    found = record(tmp_path / "one.json")
    found.add(result(run("eager_nchw"), run("compile", plain=1.95, graph=2.05)))
    found.add(result(run("eager_nchw"), batch=1))  # nothing compiled
    found.finish()
    *lines, _, recorded = readme_table.headline(tmp_path).splitlines()
    (row,) = [line for line in lines if "| mobilenet_v2 |" in line]
    assert "| mobilenet_v2 | 256 | " in row
    assert row.endswith(" | 2.0 |")
    assert recorded.startswith("Recorded ")


# the picture


def test_plot(tmp_path):
    pytest.importorskip("matplotlib")
    pytest.importorskip("PIL")
    from PIL import Image

    from dwswap.bench import model_plot

    rows = [
        result(run("eager_nchw"), run("compile"), batch=batch, model=name)
        for batch in (1, 256)
        for name in ("mobilenet_v2", "convnext_tiny")
    ]
    path = model_plot.plot(rows, tmp_path / "new" / "a.png", "title")
    with Image.open(path) as image:
        found = image.convert("RGB").getcolors(image.width * image.height)
    drawn = {"#{:02x}{:02x}{:02x}".format(*pixel) for _, pixel in found}
    colours = model_plot.COLOURS
    assert {colours["eager_nchw"], colours["compile"], model_plot.TARGET} <= drawn
    assert colours["reduce_overhead"] not in drawn
    assert set(colours) == {*RUNNERS, *TRAINING_PEERS} - set(OURS)


# the command


@pytest.mark.slow
def test_command(tmp_path, capsys, wide):
    assert command(tmp_path, "--batch", "1", "2", "--profile", "--peers", "eager", "fx_fuse") == 0
    names = sorted(path.name for path in tmp_path.iterdir())
    assert names == ["models-cpu-part.json", "models-cpu-part.png"]
    saved = json.loads((tmp_path / names[0]).read_text())
    assert (saved["kind"], saved["complete"]) == ("models", True)
    assert saved["settings"]["peers"] == ["eager", "fx_fuse"]
    assert {"torch", "commit", "gpu"} <= saved["environment"].keys()
    assert [(row["batch"], row["layout"]) for row in saved["results"]] == [
        (1, "channels_last"),
        (2, "channels_last"),
    ]
    assert all(row["passed"] and row["profile"] for row in saved["results"])
    assert saved["markdown"] == markdown([ModelResult.from_dict(**r) for r in saved["results"]])
    out = capsys.readouterr().out
    for text in ("fx fuse", "images/s", "peak MB", "GEMM, convolution", "say nothing", names[1]):
        assert text in out


@pytest.mark.slow
def test_command_is_ended_and_resumed(tmp_path, capsys, monkeypatch, wide):
    measured = []
    original = ModelBench.measure

    def measure(self, case, peers):
        if len(measured) == 1:
            raise KeyboardInterrupt
        measured.append(case)
        return original(self, case, peers)

    monkeypatch.setattr(ModelBench, "measure", measure)
    batches = ("--batch", "1", "2", "3")
    assert command(tmp_path, *batches) == 130
    assert "1 of 3 are in" in capsys.readouterr().out
    assert command(tmp_path, *batches) == 2
    assert "--resume goes on with it" in capsys.readouterr().err
    measured.append("no more interrupts")
    assert command(tmp_path, *batches, "--resume") == 0
    saved = json.loads((tmp_path / "models-cpu-part.json").read_text())
    assert [row["batch"] for row in saved["results"]] == [1, 2, 3]
    assert len(measured) == 4


def test_command_has_a_limit(tmp_path, capsys, monkeypatch, wide):
    clock = [0.0]
    monkeypatch.setattr(bench_models.time, "monotonic", lambda: clock[0])

    def measure(self, case, peers):
        clock[0] += 30.0
        return result(run("eager_nchw"), **case._asdict())

    monkeypatch.setattr(ModelBench, "measure", measure)
    batches = ("--batch", "1", "2", "3", "4", "--limit", "100")
    # The fourth would end after 120 seconds.
    assert command(tmp_path, *batches) == 0
    assert "3 of 4 are in" in capsys.readouterr().out
    assert [path.name for path in tmp_path.iterdir()] == ["models-cpu-part.partial.json"]
    assert command(tmp_path, *batches, "--resume") == 0
    names = sorted(path.name for path in tmp_path.iterdir())
    assert names == ["models-cpu-part.json", "models-cpu-part.png"]


def test_command_fails_on_wrong_numbers(tmp_path, capsys, monkeypatch, wide):
    wrong = Runner("wrong", lambda model, argument: lambda x: model(x) * 1.001)
    monkeypatch.setitem(RUNNERS, "dwswap", wrong)
    assert command(tmp_path) == 1
    assert f"FAILED: {HERE}-n1-float32-channels_last-16px" in capsys.readouterr().out


def test_command_defaults(tmp_path, capsys, monkeypatch, wide):
    seen = []

    def measure(self, case, peers):
        seen.append((case, tuple(peers)))
        return result(run("eager_nchw"), **case._asdict())

    monkeypatch.setattr(ModelBench, "measure", measure)
    given = ["bench", "models", "--device", "cpu", "--output", str(tmp_path)]
    assert main(given) == 0
    assert [case.model for case, _ in seen] == ["mobilenet_v2", *ACCEPTED]
    assert {peers for _, peers in seen} == {(*EAGER, "fx_fuse", "compile", "dwswap_compile")}
    seen.clear()
    assert main([*given, "--models", "all"]) == 0
    assert [case.model for case, _ in seen] == depthwise_models()
    assert {peers for _, peers in seen} == {EAGER}
    seen.clear()
    assert main([*given, "--select", "float32"]) == 0
    assert len(seen) == 1


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        (["--models", "mobilenet_v9"], "unknown model 'mobilenet_v9'"),
        (["--select", "resnet"], "--select: no case fits 'resnet'"),
        (["--device", "tpu"], "--device must be cpu or cuda, got 'tpu'"),
    ],
)
def test_command_refuses(tmp_path, capsys, wide, arguments, problem):
    assert command(tmp_path, *arguments) == 2
    assert problem in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("arguments", [["--batch", "0"], ["--peers", "tensorrt"], ["--limit", "x"]])
def test_command_refuses_values(tmp_path, capsys, arguments):
    with pytest.raises(SystemExit) as exit:
        command(tmp_path, *arguments)
    assert exit.value.code == 2
    assert arguments[0] in capsys.readouterr().err
