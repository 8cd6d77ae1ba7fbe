"""``scripts/explore_cuts.py`` without a GPU: its arguments and its summary."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch
from rich.console import Console

SCRIPT = Path(__file__).resolve().parents[1] / "scripts" / "explore_cuts.py"


@pytest.fixture
def script(monkeypatch) -> ModuleType:
    # What the script changes when it is read is undone after the test.
    monkeypatch.setenv("DWSWAP_NVCC_FLAGS", "-lineinfo")
    monkeypatch.setattr(sys, "path", list(sys.path))
    spec = importlib.util.spec_from_file_location("explore_cuts", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["plane_strips"], "--layout"),
        (["no_family", "--layout", "contiguous"], "no_family"),
        (["plane_strips", "--layout", "contiguous", "--select", "depth=3"], "'depth'"),
        (["plane_strips", "--layout", "contiguous", "--batch", "0"], "at least 1, got '0'"),
        (["plane_strips", "--layout", "contiguous", "--ranks", "1,2"], "begin with 0"),
    ],
)
def test_bad_arguments(script, monkeypatch, capsys, arguments, message):
    monkeypatch.setattr(sys, "argv", ["explore_cuts.py", *arguments])
    with pytest.raises(SystemExit, match="2"):
        script.main()
    assert message in capsys.readouterr().err


@pytest.mark.skipif(torch.cuda.is_available(), reason="is about machines without a CUDA GPU")
def test_without_a_gpu(tmp_path):
    output = tmp_path / "cuts.csv"
    done = subprocess.run(
        [sys.executable, str(SCRIPT), "diagonal", "--layout", "channels_last", "-o", str(output)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1
    assert "sees no CUDA GPU" in done.stderr
    assert not output.exists()


def test_summary(script):
    """Two shapes: the chosen cuts take 10 and 30 us, the best ones 8 and 30, copies 4 and 15."""
    rows = [
        dict(zip(script.COLUMNS, (shape, 8, 9, 9, 3, 1, rank, f"{rank}", us, copy), strict=True))
        for shape, rank, us, copy in ((0, 0, 10.0, 4.0), (0, 1, 8.0, 4.0), (1, 0, 30.0, 15.0))
    ]
    console = Console(width=120)
    with console.capture() as captured:
        console.print(script.summary(rows))
    cells = captured.get().split()
    # 1.25 and 1: the root of 1.25; 40 and 50 %.
    assert {"1.118", "1.25", "44.7", "50.0"} <= set(cells)


def test_flags_of_the_user_stay(script):
    assert script.os.environ["DWSWAP_NVCC_FLAGS"].split() == ["-lineinfo", "-DDWSWAP_EXPLORE"]
