"""Models saved in every format, loaded in a fresh process, and what the files are."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from export_models import BLOCKS, MODELS, check_exports
from torch import Tensor, nn

import dwswap

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


class WithDefaults(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.depthwise = nn.Conv2d(8, 8, 3, groups=8, padding=1)

    def forward(self, x: Tensor, scale: float = 2.0, y: float | Tensor = 3.0) -> Tensor:
        return scale * self.depthwise(x) + 10 * y


@pytest.mark.parametrize("names", ["xy", "yx"])
@pytest.mark.parametrize("dynamic_batch", [False, True])
@pytest.mark.parametrize("format", ["pt2", "aten"])
def test_keyword_inputs_of_a_graph(
    tmp_path: Path, format: str, dynamic_batch: bool, names: str
) -> None:
    """torch.export gives them to a graph by their order, and leaves out defaults between them."""
    model = WithDefaults().eval()
    inputs = {"x": torch.randn(2, 8, 7, 7), "y": torch.randn(2, 8, 7, 7)}
    given = {name: inputs[name] for name in names}
    path = tmp_path / "model.pt2"
    dwswap.export.save(
        dwswap.optimize(model), path, given, format=format, dynamic_batch=dynamic_batch
    )
    torch.testing.assert_close(dwswap.export.load(path)(**inputs), model(**inputs))
