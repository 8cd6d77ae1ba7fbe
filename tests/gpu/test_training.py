"""Training on the GPU: gradients that repeat bit for bit, autocast, GradScaler, and memory."""

from __future__ import annotations

import copy
import os
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from cases import Case, make_tensors, place
from torch import Tensor, nn

import dwswap
from dwswap.backend import compile_graph
from dwswap.schema import depthwise_conv2d_backward

torchvision = pytest.importorskip("torchvision")

DEVICE = os.environ.get("DWSWAP_FUZZ_DEVICE", "cuda")
pytestmark = [] if DEVICE == "cpu" else [pytest.mark.gpu]

RUNS = 1000 if DEVICE == "cuda" else 3
SIDE, BATCH = (128, 32) if DEVICE == "cuda" else (64, 8)
FORMATS = (torch.contiguous_format, torch.channels_last)
each_format = pytest.mark.parametrize("memory_format", FORMATS, ids=["nchw", "nhwc"])
each_half = pytest.mark.parametrize(
    "dtype", [torch.float16, torch.bfloat16], ids=lambda dtype: str(dtype)[6:]
)
each_bad = pytest.mark.parametrize("bad", [float("inf"), float("nan")], ids=["inf", "nan"])


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize(
    ("kernel", "stride", "dilation"), [(3, 1, 1), (3, 2, 1), (5, 1, 1), (5, 1, 2), (7, 1, 1)]
)
@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.float16, torch.bfloat16], ids=lambda dtype: str(dtype)[6:]
)
@pytest.mark.parametrize("channels", [58, 64])  # the copy engine brings pixels, or planes, of 64
def test_the_same_bits_in_a_thousand_runs(dtype, kernel, stride, dilation, layout, channels):
    """Other work runs beside it, so that blocks do not start in the same order every time."""
    side = dilation * (kernel // 2)
    # So many that blocks fill their stages several times.
    images = 512 if channels == 64 and DEVICE == "cuda" else 16
    case = Case(
        dtype, layout, images, channels, 14, 13, (kernel, kernel), (stride, stride), (side, side),
        (dilation, dilation),
    )  # fmt: skip
    input, weight, *_ = make_tensors(case, DEVICE)
    grad = place(torch.randn(case.output_shape, device=DEVICE).to(dtype), layout)
    noise = torch.randn(512, 512, device=DEVICE)
    other = torch.cuda.Stream() if DEVICE == "cuda" else None

    def run() -> tuple[Tensor, Tensor]:
        geometry = (case.stride, case.padding, case.dilation)
        _, of_weight, of_bias = depthwise_conv2d_backward(
            grad, input, weight, *geometry, (False, True, True)
        )
        return of_weight, of_bias

    first = run()
    same = torch.ones((), dtype=torch.bool, device=DEVICE)
    for i in range(RUNS):
        if other is not None and i % 3 == 0:
            with torch.cuda.stream(other):
                noise @ noise
        for again, reference in zip(run(), first, strict=True):
            same &= (again == reference).all()
    assert same


def small_mobilenet() -> nn.Module:
    torch.manual_seed(0)
    return torchvision.models.mobilenet_v2(weights=None, dropout=0.0, num_classes=10).to(DEVICE)


def batch_of(memory_format: torch.memory_format) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    images = torch.randn(BATCH, 3, SIDE, SIDE, generator=generator)
    labels = torch.randint(0, 10, (BATCH,), generator=generator)
    return images.to(DEVICE).contiguous(memory_format=memory_format), labels.to(DEVICE)


def gradients(model: nn.Module, images: Tensor, labels: Tensor, dtype: torch.dtype) -> Tensor:
    """Those of all parameters, one after the other, in float64."""
    with torch.autocast(DEVICE, dtype, enabled=dtype.itemsize == 2):
        loss = F.cross_entropy(model(images), labels)
    found = torch.autograd.grad(loss * 128, list(model.parameters()))
    return torch.cat([grad.double().flatten() for grad in found])


@each_half
@each_format
def test_a_step_of_training_is_as_exact_as_pytorchs(memory_format, dtype):
    model = small_mobilenet().to(memory_format=memory_format).train()
    fast = dwswap.optimize(copy.deepcopy(model))
    assert dwswap.report(fast).layers
    images, labels = batch_of(memory_format)
    exact = gradients(copy.deepcopy(model).double(), images.double(), labels, torch.float64)
    theirs = gradients(model, images, labels, dtype)
    ours = gradients(fast, images, labels, dtype)
    unit = torch.finfo(dtype).eps * exact.norm()
    assert (ours - exact).norm() <= 2 * (theirs - exact).norm() + unit


@each_half
@each_format
def test_a_compiled_step_is_as_exact_as_pytorchs(memory_format, dtype):
    """With the kernels for BatchNorm, which leave the same statistics."""
    head = (nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(24, 10))
    torch.manual_seed(0)
    model = nn.Sequential(small_mobilenet().features[:4], *head).to(DEVICE)
    model = model.to(memory_format=memory_format).train()
    compiled = copy.deepcopy(model)
    images, labels = batch_of(memory_format)
    exact = gradients(copy.deepcopy(model).double(), images.double(), labels, torch.float64)
    theirs = gradients(model, images, labels, dtype)
    torch._dynamo.reset()
    fast = torch.compile(compiled, backend=compile_graph, fullgraph=True)
    ours = gradients(fast, images, labels, dtype)
    unit = torch.finfo(dtype).eps * exact.norm()
    assert (ours - exact).norm() <= 2 * (theirs - exact).norm() + unit
    for one, other in zip(compiled.buffers(), model.buffers(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-2, atol=1e-2)


def train(
    model: nn.Module, scaler: torch.amp.GradScaler, images: Tensor, labels: Tensor
) -> list[Tensor]:
    """One step with ``scaler``; the parameters after it."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    with torch.autocast(DEVICE, torch.float16):
        loss = F.cross_entropy(model(images), labels)
    optimizer.zero_grad()
    scaler.scale(loss).backward()
    scaler.step(optimizer)
    scaler.update()
    return [parameter.detach().clone() for parameter in model.parameters()]


@each_bad
@each_format
def test_grad_scaler_leaves_out_a_step_that_is_not_finite(memory_format, bad):
    model = dwswap.optimize(small_mobilenet().to(memory_format=memory_format).train())
    images, labels = batch_of(memory_format)
    scaler = torch.amp.GradScaler(DEVICE, init_scale=256.0)
    before = [parameter.detach().clone() for parameter in model.parameters()]
    # In evaluation mode the statistics of BatchNorm stay finite, and everything else trains.
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.eval()
    spoilt = images.clone()
    spoilt[-1, 0, -1, -1] = bad
    after = train(model, scaler, spoilt, labels)
    assert all(torch.equal(a, b) for a, b in zip(after, before, strict=True))
    assert scaler.get_scale() == 128.0
    trained = train(model, scaler, images, labels)
    assert all(tensor.isfinite().all() for tensor in trained)
    assert any(not torch.equal(a, b) for a, b in zip(trained, before, strict=True))
    assert scaler.get_scale() == 128.0


@each_bad
@each_format
def test_what_is_not_finite_reaches_the_gradients_of_its_channel_alone(memory_format, bad):
    layer = dwswap.DepthwiseConv2d(8, 8, 3, padding=1).to(DEVICE, torch.float16)
    x = torch.randn(4, 8, 14, 14, device=DEVICE, dtype=torch.float16)
    x = x.contiguous(memory_format=memory_format).requires_grad_()
    grad = torch.randn_like(x)
    grad[2, 5, 7, 7] = bad
    layer(x).backward(grad)
    finite = layer.weight.grad.isfinite().flatten(1).all(1) & layer.bias.grad.isfinite()
    assert finite.tolist() == [channel != 5 for channel in range(8)]
    assert x.grad.isfinite().sum() == x.numel() - 9


@pytest.mark.gpu
@each_half
@each_format
def test_peak_memory_of_training(memory_format, dtype):
    model = small_mobilenet().to(memory_format=memory_format).train()
    fast = dwswap.optimize(copy.deepcopy(model))
    images, labels = batch_of(memory_format)

    def peak(subject: nn.Module) -> int:
        """Of a step beyond what lies there before it: both models do."""

        def step() -> None:
            subject.zero_grad(set_to_none=True)
            with torch.autocast("cuda", dtype):
                loss = F.cross_entropy(subject(images), labels)
            loss.backward()

        step()
        subject.zero_grad(set_to_none=True)
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        step()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before

    original = peak(model)
    model.zero_grad(set_to_none=True)
    assert peak(fast) <= original


def readme_block(heading: str) -> str:
    """The code under a heading of the README."""
    text = (Path(__file__).resolve().parents[2] / "README.md").read_text(encoding="utf-8")
    return text.split(f"\n{heading}\n")[1].split("```python\n")[1].split("```")[0]


@pytest.mark.skipif(DEVICE != "cuda", reason="CUDA graphs need a GPU")
def test_the_captured_step_of_the_readme_trains_as_the_plain_one():
    torch.manual_seed(0)
    loader = [(torch.randn(16, 3, 64, 64), torch.randint(10, (16,))) for _ in range(4)]
    model = torchvision.models.mobilenet_v2(num_classes=10).to(DEVICE)
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    names = {"torch": torch, "F": F, "dwswap": dwswap, "loader": loader}
    captured = {**names, "model": copy.deepcopy(model)}
    initial = [p.detach().clone() for p in model.parameters()]
    # So low that rounding decides nothing.
    code = readme_block("### Training steps: CUDA graphs").replace("lr=0.05", "lr=1e-4")
    exec(code, captured)

    plain = {**names, "model": model}
    exec(code.split("stream = ")[0], plain)
    for i in (0, 0, 0, *range(len(loader))):
        for kept, value in zip((plain["images"], plain["labels"]), loader[i], strict=True):
            kept.copy_(value)
        loss = plain["step"]()
    assert loss.isfinite()
    torch.testing.assert_close(captured["loss"], loss, rtol=1e-2, atol=1e-2)
    ends = [nn.utils.parameters_to_vector(m["model"].parameters()) for m in (captured, plain)]
    start = nn.utils.parameters_to_vector(initial)
    assert (ends[0] - ends[1]).norm() < 0.1 * (ends[1] - start).norm()
    tracked = [m["model"].features[0][1].num_batches_tracked for m in (captured, plain)]
    assert tracked[0] == tracked[1] == 3 + len(loader)
