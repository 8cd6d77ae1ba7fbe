"""Ragged shapes through every family of kernels, for NVIDIA's compute-sanitizer:

    compute-sanitizer --tool memcheck python scripts/sanitize.py
    compute-sanitizer --tool initcheck python scripts/sanitize.py --no-bulk-stores
    compute-sanitizer --tool racecheck python scripts/sanitize.py

initcheck does not see what a bulk copy from shared memory writes, so with --no-bulk-stores whatever
would run a family with such copies runs as it does on GPUs without them.
Every tensor is an allocation of its own, so an access beyond its end is an error that memcheck
sees. Results are compared with float64 on the CPU.
"""

from __future__ import annotations

import functools
import itertools
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

# Read when torch starts CUDA.
os.environ["PYTORCH_NO_CUDA_MEMORY_CACHING"] = "1"
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
import torch.nn.functional as F

from dwswap import build, depthwise_conv2d
from dwswap.activations import PAIRS
from dwswap.classifiers import pooled_linear
from dwswap.means import channel_means
from dwswap.norms import channel_norm
from dwswap.ops import squeeze_excitation
from dwswap.registration import kernel_family
from dwswap.schema import (
    batch_norm,
    batch_norm_backward,
    channel_scale,
    channel_scale_backward,
    depthwise_conv2d_backward,
)
from dwswap.schema import separable_conv2d as separable_operator
from dwswap.shuffling import interleaved
from dwswap.stems import stem_conv2d

FORMATS = (torch.contiguous_format, torch.channels_last)
HALVES = (torch.float16, torch.bfloat16)
# The families with bulk copies from shared memory.
BULK_STORES = ("plane_strips", "plane_bands", "diagonal")


class Problem(NamedTuple):
    dtype: torch.dtype
    memory_format: torch.memory_format
    shape: tuple[int, int, int, int]
    kernel: tuple[int, int]
    stride: int = 1
    dilation: int = 1
    multiplier: int = 1
    transform: bool = False
    extra_padding: tuple[int, int] = (0, 0)
    offset: int = 0  # of the input in its storage, in elements
    portable: bool = False
    family: str = ""  # asked for; the choice's where it is empty or does not cover the problem
    backward: str = ""  # the same for the families of the gradients


def problems() -> Iterator[Problem]:
    """Shapes that no tile divides, for every family of kernels and each way it reads and cuts."""
    fast = (torch.float32, *HALVES)
    contiguous, last = FORMATS
    for size in ((3, 3), (5, 5), (7, 7)):
        for stride in (1, 2):
            for i, dtype in enumerate(fast):
                transform = (size[0] + i) % 2 == 0
                ragged = Problem(dtype, last, (2, 2, 7, 7), size, stride, transform=transform)
                # channel_tiles: read by the copy engine, and by 16, 8 and 4 bytes.
                for channels, portable in ((72, False), (72, True), (20, False), (58, False)):
                    shape = (2, channels, 7 + 6 * i, 17 - 4 * i)
                    yield ragged._replace(shape=shape, portable=portable, family="channel_tiles")
                if stride == 1:
                    for dilation, portable in ((2, False), (2, True), (5, False)):
                        lattice = ragged._replace(dilation=dilation, portable=portable)
                        yield lattice._replace(shape=(2, 40, 17, 13), family="channel_tiles")
                yield ragged._replace(shape=(2, 72, 23, 17 - 4 * i), family="channel_columns")
                if size == (3, 3):
                    # channel_direct: accesses of 8 to 2 bytes; outputs enough for many per thread.
                    direct = ragged._replace(family="channel_direct")
                    for channels, offset in ((20, 0), (58, 0), (57, 0), (20, 1)):
                        shape = (2, channels, 9 + 6 * i, 17 - 4 * i)
                        yield direct._replace(shape=shape, offset=offset)
                    yield direct._replace(shape=(100 * stride**2, 58, 19, 21))
                # plane_strips: whole planes and strips, by both kinds of copies; rolling_rows.
                ragged = ragged._replace(memory_format=contiguous)
                small, wide = (2, 7, 9 + 6 * i, 15 + 2 * i), (1, 2, 11, 803 + i)
                for portable in (False, True):
                    strips = ragged._replace(portable=portable, family="plane_strips")
                    yield strips._replace(shape=small)
                    yield strips._replace(shape=wide)
                    yield strips._replace(shape=(19, 30, 7, 7))
                for offset in (0, 1):
                    yield ragged._replace(shape=small, offset=offset, family="rolling_rows")
        # Outputs enough for the kernels that compute many rows per thread.
        large = Problem(torch.float16, contiguous, (25, 96, 30, 31), size, family="plane_strips")
        yield large
        yield Problem(torch.float16, last, (25, 96, 30, 31), size)
        yield Problem(torch.float32, last, (25, 96, 30, 31), size, portable=True)
        yield large._replace(portable=True)
        for memory_format in FORMATS:
            # Rows of outputs that see nothing but padding, at both ends of the tensor.
            for transform in (False, True):
                shape = (2, 8, 9, 901)
                padded = Problem(torch.float16, memory_format, shape, size, transform=transform)
                yield padded._replace(extra_padding=(6, 0))
                yield padded._replace(shape=(3, 8, 11, 13), extra_padding=(9, 5))
    for dtype, stride in itertools.product(HALVES, (1, 2)):
        # diagonal: several images of a unit; columns and channels that do not divide.
        for size, shape in itertools.product(((5, 5), (7, 7)), ((5, 40, 7, 9), (2, 24, 37, 41))):
            yield Problem(dtype, last, shape, size, stride, family="diagonal")
        # plane_bands: walks of images and of segments, whole planes and strips, odd rows; pieces
        # that bulk copies write, and that do not begin at 16 bytes.
        for size, shape in itertools.product(
            ((5, 5), (7, 7)),
            ((17, 16, 7, 7), (5, 6, 14, 14), (2, 2, 37, 41), (3, 8, 28, 32), (1, 2, 9, 901)),
        ):
            banded = Problem(dtype, contiguous, shape, size, stride, family="plane_bands")
            yield banded
            yield banded._replace(transform=True)
        # toeplitz: pixels, rows of 4, 2 and 1 elements, whole planes; every number of products.
        for kernel in ((5, 5), (15, 15), (31, 31)):
            transform = stride == 2
            tall = Problem(dtype, last, (3, 24, 19, 21), kernel, stride, transform=transform)
            tall = tall._replace(family="toeplitz")
            yield tall
            yield tall._replace(dilation=2, kernel=(5, 5))
            for shape in (
                (3, 8, 7, 7),
                (2, 24, 14, 14),
                (2, 3, 33, 33),
                (2, 3, 17, 60),
                (1, 5, 50, 66),
            ):
                yield tall._replace(memory_format=contiguous, shape=shape)
    for kernel in ((3, 1), (1, 3), (3, 7), (7, 3)):
        for dtype in fast:
            yield Problem(dtype, contiguous, (2, 3, 19, 21), kernel, family="plane_strips")
    for memory_format in FORMATS:
        # What the general kernel takes.
        for dtype in (*fast, torch.float64):
            yield Problem(dtype, memory_format, (2, 3, 10, 13), (1, 11), transform=True)
            yield Problem(dtype, memory_format, (1, 57, 1, 33), (3, 3), transform=True)
            yield Problem(dtype, memory_format, (1, 5, 11, 9), (5, 5), dilation=2)
            yield Problem(dtype, memory_format, (2, 4, 7, 7), (4, 2), stride=3, multiplier=3)


def gradient_problems() -> Iterator[Problem]:
    """The same for the families of the gradients."""
    fast = (torch.float32, *HALVES)
    for memory_format, dtype, stride in itertools.product(FORMATS, fast, (1, 2)):
        for i, size in enumerate(((3, 3), (5, 5), (7, 7))):
            for channels, offset in ((72, 0), (58, 0), (57, 0), (20, 1)):
                shape = (3, channels, 9 + 6 * i, 17 - 4 * i)
                ragged = Problem(dtype, memory_format, shape, size, stride, offset=offset)
                yield ragged
                yield ragged._replace(shape=(2, channels, 33, 29), extra_padding=(1, 0))
            if memory_format is torch.channels_last and dtype in HALVES:
                # diagonal_sums, which has the 72 above too: several boxes, a few channels of a box.
                ragged = Problem(dtype, memory_format, (3, 136, 9, 35), size, stride)
                yield ragged
                yield ragged._replace(shape=(5, 24, 15, 70))
                yield ragged._replace(shape=(5, 40, 6, 7), extra_padding=(-1, -1))
                yield ragged._replace(shape=(2, 72, 33, 29), backward="channel_sums")
            if memory_format is torch.contiguous_format and dtype in HALVES:
                # Strips, whole planes, and pairs of them.
                for shape in ((2, 8, 45, 64), (3, 24, 33, 29), (5, 16, 14, 14), (7, 8, 7, 7)):
                    products = Problem(dtype, memory_format, shape, size, stride)
                    yield products._replace(backward="gram_sums")
                    yield products._replace(backward="gram_sums", extra_padding=(1, 3))
            yield Problem(dtype, memory_format, (2, 5, 11, 13), size, stride, extra_padding=(9, 5))
    for memory_format, dtype in itertools.product(FORMATS, (*fast, torch.float64)):
        general = Problem(dtype, memory_format, (2, 33, 10, 13), (3, 3), backward="general")
        yield general
        yield general._replace(kernel=(1, 11), stride=3)
        yield general._replace(kernel=(4, 2), multiplier=3, dilation=2)


class Excitation(NamedTuple):
    """A problem of squeeze_excitation."""

    dtype: torch.dtype
    memory_format: torch.memory_format
    shape: tuple[int, int, int, int]
    hidden: int
    offset: int = 0


def excitations() -> Iterator[Excitation]:
    """Channels, pixels and hidden units that no slice, vector or group of threads divides."""
    for dtype, memory_format in itertools.product((torch.float32, *HALVES), FORMATS):
        for shape, hidden in (
            ((1, 72, 7, 7), 24),
            ((2, 57, 13, 9), 5),
            ((3, 200, 8, 10), 13),
            ((1, 24, 56, 57), 300),
            ((2, 1, 1, 1), 1),
            ((300, 40, 7, 8), 10),
            ((300, 240, 7, 8), 60),  # the layers are matrix products, as in those below
            ((600, 57, 5, 7), 130),
        ):
            for offset in (0, 1):
                yield Excitation(dtype, memory_format, shape, hidden, offset)


class Means(NamedTuple):
    """A problem of the kernel that computes the means of channels."""

    dtype: torch.dtype
    memory_format: torch.memory_format
    shape: tuple[int, int, int, int]
    offset: int


def means() -> Iterator[Means]:
    """Groups of one warp and of several; channels and pixels that no vector divides."""
    for dtype, memory_format in itertools.product((torch.float32, *HALVES), FORMATS):
        shapes = ((2, 72, 7, 7), (3, 57, 13, 9), (1, 8, 33, 31), (300, 130, 3, 2), (2, 1, 1, 1))
        for shape, offset in itertools.product(shapes, (0, 1)):
            yield Means(dtype, memory_format, shape, offset)


class Norm(NamedTuple):
    """A problem of the kernels that normalize over channels."""

    dtype: torch.dtype
    memory_format: torch.memory_format  # channels_last, of which rows of channels are a view
    shape: tuple[int, int, int, int]
    offset: int
    last: bool


def norms() -> Iterator[Norm]:
    """Every number of lanes and of vectors; rows that no block and no thread divides."""
    for dtype in (torch.float32, *HALVES):
        for channels in (1, 8, 64, 96, 100, 104, 192, 200, 384, 512, 640, 1000, 1536, 2048):
            for offset, last in ((0, False), (0, True), (1, True)):
                shape = (3, channels, 7, 5 + 2 * offset)
                yield Norm(dtype, torch.channels_last, shape, offset, last)


class BatchNorm(NamedTuple):
    """A problem of the kernels of BatchNorm in training, forward and backward."""

    dtype: torch.dtype
    memory_format: torch.memory_format
    shape: tuple[int, int, int, int]
    offset: int
    activation: str


def batch_norms() -> Iterator[BatchNorm]:
    """Every width of an access and every way over planes; blocks of which threads are idle."""
    shapes = ((2, 24, 8, 8), (3, 40, 7, 7), (3, 20, 7, 5), (5, 57, 3, 5), (2, 600, 4, 9))
    for dtype, memory_format in itertools.product((torch.float32, *HALVES), FORMATS):
        for shape, offset in itertools.product((*shapes, (1, 3, 37, 61)), (0, 1, 4)):
            activation = "silu" if offset == 0 else "none"
            yield BatchNorm(dtype, memory_format, shape, offset, activation)


class Scaling(NamedTuple):
    """A problem of the kernels of squeeze-and-excitation in training, forward and backward."""

    dtype: torch.dtype
    memory_format: torch.memory_format
    shape: tuple[int, int, int, int]
    offset: int
    gate_dtype: torch.dtype


def scalings() -> Iterator[Scaling]:
    """Every width of an access; blocks of several groups and groups of several blocks; vectors of
    two planes, and planes smaller than a vector."""
    shapes = (
        *((2, 24, 8, 8), (3, 40, 7, 7), (3, 20, 7, 5), (5, 57, 3, 5), (2, 600, 4, 9)),
        *((1, 3, 37, 61), (300, 16, 1, 1), (70, 8, 2, 1), (1, 32, 120, 111)),
    )
    for dtype, memory_format in itertools.product((torch.float32, *HALVES), FORMATS):
        for i, (shape, offset) in enumerate(itertools.product(shapes, (0, 1, 4))):
            narrower = HALVES[i % 2] if dtype is torch.float32 and i % 3 == 0 else dtype
            yield Scaling(dtype, memory_format, shape, offset, narrower)


class Stem(NamedTuple):
    """A problem of the kernels of the first layer of a network."""

    dtype: torch.dtype
    memory_format: torch.memory_format
    shape: tuple[int, int, int, int]
    channels: int  # of the output
    offset: int
    activation: str


def stems() -> Iterator[Stem]:
    """Every number of channels and every access; units of all heights, and several for a block."""
    shapes = ((2, 3, 9, 40), (3, 3, 7, 13), (1, 3, 1, 1), (1, 3, 5, 1037), (1, 3, 224, 224))
    many = (1, 3, 3001, 62)
    for dtype, memory_format in itertools.product((torch.float32, *HALVES), FORMATS):
        for channels, (i, shape) in itertools.product(range(8, 65, 8), enumerate(shapes)):
            activation = ("none", "relu6", "silu")[(i + channels // 8) % 3]
            yield Stem(dtype, memory_format, shape, channels, i % 2, activation)
        for shape in (many, (700, 3, 24, 24), (700, 3, 23, 23)):
            yield Stem(dtype, memory_format, shape, 16, 0, "relu6")


class Classifier(NamedTuple):
    """A problem of the kernel of a linear layer on the means of an image."""

    dtype: torch.dtype
    shape: tuple[int, int, int, int]
    outputs: int
    activation: str


def classifiers() -> Iterator[Classifier]:
    """Shares of blocks that are empty, and that channels and outputs do not fill."""
    sizes = ((8, 1, 1), (72, 7, 7), (520, 3, 5), (1280, 7, 7), (2048, 16, 16))
    for dtype, (i, size), outputs in itertools.product(HALVES, enumerate(sizes), (8, 136, 1000)):
        yield Classifier(dtype, (1, *size), outputs, ("none", "relu6", "silu")[i % 3])


class Separable(NamedTuple):
    """A problem of the kernel of a depthwise convolution and the pointwise one behind it."""

    dtype: torch.dtype
    shape: tuple[int, int, int, int]
    kernel: int
    stride: int
    outputs: int
    pixels: int
    slices: int


def separables() -> Iterator[Separable]:
    """Pixels that no block divides, rows of odd length, slices of which the last has fewer
    channels, outputs that no matrix instruction divides."""
    shapes = ((1, 8, 1, 1), (2, 40, 9, 7), (1, 136, 5, 14), (3, 384, 7, 7))
    cuts = itertools.cycle(itertools.product((8, 16, 32), (1, 3, 8)))
    for dtype, kernel, stride, shape, outputs in itertools.product(
        HALVES, (3, 5), (1, 2), shapes, (8, 24, 160)
    ):
        yield Separable(dtype, shape, kernel, stride, outputs, *next(cuts))


class Interleaving(NamedTuple):
    """A problem of the kernel that interleaves the channels of two images."""

    dtype: torch.dtype
    memory_format: torch.memory_format  # of the images and of the result
    shape: tuple[int, int, int, int]
    offset: int = 0
    halves: bool = False  # the images are the halves of the channels of one


def interleavings() -> Iterator[Interleaving]:
    """Channels and pixels that no access and no block divides; more than one access per thread."""
    for dtype, memory_format in itertools.product((torch.float32, *HALVES), FORMATS):
        for shape in (
            (2, 58, 7, 5),
            (3, 116, 13, 9),
            (1, 57, 11, 1),
            (2, 1, 1, 1),
            (70, 24, 57, 33),
        ):
            for offset, halves in ((0, False), (1, False), (0, True)):
                yield Interleaving(dtype, memory_format, shape, offset, halves)


def place(
    values: torch.Tensor,
    problem: Problem | Excitation | Interleaving | Means | Norm | BatchNorm | Scaling | Stem,
) -> torch.Tensor:
    """A copy on the GPU in the memory format and at the offset of the problem."""
    laid_out = values.contiguous(memory_format=problem.memory_format)
    buffer = torch.zeros(values.numel() + problem.offset, dtype=values.dtype, device="cuda")
    return buffer.as_strided(values.shape, laid_out.stride(), problem.offset).copy_(laid_out)


def check(problem: Problem, bulk_stores: bool) -> str | None:
    """Run one problem; returns what is wrong with its result."""
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator).to(problem.dtype)

    channels = problem.shape[1]
    input = draw(*problem.shape)
    weight = draw(channels * problem.multiplier, 1, *problem.kernel)
    bias, input_bias = draw(weight.shape[0]), draw(channels)
    padding = [problem.dilation * size // 2 for size in problem.kernel]
    padding = [p + extra for p, extra in zip(padding, problem.extra_padding, strict=True)]
    os.environ["DWSWAP_PORTABLE"] = str(int(problem.portable))  # both are read at each launch
    os.environ["DWSWAP_FAMILY"] = problem.family
    tensors = (place(input, problem), weight.cuda(), bias.cuda())
    geometry = ([problem.stride] * 2, padding, [problem.dilation] * 2)
    absorbed: dict[str, Any] = {}
    if problem.transform:
        absorbed = {"input_bias": input_bias.cuda(), "input_activation": "relu6"}
        absorbed["activation"] = "silu"
    if not bulk_stores and kernel_family(*tensors, *geometry, *absorbed.values()) in BULK_STORES:
        os.environ["DWSWAP_PORTABLE"] = "1"
    ours = depthwise_conv2d(*tensors, *geometry, **absorbed)
    # A kernel reads the result here, so that initcheck misses no element that nobody wrote.
    result = (ours * 1).cpu().double()
    hidden = input.double()
    if problem.transform:
        hidden = F.relu6(hidden + input_bias.double()[:, None, None])
    exact = F.conv2d(
        hidden,
        weight.double(),
        bias.double(),
        problem.stride,
        padding,
        problem.dilation,
        groups=channels,
    )
    exact = F.silu(exact) if problem.transform else exact
    return difference(result, exact, problem.dtype)


def check_gradients(problem: Problem) -> str | None:
    """Run the gradients of one problem; returns what is wrong with them."""
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator).to(problem.dtype)

    channels = problem.shape[1]
    input = draw(*problem.shape)
    weight = draw(channels * problem.multiplier, 1, *problem.kernel)
    padding = [problem.dilation * size // 2 for size in problem.kernel]
    padding = [p + extra for p, extra in zip(padding, problem.extra_padding, strict=True)]
    geometry = ([problem.stride] * 2, padding, [problem.dilation] * 2)
    with torch.enable_grad():
        leaves = [t.double().requires_grad_() for t in (input, weight, weight[:, 0, 0, 0])]
        stride, dilation = problem.stride, problem.dilation
        wide_input, wide_weight, wide_bias = leaves
        output = F.conv2d(
            wide_input, wide_weight, wide_bias, stride, padding, dilation, groups=channels
        )
        grad = draw(*output.shape)
        exact = torch.autograd.grad(output, leaves, grad.double())
    os.environ["DWSWAP_PORTABLE"] = str(int(problem.portable))
    os.environ["DWSWAP_FAMILY"] = problem.family
    os.environ["DWSWAP_BACKWARD_FAMILY"] = problem.backward
    ours = depthwise_conv2d_backward(
        place(grad, problem), place(input, problem), weight.cuda(), *geometry, [True, True, True]
    )
    for name, result, reference in zip(("input", "weight", "bias"), ours, exact, strict=True):
        wrong = difference((result * 1).cpu().double(), reference, problem.dtype)
        if wrong is not None:
            return f"gradient of {name}: {wrong}"
    return None


def check_excitation(problem: Excitation) -> str | None:
    """Run one problem of squeeze_excitation; returns what is wrong with its result."""
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator).to(problem.dtype)

    channels, hidden = problem.shape[1], problem.hidden
    input, reduce_bias, expand_bias = draw(*problem.shape), draw(hidden), draw(channels)
    reduce_weight, expand_weight = draw(hidden, channels, 1, 1), draw(channels, hidden)
    expand_weight /= hidden
    parameters = (reduce_weight, reduce_bias, expand_weight, expand_bias)
    ours = squeeze_excitation(place(input, problem), *(t.cuda() for t in parameters))
    # A kernel reads the result here, so that initcheck misses no element that nobody wrote.
    result = (ours * 1).cpu().double()
    wide = [t.double() for t in parameters]
    units = F.relu(F.linear(input.double().mean((2, 3)), wide[0].flatten(1), wide[1]))
    gates = torch.sigmoid(F.linear(units, *wide[2:]))
    return difference(result, input.double() * gates[:, :, None, None], problem.dtype)


def check_means(problem: Means) -> str | None:
    """Run one problem of the kernel of means; returns what is wrong with its result."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(problem.shape, generator=generator).to(problem.dtype)
    bias = torch.randn(problem.shape[1], generator=generator).to(problem.dtype)
    ours = channel_means(place(x, problem), bias.cuda(), activation="relu6")
    # A kernel reads the result here, so that initcheck misses no element that nobody wrote.
    result = (ours * 1).cpu().double()
    exact = F.relu6(x.double() + bias.double()[:, None, None]).mean((2, 3))
    return difference(result, exact, problem.dtype)


def check_norm(problem: Norm) -> str | None:
    """Run one problem of the kernels of norms; returns what is wrong with its result."""
    generator = torch.Generator().manual_seed(0)
    channels = problem.shape[1]
    x = torch.randn(problem.shape, generator=generator).to(problem.dtype)
    parameters = torch.randn((2, channels), generator=generator).to(problem.dtype)
    image = place(x, problem)
    rows = image.movedim(1, -1) if problem.last else image
    weight, bias = (values.clone() for values in parameters)
    ours = channel_norm(rows, weight.cuda(), bias.cuda(), 1e-6, last=problem.last)
    # A kernel reads the result here, so that initcheck misses no element that nobody wrote.
    result = (ours * 1).cpu().double()
    exact = F.layer_norm(
        x.double().movedim(1, -1), (channels,), weight.double(), bias.double(), 1e-6
    )
    return difference(result, exact if problem.last else exact.movedim(-1, 1), problem.dtype)


def check_batch_norm(problem: BatchNorm) -> str | None:
    """Run one problem of BatchNorm in training; returns what is wrong with one of its results."""
    generator = torch.Generator().manual_seed(0)
    x, gradient = (
        torch.randn(problem.shape, generator=generator).to(problem.dtype) for _ in range(2)
    )
    weight, bias, mean, variance = torch.rand((4, problem.shape[1]), generator=generator)
    number = PAIRS["none", problem.activation]
    running = mean.cuda(), variance.cuda()
    batches = torch.zeros((), dtype=torch.int64, device="cuda")
    image, factors = place(x, problem), weight.cuda()
    output, stats = batch_norm(image, factors, bias.cuda(), *running, batches, 0.1, 1e-5, number)
    gradients = batch_norm_backward(
        place(gradient, problem), image, stats, factors, number, (True, True, True)
    )
    leaves = [t.double().requires_grad_() for t in (x, weight, bias)]
    wide = [mean.double(), variance.double()]
    with torch.enable_grad():
        normalized = F.batch_norm(
            leaves[0], wide[0], wide[1], leaves[1], leaves[2], True, 0.1, 1e-5
        )
        exact = F.silu(normalized) if problem.activation == "silu" else normalized
    wanted = [exact.detach(), *torch.autograd.grad(exact, leaves, gradient.double()), *wide]
    # Kernels read the results here, so that initcheck misses no element that nobody wrote.
    results = [(t * 1).cpu().double() for t in (output, *gradients, *running, batches)]
    if results.pop() != 1:
        return "batches were not counted"
    names = ("output", "grad_input", "grad_weight", "grad_bias", "running_mean", "running_var")
    for name, result, right in zip(names, results, wanted, strict=True):
        wrong = difference(result, right, problem.dtype)
        if wrong is not None:
            return f"{name}: {wrong}"
    return None


def check_scaling(problem: Scaling) -> str | None:
    """Run one problem of squeeze-and-excitation in training; returns what is wrong with it."""
    generator = torch.Generator().manual_seed(0)
    x, gradient = (
        torch.randn(problem.shape, generator=generator).to(problem.dtype) for _ in range(2)
    )
    z, spread = torch.randn((2, *problem.shape[:2]), generator=generator)
    z, spread = z.to(problem.gate_dtype), spread.to(problem.dtype)
    image, grad, gates = place(x, problem), place(gradient, problem), z.cuda()
    number = PAIRS["none", "sigmoid"]
    outputs = (
        channel_scale(image, gates, None, number),
        channel_scale(grad, gates, spread.cuda(), number),
        channel_scale_backward(grad, image, gates, number),
    )
    wide, slope, factors = x.double(), gradient.double(), z.double().sigmoid()
    pixels = problem.shape[2] * problem.shape[3]
    exact = (
        wide * factors[..., None, None],
        slope * factors[..., None, None] + spread.double()[..., None, None] / pixels,
        (wide * slope).sum((2, 3)) * factors * (1 - factors),
    )
    names = ("output", "grad_input", "grad_gates")
    dtypes = (problem.dtype, problem.dtype, problem.gate_dtype)
    for name, ours, right, dtype in zip(names, outputs, exact, dtypes, strict=True):
        # A kernel reads the result here, so that initcheck misses no element that nobody wrote.
        wrong = difference((ours * 1).cpu().double(), right, dtype)
        if wrong is not None:
            return f"{name}: {wrong}"
    return None


def check_stem(problem: Stem) -> str | None:
    """Run one problem of the kernels of the first layer; returns what is wrong with its result."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(problem.shape, generator=generator).to(problem.dtype)
    weight = torch.randn((problem.channels, 3, 3, 3), generator=generator).to(problem.dtype)
    weight = weight.contiguous(memory_format=problem.memory_format)
    bias = torch.randn(problem.channels, generator=generator).to(problem.dtype)
    ours = stem_conv2d(place(x, problem), weight.cuda(), bias.cuda(), activation=problem.activation)
    # A kernel reads the result here, so that initcheck misses no element that nobody wrote.
    result = (ours * 1).cpu().double()
    exact = F.conv2d(x.double(), weight.double(), bias.double(), 2, 1)
    activation = {"none": lambda y: y, "relu6": F.relu6, "silu": F.silu}[problem.activation]
    return difference(result, activation(exact), problem.dtype)


def check_classifier(problem: Classifier) -> str | None:
    """Run one problem of a linear layer on means; returns what is wrong with its result."""
    generator = torch.Generator().manual_seed(0)
    channels = problem.shape[1]
    shapes = (problem.shape, (channels, problem.outputs), (problem.outputs,), (channels,))
    x, weight, *biases = (torch.randn(s, generator=generator).to(problem.dtype) for s in shapes)
    os.environ["DWSWAP_PORTABLE"] = "0"
    bias, input_bias = biases
    ours = pooled_linear(
        x.cuda().contiguous(memory_format=torch.channels_last),
        weight.cuda().t(),
        bias.cuda(),
        input_bias=input_bias.cuda(),
        input_activation=problem.activation,
    )
    # A kernel reads the result here, so that initcheck misses no element that nobody wrote.
    result = (ours * 1).cpu().double()
    activation = {"none": lambda y: y, "relu6": F.relu6, "silu": F.silu}[problem.activation]
    means = activation(x.double() + input_bias.double()[:, None, None]).mean((-2, -1))
    return difference(result, F.linear(means, weight.double().t(), bias.double()), problem.dtype)


def check_separable(problem: Separable) -> str | None:
    """Run one problem of a depthwise and a pointwise convolution; returns what is wrong with it."""
    generator = torch.Generator().manual_seed(0)

    def drawn(*shape: int) -> torch.Tensor:
        image = torch.randn(shape, generator=generator).to(problem.dtype)
        return image.contiguous(memory_format=torch.channels_last) if len(shape) == 4 else image

    kernel, stride, padding = problem.kernel, problem.stride, problem.kernel // 2
    channels, outputs = problem.shape[1], problem.outputs
    x, weight, bias = drawn(*problem.shape), drawn(channels, 1, kernel, kernel), drawn(channels)
    input_bias = drawn(channels)
    point_weight, point_bias = drawn(outputs, channels, 1, 1) / channels**0.5, drawn(outputs)
    height, width = ((side - 1) // stride + 1 for side in problem.shape[2:])
    residual = drawn(problem.shape[0], outputs, height, width)
    os.environ["DWSWAP_PORTABLE"] = "0"
    ours = separable_operator(
        *(t.cuda() for t in (x, weight, bias, input_bias)),
        *(stride, padding, PAIRS["relu6", "relu"]),
        *(t.cuda() for t in (point_weight, point_bias, residual)),
        *(problem.pixels, problem.slices),
    )
    # A kernel reads the result here, so that initcheck misses no element that nobody wrote.
    result = (ours * 1).cpu().double()
    hidden = F.relu6(x.double() + input_bias.double()[:, None, None])
    taps = weight.double(), bias.double()
    hidden = F.conv2d(hidden, *taps, stride, padding, 1, channels).relu()
    exact = F.conv2d(hidden, point_weight.double(), point_bias.double()) + residual.double()
    return difference(result, exact, problem.dtype)


def check_interleaving(problem: Interleaving) -> str | None:
    """Run one problem of the interleaving kernel; returns what is wrong with its result."""
    generator = torch.Generator().manual_seed(0)
    batch, channels, *pixels = problem.shape
    both = torch.randn((batch, 2 * channels, *pixels), generator=generator).to(problem.dtype)
    bias = torch.randn(channels, generator=generator).to(problem.dtype)
    images = both.chunk(2, 1)
    first, second = (place(image, problem) for image in images)
    if problem.halves:
        first, second = place(both, problem).chunk(2, 1)
    ours = interleaved(
        first,
        second,
        problem.memory_format is torch.channels_last,
        first_bias=bias.cuda(),
        first_activation="relu",
        second_activation="silu",
    )
    # A kernel reads the result here, so that initcheck misses no element that nobody wrote.
    result = (ours * 1).cpu().double()
    wide = [image.double() for image in images]
    exact = torch.stack((F.relu(wide[0] + bias.double()[:, None, None]), F.silu(wide[1])), 2)
    return difference(result, exact.flatten(1, 2), problem.dtype)


def difference(result: torch.Tensor, exact: torch.Tensor, dtype: torch.dtype) -> str | None:
    if result.shape != exact.shape:
        return f"shape {tuple(result.shape)} instead of {tuple(exact.shape)}"
    # Errors of the arithmetic are for the tests; here wrong memory must show.
    bound = 16 * torch.finfo(dtype).eps * max(1.0, exact.abs().max().item())
    error = (result - exact).abs().max().item()
    if not error <= bound:  # NaN fails as well
        return f"error {error:.3e} instead of at most {bound:.3e}"
    return None


def main(arguments: list[str]) -> int:
    bulk_stores = "--no-bulk-stores" not in arguments
    if not torch.cuda.is_available():
        print("sanitize: PyTorch sees no CUDA GPU", file=sys.stderr)
        return 1
    count, failures = 0, 0
    checks: list[Any] = [functools.partial(check, p, bulk_stores) for p in problems()]
    for problem in gradient_problems():  # gradients of the input run forward families
        portable = problem._replace(portable=not bulk_stores)
        checks.append(functools.partial(check_gradients, portable))
    checks += [functools.partial(check_excitation, problem) for problem in excitations()]
    checks += [functools.partial(check_interleaving, problem) for problem in interleavings()]
    checks += [functools.partial(check_means, problem) for problem in means()]
    checks += [functools.partial(check_norm, problem) for problem in norms()]
    checks += [functools.partial(check_batch_norm, problem) for problem in batch_norms()]
    checks += [functools.partial(check_scaling, problem) for problem in scalings()]
    checks += [functools.partial(check_stem, problem) for problem in stems()]
    checks += [functools.partial(check_classifier, problem) for problem in classifiers()]
    checks += [functools.partial(check_separable, problem) for problem in separables()]
    with torch.no_grad():
        for run_one in checks:
            wrong = run_one()
            count += 1
            if wrong is not None:
                failures += 1
                print(f"{run_one.args[0]}: {wrong}", file=sys.stderr)
    torch.cuda.synchronize()
    if not build.status().loaded:
        print(f"sanitize: no kernels of ours ran: {build.status().reason}", file=sys.stderr)
        return 1
    print(f"sanitize: {count} cases, {failures} failed")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
