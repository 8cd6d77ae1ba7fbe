"""The command ``dwswap bench models``."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from bench_model_cases import HERE, interrupt_after_one, result, run

from dwswap.bench.model_cases import ACCEPTED, depthwise_models
from dwswap.bench.model_peers import EAGER, RUNNERS, Runner
from dwswap.bench.model_results import ModelResult
from dwswap.bench.model_summary import markdown
from dwswap.bench.models import ModelBench
from dwswap.cli import bench_models, main


@pytest.fixture
def wide(monkeypatch):
    """No line is wrapped, so that texts can be looked for."""
    monkeypatch.setenv("COLUMNS", "300")


def command(folder: Path, *arguments: str) -> int:
    given = ["bench", "models", "--device", "cpu", "--budget", "0", "--output", str(folder)]
    given += ["--size", "16", "--dtype", "float32"]
    model = () if "--models" in arguments else ("--models", HERE)
    peers = () if "--peers" in arguments else ("--peers", "eager")
    return main([*given, *model, *peers, *arguments])


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
    measured = interrupt_after_one(monkeypatch)
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
