"""The export example, and the C++ example with the files that it leaves."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from cpp_example import build_classify, run
from test_examples import load
from test_examples import run as run_example

pytest.importorskip("torchvision")
pytest.importorskip("PIL")


@pytest.mark.slow
def test_export_and_serve_and_classify(tmp_path: Path) -> None:
    arguments = ["--model", "mnasnet0_5", "--format", "aoti", "--batch", "3"]
    done = run_example("export_and_serve.py", *arguments, "--output", str(tmp_path))
    assert done.returncode == 0, done.stderr
    assert "the same class for 3 of 3 pictures" in done.stdout
    top5 = done.stdout.splitlines()[-5:]

    classify = build_classify(tmp_path / "build")
    package, picture = tmp_path / "model.pt2", tmp_path / "picture.ppm"
    told = run(classify, package, picture)
    assert told.returncode == 0, told.stderr
    assert told.stdout.splitlines() == top5

    # What it says of files that are wrong.
    cut, small = tmp_path / "cut.ppm", tmp_path / "small.ppm"
    cut.write_bytes(picture.read_bytes()[:-1])
    small.write_bytes(b"P6\n8 8\n255\n" + bytes(8 * 8 * 3))
    for files, text in (
        ((package, cut), "cut.ppm ends before its last pixel"),
        ((package, small), "unmatched dim value"),
        ((package, package), "must be a binary PPM"),
        ((package, picture, tmp_path / "missing.so"), "missing.so"),
    ):
        told = run(classify, *files)
        assert told.returncode == 1
        assert text in told.stderr
        assert told.stdout == ""
    assert run(classify).returncode == 2


def test_export_and_serve_refuses_no_pictures(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["export_and_serve.py", "--batch", "0"])
    with pytest.raises(SystemExit) as exit:
        load("examples/export_and_serve.py").main()
    assert exit.value.code == 2
    assert "--batch must be at least 1, got 0" in capsys.readouterr().err
