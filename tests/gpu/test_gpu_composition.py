"""Exported programs, ``torch.compile`` and the backend ``dwswap`` with the CUDA kernels."""

from __future__ import annotations

import copy
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from test_torchvision import DEPTHWISE, build_with_data
from torch import nn
from torch._inductor.utils import run_and_get_code
from torch.export import Dim, export

import dwswap
from dwswap.backend import compile_graph
from dwswap.comparison import compare

pytestmark = pytest.mark.gpu

OPERATOR = torch.ops.dwswap.depthwise_conv2d.default


@pytest.fixture(autouse=True)
def _fresh() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def mobilenet(dtype: torch.dtype) -> tuple[nn.Module, torch.Tensor]:
    model = build_with_data("mobilenet_v2").to("cuda", dtype)
    return model, torch.rand(4, 3, 96, 96, device="cuda", dtype=dtype)


def check(ours: Any, model: nn.Module, x: torch.Tensor) -> None:
    """The rule for numbers. (Two results in half precision may be twice an error apart.)"""
    exact = copy.deepcopy(model).double()(x.double())
    found = compare(ours, model(x), exact)
    assert found.passed, found


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("decompose", [False, True])
def test_an_exported_program(dtype: torch.dtype, decompose: bool, tmp_path: Path) -> None:
    model, x = mobilenet(dtype)
    program = export(model, (x,), dynamic_shapes=({0: Dim("batch", min=1, max=64)},))
    program = program.run_decompositions() if decompose else program
    fast = dwswap.optimize(program)

    report = dwswap.report(fast)
    assert len(report.swapped) == DEPTHWISE["mobilenet_v2"]
    assert report.kernels.startswith("CUDA kernels")
    assert report.memory_format.startswith(
        "channels_last" if dtype == torch.float16 else "preserve"
    )
    torch.export.save(fast, tmp_path / "fast.pt2")
    with torch.no_grad():
        for module in (fast.module(), torch.export.load(tmp_path / "fast.pt2").module()):
            for batch in (1, 7):
                image = torch.rand(batch, 3, 96, 96, device="cuda", dtype=dtype)
                check(module(image), model, image)


def test_select_measured_and_verify_on_a_program() -> None:
    model, x = mobilenet(torch.float32)
    fast = dwswap.optimize(export(model, (x,)), x, select="measured", verify=True)
    report = dwswap.report(fast)
    assert report.verification is not None
    assert report.verification.passed, str(report)
    with torch.no_grad():
        check(fast.module()(x), model, x)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_inductor_copies_nothing_around_the_operator(dtype: torch.dtype) -> None:
    """17 layers: two copies around each would be 34 kernels more."""
    model, x = mobilenet(dtype)
    compiled = torch.compile(dwswap.optimize(model), fullgraph=True)
    with torch.no_grad(), torch._inductor.config.patch(fx_graph_cache=False):
        ours, (code, *_) = run_and_get_code(compiled, x)
        check(ours, model, x)
    assert code.count("torch.ops.dwswap.depthwise_conv2d.default(") == DEPTHWISE["mobilenet_v2"]
    kernels = re.findall(r"^ +(triton_\w+)\.run\(", code, re.MULTILINE)
    assert len(kernels) <= 40, kernels


@pytest.mark.parametrize("freezing", [False, True])
@pytest.mark.parametrize("mode", ["default", "reduce-overhead"])
def test_the_backend(freezing: bool, mode: str) -> None:
    model, x = mobilenet(torch.float16)
    with torch.no_grad(), torch._inductor.config.patch(freezing=freezing):
        compiled = torch.compile(model, backend=compile_graph, fullgraph=True, mode=mode)
        for _ in range(3):
            check(compiled(x), model, x)


def test_the_backend_compiles_once_for_all_batches() -> None:
    model, _ = mobilenet(torch.float16)
    compiled = torch.compile(model, backend=compile_graph, fullgraph=True)
    with torch.no_grad(), torch._dynamo.config.patch(error_on_recompile=True):
        for batch in (4, 2, 9):
            x = torch.rand(batch, 3, 96, 96, device="cuda", dtype=torch.float16)
            torch._dynamo.mark_dynamic(x, 0)
            check(compiled(x), model, x)


def test_a_training_step_with_the_backend() -> None:
    model, x = mobilenet(torch.float64)
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = 0.1  # Dynamo cannot trace the average over all batches
    model.train()
    plain = copy.deepcopy(model)
    for module in (torch.compile(model, backend=compile_graph, fullgraph=True), plain):
        optimizer = torch.optim.SGD(module.parameters(), lr=0.01)
        module(x).square().mean().backward()
        optimizer.step()
    for ours, theirs in zip(model.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad)
        torch.testing.assert_close(ours, theirs)
