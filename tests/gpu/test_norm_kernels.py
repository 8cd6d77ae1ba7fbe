"""The CUDA kernels that normalize over the channels of every pixel."""

from __future__ import annotations

import itertools
import os

import pytest
import torch
import torch.nn.functional as F
from cases import LAYOUTS, place
from numerics import Judge, poison
from torch import Tensor

from dwswap.bench.kernel_families import REDUCTION, profile
from dwswap.norms import channel_norm

DEVICE = os.environ.get("DWSWAP_FUZZ_DEVICE", "cuda")
pytestmark = [] if DEVICE == "cpu" else [pytest.mark.gpu]

FAST = (torch.float32, torch.float16, torch.bfloat16)
EACH = pytest.mark.parametrize("dtype", [*FAST, torch.float64], ids=str)
EACH_FAST = pytest.mark.parametrize("dtype", FAST, ids=str)
# Of ConvNeXt; those that no vector divides; every number of lanes and of vectors; more than fit.
CHANNELS = (1, 3, 8, 72, 96, 100, 128, 192, 250, 256, 384, 512, 768, 1000, 1024, 1536, 2040, 2048)
LARGE = (2049, 5000)
EPS = 1e-6


def draw(shape: tuple[int, ...], dtype: torch.dtype, seed: int = 0) -> Tensor:
    generator = torch.Generator(DEVICE).manual_seed(seed)
    return (3 * torch.randn(shape, generator=generator, device=DEVICE) + 1).to(dtype)


def parameters(channels: int, dtype: torch.dtype, case: int) -> list[Tensor | None]:
    """None, an aligned one, one that begins an element later, and one with gaps."""
    choices = []
    for kind, seed in ((case % 4, 1), (case // 4 % 4, 2)):
        values = draw((2 * channels + 1,), dtype, case + seed)
        views = (None, values[:channels], values[1 : channels + 1], values[1::2])
        choices.append(views[kind])
    return choices


def expected(x: Tensor, weight: Tensor | None, bias: Tensor | None, last: bool) -> Tensor:
    if last:
        return F.layer_norm(x, x.shape[-1:], weight, bias, EPS)
    rows = x.movedim(-3, -1)
    return F.layer_norm(rows, rows.shape[-1:], weight, bias, EPS).movedim(-1, -3)


def add(judge: Judge, x: Tensor, case: int, last: bool, label: str = "") -> None:
    tensors = parameters(x.shape[-1 if last else -3], x.dtype, case)
    theirs = expected(x, *tensors, last)
    poison(theirs)
    ours = channel_norm(x, *tensors, EPS, last=last)
    assert ours.stride() == theirs.stride()
    wide = [None if t is None else t.double() for t in (x, *tensors)]
    kinds = (case % 4, case // 4 % 4)
    name = f"{label} {tuple(x.shape)} {x.stride()} {x.dtype} parameters {kinds} {last}"
    judge.add(name, ours, theirs, expected(*wide, last))


@EACH
@torch.no_grad()
def test_rows(dtype: torch.dtype) -> None:
    """Of odd numbers, which the rows of no block and no thread divide; from any element on."""
    judge = Judge()
    for case, (channels, rows) in enumerate(
        itertools.product((*CHANNELS, *LARGE), (1, 2, 33, 257, 1001))
    ):
        if rows * channels < 256:
            rows = 256 // channels + 1  # else two largest errors say nothing
        add(judge, draw((rows, channels), dtype, case), case, True)
        elements = draw((rows * channels + 8,), dtype, case)
        for offset in (1, 4, 8):
            x = elements[offset:][: rows * channels].view(rows, channels)
            add(judge, x, case + offset, True, f"offset {offset}")
    judge.check()


@pytest.mark.parametrize("layout", LAYOUTS)
@EACH
@torch.no_grad()
def test_images(dtype: torch.dtype, layout: str) -> None:
    judge = Judge()
    for case, (channels, (n, h, w)) in enumerate(
        itertools.product((1, 57, 96, 1000, 1536), ((3, 7, 13), (2, 56, 31), (257, 1, 1)))
    ):
        x = place(draw((n, channels, h, w), dtype, case), layout)
        add(judge, x, case, False)
        add(judge, x, case, True)  # its columns as channels
        add(judge, x.movedim(1, -1), case + 1, True)
        add(judge, x[1], case + 2, False)
    judge.check()


@EACH_FAST
@torch.no_grad()
def test_sparse_channels(dtype: torch.dtype) -> None:
    """Every number of channels up to 300: vectors that only some of the lanes have."""
    judge = Judge()
    step = 4 if dtype == torch.float32 else 8
    for channels in (*range(1, 300, 7), *range(step, 2049, step)):
        add(judge, draw((257 if channels < 300 else 13, channels), dtype, channels), channels, True)
    judge.check()


@EACH_FAST
@pytest.mark.parametrize("mean", [100.0, -3e3, 3e4])
@torch.no_grad()
def test_small_deviations_from_a_large_mean(dtype: torch.dtype, mean: float) -> None:
    judge = Judge()
    spread = 4 * torch.finfo(dtype).eps * abs(mean)
    for channels in (96, 100, 768, 1536):
        wide = spread * torch.randn((517, channels), device=DEVICE, dtype=torch.float64) + mean
        for case in (0, 5):
            add(judge, wide.to(dtype), case, True, f"mean {mean}")
    judge.check()


@pytest.mark.gpu
@EACH_FAST
@torch.no_grad()
def test_rows_of_one_value(dtype: torch.dtype) -> None:
    """Their variance is 0, not what rounding leaves of a mean."""
    for channels in (1, 8, 96, 100, 1000, 1536):
        values = draw((37, 1), dtype, channels) * 100
        bias = draw((channels,), dtype)
        ours = channel_norm(values.expand(-1, channels).contiguous(), None, bias, EPS, last=True)
        torch.testing.assert_close(ours, bias.expand(37, -1), rtol=0, atol=1e-5)


@EACH_FAST
@pytest.mark.parametrize("channels", [96, 100, 104, 768, 1536])
@torch.no_grad()
def test_extremes(dtype: torch.dtype, channels: int) -> None:
    """A NaN and an infinity stay in their rows; what has no NaN in aten has none here."""
    x = draw((67, channels), dtype)
    clean = channel_norm(x, None, None, EPS, last=True)
    x[3, channels - 1], x[30, 0] = float("nan"), float("inf")
    x[31, 5], x[66, channels // 2] = -float("inf"), float("nan")
    x[7] = torch.finfo(dtype).max / 2
    x[8] *= torch.finfo(dtype).max / 64
    ours, theirs = channel_norm(x, None, None, EPS, last=True), expected(x, None, None, True)
    assert ours[[3, 30, 31, 66]].isnan().all()
    assert theirs[ours.isnan()].isnan().all()
    others = [row for row in range(67) if row not in (3, 7, 8, 30, 31, 66)]
    assert torch.equal(ours[others], clean[others])
    again = [channel_norm(x[9:30], None, None, EPS, last=True) for _ in range(20)]
    assert all(torch.equal(result, again[0]) for result in again)


@torch.no_grad()
def test_nothing_beside_the_rows_is_read_or_written() -> None:
    for dtype, channels in itertools.product(FAST, (96, 100, 104, 1536)):
        buffer = draw((129, channels), dtype)
        exact = channel_norm(buffer[1:-1].clone(), None, None, EPS, last=True)
        buffer[0], buffer[-1] = float("nan"), float("nan")
        assert torch.equal(channel_norm(buffer[1:-1], None, None, EPS, last=True), exact)


@torch.no_grad()
def test_what_has_no_kernel_is_left_to_aten() -> None:
    x = draw((2, 8, 5, 3), torch.float16)
    weight = draw((8,), x.dtype)
    for other in (x.double(), x[0], x[..., ::2], x.expand(2, 2, 8, 5, 3)[0]):
        given = weight.to(other.dtype)
        result = channel_norm(other, given, None, EPS, last=False)
        torch.testing.assert_close(result, expected(other, given, None, False))
    for shape in ((0, 8), (3, 0, 8)):
        empty = draw(shape, x.dtype)
        assert channel_norm(empty, None, None, EPS, last=True).shape == shape
    empty = channel_norm(x[:0].to(memory_format=torch.channels_last), weight, None, EPS, last=False)
    assert empty.shape == (0, 8, 5, 3)
    assert empty.stride() == expected(x[:0], None, None, False).stride()
    leaf = x.float().requires_grad_()
    with torch.enable_grad():
        grads = [
            torch.autograd.grad(call(leaf).square().sum(), leaf)[0]
            for call in (
                lambda t: channel_norm(t, None, None, EPS, last=False),
                lambda t: expected(t, None, None, False),
            )
        ]
    torch.testing.assert_close(*grads)


@pytest.mark.gpu
@torch.no_grad()
def test_bad_input_is_named() -> None:
    x = draw((2, 5, 3, 4), torch.float16)
    vector = draw((4,), x.dtype)
    with pytest.raises(RuntimeError, match=r"weight must be 1-D of length 4, got shape \[5\]"):
        channel_norm(x, draw((5,), x.dtype), None, EPS, last=True)
    with pytest.raises(RuntimeError, match=r"bias must be 1-D of length 4, got shape \[1, 4\]"):
        channel_norm(x, vector, vector[None], EPS, last=True)
    with pytest.raises(RuntimeError, match="bias must have the input's dtype Half, got Float"):
        channel_norm(x, vector, vector.float(), EPS, last=True)
    with pytest.raises(RuntimeError, match="weight must be on the input's device, cuda:0, got cpu"):
        channel_norm(x, vector.cpu(), None, EPS, last=True)
    with pytest.raises(RuntimeError, match=r"input must be 4-D .* 3-D .*, got shape \[3, 4\]"):
        channel_norm(x[0, 0], None, None, EPS, last=False)
    with pytest.raises(RuntimeError, match=r"input must be at least 1-D .*, got shape \[\]"):
        channel_norm(vector[0], None, None, EPS, last=True)


@pytest.mark.gpu
@pytest.mark.parametrize("last", [False, True])
@pytest.mark.parametrize("channels", [96, 100])
@torch.no_grad()
def test_one_kernel(channels: int, last: bool) -> None:
    image = draw((4, channels, 14, 14), torch.float16).to(memory_format=torch.channels_last)
    x = image.movedim(1, -1) if last else image
    weight, bias = parameters(channels, x.dtype, 5)
    call = lambda: channel_norm(x, weight, bias, EPS, last=last)  # noqa: E731
    call()
    (row,) = profile(call, torch.device("cuda"))
    assert (row.family, row.kernels) == (REDUCTION, 1)
    assert "channel_norm" in row.largest


@pytest.mark.gpu
@EACH_FAST
@torch.no_grad()
def test_graph_capture_on_a_stream(dtype: torch.dtype) -> None:
    x, weight, bias = draw((3, 96, 7, 9), dtype), *parameters(96, dtype, 5)
    x = x.to(memory_format=torch.channels_last)
    assert weight is not None
    stream = torch.cuda.Stream()
    channel_norm(x, weight, bias, EPS, last=False)  # builds the library
    stream.wait_stream(torch.cuda.current_stream())
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        output = channel_norm(x, weight, bias, EPS, last=False)
    for seed in range(3):
        x.copy_(draw((3, 96, 7, 9), dtype, seed))
        weight.copy_(draw((96,), dtype, seed))
        graph.replay()
        torch.cuda.synchronize()
        assert torch.equal(output, channel_norm(x, weight, bias, EPS, last=False))


@pytest.mark.gpu
@pytest.mark.parametrize("channels", [96, 100, 1536])
@torch.no_grad()
def test_offsets_beyond_32_bits(channels: int) -> None:
    rows = (1 << 31) // channels + 1001
    x = torch.empty((rows, channels), dtype=torch.float16, device="cuda").normal_()
    assert x.numel() > 1 << 31
    output = channel_norm(x, None, None, EPS, last=True)
    judge = Judge()
    for part in (slice(1000), slice(-1000, None)):
        exact = expected(x[part].double(), None, None, True)
        judge.add(str(part), output[part], expected(x[part], None, None, True), exact)
    judge.check()
