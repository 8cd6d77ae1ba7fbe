"""Builds and runs ``examples/cpp``."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

SOURCES = Path(__file__).resolve().parents[1] / "examples" / "cpp"


def build_classify(folder: Path) -> Path:
    """The program, built by CMake below ``folder``; skips the test where a tool is missing."""
    cmake = shutil.which("cmake") or shutil.which("cmake", path=str(Path(sys.executable).parent))
    if cmake is None or shutil.which("g++") is None:
        pytest.skip("needs cmake and g++")
    prefix = f"-DCMAKE_PREFIX_PATH={torch.utils.cmake_prefix_path}"
    warnings = "-DCMAKE_CXX_FLAGS=-Wall -Wextra -Werror"
    for command in (
        [cmake, "-S", str(SOURCES), "-B", str(folder), prefix, warnings],
        [cmake, "--build", str(folder)],
    ):
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout + done.stderr
    return folder / "classify"


def run(*command: str | Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(list(map(str, command)), capture_output=True, text=True, check=False)
