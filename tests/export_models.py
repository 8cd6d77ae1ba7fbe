"""The models whose exports are tested, and fresh processes that load the files."""

from __future__ import annotations

import copy
import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from numerics import Judge
from torch import Tensor, nn

import dwswap
from dwswap.bench.random_weights import randomize
from dwswap.export import save

ROOT = Path(__file__).resolve().parents[1]
MODELS = (
    "mobilenet_v2",
    "mobilenet_v3_large",
    "efficientnet_b0",
    "shufflenet_v2_x1_0",
    "convnext_tiny",
)
# A block of each of the five: their compilation is most of the time that a test takes.
BLOCKS = "blocks"
SIDE = 64
BATCH = 3

# Each reads inputs from and writes outputs to .npy files; only the first may know dwswap.
_READ = """
import json, sys
import numpy as np
jobs = json.loads(sys.argv[1])
"""
_RUN_TORCH = """
torch.backends.cudnn.allow_tf32 = False
with torch.no_grad():
    for job in jobs:
        model = load(job["path"])
        x = torch.from_numpy(np.load(job["input"])).to(job["device"])
        np.save(job["output"], model(x).cpu().numpy())
"""
_ALONE = "assert not any(name.split('.')[0] == 'dwswap' for name in sys.modules), 'dwswap'\n"
PROGRAMS = {
    "pt2": _READ + "import torch, dwswap\nload = dwswap.export.load\n" + _RUN_TORCH,
    "aten": _READ
    + "import torch\nload = lambda path: torch.export.load(path).module()\n"
    + _RUN_TORCH
    + _ALONE,
    "aoti": _READ
    + "import torch\nload = torch._inductor.aoti_load_package\n"
    + "for library in sys.argv[2:]: torch.ops.load_library(library)\n"
    + _RUN_TORCH
    + _ALONE,
    "onnx": _READ
    + """
import onnxruntime
for job in jobs:
    session = onnxruntime.InferenceSession(job["path"], providers=["CPUExecutionProvider"])
    x = np.load(job["input"])
    np.save(job["output"], session.run(None, {session.get_inputs()[0].name: x})[0])
assert "torch" not in sys.modules
""",
}


def build_blocks() -> nn.Module:
    pytest.importorskip("torchvision")
    from torchvision.models import convnext, efficientnet, mobilenetv2, mobilenetv3, shufflenetv2
    from torchvision.ops import Conv2dNormActivation

    norm = nn.BatchNorm2d
    gated = mobilenetv3.InvertedResidualConfig(16, 5, 32, 16, True, "HS", 2, 1, 1.0)
    return nn.Sequential(
        Conv2dNormActivation(3, 16, stride=2, activation_layer=nn.Hardswish),
        mobilenetv2.InvertedResidual(16, 16, 2, 2),
        mobilenetv3.InvertedResidual(gated, norm),
        efficientnet.MBConv(efficientnet.MBConvConfig(2, 3, 1, 16, 16, 1), 0.0, norm),
        shufflenetv2.InvertedResidual(16, 16, 1),
        convnext.CNBlock(16, 1.0, 0.0),
        Conv2dNormActivation(16, 256, 1, activation_layer=nn.ReLU),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        # The largest of few errors would be chance.
        nn.Linear(256, 1000),
    )


def build_model(name: str, device: str = "cpu", dtype: torch.dtype = torch.float32) -> nn.Module:
    """Untrained, but with the BatchNorm statistics of its own activations."""
    models = pytest.importorskip("torchvision").models
    torch.manual_seed(0)
    model = build_blocks() if name == BLOCKS else models.get_model_builder(name)(weights=None)
    randomize(model, torch.randn(4, 3, SIDE, SIDE))
    return model.to(device, dtype)


def picture(batch: int = BATCH) -> Tensor:
    """A batch of another size than the one that is exported."""
    generator = torch.Generator().manual_seed(1)
    return torch.randn(batch, 3, SIDE, SIDE, generator=generator)


def run_fresh(format: str, jobs: list[dict[str, str]], *libraries: Path) -> None:
    """Load and run files of ``format`` in a fresh process: ``path``, ``input``, ``output``.

    Args:
        jobs: paths, and the ``device`` for the input.
        libraries: to be loaded before, by a process that does not know dwswap.
    """
    done = subprocess.run(
        [sys.executable, "-c", PROGRAMS[format], json.dumps(jobs), *map(str, libraries)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr


def check_exports(
    format: str,
    names: Sequence[str],
    folder: Path,
    *libraries: Path,
    device: str = "cpu",
    dtype: torch.dtype = torch.float32,
) -> None:
    """Save models in ``format``, run the files in a fresh process, judge the outputs by the rule.

    The files are made of one picture, for any batch, and run on three.
    """
    jobs = []
    models = {name: build_model(name, device, dtype) for name in names}
    x = picture().to(dtype)
    np.save(folder / "input.npy", x.numpy())
    for name, model in models.items():
        fast = dwswap.optimize(model)
        path = folder / (name + (".onnx" if format == "onnx" else ".pt2"))
        example = x[:1].to(device)
        assert save(fast, path, example, format=format, dynamic_batch=True) == path
        output = folder / f"{name}.npy"
        files = {"path": path, "input": folder / "input.npy", "output": output}
        jobs.append({key: str(file) for key, file in files.items()} | {"device": device})
    run_fresh(format, jobs, *libraries)
    judge = Judge()
    for job, (name, model) in zip(jobs, models.items(), strict=True):
        ours = torch.from_numpy(np.load(job["output"]))
        with torch.no_grad():
            theirs = model(x.to(device)).cpu()
            exact = copy.deepcopy(model).double()(x.double().to(device)).cpu()
        judge.add(f"{name} as {format}", ours, theirs, exact)
        if format == "onnx":
            assert (ours - theirs).abs().max() <= 1e-4 * theirs.abs().max(), name
            _check_standard(job["path"])
    judge.check()


def _check_standard(path: str) -> None:
    """No operator of another domain than ONNX's own, and no function made of operators."""
    model = pytest.importorskip("onnx").load(path)
    assert {node.domain for node in model.graph.node} <= {"", "ai.onnx"}
    assert {opset.domain for opset in model.opset_import} <= {"", "ai.onnx"}
    assert not model.functions
    assert "Conv" in {node.op_type for node in model.graph.node}
