"""``dwswap bench layers --backward``: measurements, record, summary, pictures, and the README."""

from __future__ import annotations

import importlib.util
import itertools
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from test_bench_layers import SHAPE, TINY

from dwswap.bench import gradients, layers
from dwswap.bench.gradient_record import GradientRecord
from dwswap.bench.gradient_results import PARTS, GradientResult
from dwswap.bench.gradients import GradientBench
from dwswap.bench.layers import CPU_BUFFERS
from dwswap.cli import main

ROOT = Path(__file__).resolve().parents[1]


def bench(**changes) -> GradientBench:
    return GradientBench(torch.device("cpu"), **({"batch": 3, "budget": 0.0} | changes))


def command(folder: Path, *arguments: str) -> int:
    given = ["bench", "layers", "--backward", "--device", "cpu", "--budget", "0"]
    return main([*given, "--select", TINY, "--output", str(folder), *arguments])


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_measure(dtype, layout):
    result = bench().measure(SHAPE, dtype, layout)
    assert result.passed
    assert result.shape == [3, 6, 9, 7]
    # 9x7, kernel 3, stride 2x1, padding 1x0: the output is 5x5.
    moved = 3 * 6 * (9 * 7 + 5 * 5) * (4 if dtype == "float32" else 2)
    assert [result.part(name).moved_bytes for name in PARTS] == [moved, moved, 3 * moved]
    for name in PARTS:
        row = result.part(name)
        assert row.key == result.key
        assert row.speedup == row.pytorch_us / row.ours_us
        assert row.percent_of_copy == 100 * row.copy_us / row.ours_us
    assert result.part("training").copy_us == 3 * result.part("input").copy_us
    assert GradientResult(**json.loads(json.dumps(result.to_dict()))) == result


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_launches_are_those_of_the_weight(layout):
    family, launches = bench().launches(SHAPE, "float32", layout)
    assert family == "aten"
    assert len(launches) == CPU_BUFFERS
    for launch in launches:
        of_input, of_weight, of_bias = launch()
        assert of_input is of_bias is None
        assert of_weight.shape == (6, 1, 3, 3)


def test_images_do_not_overlap(monkeypatch):
    seen = []
    original = GradientBench._compare

    def spy(self, ours, pytorch, inputs):
        seen.extend(image for images in inputs for image in images)
        return original(self, ours, pytorch, inputs)

    monkeypatch.setattr(GradientBench, "_compare", spy)
    bench().measure(SHAPE, "float32", "channels_last")
    places = sorted({(t.data_ptr(), t.data_ptr() + 4 * t.numel()) for t in seen})
    assert len(places) == 4
    assert all(end <= start for (_, end), (start, _) in itertools.pairwise(places))


@pytest.mark.parametrize("wrong", [0, 1])
def test_a_wrong_gradient_fails(monkeypatch, tmp_path, capsys, wrong):
    original = gradients.depthwise_conv2d_backward

    def spoilt(*args):
        results = list(original(*args))
        if results[wrong] is not None:
            results[wrong] = results[wrong] + 0.5
        return tuple(results)

    monkeypatch.setattr(gradients, "depthwise_conv2d_backward", spoilt)
    assert command(tmp_path, "--layout", "contiguous") == 1
    assert f"FAILED {('input', 'weight')[wrong]}: " in capsys.readouterr().out


@pytest.mark.parametrize(
    ("place", "problem"),
    [((0, 2, 1, 1), "result of all images"), ((-1, 2, 1, 1), None)],
    ids=["other", "last"],
)
def test_a_wrong_gradient_of_any_image_fails(monkeypatch, place, problem):
    """One image is compared with float64, the last; all are with PyTorch's."""
    monkeypatch.setattr(layers, "CHECK_ELEMENTS", 1)
    original = gradients.depthwise_conv2d_backward

    def spoilt(*args):
        grads = original(*args)
        if grads[0] is not None:
            grads[0][place] += 1e-3
        return grads

    assert bench().measure(SHAPE, "float32", "contiguous").passed
    monkeypatch.setattr(gradients, "depthwise_conv2d_backward", spoilt)
    result = bench().measure(SHAPE, "float32", "contiguous")
    assert not result.passed
    assert result.part("weight").passed
    assert problem is None or problem in result.part("input").problem


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_an_image_that_is_left_out_fails(monkeypatch, dtype):
    monkeypatch.setattr(layers, "CHECK_ELEMENTS", 1)
    original = gradients.depthwise_conv2d_backward

    def without_one(grad, *args):
        grad = grad.clone()
        grad[0] = 0
        return original(grad, *args)

    monkeypatch.setattr(gradients, "depthwise_conv2d_backward", without_one)
    result = bench(batch=64).measure(SHAPE, dtype, "contiguous")
    for name in ("input", "weight"):
        assert "result of all images" in result.part(name).problem


def test_what_does_not_fit_is_skipped(monkeypatch):
    monkeypatch.setattr(layers, "available_bytes", lambda device: 0)
    assert "GB are free" in bench().measure(SHAPE, "float32", "contiguous").reason


def test_command(tmp_path, capsys):
    assert command(tmp_path, "--layout", "channels_last", "--each") == 0
    out = capsys.readouterr().out
    assert all(f"{name}: float32 channels_last 1x128x1x1" in out for name in PARTS)
    (path,) = tmp_path.glob("*.json")
    found = json.loads(path.read_text(encoding="utf-8"))
    assert (found["kind"], found["complete"], found["whole"]) == ("gradients", True, False)
    assert len(found["results"]) == 3
    assert set(found["summary"]) == set(PARTS)
    assert all(f"{head}, speedup over PyTorch's:" in found["markdown"] for head in PARTS.values())
    if importlib.util.find_spec("matplotlib"):
        assert {p.name for p in tmp_path.glob("*.png")} == {
            f"{path.stem}-{name}.png" for name in PARTS
        }


def test_resume_goes_on(tmp_path):
    settings = {"batch": 3}
    first = GradientRecord(tmp_path / "a.json", device="CPU", settings=settings)
    first.add(bench().measure(SHAPE, "float32", "contiguous"))
    first.save()
    second = GradientRecord(tmp_path / "a.json", device="CPU", settings=settings)
    second.resume()
    assert second.results == first.results
    assert second.done == {(SHAPE.index, "float32", "contiguous")}
    assert second.copies == first.copies


def test_no_activation(tmp_path, capsys):
    assert command(tmp_path, "--activation", "relu") != 0
    assert "leave out --activation" in capsys.readouterr().err


def test_readme_merges_whole_runs_of_a_dtype_and_layout(tmp_path, readme_table):
    """The newest of each; runs of some shapes, or with switches, do not count."""
    settings = {
        "dtypes": ["float32"],
        "layouts": ["contiguous"],
        "batch": 3,
        "select": None,
        "reduced": False,
    }
    row = bench().measure(SHAPE, "float32", "contiguous").to_dict()
    row["parts"] = {name: {**part, "speedup": 2.0} for name, part in row["parts"].items()}

    def save(name: str, recorded: str, speedup: float, **changes) -> None:
        made = GradientRecord(tmp_path / name, device="GPU", settings={**settings, **changes})
        key = {"dtype": made_dtype(changes), "layout": changes.get("layouts", ["contiguous"])[0]}
        parts = {
            part: {**fields, **key, "speedup": speedup} for part, fields in row["parts"].items()
        }
        made.add(GradientResult(**{**row, **key, "parts": parts}))
        made.finish()
        found = json.loads((tmp_path / name).read_text(encoding="utf-8"))
        text = json.dumps({**found, "recorded": recorded})
        (tmp_path / name).write_text(text, encoding="utf-8")

    def made_dtype(changes) -> str:
        return changes.get("dtypes", ["float32"])[0]

    save("part.json", "2026-01-09", 9.5, select="0:1")
    save("cpu.json", "2026-01-09", 9.5, reduced=True)
    save("cold.json", "2026-01-09", 9.5, cold_code=True)
    assert readme_table.NOTHING in readme_table.page(readme_table.newest_records(tmp_path))
    save("old.json", "2026-01-01", 2.5)
    save("new.json", "2026-01-02", 3.5)
    save("half.json", "2026-01-01", 4.5, dtypes=["float16"], layouts=["channels_last"])
    text = readme_table.page(readme_table.newest_records(tmp_path))
    assert all(f"{head}, speedup over PyTorch's:" in text for head in PARTS.values())
    assert "3.50" in text
    assert "4.50" in text
    assert "2.50" not in text
    assert "9.50" not in text
    rows = [line for line in text.splitlines() if line.startswith("| float")]
    assert [row.split(" | ")[0] for row in rows] == ["| float32", "| float16"] * len(PARTS)
    assert text.count("gradients-gpu-n3-") == len(PARTS)
    assert readme_table.selection(readme_table.newest_records(tmp_path)) == readme_table.NOTHING


@pytest.mark.slow
def test_page_is_written_and_drawn(tmp_path):
    assert command(tmp_path, "--layout", "channels_last") == 0
    (path,) = tmp_path.glob("*.json")
    found = json.loads(path.read_text(encoding="utf-8"))
    found["settings"] |= {"select": None, "reduced": False}
    path.write_text(json.dumps(found), encoding="utf-8")
    readme = tmp_path / "README.md"
    markers = [
        f"<!-- {name}: start (scripts/readme_table.py) -->\n<!-- {name}: end -->\n"
        for name in ("headline", "results")
    ]
    readme.write_text("".join(markers), encoding="utf-8")
    script = ROOT / "scripts" / "readme_table.py"
    page = tmp_path / "RESULTS.md"
    given = ["--readme", str(readme), "--page", str(page), "--results", str(tmp_path)]
    subprocess.run([sys.executable, str(script), *given], check=True)
    shown = re.findall(r"\(results/(gradients-[^)]*)", page.read_text(encoding="utf-8"))
    assert len(shown) == len(PARTS)
    assert all((tmp_path / name).stat().st_size > 10_000 for name in shown)
