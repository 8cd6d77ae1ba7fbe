"""``dwswap bench layers``: shapes, measurements, record, summary, picture, and the command."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from dwswap import build
from dwswap.activations import ACTIVATIONS
from dwswap.bench import layers, run_record
from dwswap.bench.layer_record import LayerRecord
from dwswap.bench.layer_results import LayerResult, Skipped
from dwswap.bench.layer_summary import copy_target, markdown, speedup_target, summarize
from dwswap.bench.layers import LayerBench
from dwswap.bench.shapes import FIELDS, LayerShape, select, torchvision_shapes
from dwswap.cli import main

CPU = torch.device("cpu")
TINY = "height<=3,channels<=128"  # 128x1x1, 64x2x2 stride 2, 128x3x3 stride 2
SHAPE = LayerShape(
    index=5,
    channels=6,
    out_channels=6,
    height=9,
    width=7,
    kernel=(3, 3),
    stride=(2, 1),
    padding=(1, 0),
    dilation=(1, 1),
    bias=True,
)


def row(**changes) -> LayerResult:
    values = {
        "index": 0,
        "dtype": "float32",
        "layout": "contiguous",
        "shape": [64, 32, 112, 112],
        "kernel": [3, 3],
        "stride": [1, 1],
        "padding": [1, 1],
        "dilation": [1, 1],
        "bias": False,
        "family": "aten",
        "moved_bytes": 1_000_000,
        "ours_us": 10.0,
        "pytorch_us": 20.0,
        "copy_us": 8.0,
        "plain_us": None,
        "speedup": 2.0,
        "percent_of_copy": 80.0,
        "remeasured": False,
        "error": 1e-7,
        "pytorch_error": 1e-7,
        "error_limit": 3e-7,
        "problem": None,
        "passed": True,
    }
    return LayerResult(**(values | changes))


def bench(**changes) -> LayerBench:
    return LayerBench(CPU, **({"batch": 2, "budget": 0.0} | changes))


@pytest.fixture
def wide(monkeypatch):
    """No line is wrapped, so that texts can be looked for."""
    monkeypatch.setenv("COLUMNS", "300")


def command(folder: Path, *arguments: str) -> int:
    given = ["bench", "layers", "--device", "cpu", "--budget", "0", "--output", str(folder)]
    return main([*given, *(() if "--select" in arguments else ("--select", TINY)), *arguments])


# shapes


def test_shapes_are_all_different():
    shapes = torchvision_shapes()
    assert len(shapes) == 368
    assert [shape.index for shape in shapes] == list(range(368))
    assert len({str(shape) + str(shape.padding) for shape in shapes}) == 368


def test_output_sizes_are_those_of_pytorch():
    for shape in [*torchvision_shapes(), SHAPE]:
        x = torch.empty(1, shape.channels, shape.height, shape.width, device="meta")
        weight = torch.empty(shape.out_channels, 1, *shape.kernel, device="meta")
        y = F.conv2d(
            x, weight, None, shape.stride, shape.padding, shape.dilation, groups=shape.channels
        )
        assert tuple(y.shape[-2:]) == shape.output
        assert (shape.input_elements, shape.output_elements) == (x.numel(), y.numel())


def test_names_of_shapes():
    assert str(torchvision_shapes()[0]) == "16x112x112 k3 s1"
    assert str(SHAPE) == "6x9x7 k3 s2x1"
    assert str(select(torchvision_shapes(), "dilation=2")[0]).endswith("k5 s1 d2")


@pytest.mark.parametrize(
    ("expression", "count"),
    [
        ("kernel=7", 12),
        ("kernel==7, channels >= 96", 12),
        ("stride=2", 73 + 46),
        ("dilation>1", 4),
        ("bias!=0", 12),
        ("kernel<5", 157 + 73),
        ("model=mobilenet_v2", 10),
        ("12", 1),
        ("0:20", 20),
        (":20", 20),
        ("300:", 68),
        ("300:,0:301", 1),
        (":", 368),
    ],
)
def test_select(expression, count):
    assert len(select(torchvision_shapes(), expression)) == count


def test_select_takes_or_leaves_a_model():
    shapes = torchvision_shapes()
    taken, left = select(shapes, "model=mobilenet_v2"), select(shapes, "model!=mobilenet_v2")
    assert sorted(s.index for s in taken + left) == list(range(368))
    assert all("mobilenet_v2" in shape.models for shape in taken)


@pytest.mark.parametrize(
    ("expression", "problem"),
    [
        ("size=3", "unknown field 'size'"),
        ("kernel=big", "kernel must be compared with an integer, got 'kernel=big'"),
        ("kernel=3,", "cannot read the condition ''"),
        ("kernel", "cannot read the condition 'kernel'"),
        ("1-3", "cannot read the condition '1-3'"),
        ("kernel=9", "no shape meets 'kernel=9'"),
        ("model=mobilenet", "did you mean .*mobilenet_v2"),
        ("model<mobilenet_v2", "= and != only"),
    ],
)
def test_select_says_what_is_wrong(expression, problem):
    with pytest.raises(ValueError, match=problem) as caught:
        select(torchvision_shapes(), expression)
    if not expression.startswith("model") and expression != "kernel=big":
        assert all(field in str(caught.value) for field in FIELDS)


# measuring


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_measure(dtype, layout):
    result = bench(batch=3).measure(SHAPE, dtype, layout)
    assert result.passed
    assert result.error <= result.error_limit
    assert result.shape == [3, 6, 9, 7]
    # 9x7, kernel 3, stride 2x1, padding 1x0: the output is 5x5.
    width = 4 if dtype == "float32" else 2
    assert result.moved_bytes == 3 * 6 * (9 * 7 + 5 * 5) * width
    assert result.speedup == result.pytorch_us / result.ours_us
    assert result.percent_of_copy == 100 * result.copy_us / result.ours_us
    assert min(result.ours_us, result.pytorch_us, result.copy_us) > 0
    assert result.plain_us is None


@pytest.mark.parametrize("activation", [name for name in ACTIVATIONS if name != "none"])
def test_measure_with_activation(activation, monkeypatch):
    seen = []
    original = layers.depthwise_conv2d

    def spy(*args, **kwargs):
        seen.append((kwargs.get("input_activation"), kwargs.get("activation")))
        return original(*args, **kwargs)

    monkeypatch.setattr(layers, "depthwise_conv2d", spy)
    result = bench(activation=activation).measure(SHAPE, "float32", "channels_last")
    assert result.passed
    assert result.plain_us > 0
    assert set(seen) == {(activation, activation), (None, None)}


def test_inputs_are_windows_of_one_pool():
    subject = bench()
    first = subject._inputs(3, [2, 6, 9, 7], torch.float16, torch.channels_last)
    assert all(x.shape == (2, 6, 9, 7) for x in first)
    assert all(x.is_contiguous(memory_format=torch.channels_last) for x in first)
    assert len({x.data_ptr() for x in first}) == 3
    assert all(x.storage_offset() * 2 % 512 == 0 for x in first)
    assert not torch.equal(first[0], first[1])
    assert all(0.8 < float(x.float().std()) < 1.2 for x in first)
    smaller = subject._inputs(2, [2, 6, 5, 5], torch.float16, torch.contiguous_format)
    assert smaller[0].data_ptr() == first[0].data_ptr()
    assert smaller[0].is_contiguous()
    wider = subject._inputs(1, [2, 6, 5, 5], torch.float32, torch.contiguous_format)
    assert wider[0].dtype == torch.float32


def test_a_copy_is_measured_once_per_size(monkeypatch):
    sizes = []
    original = layers.time_copy

    def spy(num_bytes, *args, **kwargs):
        sizes.append(num_bytes)
        return original(num_bytes, *args, **kwargs)

    monkeypatch.setattr(layers, "time_copy", spy)
    subject = bench(copies={4 * 2 * 6 * 88: 1.25})
    found = [subject.measure(SHAPE, dtype, "contiguous") for dtype in layers.DTYPES]
    assert sizes == [2 * 2 * 6 * 88]
    assert found[0].copy_us == 1.25
    assert found[1].copy_us == found[2].copy_us


def wrong(change):
    original = layers.depthwise_conv2d

    def operator(*args, **kwargs):
        result = original(*args, **kwargs)
        change(result)
        return result

    return operator


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        (lambda y: y.add_(1e-3), None),
        (lambda y: y[-1, -1, -1, -1].fill_(math.nan), "not finite"),
        # Of two samples the last is the one that is compared with float64.
        (lambda y: y[0, 2, 1].add_(1e-3), "outside the samples"),
        (lambda y: y[0, 2, 1].fill_(math.nan), "outside the samples"),
    ],
)
def test_wrong_numbers_fail(monkeypatch, change, problem):
    monkeypatch.setattr(layers, "CHECK_ELEMENTS", 1)
    monkeypatch.setattr(layers, "depthwise_conv2d", wrong(change))
    result = bench().measure(SHAPE, "float32", "contiguous")
    assert not result.passed
    if problem:
        assert problem in result.problem


def test_launches_have_inputs_of_their_own():
    family, launches = bench().launches(SHAPE, "float32", "channels_last")
    assert family == "aten"
    outputs = [launch() for launch in launches]
    assert len(outputs) == layers.CPU_BUFFERS
    assert outputs[0].is_contiguous(memory_format=torch.channels_last)
    assert not torch.equal(outputs[0], outputs[1])


def test_another_layout_fails(monkeypatch):
    original = layers.depthwise_conv2d
    monkeypatch.setattr(
        layers, "depthwise_conv2d", lambda *args, **kwargs: original(*args, **kwargs).contiguous()
    )
    result = bench().measure(SHAPE, "float32", "channels_last")
    assert not result.passed
    assert "strides" in result.problem


def test_what_does_not_fit_is_skipped(monkeypatch):
    monkeypatch.setattr(layers, "available_bytes", lambda device: 1000)
    result = bench().measure(SHAPE, "float32", "contiguous")
    assert isinstance(result, Skipped)
    assert result.reason == "needs about 0.0 GB, 0.0 GB are free"


def test_out_of_memory_is_skipped(monkeypatch):
    def full(*args, **kwargs):
        raise torch.OutOfMemoryError("out of memory: tried to allocate 5 GiB\nmore")

    monkeypatch.setattr(layers, "time_copy", full)
    result = bench().measure(SHAPE, "float32", "contiguous")
    assert isinstance(result, Skipped)
    assert result.reason == "out of memory: tried to allocate 5 GiB"


def test_close_calls_get_the_best_of_three(monkeypatch):
    subject = bench()
    subject.device = torch.device("cuda")
    times = {"ours": iter([10.0, 9.0, 11.0]), "pytorch": iter([9.5, 10.5, 12.0])}
    monkeypatch.setattr(subject, "_time", lambda call, inputs, budgets=1: next(times[call]))
    calls = layers.Calls("ours", "plain", "pytorch", "exact", "family")
    assert subject._compare(calls.ours, calls.pytorch, []) == (9.0, 9.5, True)
    times = {"ours": iter([10.0]), "pytorch": iter([10.6])}
    assert subject._compare(calls.ours, calls.pytorch, []) == (10.0, 10.6, False)


# the record


def record(path, **changes) -> LayerRecord:
    return LayerRecord(path, device="CPU", settings={"batch": 1, "select": None} | changes)


def test_record_is_saved_as_it_grows(tmp_path, monkeypatch):
    monkeypatch.setattr(run_record, "SAVE_SECONDS", 0.0)
    made = record(tmp_path / "a.json")
    for index in range(3):
        made.add(row(index=index))
        saved = json.loads((tmp_path / "a.partial.json").read_text())
        assert [entry["index"] for entry in saved["results"]] == list(range(index + 1))
        assert not saved["complete"]
    made.add(Skipped(3, "float32", "contiguous", [1, 2, 3, 4], "too large"))
    assert not (tmp_path / "a.json").exists()

    again = record(tmp_path / "a.json")
    again.resume()
    assert again.done == made.done
    assert len(again.done) == 4
    assert again.copies == {1_000_000: 8.0}
    again.finish()
    assert [path.name for path in tmp_path.iterdir()] == ["a.json"]
    saved = json.loads((tmp_path / "a.json").read_text())
    assert saved["complete"]
    assert saved["skipped"][0]["reason"] == "too large"
    assert saved["summary"]["groups"][0]["shapes"] == 3


def test_record_is_not_saved_for_every_row(tmp_path, monkeypatch):
    monkeypatch.setattr(run_record, "SAVE_SECONDS", 3600.0)
    made = record(tmp_path / "a.json")
    made.add(row())
    assert list(tmp_path.iterdir()) == []
    made.save()
    assert [path.name for path in tmp_path.iterdir()] == ["a.partial.json"]


def test_resume_refuses_another_run(tmp_path, monkeypatch):
    made = record(tmp_path / "a.json", select="kernel=3")
    made.save()
    with pytest.raises(ValueError, match="settings select: 'kernel=3', now None"):
        record(tmp_path / "a.json").resume()
    monkeypatch.setenv("DWSWAP_PORTABLE", "1")
    with pytest.raises(ValueError, match="switches DWSWAP_PORTABLE: None, now '1'"):
        record(tmp_path / "a.json", select="kernel=3").resume()
    made.partial.write_text("{}")
    with pytest.raises(ValueError, match="no record of this version"):
        record(tmp_path / "a.json").resume()


def test_nothing_to_resume(tmp_path):
    made = record(tmp_path / "a.json")
    made.resume()
    assert made.done == set()


# the summary


def test_summary_of_speedups():
    rows = [
        row(index=1, speedup=8.0, shape=[64, 8, 9, 9]),
        row(index=2, speedup=0.5, shape=[64, 16, 5, 5], stride=[2, 2], dilation=[2, 2]),
        row(index=3, speedup=2.0, passed=False),
        row(index=4, speedup=0.96, dtype="float16", layout="channels_last"),
    ]
    first, second = summarize(rows)["groups"]
    assert (first["dtype"], first["layout"], first["shapes"]) == ("float32", "contiguous", 3)
    assert first["geomean"] == pytest.approx(2.0)  # the cube root of 8 * 0.5 * 2
    assert first["target"] == 4.0
    assert (first["worst"], first["worst_index"]) == (0.5, 2)
    assert first["worst_shape"] == "64x16x5x5 k3 s2 d2"
    assert (first["slower"], first["failed"]) == (1, 1)
    assert first["activation_cost"] is None
    assert (second["geomean"], second["slower"], second["target"]) == (0.96, 1, 1.5)


def test_summary_of_percentages():
    rows = [
        row(percent_of_copy=90.0, moved_bytes=64_000_000),
        row(percent_of_copy=70.0, moved_bytes=63_999_999),
        row(percent_of_copy=80.0, moved_bytes=1_000),
        row(percent_of_copy=40.0, kernel=[7, 7]),
        row(percent_of_copy=50.0, kernel=[7, 7]),
    ]
    found = {
        (entry["kernel"], entry["size"]): (entry["shapes"], entry["median"], entry["target"])
        for entry in summarize(rows)["copy"]
    }
    assert found == {
        (3, "large"): (1, 90.0, 85.0),
        (3, "small"): (2, 75.0, 75.0),
        (3, "all"): (3, 80.0, None),
        (7, "small"): (2, 45.0, None),
        (7, "all"): (2, 45.0, 55.0),
    }


def test_summary_without_targets():
    summary = summarize([row()], targets=False)
    assert summary["groups"][0]["target"] is None
    assert {entry["target"] for entry in summary["copy"]} == {None}
    assert "**" not in "\n".join(markdown(summary))


def test_summary_of_activations():
    rows = [row(ours_us=11.0, plain_us=10.0), row(ours_us=12.6, plain_us=12.0)]
    summary = summarize(rows)
    assert summary["groups"][0]["activation_cost"] == pytest.approx(7.5)
    assert "| +7.5 % |" in "\n".join(markdown(summary))


def test_targets():
    dtypes = ("float32", "float16", "bfloat16")
    assert [speedup_target(dtype, "channels_last") for dtype in dtypes] == [1.5, 1.5, 1.5]
    assert [speedup_target(dtype, "contiguous") for dtype in dtypes] == [4.0, 2.5, 4.0]
    assert [copy_target(7, dtype, "all") for dtype in dtypes] == [55.0, 45.0, 45.0]
    assert [copy_target(3, "float16", size) for size in ("large", "small")] == [85.0, 75.0]
    assert copy_target(5, "float16", "all") == 65.0
    assert copy_target(5, "float16", "large") is None
    assert copy_target(31, "float16", "all") is None


def test_markdown():
    rows = [
        row(speedup=2.0, percent_of_copy=74.0),
        row(speedup=5.0, percent_of_copy=80.0, layout="channels_last"),
    ]
    assert markdown(summarize(rows)) == [
        "Speedup over PyTorch's own convolution in the same layout:",
        "",
        "| dtype | layout | shapes | geometric mean | worst | shape of the worst | below 0.97 "
        "| failed checks |",
        "| --- | --- | ---: | ---: | ---: | --- | ---: | ---: |",
        "| float32 | contiguous | 1 | **2.00 (4)** | 2.00 | 64x32x112x112 k3 s1 | 0 | 0 |",
        "| float32 | channels_last | 1 | 5.00 (1.5) | 5.00 | 64x32x112x112 k3 s1 | 0 | 0 |",
        "",
        "Copy time / our time in percent, median:",
        "",
        "| kernel | input + output | float32 contiguous | float32 channels_last |",
        "| --- | --- | ---: | ---: |",
        "| 3x3 | below 64 MB | **74.0 (75)** | 80.0 (75) |",
        "| 3x3 | all sizes | 74.0 | 80.0 |",
    ]
    assert markdown(summarize([])) == ["Nothing was measured."]


# the picture


def colours(path: Path) -> set[str]:
    from PIL import Image

    with Image.open(path) as image:
        found = image.convert("RGB").getcolors(image.width * image.height)
    return {"#{:02x}{:02x}{:02x}".format(*pixel) for _, pixel in found}


@pytest.mark.slow
def test_plot(tmp_path):
    pytest.importorskip("matplotlib")
    pytest.importorskip("PIL")
    from dwswap.bench import layer_plot

    rows = [
        row(dtype=dtype, layout=layout, kernel=[k, k], moved_bytes=10 ** (k + 1), speedup=k - 2.5)
        for dtype in ("float32", "float16")
        for layout in ("contiguous", "channels_last")
        for k in (3, 5, 7)
    ]
    path = layer_plot.plot(rows, tmp_path / "new" / "a.png", "title")
    drawn = colours(path)
    # The lines of the targets; the points are translucent.
    assert {*layer_plot.COLOURS.values(), layer_plot.TARGET, "#000000"} <= drawn
    bare = colours(layer_plot.plot(rows, tmp_path / "b.png", "title", targets=False))
    assert layer_plot.TARGET not in bare
    failed = [*rows, row(passed=False)]
    assert layer_plot.TARGET in colours(
        layer_plot.plot(failed, tmp_path / "c.png", "title", targets=False)
    )


def test_plot_of_one_point(tmp_path):
    pytest.importorskip("matplotlib")
    pytest.importorskip("PIL")
    from dwswap.bench.layer_plot import plot

    assert len(colours(plot([row()], tmp_path / "a.png", "title"))) > 10


# the README


def test_readme_takes_whole_runs_only(tmp_path, readme_table):
    part = record(tmp_path / "part.json")
    part.add(row())
    part.finish()
    assert readme_table.NOTHING in readme_table.page(readme_table.newest_records(tmp_path))
    for batch, speedup in ((64, 4.5), (1, 3.25)):
        settings = {"batch": batch}
        whole = LayerRecord(
            tmp_path / f"whole-{batch}.json", device="Some GPU", settings=settings, whole=True
        )
        whole.add(row(speedup=speedup))
        whole.save()
        assert f"N = {batch}" not in readme_table.page(readme_table.newest_records(tmp_path))
        whole.finish()
    text = readme_table.page(readme_table.newest_records(tmp_path))
    assert "N = 64, on Some GPU" in text
    assert "| float32 | contiguous | 1 | 4.50 |" in text
    assert "| float32 | contiguous | 1 | 3.25 |" in text
    assert "Copy time / our time" in text
    assert "whole-64.png" not in text
    selection = readme_table.selection(readme_table.newest_records(tmp_path))
    assert "| float32 | contiguous | 1 | 4.50 |" in selection
    assert "3.25" not in selection
    assert "Copy time / our time" not in selection
    (tmp_path / "whole-64.png").touch()
    assert "(results/whole-64.png)" in readme_table.page(readme_table.newest_records(tmp_path))
    whole.add(row(index=1, passed=False))
    whole.finish()
    with pytest.raises(ValueError, match="failed its check"):
        readme_table.page(readme_table.newest_records(tmp_path))


# the command


def test_command(tmp_path, capsys, wide):
    assert command(tmp_path, "--dtype", "float32", "bfloat16", "--batch", "2") == 0
    names = sorted(path.name for path in tmp_path.iterdir())
    assert names == ["layers-cpu-n2-part.json", "layers-cpu-n2-part.png"]
    saved = json.loads((tmp_path / names[0]).read_text())
    assert saved["kind"] == "layers"
    assert saved["complete"]
    assert not saved["whole"]
    assert {"torch", "commit", "gpu"} <= saved["environment"].keys()
    assert saved["settings"]["select"] == TINY
    assert saved["settings"]["reduced"]
    keys = {(r["index"], r["dtype"], r["layout"]) for r in saved["results"]}
    assert len(keys) == len(saved["results"]) == 3 * 2 * 2
    assert all(r["passed"] and r["shape"][0] == 2 for r in saved["results"])
    assert [group["shapes"] for group in saved["summary"]["groups"]] == [3, 3, 3, 3]
    assert saved["markdown"] == markdown(saved["summary"])
    # One row per line: a file that can be read, and compared in git.
    assert (tmp_path / names[0]).read_text().count('\n    {"index"') == 12
    out = capsys.readouterr().out
    assert "geometric mean" in out
    assert "say nothing about the kernels" in out
    assert names[1] in out


def test_command_output_may_be_a_file(tmp_path):
    assert command(tmp_path / "sub" / "mine.json", "--select", "41") == 0
    names = sorted(path.name for path in (tmp_path / "sub").iterdir())
    assert names == ["mine.json", "mine.png"]


def test_command_is_ended_and_resumed(tmp_path, capsys, monkeypatch, wide):
    assert command(tmp_path) == 0
    path = tmp_path / "layers-cpu-n1-part.json"
    earlier = path.read_text()
    measured = []
    original = LayerBench.measure

    def measure(self, shape, dtype, layout):
        if len(measured) == 2:
            raise KeyboardInterrupt
        measured.append((shape.index, dtype, layout))
        return original(self, shape, dtype, layout)

    monkeypatch.setattr(LayerBench, "measure", measure)
    assert command(tmp_path) == 130
    assert "2 of 6 are in" in capsys.readouterr().out
    assert path.read_text() == earlier
    partial = json.loads(path.with_suffix(".partial.json").read_text())
    assert len(partial["results"]) == 2

    assert command(tmp_path) == 2
    assert "--resume goes on with it" in capsys.readouterr().err
    assert command(tmp_path, "--resume", "--activation", "relu") == 2
    assert "settings activation: 'none', now 'relu'" in capsys.readouterr().err

    measured.append("no more interrupts")
    assert command(tmp_path, "--resume") == 0
    assert len(measured) == 3 + 4
    assert not path.with_suffix(".partial.json").exists()
    saved = json.loads(path.read_text())
    assert saved["results"][:2] == partial["results"]
    assert len({(r["index"], r["layout"]) for r in saved["results"]}) == 6


def test_command_saves_before_it_fails(tmp_path, monkeypatch):
    monkeypatch.setattr(LayerBench, "measure", lambda *args: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        command(tmp_path)
    assert json.loads((tmp_path / "layers-cpu-n1-part.partial.json").read_text())["results"] == []


def test_command_fails_on_wrong_numbers(tmp_path, capsys, monkeypatch, wide):
    monkeypatch.setattr(layers, "depthwise_conv2d", wrong(lambda y: y.add_(1e-3)))
    assert command(tmp_path, "--select", "41", "--layout", "contiguous") == 1
    out = capsys.readouterr().out
    assert "FAILED float32 contiguous 1x128x1x1" in out
    assert "FAILED: 1 checks, shapes 41" in out


def test_command_without_memory(tmp_path, capsys, monkeypatch, wide):
    monkeypatch.setattr(layers, "available_bytes", lambda device: 0)
    assert command(tmp_path) == 1
    out = capsys.readouterr().out
    assert "skipped float32 contiguous 1x128x1x1" in out
    assert "nothing could be measured" in out
    saved = json.loads((tmp_path / "layers-cpu-n1-part.json").read_text())
    assert len(saved["skipped"]) == 6


def test_command_without_matplotlib(tmp_path, capsys, monkeypatch):
    for name in ("matplotlib", "matplotlib.figure", "matplotlib.backends.backend_agg"):
        monkeypatch.setitem(sys.modules, name, None)
    assert command(tmp_path, "--select", "41") == 0
    assert "dwswap[bench]" in capsys.readouterr().out
    assert [path.suffix for path in tmp_path.iterdir()] == [".json"]


def test_command_needs_a_gpu(capsys, monkeypatch, wide):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert main(["bench", "layers"]) == 2
    assert "--device cpu" in capsys.readouterr().err


def test_command_needs_the_kernels(capsys, monkeypatch, wide):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(build, "load", lambda: False)
    monkeypatch.setattr(build, "status", lambda: build.Status(reason="no compiler"))
    assert main(["bench", "layers"]) == 2
    assert "the CUDA kernels are not loaded: no compiler" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        (["--select", "size=3"], "--select: unknown field 'size'"),
        (["--device", "tpu"], "--device must be cpu or cuda, got 'tpu'"),
        (["--cold-code"], "--cold-code needs a GPU, got --device cpu"),
    ],
)
def test_command_refuses(tmp_path, capsys, wide, arguments, problem):
    assert command(tmp_path, *arguments) == 2
    assert problem in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "arguments",
    [["--batch", "0"], ["--budget", "-1"], ["--dtype", "int8"], ["--activation", "tanh"]],
)
def test_command_refuses_values(tmp_path, capsys, arguments):
    with pytest.raises(SystemExit) as exit:
        command(tmp_path, *arguments)
    assert exit.value.code == 2
    assert arguments[0] in capsys.readouterr().err
