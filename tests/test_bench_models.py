"""``dwswap bench models``: cases, peers, and what is measured."""

from __future__ import annotations

import math
import statistics
import weakref
from itertools import pairwise

import pytest
import torch
from bench_model_cases import CASE, CPU, bench, small
from torch import nn

from dwswap.bench import latency, model_peers, models, random_weights
from dwswap.bench.latency import TURN, MemoryMeter, median_within, time_rounds, time_stream
from dwswap.bench.model_cases import ACCEPTED, Case, choose, defaults, depthwise_models, product
from dwswap.bench.model_peers import EAGER, OURS, RUNNERS, Runner, chosen_peers
from dwswap.bench.model_subject import Subject
from dwswap.bench.models import ModelBench

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
    assert on_cpu == [*EAGER, "fx_fuse", "compile", "dwswap_compile", "dwswap_backend"]
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


def test_time_rounds(monkeypatch):
    """A warm call and three timed ones of each, in turns; as many rounds as the slower allows."""
    clock, calls = [0.0], []

    def takes(name, seconds):
        def call():
            calls.append(name)
            clock[0] += seconds

        return call

    monkeypatch.setattr(latency.time, "perf_counter", lambda: clock[0])
    both = [takes("a", 0.125), takes("b", 0.25)]
    rounds = time_rounds(both, "cpu", budget=4.0, least=2)
    assert rounds == [[125_000.0, 250_000.0]] * 4
    one = ["a"] * (TURN + 1) + ["b"] * (TURN + 1)
    assert calls == ["a", "b"] + one * 4
    assert len(time_rounds(both, "cpu", budget=0.0, least=2)) == 2


@pytest.mark.parametrize(
    ("count", "outside"),
    # Of the binomial distribution with p = 1/2, by its tables: 2.5 % and less below.
    [(6, 0), (8, 0), (9, 1), (20, 5), (50, 17), (3000, 1445)],
)
def test_median_within(count, outside):
    """Half of the interval from the value with so many below it to that with as many above."""
    values = [float(i * i) for i in range(count)]
    median, within = median_within(values[::-1])
    assert median == statistics.median(values)
    assert within == (values[count - 1 - outside] - values[outside]) / 2


def test_median_within_of_too_few():
    assert median_within([1.0, 3.0, 2.0, 5.0, 4.0]) == (3.0, None)


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
