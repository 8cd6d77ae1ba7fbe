"""The last layer of a network, on the means of an image."""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F

from dwswap.classifiers import pooled_linear
from sanitizer.common import HALVES, difference


class Classifier(NamedTuple):
    """A problem of the kernel of a linear layer on the means of an image."""

    dtype: torch.dtype
    shape: tuple[int, int, int, int]
    outputs: int
    activation: str


def problems() -> Iterator[Classifier]:
    """Shares of blocks that are empty, and that channels and outputs do not fill."""
    sizes = ((8, 1, 1), (72, 7, 7), (520, 3, 5), (1280, 7, 7), (2048, 16, 16))
    for dtype, (i, size), outputs in itertools.product(HALVES, enumerate(sizes), (8, 136, 1000)):
        yield Classifier(dtype, (1, *size), outputs, ("none", "relu6", "silu")[i % 3])


def check(problem: Classifier) -> str | None:
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
