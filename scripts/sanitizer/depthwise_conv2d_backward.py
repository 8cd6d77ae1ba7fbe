"""Gradients of depthwise convolutions, every family of kernels."""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterator

import torch
import torch.nn.functional as F

from dwswap.backward import backward_families
from dwswap.schema import depthwise_conv2d_backward
from sanitizer.common import FORMATS, HALVES, difference, place
from sanitizer.depthwise_conv2d import Problem


def problems() -> Iterator[Problem]:
    """Shapes that no tile divides, for every family of the gradients."""
    fast = (torch.float32, *HALVES)
    for memory_format, dtype, stride in itertools.product(FORMATS, fast, (1, 2)):
        for i, size in enumerate(((3, 3), (5, 5), (7, 7))):
            for channels, offset in ((72, 0), (58, 0), (57, 0), (20, 1)):
                shape = (3, channels, 9 + 6 * i, 17 - 4 * i)
                ragged = Problem(dtype, memory_format, shape, size, stride, offset=offset)
                yield ragged
                yield ragged._replace(shape=(2, channels, 33, 29), extra_padding=(1, 0))
                if memory_format is torch.channels_last:
                    yield ragged._replace(backward="channel_sums")
                    few = ragged._replace(backward="pixel_sums")
                    yield few._replace(shape=(65, channels, 1, 1))
                    yield few._replace(shape=(11, channels, 3, 2), dilation=2, stride=stride + 1)
            if memory_format is torch.channels_last:
                # Several boxes, a few channels of a box.
                squares = "diagonal_sums" if dtype in HALVES else "channel_sums"
                boxes = "column_sums" if size == (3, 3) else squares
                ragged = Problem(dtype, memory_format, (3, 136, 9, 35), size, stride)
                ragged = ragged._replace(backward=boxes)
                yield ragged
                yield ragged._replace(shape=(3, 72, 9 + 6 * i, 17 - 4 * i))
                yield ragged._replace(shape=(2, 72, 33, 29), extra_padding=(1, 0))
                yield ragged._replace(shape=(5, 24, 15, 70))
                yield ragged._replace(shape=(5, 40, 6, 7), extra_padding=(-1, -1))
                yield ragged._replace(shape=(2, 72, 33, 29), backward="channel_sums")
            if memory_format is torch.contiguous_format and dtype in HALVES:
                # Strips, whole planes, and pairs of them.
                for shape in ((2, 8, 45, 56), (3, 24, 33, 29), (5, 16, 14, 14), (7, 8, 7, 7)):
                    products = Problem(dtype, memory_format, shape, size, stride)
                    yield products._replace(backward="gram_sums")
                    yield products._replace(
                        backward="gram_sums", extra_padding=(1, 3), bias_gradient=False
                    )
            yield Problem(dtype, memory_format, (2, 5, 11, 13), size, stride, extra_padding=(9, 5))
    for memory_format, dtype in itertools.product(FORMATS, (*fast, torch.float64)):
        general = Problem(dtype, memory_format, (2, 33, 10, 13), (3, 3), backward="general")
        yield general
        yield general._replace(kernel=(1, 11), stride=3)
        yield general._replace(kernel=(4, 2), multiplier=3, dilation=2)


def check(problem: Problem) -> str | None:
    """Run the gradients of one problem; returns what is wrong with them."""
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator).to(problem.dtype)

    channels = problem.shape[1]
    input = draw(*problem.shape)
    weight = draw(channels * problem.multiplier, 1, *problem.kernel)
    padding = problem.padding
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
    tensors = (place(grad, problem), place(input, problem), weight.cuda())
    mask = [True, True, problem.bias_gradient]
    ran = backward_families(*tensors, *geometry, mask)
    # Some families need sm_90, and what DWSWAP_PORTABLE leaves out.
    everywhere = problem.portable or torch.cuda.get_device_capability() != (9, 0)
    if problem.backward not in ("", *ran) and not everywhere:
        return f"{' and '.join(ran)} ran"
    ours = depthwise_conv2d_backward(*tensors, *geometry, mask)
    for name, result, reference in zip(("input", "weight", "bias"), ours, exact, strict=True):
        if result is None:
            continue
        wrong = difference((result * 1).cpu().double(), reference, problem.dtype)
        if wrong is not None:
            return f"gradient of {name}: {wrong}"
    return None
