"""Models saved in every format, loaded in a fresh process, and what the files are."""

from __future__ import annotations

from pathlib import Path

import pytest
from export_models import BLOCKS, MODELS, check_exports

NAMES = [BLOCKS, *(pytest.param(name, marks=pytest.mark.slow) for name in MODELS)]
# A whole model: of a few layers onnxruntime alone can round more than the rule allows.
ONNX = "mobilenet_v3_large"


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("format", ["pt2", "aten"])
def test_programs_in_a_fresh_process(tmp_path: Path, format: str, name: str) -> None:
    check_exports(format, [name], tmp_path)


@pytest.mark.parametrize(
    "name", [n if n == ONNX else pytest.param(n, marks=pytest.mark.slow) for n in MODELS]
)
def test_onnx_in_a_fresh_process(tmp_path: Path, name: str) -> None:
    pytest.importorskip("onnxscript")
    pytest.importorskip("onnxruntime")
    check_exports("onnx", [name], tmp_path)


@pytest.mark.parametrize("name", NAMES)
def test_compiled_in_a_fresh_process(tmp_path: Path, name: str) -> None:
    check_exports("aoti", [name], tmp_path)
