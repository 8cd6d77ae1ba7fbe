"""The operators of pointwise products on the GPU: the products of aten's calls, bit for bit."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.library import opcheck

from dwswap import build, pointwise
from dwswap.bench.kernel_families import profile
from dwswap.pointwise import pointwise_product, pointwise_residual

pytestmark = pytest.mark.gpu

HALF = [torch.float16, torch.bfloat16]
EACH = pytest.mark.parametrize("dtype", HALF, ids=str)
CHANNELS_LAST = torch.channels_last
# In, out: multiples of 8 and not, one, and those of a MobileNetV2's ends.
CHANNELS = [(96, 24), (58, 58), (116, 122), (3, 5), (1, 6), (6, 1), (320, 1280)]
# Batch, height, width: one pixel, one column, one row.
SIZES = [(1, 28, 28), (5, 14, 9), (64, 7, 7), (1, 1, 1), (3, 1, 1), (3, 5, 1), (2, 1, 5)]
PRODUCT = torch.ops.dwswap._pointwise_product.default
RESIDUAL = torch.ops.dwswap._pointwise_residual_.default


@pytest.fixture(scope="module", autouse=True)
def _library() -> None:
    assert build.load(), build.status().reason


@pytest.fixture
def without_aten(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """Python makes no product and no convolution, until the function that this is is called."""

    def refuse(*args: Any) -> None:
        raise AssertionError("Python called aten")

    for owner, name in ((torch, "mm"), (torch, "addmm"), (F, "conv2d"), (Tensor, "addmm_")):
        monkeypatch.setattr(owner, name, refuse)
    return monkeypatch.undo


def sizes(*channels: int) -> list[tuple[int, int, int]]:
    """One channel of one pixel has no layout."""
    return [size for size in SIZES if min(channels) > 1 or size[1:] != (1, 1)]


def draw(*shape: int, dtype: torch.dtype, seed: int = 0, device: str = "cuda") -> Tensor:
    """4-D ones with the strides of channels_last, also of dimensions of one element."""
    generator = torch.Generator(device).manual_seed(seed)
    values = torch.randn(shape, generator=generator, device=device).to(dtype)
    if len(shape) != 4:
        return values
    return torch.empty_like(values, memory_format=CHANNELS_LAST).copy_(values)


def rows(image: Tensor) -> Tensor:
    return image.permute(0, 2, 3, 1).flatten(0, 2)


def old_product(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    matrix = weight.flatten(1).t()
    result = torch.mm(rows(x), matrix) if bias is None else torch.addmm(bias, rows(x), matrix)
    return result.view(x.shape[0], *x.shape[2:], weight.shape[0]).permute(0, 3, 1, 2)


def old_residual(x: Tensor, weight: Tensor, residual: Tensor) -> Tensor:
    rows(residual).addmm_(rows(x), weight.flatten(1).t())
    return residual


def placed(*shape: int, dtype: torch.dtype, seed: int = 0) -> list[Tensor]:
    """An image alone, and as some of the channels of a wider one."""
    wide = draw(shape[0], 2 * shape[1], *shape[2:], dtype=dtype, seed=seed)
    part = wide[:, shape[1] :]
    return [torch.empty_like(part, memory_format=CHANNELS_LAST).copy_(part), part]


def in_same_place(image: Tensor) -> Tensor:
    """A copy with the same strides, and the same gaps."""
    copy = torch.empty_strided(image.shape, image.stride(), dtype=image.dtype, device=image.device)
    return copy.copy_(image)


# --- numbers ------------------------------------------------------------------------------------


@EACH
@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize(("channels", "outputs"), CHANNELS)
@torch.no_grad()
def test_product(
    channels: int,
    outputs: int,
    biased: bool,
    dtype: torch.dtype,
    without_aten: Callable[[], None],
) -> None:
    weight = draw(outputs, channels, 1, 1, dtype=dtype, seed=1)
    bias = draw(outputs, dtype=dtype, seed=2) if biased else None
    found: list[tuple[Tensor, Tensor, Tensor]] = []
    weights = [weight, weight.contiguous()]
    for (batch, *size), given in itertools.product(sizes(channels), weights):
        for x in placed(batch, channels, *size, dtype=dtype):
            found.append((x, given, pointwise_product(x, given, bias)))
    without_aten()
    for x, given, ours in found:
        theirs = old_product(x, given, bias)
        assert torch.equal(ours, theirs), (x.shape, x.stride())
        assert ours.stride() == theirs.stride()
        assert not ours._is_view()


@EACH
@pytest.mark.parametrize(("channels", "outputs"), CHANNELS)
@torch.no_grad()
def test_residual(
    channels: int, outputs: int, dtype: torch.dtype, without_aten: Callable[[], None]
) -> None:
    weight = draw(outputs, channels, 1, 1, dtype=dtype, seed=1)
    found: list[tuple[Tensor, Tensor, Tensor]] = []
    for batch, *size in sizes(channels, outputs):
        images = placed(batch, channels, *size, dtype=dtype)
        residuals = placed(batch, outputs, *size, dtype=dtype, seed=3)
        for x, residual, taps in itertools.product(images, residuals, (weight, weight.flatten(1))):
            ours = in_same_place(residual)
            version = ours._version
            assert pointwise_residual(x, taps, ours) is ours
            assert ours._version > version
            found.append((x, residual, ours))
    without_aten()
    for x, residual, ours in found:
        theirs = old_residual(x, weight, in_same_place(residual))
        assert torch.equal(ours, theirs), (x.shape, x.stride(), residual.stride())


@EACH
@torch.no_grad()
def test_misaligned(dtype: torch.dtype) -> None:
    """cuBLAS takes other kernels for what begins at no multiple of 16 bytes."""
    weight, bias = draw(24, 96, 1, 1, dtype=dtype, seed=1), draw(24, dtype=dtype, seed=2)
    image, sums = draw(2, 96, 7, 7, dtype=dtype), draw(2, 24, 7, 7, dtype=dtype, seed=3)

    def moved(tensor: Tensor, offset: int) -> Tensor:
        memory = torch.empty(tensor.numel() + 8, dtype=dtype, device="cuda")
        return memory.as_strided(tensor.shape, tensor.stride(), offset).copy_(tensor)

    for offset in range(9):
        x, w, b = moved(image, offset), moved(weight, offset), moved(bias, offset)
        assert torch.equal(pointwise_product(x, w, b), old_product(x, w, b)), offset
        ours, theirs = moved(sums, offset), moved(sums, offset)
        assert torch.equal(pointwise_residual(x, w, ours), old_residual(x, w, theirs)), offset


@EACH
@torch.no_grad()
def test_the_same_kernels(dtype: torch.dtype) -> None:
    """And none of another kind: the sum of a residual is not a copy and a product."""
    for batch, channels, outputs, side in ((1, 960, 160, 7), (64, 96, 24, 56), (64, 58, 58, 28)):
        x, residual = (draw(batch, count, side, side, dtype=dtype) for count in (channels, outputs))
        weight, bias = draw(outputs, channels, 1, 1, dtype=dtype), draw(outputs, dtype=dtype)
        calls: list[tuple[Callable[..., Tensor], Callable[..., Tensor], tuple[Any, ...]]] = [
            (pointwise_product, old_product, (x, weight, None)),
            (pointwise_product, old_product, (x, weight, bias)),
            (pointwise_residual, old_residual, (x, weight, residual)),
        ]
        for ours, theirs, given in calls:
            kernels = []
            for function in (ours, theirs):
                call = functools.partial(function, *given)
                call()
                found = profile(call, torch.device("cuda"))
                kernels.append([(row.family, row.kernels, row.largest) for row in found])
            assert kernels[0] == kernels[1], (ours, x.shape)


# --- what has no product ------------------------------------------------------------------------


Case = Callable[[Tensor, Tensor, Tensor, Tensor], tuple[Tensor, Tensor, Tensor, Tensor]]
# Of input, weight, bias and residual; what begins with "a" is a product nevertheless.
CASES: dict[str, Case] = {
    "no image": lambda x, w, b, r: (x[:0], w, b, r[:0]),
    "NCHW": lambda x, w, b, r: (x.contiguous(), w, b, r.contiguous()),
    "rows with gaps": lambda x, w, b, r: (x[:, :, ::2], w, b, r[:, :, ::2]),
    "columns with gaps": lambda x, w, b, r: (x[..., 1:], w, b, r[..., 1:]),
    "channels with gaps": lambda x, w, b, r: (torch.cat([x, x], 1)[:, ::2], w, b, r),
    "float32": lambda x, w, b, r: (x.float(), w.float(), b.float(), r.float()),
    "a weight in a wider one": lambda x, w, b, r: (x, torch.cat([w, w], 1)[:, 8:], b, r),
    "a weight with gaps": lambda x, w, b, r: (x, torch.cat([w, w], 1)[:, ::2], b, r),
    "a bias with gaps": lambda x, w, b, r: (x, w, torch.cat([b, b])[::2], r),
}


def small() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Input, weight, bias, residual."""
    shapes = [(2, 8, 5, 7), (6, 8, 1, 1), (6,), (2, 6, 5, 7)]
    x, weight, bias, residual = (
        draw(*shape, dtype=torch.float16, seed=seed) for seed, shape in enumerate(shapes)
    )
    return x, weight, bias, residual


@pytest.mark.parametrize("case", CASES)
@torch.no_grad()
def test_as_it_was(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    x, weight, bias, residual = CASES[case](*small())
    is_product = case.startswith("a ")
    results = []
    for loaded in (True, False):
        monkeypatch.setattr(build, "load", lambda loaded=loaded: loaded)
        other = in_same_place(residual)
        sums = pointwise_residual(x, weight, other)
        assert (sums is other) == is_product
        assert is_product or torch.equal(other, residual)
        results.append((pointwise_product(x, weight, bias), sums))
    for ours, theirs in zip(*results, strict=True):
        assert torch.equal(ours, theirs)
        assert ours.stride() == theirs.stride()
    assert torch.equal(PRODUCT(x, weight, bias), results[0][0])


@torch.no_grad()
def test_residual_of_another_shape() -> None:
    x, weight, _, residual = small()
    for other in (residual[:1], residual[:, :1], residual[:, :, :1, :1], residual.float()):
        before = other.clone()
        assert torch.equal(pointwise_residual(x, weight, other), before + F.conv2d(x, weight))
        assert torch.equal(other, before)


@torch.no_grad()
def test_errors_are_those_of_aten() -> None:
    x, weight, bias, residual = small()
    for w, b in ((weight.float(), bias), (weight[:, :4], bias), (weight, bias[:3]), (weight, x)):
        with pytest.raises(RuntimeError):
            pointwise_product(x, w, b)
    for w in (weight.float(), weight[:, :4], weight.flatten(1)[:, :4]):
        with pytest.raises(RuntimeError):
            pointwise_residual(x, w, residual)
    with pytest.raises(RuntimeError):
        pointwise_product(x, weight.cpu(), None)
    with pytest.raises(RuntimeError):
        pointwise_residual(x, weight.cpu(), residual)


def test_autocast_and_gradients(monkeypatch: pytest.MonkeyPatch) -> None:
    x, weight, bias, residual = small()

    def refuse(*args: Any) -> None:
        raise AssertionError("an operator was called")

    monkeypatch.setattr(pointwise, "product_operator", refuse)
    monkeypatch.setattr(pointwise, "residual_operator", refuse)
    with torch.autocast("cuda", torch.bfloat16):
        assert pointwise_product(x, weight, bias).dtype == torch.bfloat16
        assert pointwise_residual(x, weight, residual).dtype == torch.float32
    leaves = [t.clone().requires_grad_() for t in (x, weight, bias)]
    ours, theirs = (
        torch.autograd.grad(function(*leaves).float().square().sum(), leaves)
        for function in (pointwise_product, F.conv2d)
    )
    for own, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(own, other)


# --- PyTorch's subsystems -------------------------------------------------------------------------


@EACH
@torch.no_grad()
def test_pytorch_can_work_with_it(dtype: torch.dtype) -> None:
    weight, bias = draw(6, 8, 1, 1, dtype=dtype), draw(6, dtype=dtype)
    for batch, *size in SIZES:
        for x in placed(batch, 8, *size, dtype=dtype):
            real = PRODUCT(x, weight, bias)
            with FakeTensorMode() as mode:
                fake = PRODUCT(*(mode.from_tensor(t) for t in (x, weight, bias)))
            assert (fake.shape, fake.stride()) == (real.shape, real.stride())
            assert (fake.dtype, fake.device) == (real.dtype, real.device)
    opcheck(PRODUCT, (x, weight, bias))
    utilities = ("test_schema", "test_autograd_registration", "test_faketensor")
    opcheck(RESIDUAL, (x, weight, real.clone()), test_utils=utilities)


def test_inference_mode() -> None:
    x, weight, *_ = small()
    weight = nn.Parameter(weight)
    with torch.inference_mode():
        result = pointwise_product(x, weight)
        assert result.is_inference()
        expected = old_residual(x, weight, result.clone())
        assert torch.equal(pointwise_residual(x, weight, result), expected)


def test_what_was_saved_for_a_gradient_is_not_changed_unseen() -> None:
    x, weight, _, residual = small()
    scale = torch.ones(1, device="cuda", requires_grad=True)
    loss = (scale * residual).sum()
    with torch.no_grad():
        pointwise_residual(x, weight, residual)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


# --- streams, graphs, devices ---------------------------------------------------------------------


def layers(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return pointwise_residual(x, weight, pointwise_product(x, weight, bias))


def operands(dtype: torch.dtype, seed: int, device: str = "cuda") -> tuple[Tensor, Tensor, Tensor]:
    return (
        draw(8, 96, 14, 14, dtype=dtype, seed=seed, device=device),
        draw(24, 96, 1, 1, dtype=dtype, seed=seed + 1, device=device),
        draw(24, dtype=dtype, seed=seed + 2, device=device),
    )


@EACH
@torch.no_grad()
def test_the_current_stream_is_used(dtype: torch.dtype) -> None:
    given = operands(dtype, 0)
    expected = layers(*given)
    late = (torch.zeros_like(given[0]), *given[1:])
    stream = torch.cuda.Stream()
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(100_000_000)
        late[0].copy_(given[0])
        output = layers(*late)
    stream.synchronize()
    assert torch.equal(output, expected)


@EACH
@torch.no_grad()
def test_graph_capture_on_a_stream(dtype: torch.dtype) -> None:
    given = operands(dtype, 0)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        layers(*given)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        output = layers(*given)
    for seed in (10, 20):
        for target, source in zip(given, operands(dtype, seed), strict=True):
            target.copy_(source)
        output.fill_(torch.nan)
        graph.replay()
        torch.cuda.synchronize()
        assert torch.equal(output, layers(*given))


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA GPUs")
@EACH
@torch.no_grad()
def test_the_device_of_the_tensors_not_the_current_one(dtype: torch.dtype) -> None:
    expected = layers(*operands(dtype, 0))
    with torch.cuda.device(0):
        given = [t.to("cuda:1") for t in operands(dtype, 0)]
        result = layers(*given)
        assert result.get_device() == 1
        assert torch.cuda.current_device() == 0
        with pytest.raises(RuntimeError):
            pointwise_product(given[0], given[1].to("cuda:0"), given[2])
    assert torch.equal(result.cpu(), expected.cpu())
