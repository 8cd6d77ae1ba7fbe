"""The CUDA kernels of the first layer of a network."""

from __future__ import annotations

import itertools
import os

import pytest
import torch
import torch.nn.functional as F
from cases import LAYOUTS, place
from numerics import ACTIVATIONS, WIDE_ACTIVATIONS, Judge, poison
from torch import Tensor, nn

import dwswap
from dwswap.bench.kernel_families import GEMM, profile
from dwswap.layouts import to_layout
from dwswap.stems import stem_conv2d

DEVICE = os.environ.get("DWSWAP_FUZZ_DEVICE", "cuda")
pytestmark = [] if DEVICE == "cpu" else [pytest.mark.gpu]

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
EACH = pytest.mark.parametrize("dtype", DTYPES, ids=str)
CHANNELS_LAST = torch.channels_last
FORMATS = pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
CHANNELS = tuple(range(8, 65, 8))
# One pixel, row and column; all accesses; tiles, pieces and rows that no unit divides.
SIZES = (
    *((1, 1), (1, 2), (2, 1), (2, 2), (3, 3), (1, 37), (37, 1), (7, 9), (8, 8), (9, 33), (17, 34)),
    *(
        (31, 32),
        (33, 31),
        (64, 66),
        (65, 100),
        (5, 225),
        (225, 225),
        (224, 224),
        (9, 256),
        (3, 258),
    ),
    *((260, 260), (7, 300), (3, 1037), (2, 1536), (1037, 3), (1, 4001)),
)


def draw(shape: tuple[int, ...], dtype: torch.dtype, seed: int = 0) -> Tensor:
    generator = torch.Generator(DEVICE).manual_seed(seed)
    return torch.randn(shape, generator=generator, device=DEVICE).to(dtype)


def parameters(channels: int, dtype: torch.dtype, case: int = 0) -> tuple[Tensor, Tensor | None]:
    """Weights in either layout, also misaligned; a bias, a misaligned one, one with gaps, none."""
    weight = place(draw((channels, 3, 3, 3), dtype, case + 1) / 3, ODD[case % len(ODD)])
    values = draw((2 * channels + 1,), dtype, case + 2)
    views = (values[:channels], None, values[1 : channels + 1], values[1::2])
    return weight, views[case % 4]


ODD = ("contiguous", "channels_last", "offset", "offset_channels_last", "channels_last")


def expected(x: Tensor, weight: Tensor, bias: Tensor | None, activation: str) -> Tensor:
    table = WIDE_ACTIVATIONS if x.dtype == torch.float64 else ACTIVATIONS
    return table[activation](F.conv2d(x, weight, bias, 2, 1))


def aligned(x: Tensor) -> Tensor:
    """cuDNN may have no kernel for misaligned tensors."""
    return torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device=x.device).copy_(x)


def add(
    judge: Judge, x: Tensor, channels: int, case: int, activation: str = "none", label: str = ""
) -> None:
    tensors = parameters(channels, x.dtype, case)
    given = [None if t is None else aligned(t) for t in (x, *tensors)]
    theirs = expected(*given, activation)
    poison(theirs)
    ours = stem_conv2d(x, *tensors, activation=activation)
    assert ours.movedim(-3, -1).is_contiguous()
    wide = [None if t is None else t.double() for t in (x, *tensors)]
    name = f"{label} {tuple(x.shape)} {x.stride()} {x.dtype} {channels} case {case} {activation}"
    judge.add(name, ours, theirs, expected(*wide, activation))


@FORMATS
@EACH
@torch.no_grad()
def test_sizes(dtype: torch.dtype, layout: str) -> None:
    judge = Judge()
    for case, (height, width) in enumerate(SIZES):
        batch = max(2, 2048 // (height * width))  # else two largest errors say nothing
        for channels in (CHANNELS[case % 8], CHANNELS[(case + 3) % 8], 32):
            x = place(draw((batch, 3, height, width), dtype, case), layout)
            add(judge, x, channels, case)
    judge.check()


@pytest.mark.parametrize("channels", CHANNELS)
@EACH
@torch.no_grad()
def test_channels_and_activations(dtype: torch.dtype, channels: int) -> None:
    judge = Judge()
    for case, (activation, layout) in enumerate(
        itertools.product(ACTIVATIONS, ("contiguous", "channels_last"))
    ):
        x = place(draw((3, 3, 37, 72), dtype, case), layout)
        for more in range(4):
            add(judge, x, channels, case + more, activation)
    judge.check()


@pytest.mark.parametrize("layout", LAYOUTS)
@EACH
@torch.no_grad()
def test_layouts(dtype: torch.dtype, layout: str) -> None:
    """Misaligned images have kernels, and what is not dense goes to aten."""
    judge = Judge()
    for case, (height, width) in enumerate(((15, 17), (24, 40), (9, 300), (33, 66))):
        x = place(draw((5, 3, height, width), dtype, case), layout)
        add(judge, x, CHANNELS[case], case)
        add(judge, x[1], CHANNELS[case + 4], case)
    judge.check()


@FORMATS
@EACH
@torch.no_grad()
def test_many_images(dtype: torch.dtype, layout: str) -> None:
    """Blocks of several units, tall ones and those of one row."""
    judge = Judge()
    for case, shape in enumerate(
        ((64, 224, 224), (300, 64, 64), (1001, 23, 25), (2500, 7, 9), (3, 1025, 999), (1, 5000, 61))
    ):
        batch, height, width = shape
        x = place(draw((batch, 3, height, width), dtype, case), layout)
        for channels in (32, 24, 64):
            add(judge, x, channels, case, ("none", "relu6", "silu")[case % 3])
    judge.check()


@FORMATS
@EACH
@torch.no_grad()
def test_integers_are_exact(dtype: torch.dtype, layout: str) -> None:
    for case, (height, width) in enumerate(SIZES):
        channels = CHANNELS[case % 8]
        shapes = ((3, 3, height, width), (channels, 3, 3, 3), (channels,))
        values = [draw(shape, dtype, case).round().clamp(-2, 2) for shape in shapes]
        x, weight, bias = place(values[0], layout), *values[1:]
        exact = expected(x.double(), weight.double(), bias.double(), "none")
        ours = stem_conv2d(x, weight, bias)
        assert torch.equal(ours.double(), exact), (height, width, channels)


@FORMATS
@pytest.mark.parametrize("size", [(5, 6), (4, 9), (3, 40), (8, 8)])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@EACH
@torch.no_grad()
def test_not_a_number_reaches_its_outputs_alone(
    dtype: torch.dtype, value: float, size: tuple[int, int], layout: str
) -> None:
    """In turn in every element of an image of its own; images lie side by side in memory."""
    elements = 3 * size[0] * size[1]
    hit = torch.eye(elements, dtype=torch.bool, device=DEVICE).view(elements, 3, *size)
    x = place(draw((elements, 3, *size), dtype).masked_fill(hit, value), layout)
    for channels in (16, 40):
        weight, bias = draw((channels, 3, 3, 3), dtype, 1).abs() + 1, draw((channels,), dtype, 2)
        ours = stem_conv2d(x, weight, bias)
        reached = F.conv2d(hit.double(), weight.double(), None, 2, 1) > 0
        assert torch.equal(ours.isfinite(), ~reached)
        assert torch.equal(ours.isnan(), reached & (value != value))
        relu = stem_conv2d(x, weight, bias, activation="relu6")
        assert torch.equal(relu.isnan(), ours.isnan())


@FORMATS
@EACH
@torch.no_grad()
def test_nothing_beside_the_image_is_read_or_written(dtype: torch.dtype, layout: str) -> None:
    for (height, width), offset in itertools.product(
        ((5, 6), (9, 33), (8, 40), (6, 224), (3, 1037)), (0, 1, 2, 4, 8)
    ):
        values = draw((2, 3, height, width), dtype)
        like = place(values, layout)
        buffer = torch.full((like.numel() + 128,), float("nan"), dtype=dtype, device=DEVICE)
        x = buffer.as_strided(like.shape, like.stride(), 64 + offset).copy_(values)
        tensors = parameters(24, dtype)
        ours, exact = stem_conv2d(x, *tensors), stem_conv2d(like, *tensors)
        assert torch.equal(ours, exact)
        assert not ours.isnan().any()
        assert buffer[: 64 + offset].isnan().all()
        assert buffer[64 + offset + like.numel() :].isnan().all()


@FORMATS
@EACH
@torch.no_grad()
def test_every_run_is_the_same(dtype: torch.dtype, layout: str) -> None:
    x = place(draw((32, 3, 112, 112), dtype), layout)
    for channels in (16, 24, 32, 64):
        tensors = parameters(channels, dtype)
        first = stem_conv2d(x, *tensors, activation="silu")
        assert all(
            torch.equal(stem_conv2d(x, *tensors, activation="silu"), first) for _ in range(10)
        )
        # An image alone is cut in another way, and computed in the same.
        assert torch.equal(stem_conv2d(x[3:4], *tensors, activation="silu"), first[3:4])


@torch.no_grad()
def test_what_has_no_kernel_is_left_to_aten() -> None:
    x = draw((2, 3, 9, 12), torch.float16)
    for channels, dtype in ((12, x.dtype), (72, torch.float32), (8, torch.float64)):
        tensors = [
            t.to(dtype) for t in (draw((channels, 3, 3, 3), x.dtype), draw((channels,), x.dtype))
        ]
        result = stem_conv2d(x.to(dtype), *tensors, activation="relu")
        torch.testing.assert_close(result, expected(x.to(dtype), *tensors, "relu"))
    shapes = (tuple(x.shape), (8, 3, 3, 3), (8,))
    image, weight, bias = (draw(shape, x.dtype).round().clamp(-2, 2) for shape in shapes)
    strided = weight.transpose(2, 3).contiguous().transpose(2, 3)
    assert torch.equal(stem_conv2d(image, strided, bias), stem_conv2d(image, weight, bias))
    empty = stem_conv2d(x[:0], weight, bias)
    assert empty.shape == (0, 8, 5, 6)
    leaf = x.float().requires_grad_()
    with torch.enable_grad():
        grads = [
            torch.autograd.grad(call(leaf, weight.float(), bias.float(), None), leaf)[0]
            for call in (
                lambda *given: stem_conv2d(*given[:3]).square().sum(),
                lambda *given: expected(*given[:3], "none").square().sum(),
            )
        ]
    torch.testing.assert_close(*grads)


@pytest.mark.gpu
@torch.no_grad()
def test_bad_input_is_named() -> None:
    x, weight = draw((2, 3, 5, 4), torch.float16), draw((8, 3, 3, 3), torch.float16)
    with pytest.raises(RuntimeError, match=r"bias must be 1-D of length 8, got shape \[5\]"):
        stem_conv2d(x, weight, draw((5,), x.dtype))
    with pytest.raises(RuntimeError, match="weight must have the input's dtype Half, got Float"):
        stem_conv2d(x, weight.float())
    with pytest.raises(RuntimeError, match="weight must be on the input's device, cuda:0, got cpu"):
        stem_conv2d(x, weight.cpu())
    for input, taps in ((x[:, :2], weight), (x[0, 0], weight), (x, weight[..., :2])):
        with pytest.raises((RuntimeError, ValueError), match=r"must|failed for shapes"):
            stem_conv2d(input, taps)


@pytest.mark.gpu
@EACH
@FORMATS
@pytest.mark.parametrize("channels", [24, 32])
@torch.no_grad()
def test_one_kernel(channels: int, layout: str, dtype: torch.dtype) -> None:
    x = place(draw((4, 3, 64, 64), dtype), layout)
    weight, bias = parameters(channels, x.dtype)
    call = lambda: stem_conv2d(x, weight, bias, activation="silu")  # noqa: E731
    call()
    (row,) = profile(call, torch.device("cuda"))
    assert (row.family, row.kernels) == (GEMM, 1)
    assert "stem_conv2d" in row.largest


@pytest.mark.gpu
@EACH
@torch.no_grad()
def test_graph_capture_on_a_stream(dtype: torch.dtype) -> None:
    x, weight, bias = draw((3, 3, 33, 64), dtype), *parameters(32, dtype)
    stream = torch.cuda.Stream()
    stem_conv2d(x, weight, bias)  # builds the library
    stream.wait_stream(torch.cuda.current_stream())
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        output = stem_conv2d(x, weight, bias)
    for seed in range(3):
        x.copy_(draw(tuple(x.shape), dtype, seed))
        weight.copy_(draw(tuple(weight.shape), dtype, seed))
        graph.replay()
        torch.cuda.synchronize()
        assert torch.equal(output, stem_conv2d(x, weight, bias))


@pytest.mark.gpu
@FORMATS
@torch.no_grad()
def test_offsets_beyond_32_bits(layout: str) -> None:
    """Of input and output over all images, and of the output of one image."""
    for shape, channels in (((14400, 3, 224, 224), 16), ((1, 3, 20000, 16384), 64)):
        size = shape if layout == "contiguous" else (shape[0], *shape[2:], 3)
        x = torch.empty(size, dtype=torch.float16, device="cuda").normal_()
        x = x if layout == "contiguous" else x.movedim(-1, 1)
        weight, bias = parameters(channels, x.dtype)
        output = stem_conv2d(x, weight, bias)
        assert output.numel() > 1 << 31
        judge = Judge()
        for part in (slice(2), slice(-2, None)):
            # The rows at both ends: those of output next to the cut do not count.
            rows, kept = (
                (slice(64), slice(31))
                if part.start is None
                else (slice(-64, None), slice(-31, None))
            )
            given = x[part, :, rows].contiguous()
            exact = expected(given.double(), weight.double(), bias.double(), "none")[:, :, kept]
            usual = expected(given, weight, bias, "none")[:, :, kept]
            judge.add(str(part), output[part, :, kept], usual, exact)
        judge.check()
        del x, output


@pytest.mark.gpu
@EACH
@torch.no_grad()
def test_optimized_models_run_it(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 32, 3, 2, 1, bias=False),
        nn.BatchNorm2d(32),
        nn.SiLU(inplace=True),
        nn.MaxPool2d(1),
        nn.Conv2d(32, 32, 3, padding=1, groups=32),
    )
    model = model.to("cuda", dtype).eval()
    fast = dwswap.optimize(model, memory_format="channels_last")
    (node,) = fast.graph.find_nodes(op="call_function", target=stem_conv2d)
    assert node.kwargs == {"activation": "silu"}
    assert not fast.graph.find_nodes(op="call_function", target=to_layout)
    judge = Judge()
    for case, (height, width) in enumerate(((64, 64), (33, 50))):
        x = draw((4, 3, height, width), dtype, case)
        for given in (x, x.to(memory_format=CHANNELS_LAST)):
            wide = model.double()(given.double())
            theirs = model.to(dtype)(given)
            judge.add(str((height, width)), fast(given), theirs, wide)
    judge.check()
