"""Every family of CUDA kernels of the gradients, at every size that is compiled.

The families are listed in ``csrc/depthwise_conv2d/backward/choice.cpp``; ``DWSWAP_BACKWARD_FAMILY``
asks for one. A family is added here by its lines in ``ROWS``.
"""

from __future__ import annotations

import itertools
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass, replace

import pytest
import torch
import torch.nn.functional as F
from cases import Case, make_tensors, place
from numerics import Judge, poison, told
from torch import Tensor

from dwswap.backward import backward_families
from dwswap.compilation import csrc_dir
from dwswap.layouts import memory_format
from dwswap.schema import depthwise_conv2d_backward

DEVICE = os.environ.get("DWSWAP_FUZZ_DEVICE", "cuda")
FAST = (torch.float32, torch.float16, torch.bfloat16)
HALVES = (torch.float16, torch.bfloat16)
SQUARES = ((3, 3), (5, 5), (7, 7))
SIZES = ((7, 7), (13, 9), (14, 14), (33, 29), (1, 23), (5, 113), (56, 57))
NARROW = ((7, 7), (13, 9), (28, 28), (33, 29), (5, 30), (75, 56))
ALL = (True, True, True)

pytestmark = [] if DEVICE == "cpu" else [pytest.mark.gpu]


@dataclass(frozen=True)
class Row:
    """Problems of which one family computes the gradient of the input, or of weight and bias."""

    of: str  # "input" or "sums"
    family: str
    layout: str
    kernels: tuple[tuple[int, int], ...] = SQUARES
    strides: tuple[int, ...] = (1, 2)
    channels: tuple[int, ...] = (3, 8, 58, 72)
    multiplier: int = 1
    dilation: int = 1
    extra_padding: tuple[int, int] = (0, 0)
    dtypes: tuple[torch.dtype, ...] = FAST
    sizes: tuple[tuple[int, int], ...] = SIZES
    batches: tuple[int, ...] = ()  # instead of small ones, and one that fills a GPU
    bias: bool = True  # whether "sums" asks for its gradient


GRAM = Row("sums", "gram_sums", "contiguous", channels=(24,), dtypes=HALVES, sizes=NARROW)
COLUMN_SUMS = Row(
    "sums",
    "column_sums",
    "channels_last",
    kernels=((3, 3),),
    channels=(8, 24, 72, 136, 200, 520),
    sizes=(*SIZES, (1, 1), (2, 3), (28, 112)),
)
PIXEL_SUMS = Row(
    "sums",
    "pixel_sums",
    "channels_last",
    strides=(1, 2, 3),
    channels=(8, 57, 66, 128),
    sizes=((1, 1), (2, 2), (3, 3), (5, 3), (2, 7), (7, 7)),
    batches=(1, 64, 65),
)
ANY_KERNEL = ((1, 1), (2, 2), (3, 1), (4, 3), (1, 11), (9, 9))
ROWS = {
    "flipped": Row("input", "flipped", "contiguous", (*SQUARES, (2, 5)), (1,)),
    "flipped, channels_last": Row("input", "flipped", "channels_last", (*SQUARES, (2, 5)), (1,)),
    "flipped, dilation": Row("input", "flipped", "contiguous", strides=(1,), dilation=2),
    "flipped, no padding": Row(
        "input", "flipped", "channels_last", strides=(1,), extra_padding=(-1, -1)
    ),
    "flipped, misaligned": Row("input", "flipped", "offset_channels_last", strides=(1,)),
    "flipped, float64": Row(
        "input", "flipped", "contiguous", ((3, 3), (4, 5)), (1,), dtypes=(torch.float64,)
    ),
    "plane gather": Row("input", "plane_gather", "contiguous", strides=(2,)),
    "plane gather, misaligned": Row("input", "plane_gather", "offset", strides=(2,)),
    "plane gather, odd padding": Row(
        "input", "plane_gather", "contiguous", strides=(2,), extra_padding=(1, 0)
    ),
    "plane gather, much padding": Row(
        "input", "plane_gather", "contiguous", strides=(2,), extra_padding=(9, 6)
    ),
    "channel gather": Row("input", "channel_gather", "channels_last", strides=(2,)),
    "channel gather, misaligned": Row(
        "input", "channel_gather", "offset_channels_last", strides=(2,)
    ),
    "channel gather, pairs": Row("input", "channel_gather", "offset_by_pair", strides=(2,)),
    "channel gather, odd padding": Row(
        "input", "channel_gather", "channels_last", strides=(2,), extra_padding=(0, 1)
    ),
    "channel gather, much padding": Row(
        "input", "channel_gather", "channels_last", strides=(2,), extra_padding=(9, 6)
    ),
    "general gather": Row("input", "general", "contiguous", ANY_KERNEL, (1, 2, 3)),
    "general gather, channels_last": Row(
        "input", "general", "channels_last", ANY_KERNEL, (1, 3), multiplier=2
    ),
    "general gather, dilation": Row("input", "general", "channels_last", dilation=2),
    "general gather, cropped": Row(
        "input", "general", "contiguous", SQUARES, (1,), extra_padding=(9, 5)
    ),
    "general gather, float64": Row("input", "general", "contiguous", dtypes=(torch.float64,)),
    "plane sums": Row("sums", "plane_sums", "contiguous"),
    "plane sums, misaligned": Row("sums", "plane_sums", "offset"),
    "plane sums, multiplier": Row("sums", "plane_sums", "contiguous", multiplier=2),
    "plane sums, dilation": Row("sums", "plane_sums", "contiguous", strides=(1,), dilation=2),
    "plane sums, no padding": Row("sums", "plane_sums", "contiguous", extra_padding=(-1, -1)),
    "plane sums, more padding": Row("sums", "plane_sums", "contiguous", extra_padding=(1, 4)),
    "gram sums": replace(
        GRAM,
        strides=(1,),
        channels=(8, 40, 136),
        sizes=((7, 7), (8, 8), (13, 9), (14, 14), (33, 29), (1, 23), (5, 63), (56, 57), (75, 64)),
    ),
    "gram sums, stride 2": replace(
        GRAM,
        strides=(2,),
        channels=(8, 40, 136),
        sizes=((7, 7), (8, 8), (13, 9), (14, 14), (33, 29), (1, 23), (5, 30), (75, 64)),
    ),
    "gram sums, no padding": replace(GRAM, extra_padding=(-1, -1)),
    "gram sums, padding that splits words": replace(
        GRAM, kernels=((7, 7),), strides=(1,), extra_padding=(0, 2)
    ),
    "gram sums, more padding": replace(GRAM, extra_padding=(1, 4)),
    "diagonal sums": Row(
        "sums",
        "diagonal_sums",
        "channels_last",
        SQUARES[1:],
        channels=(8, 32, 72, 80, 136, 200),
        dtypes=HALVES,
    ),
    "diagonal sums, misaligned by pixels": Row(
        "sums", "diagonal_sums", "offset_by_vector", SQUARES[1:], channels=(8, 72), dtypes=HALVES
    ),
    "diagonal sums, no padding": Row(
        "sums",
        "diagonal_sums",
        "channels_last",
        SQUARES[1:],
        channels=(24,),
        dtypes=HALVES,
        extra_padding=(-1, -1),
    ),
    "diagonal sums, more padding": Row(
        "sums",
        "diagonal_sums",
        "channels_last",
        SQUARES[1:],
        channels=(24,),
        dtypes=HALVES,
        extra_padding=(1, 4),
    ),
    "column sums": COLUMN_SUMS,
    "column sums, misaligned by pixels": replace(
        COLUMN_SUMS, layout="offset_by_vector", channels=(8, 72)
    ),
    "column sums, no padding": replace(COLUMN_SUMS, channels=(24,), extra_padding=(-1, -1)),
    "column sums, more padding": replace(COLUMN_SUMS, channels=(24,), extra_padding=(1, 4)),
    "pixel sums": PIXEL_SUMS,
    "pixel sums, misaligned": replace(PIXEL_SUMS, layout="offset_channels_last"),
    "pixel sums, pairs": replace(PIXEL_SUMS, layout="offset_by_pair", channels=(8, 66)),
    "pixel sums, dilation": replace(PIXEL_SUMS, dilation=2, sizes=((1, 1), (3, 3), (5, 3))),
    "pixel sums, no padding": replace(PIXEL_SUMS, extra_padding=(-3, -3)),
    "pixel sums, much padding": replace(
        PIXEL_SUMS, extra_padding=(1, 4), sizes=((1, 1), (2, 3), (3, 3))
    ),
    "pixel sums, no bias": replace(PIXEL_SUMS, bias=False),
    "channel sums": Row("sums", "channel_sums", "channels_last", channels=(1, 3, 8, 58, 72, 130)),
    "channel sums, misaligned": Row("sums", "channel_sums", "offset_channels_last"),
    "channel sums, pairs": Row("sums", "channel_sums", "offset_by_pair", channels=(8, 58)),
    "channel sums, dilation": Row(
        "sums", "channel_sums", "channels_last", strides=(1,), dilation=2
    ),
    "channel sums, no padding": Row(
        "sums", "channel_sums", "channels_last", extra_padding=(-1, -1)
    ),
    "channel sums, more padding": Row(
        "sums", "channel_sums", "channels_last", extra_padding=(1, 4)
    ),
    "general sums": Row("sums", "general", "contiguous", (*ANY_KERNEL, (3, 3)), (1, 2, 3)),
    "general sums, channels_last": Row(
        "sums", "general", "channels_last", (*ANY_KERNEL, (3, 3)), (1, 3), multiplier=2
    ),
    "general sums, dilation": Row("sums", "general", "channels_last", dilation=2),
    "general sums, much padding": Row("sums", "general", "contiguous", extra_padding=(9, 5)),
    "general sums, float64": Row("sums", "general", "contiguous", dtypes=(torch.float64,)),
    "strided": Row("input", "flipped", "sliced", strides=(1,)),
    "strided, sums": Row("sums", "plane_sums", "sliced"),
    "strided channels_last, sums": Row("sums", "channel_sums", "channel_sliced_channels_last"),
}
# These have kernels of their own where the gradient of the bias is not wanted.
ROWS |= {
    f"{name}, no bias": replace(row, bias=False)
    for name, row in ROWS.items()
    if row.family == "gram_sums"
}
each_row = pytest.mark.parametrize(
    ("row", "dtype"),
    [
        pytest.param(row, dtype, id=f"{name}-{str(dtype)[6:]}")
        for name, row in ROWS.items()
        for dtype in row.dtypes
    ],
)


@pytest.fixture(autouse=True)
def _family(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if "row" in request.fixturenames:
        monkeypatch.setenv("DWSWAP_BACKWARD_FAMILY", request.getfixturevalue("row").family)


def problems(row: Row, dtype: torch.dtype) -> Iterator[Case]:
    """Small batches or those of the row, one without N, and one size whose batch fills a GPU."""
    count = 0
    for kernel, stride in itertools.product(row.kernels, row.strides):
        padding = [row.dilation * side // 2 for side in kernel]
        padding = [
            max(0, side + extra) for side, extra in zip(padding, row.extra_padding, strict=True)
        ]
        least = [
            row.dilation * (side - 1) + 1 - 2 * p for side, p in zip(kernel, padding, strict=True)
        ]
        for i, size in enumerate((*row.sizes, row.sizes[count % len(row.sizes)])):
            channels = row.channels[count % len(row.channels)]
            count += 1
            height, width = (max(pair) for pair in zip(size, least, strict=True))
            many = i == len(row.sizes) and not row.batches and DEVICE != "cpu"
            batches = row.batches or (1, 2, 3)
            yield Case(
                dtype,
                row.layout,
                None
                if count % 5 == 0
                else -(-(1 << 20) // (height * width))
                if many
                else batches[count % len(batches)],
                min(channels, 8) if many else channels,
                height,
                width,
                kernel,
                (stride, stride),
                (padding[0], padding[1]),
                (row.dilation, row.dilation),
                row.multiplier,
                seed=count,
            )


def gradient_of_output(case: Case, *, integers: bool = False) -> Tensor:
    generator = torch.Generator(DEVICE).manual_seed(case.seed + 1)
    if integers:
        values = torch.randint(-1, 2, case.output_shape, generator=generator, device=DEVICE)
    else:
        values = torch.randn(case.output_shape, generator=generator, device=DEVICE)
    return place(values.to(case.dtype), case.layout)


def geometry(case: Case) -> tuple[tuple[int, int], ...]:
    return (case.stride, case.padding, case.dilation)


def wanted(row: Row, results: list[Tensor | None]) -> dict[str, Tensor]:
    named = dict(zip(("input", "weight", "bias"), results, strict=True))
    return {
        name: t
        for name, t in named.items()
        if t is not None and (name == "input") == (row.of == "input")
    }


def aten(case: Case, grad: Tensor, input: Tensor, weight: Tensor) -> list[Tensor]:
    leaves = [
        t.detach().requires_grad_() for t in (input, weight, weight.new_zeros(weight.shape[0]))
    ]
    output = F.conv2d(*leaves, *geometry(case), groups=case.channels)
    return list(torch.autograd.grad(output, leaves, grad))


def ours(row: Row, case: Case, grad: Tensor, input: Tensor, weight: Tensor) -> list[Tensor]:
    mask = [row.of == "input", row.of == "sums", row.of == "sums" and row.bias]
    if DEVICE != "cpu":
        found = backward_families(grad, input, weight, *geometry(case), mask)
        assert found[row.of == "sums"] == row.family, f"{found} for {case}"
    poison(input)
    return depthwise_conv2d_backward(grad, input, weight, *geometry(case), mask)


@each_row
def test_values(row, dtype):
    judge = Judge()
    for i, case in enumerate(problems(row, dtype)):
        with told(case):
            input, weight, *_ = make_tensors(case, DEVICE)
            grad = gradient_of_output(case)
            exact = wanted(row, aten(case, grad.double(), input.double(), weight.double()))
            # cuDNN fails on some half-precision tensors that do not begin at 16 bytes.
            dense = (t.clone(memory_format=torch.contiguous_format) for t in (grad, input, weight))
            theirs = wanted(row, aten(case, *dense))
            for name, result in wanted(row, ours(row, case, grad, input, weight)).items():
                judge.add(f"grad_{name} of {case}", result, theirs[name], exact[name])
        if i % 16 == 15:
            judge.check()
    judge.check()


@each_row
def test_integers_match_exactly(row, dtype):
    """Down to a single output: sums of so few are exact in every dtype."""
    # diagonal_sums wants even and odd columns of a strided input.
    least = (1, 2) if row.family == "diagonal_sums" else (1, 1)
    for case in problems(replace(row, sizes=(least, (4, 3), (7, 7), (11, 12))), dtype):
        case = replace(case, batch=None if case.batch is None else 1)
        with told(case):
            input, weight, *_ = make_tensors(case, DEVICE, integers=True)
            grad = gradient_of_output(case, integers=True)
            exact = wanted(row, aten(case, grad.double(), input.double(), weight.double()))
            for name, result in wanted(row, ours(row, case, grad, input, weight)).items():
                assert torch.equal(result.double(), exact[name]), name


@each_row
def test_nan_reaches_exactly_its_windows(row, dtype):
    """From every pixel of grad_output, the borders' included; the gradient elsewhere is clean."""
    if row.of != "input":
        pytest.skip("a gradient of the weight sees every pixel")
    for case in problems(replace(row, sizes=((9, 8),)), dtype):
        out_h, out_w = case.output_shape[-2:]
        case = replace(case, batch=out_h * out_w)
        hit = torch.eye(out_h * out_w, dtype=torch.bool, device=DEVICE).view(-1, 1, out_h, out_w)
        input, weight, *_ = make_tensors(case, DEVICE)
        weight = torch.ones_like(weight)
        grad = gradient_of_output(case)
        result = ours(row, case, grad.masked_fill(hit, torch.nan), input, weight)[0]
        ones = weight.new_ones((1, 1, *case.kernel), dtype=torch.float64)
        reached = torch.nn.grad.conv2d_input(
            (case.batch, 1, case.height, case.width), ones, hit.double(), *geometry(case)
        )
        assert torch.equal(result.isnan(), (reached > 0).expand_as(result)), case


@each_row
def test_the_same_bits_every_time(row, dtype):
    for case in problems(row if row.batches else replace(row, sizes=((33, 29),)), dtype):
        input, weight, *_ = make_tensors(case, DEVICE)
        grad = gradient_of_output(case)
        first = wanted(row, ours(row, case, grad, input, weight))
        for _ in range(5):
            again = wanted(row, ours(row, case, grad, input, weight))
            assert all(torch.equal(first[name], again[name]) for name in first), case


@pytest.mark.parametrize("dtype", [*FAST, torch.float64], ids=lambda dtype: str(dtype)[6:])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "transposed"])
@pytest.mark.parametrize("stride", [(1, 1), (2, 2), (3, 1)])
def test_only_what_is_asked_for(layout, stride, dtype):
    case = Case(dtype, layout, 2, 8, 13, 11, (3, 3), stride, (1, 1))
    input, weight, *_ = make_tensors(case, DEVICE)
    grad = gradient_of_output(case)
    arguments = (grad, input, weight, *geometry(case))
    everything = depthwise_conv2d_backward(*arguments, ALL)
    like_weight = torch.empty_like(weight, memory_format=memory_format(weight))
    assert everything[1].stride() == like_weight.stride()
    for mask in itertools.product((False, True), repeat=3):
        results = depthwise_conv2d_backward(*arguments, mask)
        for asked, result, reference in zip(mask, results, everything, strict=True):
            assert (result is not None) == asked
            if asked:
                torch.testing.assert_close(result, reference)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", FAST, ids=lambda dtype: str(dtype)[6:])
def test_few_pixels_have_kernels_of_their_own(dtype):
    for size, few in ((1, True), (3, True), (56, False)):
        case = Case(dtype, "channels_last", 64, 128, size, size, (3, 3), (1, 1), (1, 1))
        input, weight, *_ = make_tensors(case, "cuda")
        found = backward_families(input, input, weight, *geometry(case), ALL)
        assert (found[1] == "pixel_sums") == few, f"{found} for {case}"


@pytest.mark.parametrize("dtype", [*FAST, torch.float64], ids=lambda dtype: str(dtype)[6:])
def test_an_empty_batch(dtype):
    case = Case(dtype, "contiguous", 0, 8, 13, 11, (3, 3), (1, 1), (1, 1))
    input = torch.empty(case.input_shape, dtype=dtype, device=DEVICE)
    weight = torch.randn(case.weight_shape, dtype=dtype, device=DEVICE)
    grad = torch.empty(case.output_shape, dtype=dtype, device=DEVICE)
    results = depthwise_conv2d_backward(grad, input, weight, *geometry(case), ALL)
    assert results[0].shape == input.shape
    assert all(not result.any() for result in results[1:])


@pytest.mark.gpu
def test_other_arguments_are_refused(monkeypatch):
    case = Case(torch.float32, "contiguous", 2, 8, 13, 11, (3, 3), (1, 1), (1, 1))
    input, weight, *_ = make_tensors(case, "cuda")
    grad = torch.randn(case.output_shape, device="cuda")

    def run(grad=grad):
        depthwise_conv2d_backward(grad, input, weight, *geometry(case), ALL)

    with pytest.raises(RuntimeError, match=r"grad_output must have the output's shape .*13, 11"):
        run(grad[..., 1:])
    with pytest.raises(RuntimeError, match="grad_output must have the input's dtype"):
        run(grad.half())
    monkeypatch.setenv("DWSWAP_BACKWARD_FAMILY", "fastest")
    with pytest.raises(RuntimeError, match="DWSWAP_BACKWARD_FAMILY must name a family"):
        run()


def test_every_family_is_covered():
    source = (csrc_dir() / "depthwise_conv2d" / "backward" / "choice.cpp").read_text()
    families = re.findall(r'^    \{\{"(\w+)", ', source, re.MULTILINE)
    assert set(families) == {row.family for row in ROWS.values()}
