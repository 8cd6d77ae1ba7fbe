"""Problems for ``squeeze_excitation``: tensors, and what the operator means in aten's."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from cases import place
from numerics import ACTIVATIONS, WIDE_ACTIVATIONS
from torch import Tensor

from dwswap.ops import squeeze_excitation


class ExcitationTensors(NamedTuple):
    input: Tensor
    reduce_weight: Tensor
    reduce_bias: Tensor | None
    expand_weight: Tensor
    expand_bias: Tensor | None

    def map(self, function: Callable[[Tensor], Tensor]) -> ExcitationTensors:
        return ExcitationTensors(*(None if t is None else function(t) for t in self))


@dataclass(frozen=True)
class ExcitationCase:
    """One problem; ``batch`` None is an image without a batch."""

    dtype: torch.dtype = torch.float32
    layout: str = "contiguous"
    batch: int | None = 2
    channels: int = 8
    height: int = 5
    width: int = 7
    hidden: int = 4
    activation: str = "relu"
    gate: str = "sigmoid"
    bias: bool = True
    linear: bool = False  # weights of linear layers instead of convolutions
    offset: int = 0  # of every weight and bias in its storage
    seed: int = 0

    @property
    def shape(self) -> tuple[int, ...]:
        image = (self.channels, self.height, self.width)
        return image if self.batch is None else (self.batch, *image)

    def tensors(self, device: str) -> ExcitationTensors:
        generator = torch.Generator(device).manual_seed(self.seed)

        def draw(shape: tuple[int, ...], scale: float = 1.0) -> Tensor:
            values = torch.randn(shape, generator=generator, device=device) * scale
            return values.to(self.dtype)

        def parameter(shape: tuple[int, ...], scale: float = 1.0) -> Tensor:
            return draw((math.prod(shape) + self.offset,), scale)[self.offset :].view(shape)

        ends = () if self.linear else (1, 1)
        # Means are small: weights that are not make gates of all values.
        pixels = self.height * self.width
        return ExcitationTensors(
            place(draw(self.shape, 2.0), self.layout),
            parameter((self.hidden, self.channels, *ends), math.sqrt(pixels / self.channels)),
            parameter((self.hidden,)) if self.bias else None,
            parameter((self.channels, self.hidden, *ends), 2.0 / math.sqrt(self.hidden)),
            parameter((self.channels,)) if self.bias else None,
        )


def operator(case: ExcitationCase, tensors: ExcitationTensors) -> Tensor:
    return squeeze_excitation(*tensors, activation=case.activation, gate=case.gate)


def composite(case: ExcitationCase, tensors: ExcitationTensors, *, exact: bool = False) -> Tensor:
    """What the operator means, in aten operators, or in forms that are exact in float64."""
    activations = WIDE_ACTIVATIONS if exact else ACTIVATIONS
    input, reduce_weight, reduce_bias, expand_weight, expand_bias = tensors
    reduce_weight, expand_weight = (
        weight[..., None, None] if weight.dim() == 2 else weight
        for weight in (reduce_weight, expand_weight)
    )
    pooled = F.adaptive_avg_pool2d(input, 1)
    hidden = activations[case.activation](F.conv2d(pooled, reduce_weight, reduce_bias))
    return input * activations[case.gate](F.conv2d(hidden, expand_weight, expand_bias))


def exact_result(case: ExcitationCase, tensors: ExcitationTensors) -> Tensor:
    wide = tensors.map(lambda tensor: tensor.detach().double().contiguous())
    return composite(case, wide, exact=True)
