"""Models saved in every format, loaded in a fresh process, and what the files are."""

from __future__ import annotations

from pathlib import Path

import pytest
from export_models import MODELS, check_exports


@pytest.mark.parametrize("format", ["pt2", "aten"])
def test_programs_in_a_fresh_process(tmp_path: Path, format: str) -> None:
    check_exports(format, MODELS, tmp_path)


def test_onnx_in_a_fresh_process(tmp_path: Path) -> None:
    pytest.importorskip("onnxscript")
    pytest.importorskip("onnxruntime")
    check_exports("onnx", MODELS, tmp_path)


@pytest.mark.parametrize("name", MODELS)
def test_compiled_in_a_fresh_process(tmp_path: Path, name: str) -> None:
    check_exports("aoti", [name], tmp_path)
