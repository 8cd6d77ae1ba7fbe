"""The examples run as a user runs them, with less work, and fail where they must."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch
import torch.nn.functional as F
from torch import nn

ROOT = Path(__file__).resolve().parents[1]
# Python adds the folder of a script that it runs; examples import what they have in common.
sys.path.insert(0, str(ROOT / "examples"))


def run(
    example: str, *arguments: str, device: str = "cpu", launcher: tuple[str, ...] = ()
) -> subprocess.CompletedProcess[str]:
    """Run an example, from the checkout; ``launcher``: what Python runs it with."""
    paths = [str(ROOT), os.environ.get("PYTHONPATH", "")]
    script = str(ROOT / "examples" / example)
    return subprocess.run(
        [sys.executable, *launcher, script, "--device", device, *arguments],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths))},
        capture_output=True,
        text=True,
        check=False,
    )


def load(path: str) -> ModuleType:
    """A script as a module."""
    name = Path(path).stem
    spec = importlib.util.spec_from_file_location(f"dwswap_example_{name}", ROOT / path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def kernelbench():
    return load("examples/kernelbench.py")


# kernelbench


def test_kernelbench(tmp_path):
    path = tmp_path / "results.json"
    done = run("kernelbench.py", "--budget", "0.01", "--json", str(path))
    assert done.returncode == 0, done.stderr
    assert "reduced size" in done.stdout
    saved = json.loads(path.read_text())
    assert [row["problem"] for row in saved["results"]] == [82, 83, 84, 85]
    for row in saved["results"]:
        assert row["passed"]
        assert row["error"] <= row["error_limit"]
        assert min(row["eager_us"], row["ours_us"], row["copy_us"]) > 0


def test_kernelbench_refuses_other_problems(kernelbench, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["kernelbench.py", "--problems", "1"])
    with pytest.raises(SystemExit) as exit:
        kernelbench.main()
    assert exit.value.code == 2
    assert "82, 83, 84, 85" in capsys.readouterr().err


@pytest.mark.parametrize("number", [82, 83, 84, 85])
def test_kernelbench_models_are_the_problems(kernelbench, number):
    """Shapes, kernels and groups as KernelBench states them; checkpoints go both ways."""
    problem = next(p for p in kernelbench.PROBLEMS if p.number == number)
    model, model_new = problem.model(**problem.arguments), problem.model_new(**problem.arguments)
    expected = {
        82: ((16, 64, 512, 512), (3, 3)),
        83: ((64, 8, 512, 512), (3, 1)),
        84: ((64, 128, 256, 512), (3, 3)),
        85: ((32, 128, 128, 256), (3, 7)),
    }
    shape, kernel = expected[number]
    assert problem.full == shape
    assert type(model.conv2d) is nn.Conv2d
    assert model.conv2d.kernel_size == kernel
    assert model.conv2d.groups == model.conv2d.in_channels == shape[1]
    assert model.conv2d.bias is None
    model_new.load_state_dict(model.state_dict())
    x = torch.randn(problem.reduced)
    torch.testing.assert_close(model_new(x), model(x))


def test_kernelbench_fails_on_wrong_numbers(kernelbench, monkeypatch, capsys):
    class Wrong(kernelbench.Model82):
        def forward(self, x):
            return super().forward(x) + 1e-3

    problem = kernelbench.PROBLEMS[0]
    wrong = kernelbench.Problem(
        82, problem.model, Wrong, problem.arguments, problem.full, problem.reduced
    )
    monkeypatch.setattr(kernelbench, "PROBLEMS", [wrong])
    arguments = ["kernelbench.py", "--device", "cpu", "--budget", "0.01"]
    monkeypatch.setattr(sys, "argv", arguments)
    assert kernelbench.main() == 1
    assert "FAILED" in capsys.readouterr().out


# the results in the README and in benchmarks/RESULTS.md


def results(**changes):
    row = {
        "problem": 82,
        "shape": [16, 64, 512, 512],
        "kernel": [3, 3],
        "eager_us": 2500.0,
        "eager_channels_last_us": 700.0,
        "ours_us": 625.0,
        "copy_us": 500.0,
        "speedup": 4.0,
        "passed": True,
    }
    return {
        "kind": "kernelbench",
        "recorded": "2026-01-02T03:04:05+00:00",
        "environment": {"torch": "2.11.0"},
        "device": "Some GPU",
        "results": [row | changes],
    }


def test_readme_table_takes_the_newest_record(readme_table, tmp_path):
    (tmp_path / "b.json").write_text(json.dumps(results()))
    old = results(ours_us=9999.0) | {"recorded": "2025-01-01T00:00:00+00:00"}
    (tmp_path / "a.json").write_text(json.dumps(old))
    (tmp_path / "c.json").write_text(json.dumps({"kind": "another"}))
    text = readme_table.selection(readme_table.newest_records(tmp_path))
    assert "| 82 | 16x64x512x512 | 3x3 | 2,500 | 700 | 625 | 500 | 4.0 |" in text
    assert "9,999" not in text
    assert "Some GPU" in text
    assert text in readme_table.page(readme_table.newest_records(tmp_path))


def test_readme_table_refuses_failed_results(readme_table, tmp_path):
    (tmp_path / "a.json").write_text(json.dumps(results(passed=False)))
    with pytest.raises(ValueError, match="failed its check"):
        readme_table.selection(readme_table.newest_records(tmp_path))


def test_readme_table_keeps_the_rest(readme_table):
    readme = f"before\n{readme_table.START}\nold\n{readme_table.END}\nafter\n"
    after = readme_table.filled(readme, "new")
    assert after == f"before\n{readme_table.START}\nnew\n{readme_table.END}\nafter\n"
    with pytest.raises(ValueError, match="markers"):
        readme_table.filled("no markers", "new")


def test_check_sees_changes_of_both_documents(readme_table, tmp_path, monkeypatch, capsys):
    (tmp_path / "a.json").write_text(json.dumps(results()))
    readme, page = tmp_path / "README.md", tmp_path / "RESULTS.md"
    markers = ("HEADLINE_START", "HEADLINE_END", "START", "END")
    readme.write_text("\n".join(getattr(readme_table, name) for name in markers))
    command = ["readme_table.py", "--readme", str(readme), "--page", str(page)]
    command += ["--results", str(tmp_path)]

    def differing() -> list[Path]:
        monkeypatch.setattr(sys, "argv", [*command, "--check"])
        failed = readme_table.main()
        lines = capsys.readouterr().out.splitlines()
        assert failed == bool(lines)
        return [Path(line.split(": ")[0]) for line in lines]

    assert differing() == [readme, page]
    monkeypatch.setattr(sys, "argv", command)
    assert readme_table.main() == 0
    assert differing() == []
    for path in (readme, page):
        text = path.read_text()
        path.write_text(text.replace("| 4.0 |", "| 4.1 |"))
        assert differing() == [path]
        path.write_text(text)
    page.unlink()
    assert differing() == [page]


def test_results_are_up_to_date(readme_table, monkeypatch, capsys):
    """Every figure in the README and in benchmarks/RESULTS.md comes from a committed record."""
    monkeypatch.setattr(sys, "argv", ["readme_table.py", "--check"])
    assert readme_table.main() == 0, capsys.readouterr().out


# the one-liner of the README on a model small enough to read


def test_one_liner():
    import dwswap

    model = nn.Sequential(nn.Conv2d(8, 8, 3, padding=1, groups=8), nn.ReLU6()).eval()
    x = torch.randn(2, 8, 9, 9)
    fast = dwswap.optimize(model)
    with torch.no_grad():
        expected = F.conv2d(x, model[0].weight, model[0].bias, padding=1, groups=8).clamp(0, 6)
        torch.testing.assert_close(fast(x), expected)
