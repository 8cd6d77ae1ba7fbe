"""Optimized models with the rest of PyTorch: export, compile, transforms, several processes."""

from __future__ import annotations

import copy
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from tiny_models import MODES, Block, Functional, InvertedResidual, image
from torch import Tensor, nn
from torch.export import Dim, export
from torch.utils.checkpoint import checkpoint

import dwswap

ROOT = Path(__file__).resolve().parents[1]
FORMATS = ["preserve", "channels_last"]


@pytest.fixture(autouse=True)
def _fresh() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def run(*arguments: str, **environment: str) -> str:
    """The output of Python in a fresh process, which must succeed."""
    paths = [str(Path(dwswap.__file__).parents[1]), os.environ.get("PYTHONPATH", "")]
    paths = os.pathsep.join(filter(None, paths))
    done = subprocess.run(
        [sys.executable, *arguments],
        env={**os.environ, "PYTHONPATH": paths, **environment},
        capture_output=True,
        text=True,
        timeout=500,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


# --- torch.export -------------------------------------------------------------------------------

SHAPES = ({0: Dim("batch", min=1, max=16), 2: Dim("height", min=4), 3: Dim("width", min=4)},)


@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize("memory_format", FORMATS)
def test_an_optimized_model_exports_with_dynamic_sizes(strict: bool, memory_format: Any) -> None:
    model = InvertedResidual().eval()
    fast = dwswap.optimize(model, memory_format=memory_format)
    program = export(fast, (image(),), dynamic_shapes=SHAPES, strict=strict)
    program.run_decompositions()
    for batch, height, width in ((1, 5, 8), (7, 20, 9)):
        x = torch.randn(batch, 3, height, width)
        torch.testing.assert_close(program.module()(x), model(x))


@pytest.mark.parametrize("how", MODES)
@pytest.mark.parametrize("strict", [False, True])
def test_every_way_of_optimizing_exports(how: dict[str, bool], strict: bool) -> None:
    model = InvertedResidual().train(how["train"])
    fast = dwswap.optimize(model, fuse=how["fuse"])
    program = export(fast, (image(),), dynamic_shapes=({0: Dim("batch", max=16)},), strict=strict)
    x = image(batch=5)
    torch.testing.assert_close(program.module()(x), copy.deepcopy(model)(x))


@pytest.mark.slow
@pytest.mark.parametrize("of_program", [False, True])
def test_save_and_load_in_a_fresh_process(tmp_path: Path, of_program: bool) -> None:
    model, x = InvertedResidual().eval(), image()
    if of_program:
        program = dwswap.optimize(export(model, (x,), dynamic_shapes=SHAPES))
    else:
        program = export(dwswap.optimize(model), (x,), dynamic_shapes=SHAPES)
    torch.export.save(program, tmp_path / "program.pt2")
    x = image(batch=3, size=14)
    with torch.no_grad():
        torch.save((x, model(x)), tmp_path / "tensors.pt")
    code = (
        "import sys, torch, dwswap\n"
        "folder = sys.argv[1]\n"
        "x, expected = torch.load(folder + '/tensors.pt')\n"
        "module = torch.export.load(folder + '/program.pt2').module()\n"
        "torch.testing.assert_close(module(x).detach(), expected)\n"
        "calls = [n for n in module.graph.nodes if n.op == 'call_function']\n"
        "print(sum('depthwise' in str(n.target) for n in calls))\n"
    )
    assert run("-c", code, str(tmp_path)).strip() == "1"


# --- torch.compile ------------------------------------------------------------------------------

COMPILE_MODES = ["default", "reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs"]


@pytest.mark.slow
@pytest.mark.parametrize("mode", COMPILE_MODES)
@pytest.mark.parametrize("memory_format", FORMATS)
def test_compile_in_every_mode(mode: str, memory_format: Any, device: str) -> None:
    model, x = InvertedResidual().eval().to(device), image().to(device)
    fast = dwswap.optimize(model, memory_format=memory_format)
    compiled = torch.compile(fast, fullgraph=True, mode=mode)
    with torch.no_grad():
        for _ in range(3):
            torch.testing.assert_close(compiled(x), model(x), rtol=1e-4, atol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("how", MODES)
def test_inductor_copies_nothing_for_us(how: dict[str, bool]) -> None:
    """Inductor runs convolutions in channels_last here, and so the operator between them."""
    from torch._inductor.utils import run_and_get_code

    model, x = InvertedResidual().train(how["train"]), image()
    fast = dwswap.optimize(model, fuse=how["fuse"])
    compiled = torch.compile(fast, fullgraph=True)
    with torch.set_grad_enabled(how["train"]), torch._inductor.config.patch(fx_graph_cache=False):
        _, (code, *_) = run_and_get_code(compiled, x)
    (call,) = re.findall(r"= torch\.ops\.dwswap\.depthwise_conv2d\.default\((\w+)", code)
    made = re.findall(rf"{call} = (\w+)|{call} = .*reinterpret", code)
    assert made, code
    before = code[: code.index("torch.ops.dwswap.depthwise_conv2d.default(")]
    kernels = re.findall(r"^        (cpp_fused\w*)\(", before, re.MULTILINE)
    # The layout of the image, and BatchNorm with the activation where these were not absorbed.
    assert len(kernels) == (1 if how["fuse"] and not how["train"] else 2), kernels


# --- transforms and modes -----------------------------------------------------------------------


@pytest.mark.parametrize("how", MODES)
def test_jit_trace(how: dict[str, bool], tmp_path: Path) -> None:
    model = InvertedResidual().train(how["train"])
    fast = dwswap.optimize(model, fuse=how["fuse"]).requires_grad_(False)
    traced = torch.jit.trace(fast, image(), check_trace=not how["train"])
    assert "dwswap::depthwise_conv2d" in str(traced.inlined_graph)
    torch.jit.save(traced, tmp_path / "traced.pt")
    x = image(batch=5)
    expected = copy.deepcopy(fast)(x)
    torch.testing.assert_close(torch.jit.load(tmp_path / "traced.pt")(x), expected)


def without_batch_statistics(how: dict[str, bool]) -> tuple[nn.Module, Any]:
    """The gradient of a function of one image is that of its batch: so no BatchNorm in between."""
    block = Block()
    block.norm, block.dropout = nn.Identity(), nn.Identity()
    block.train(how["train"])
    return block, dwswap.optimize(block, fuse=how["fuse"])


@pytest.mark.parametrize("how", MODES)
def test_functional_transforms(how: dict[str, bool]) -> None:
    model, fast = without_batch_statistics(how)
    x = image()

    def gradients(module: nn.Module) -> dict[str, Tensor]:
        def loss(parameters: dict[str, Tensor], image: Tensor) -> Tensor:
            return torch.func.functional_call(module, parameters, (image[None],)).square().sum()

        parameters = {name: p.detach() for name, p in module.named_parameters()}
        per_sample = torch.func.vmap(torch.func.grad(loss), (None, 0))(parameters, x)
        assert all(g.shape[0] == len(x) for g in per_sample.values())
        return per_sample

    ours, theirs = gradients(fast), gradients(model)
    for (_, own), (_, expected) in zip(sorted(ours.items()), sorted(theirs.items()), strict=True):
        torch.testing.assert_close(own, expected, rtol=1e-4, atol=1e-4)
    direction = torch.randn_like(x)
    for function in (torch.func.jvp,):
        own, expected = (function(m, (x,), (direction,)) for m in (fast, model))
        torch.testing.assert_close(own, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpoint(reentrant: bool) -> None:
    model = nn.Sequential(InvertedResidual(), InvertedResidual()).train()
    fast = dwswap.optimize(model)
    x = image().requires_grad_()

    def step(module: nn.Module, call: Callable[..., Tensor]) -> list[Tensor]:
        call(module).square().mean().backward()
        return [p.grad for p in module.parameters() if p.grad is not None]

    theirs = step(model, lambda m: m(x))
    ours = step(fast, lambda m: checkpoint(m, x, use_reentrant=reentrant))
    assert len(ours) == len(list(model.parameters()))
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("how", MODES)
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_without_gradients(how: dict[str, bool], mode: Any) -> None:
    model = InvertedResidual().train(how["train"])
    fast = dwswap.optimize(model, fuse=how["fuse"])
    with mode():
        x = image()
        ours, theirs = fast(x), model(x)
        torch.testing.assert_close(ours, theirs)
        assert ours.is_inference() is theirs.is_inference()


def test_a_model_made_in_inference_mode() -> None:
    with torch.inference_mode():
        model = InvertedResidual().eval()
        fast = dwswap.optimize(model)
        torch.testing.assert_close(fast(image()), model(image()))


@pytest.mark.parametrize("how", MODES)
def test_autocast(how: dict[str, bool]) -> None:
    model = InvertedResidual().train(how["train"])
    fast = dwswap.optimize(model, fuse=how["fuse"])
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        ours, theirs = fast(image()), model(image())
    assert ours.dtype == theirs.dtype
    torch.testing.assert_close(ours, theirs, rtol=3e-2, atol=3e-2)


# --- quantization -------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore")
def test_a_model_that_is_prepared_for_quantization_is_left_alone() -> None:
    from torch.ao import quantization
    from torch.ao.quantization.quantize_fx import prepare_fx

    config = quantization.get_default_qconfig_mapping()
    by_graph = prepare_fx(InvertedResidual().eval(), config, (image(),))
    eager = InvertedResidual().eval()
    eager.qconfig = quantization.default_qconfig  # type: ignore[assignment]
    eager = quantization.prepare(eager)
    for prepared, reason in ((by_graph, "quantization_prepared"), (eager, "forward_hook")):
        fast = dwswap.optimize(prepared)
        report = dwswap.report(fast)
        assert report.mode == "unchanged"
        reasons = {layer.reason for layer in report.layers if layer.groups == 8}
        assert reasons <= {"quantization_prepared", reason}
        names = [[type(m).__name__ for m in model.modules()] for model in (fast, prepared)]
        assert names[0] == names[1]


def test_functional_calls_beside_observers_stay() -> None:
    from torch.ao.quantization import MinMaxObserver

    model = Functional(lambda x, w, b, groups: F.conv2d(x, w, b, groups=groups)).eval()
    prepared = torch.fx.symbolic_trace(model)
    assert dwswap.explain(prepared).swapped
    prepared.add_submodule("observer", MinMaxObserver())
    report = dwswap.explain(prepared)
    assert [layer.reason for layer in report.layers] == ["quantization_prepared"]


# --- several processes --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "backend"),
    [
        pytest.param("ddp", "gloo", marks=pytest.mark.slow),
        ("fsdp", "gloo"),
        pytest.param("ddp", "nccl", marks=pytest.mark.gpu),
        pytest.param("fsdp", "nccl", marks=pytest.mark.gpu),
    ],
)
def test_two_processes(kind: str, backend: str) -> None:
    if backend == "nccl" and torch.cuda.device_count() < 2:
        pytest.skip("needs two CUDA GPUs")
    launcher = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
    script = str(ROOT / "tests" / "distributed_steps.py")
    output = run(*launcher, script, kind, backend, OMP_NUM_THREADS="1")
    assert output.count("36 tensors are equal") == 2


@pytest.mark.slow
def test_a_sharded_model_is_refused_or_left_alone() -> None:
    code = (
        "import os, torch, dwswap, torch.distributed as dist\n"
        "from torch import nn\n"
        "from torch.distributed.fsdp import fully_shard\n"
        "dist.init_process_group('gloo', store=dist.HashStore(), rank=0, world_size=1)\n"
        "model = nn.Sequential(nn.Conv2d(4, 4, 3, groups=4), nn.ReLU())\n"
        "fully_shard(model, mesh=dist.init_device_mesh('cpu', (1,)))\n"
        "try:\n"
        "    dwswap.optimize(model)\n"
        "except ValueError as error:\n"
        "    print(error)\n"
        "fast = dwswap.optimize(model, inplace=True)\n"
        "print(dwswap.report(fast).layers[0].reason)\n"
        "dist.destroy_process_group()\n"
    )
    refusal, reason = run("-c", code).strip().splitlines()[-2:]
    assert "FSDP does not support deepcopy" in refusal
    assert reason in ("state_dict_hook", "tensor_subclass")
