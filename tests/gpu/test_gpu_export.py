"""Exports on the GPU: every format in a fresh process, and the library for hosts without Python.

The compiled packages keep our operator, and run in processes that have only the operator library.
"""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from cpp_example import build_classify, run
from export_models import MODELS, check_exports
from test_examples import run as run_example
from tiny_models import Block, image

import dwswap
from dwswap import build
from dwswap.export import load, save

pytestmark = pytest.mark.gpu
DTYPES = (torch.float32, torch.float16)


@pytest.fixture(scope="module")
def library() -> Path:
    """The operator library that needs no Python, for the GPUs at hand."""
    return build.build(standalone=True)


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype)[6:])
@pytest.mark.parametrize("format", ["pt2", "aten"])
def test_programs_in_a_fresh_process(tmp_path, format, dtype):
    check_exports(format, MODELS, tmp_path, device="cuda", dtype=dtype)


@pytest.mark.parametrize("name", MODELS)
def test_onnx_in_a_fresh_process(tmp_path, name):
    pytest.importorskip("onnxscript")
    pytest.importorskip("onnxruntime")
    check_exports("onnx", [name], tmp_path, device="cuda")


@pytest.mark.slow
@pytest.mark.parametrize("name", MODELS)
def test_compiled_in_a_process_with_the_library_alone(tmp_path, library, name):
    check_exports("aoti", [name], tmp_path, library, device="cuda", dtype=torch.float16)


def test_compiled_in_float32(tmp_path, library):
    check_exports("aoti", MODELS[:1], tmp_path, library, device="cuda")


@pytest.mark.parametrize("memory_format", ["preserve", "channels_last"])
def test_compiled_packages_keep_the_operator(tmp_path, memory_format):
    model = Block().eval().cuda()
    fast = dwswap.optimize(model, memory_format=memory_format)
    x = image().cuda()
    path = save(fast, tmp_path / "m.pt2", x, format="aoti", dynamic_batch=True)
    assert b"dwswap::depthwise_conv2d" in path.read_bytes()
    loaded = load(path)
    for given in (x, x[:1], x.to(memory_format=torch.channels_last), x.repeat(3, 1, 1, 1)):
        with torch.no_grad():
            expected = fast(given)
        torch.testing.assert_close(loaded(given), expected)
    with pytest.raises(TypeError, match="must be float32 on cuda, got float32 on cpu"):
        loaded(x.cpu())


def test_inputs_on_another_device_than_the_model(tmp_path):
    fast = dwswap.optimize(Block().eval().cuda())
    with pytest.raises(ValueError, match="must be on one device, got tensors on cpu, cuda:0"):
        save(fast, tmp_path / "m.pt2", image())


def test_dtypes_without_a_kernel_say_so_without_python(tmp_path, library):
    code = """
import sys, torch
torch.ops.load_library(sys.argv[1])
x = torch.ones(1, 2, 5, 5, device="cuda", dtype=torch.complex64)
weight = torch.ones(2, 1, 3, 3, device="cuda", dtype=torch.complex64)
depthwise = torch.ops.dwswap.depthwise_conv2d
print(depthwise(x.real.clone(), weight.real.clone(), None, [1, 1], [1, 1], [1, 1]).sum().item())
depthwise(x, weight, None, [1, 1], [1, 1], [1, 1])
"""
    done = run(sys.executable, "-c", code, library)
    assert done.returncode != 0
    assert done.stdout.strip() == "338.0"
    assert "a process without Python does not have it" in done.stderr


def test_the_cpp_example_prints_what_python_prints(tmp_path, library):
    arguments = ["--format", "aoti", "--dtype", "float16", "--output", str(tmp_path)]
    done = run_example("export_and_serve.py", *arguments, device="cuda")
    assert done.returncode == 0, done.stderr
    classify = build_classify(tmp_path / "build")
    package, picture = tmp_path / "model.pt2", tmp_path / "picture.ppm"
    told = run(classify, package, picture, library)
    assert told.returncode == 0, told.stderr
    assert told.stdout.splitlines() == done.stdout.splitlines()[-5:]
    # Without the library it says which operator is missing.
    told = run(classify, package, picture)
    assert told.returncode == 1
    assert "dwswap::depthwise_conv2d" in told.stderr
