"""Random problems for the operator: shapes, arguments, layouts, tensors."""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

CHANNELS = (1, 2, 3, 8, 16, 24, 32, 57, 58, 72, 116, 144)
# Outputs of a random case at least: see numerics.py.
MIN_RESULTS = 256
MAX_ELEMENTS = 1 << 19
# Some kernels are for problems that keep every multiprocessor of a large GPU busy.
MANY_RESULTS = 2_100_000
MANY_ELEMENTS = 1 << 23
# NaN on both sides of a tensor on CUDA, in elements; keeps the alignment of the allocator.
MARGIN = 64

ACTIVATION_NAMES = (
    "none",
    "relu",
    "relu6",
    "hardswish",
    "silu",
    "gelu",
    "gelu_tanh",
    "hardsigmoid",
    "sigmoid",
)
# Integers stay integers.
EXACT_ACTIVATIONS = ("none", "relu", "relu6")


@dataclass(frozen=True)
class Case:
    """One problem. Its repr replays it: ``forward_errors(Case(...), "cuda", Judge())``."""

    dtype: torch.dtype
    layout: str
    batch: int | None
    channels: int
    height: int
    width: int
    kernel: tuple[int, int]
    stride: tuple[int, int] = (1, 1)
    padding: tuple[int, int] = (0, 0)
    dilation: tuple[int, int] = (1, 1)
    multiplier: int = 1
    bias: bool = False
    input_bias: bool = False
    input_activation: str = "none"
    activation: str = "none"
    seed: int = 0

    @property
    def input_shape(self) -> tuple[int, ...]:
        image = (self.channels, self.height, self.width)
        return image if self.batch is None else (self.batch, *image)

    @property
    def weight_shape(self) -> tuple[int, ...]:
        return (self.channels * self.multiplier, 1, *self.kernel)

    @property
    def output_shape(self) -> tuple[int, ...]:
        size = (self.height, self.width)
        spatial = (
            (size[i] + 2 * self.padding[i] - self.dilation[i] * (self.kernel[i] - 1) - 1)
            // self.stride[i]
            + 1
            for i in range(2)
        )
        return (*self.input_shape[:-3], self.weight_shape[0], *spatial)


def random_case(
    rng: random.Random, dtype: torch.dtype, layout: str, *, largest: int = 40, enough: bool = True
) -> Case:
    """A case drawn from everything that the operator takes.

    Height and width are at most ``largest``, or what the kernel needs. Up to 12 there are few
    channels; from 40 on some cases are wide and some have many outputs. With ``enough`` there are
    at least ``MIN_RESULTS`` outputs.
    """
    square = rng.choice((3, 3, 5, 7))
    kernel = (square, square) if rng.random() < 0.6 else (rng.randint(1, 11), rng.randint(1, 11))
    strides = ((1, 1), (1, 1), (2, 2), (rng.randint(1, 3), rng.randint(1, 3)))
    dilation = (1, 1) if rng.random() < 0.75 else (rng.randint(1, 2), rng.randint(1, 2))
    if rng.random() < 0.5:
        padding = (dilation[0] * kernel[0] // 2, dilation[1] * kernel[1] // 2)
    else:
        # Rarely so much that whole rows of outputs see nothing but padding.
        most = 3 if rng.random() < 0.15 else 1
        padding = (rng.randint(0, most * kernel[0]), rng.randint(0, most * kernel[1]))
    # The kernel must fit.
    least = [max(1, dilation[i] * (kernel[i] - 1) + 1 - 2 * padding[i]) for i in range(2)]
    height, width = (max(size, rng.randint(1, largest)) for size in least)
    channels = rng.choice(CHANNELS if largest > 12 else CHANNELS[:8])
    if largest >= 40 and rng.random() < 0.06:
        width, channels = rng.randint(300, 1200), rng.choice(CHANNELS[:5])
    case = Case(
        dtype,
        layout,
        rng.choice((None, 1, 2, 3, 5)),
        channels,
        height,
        width,
        kernel,
        rng.choice(strides),
        padding,
        dilation,
        rng.choice((1, 1, 1, 2, 3)),
        rng.random() < 0.5,
        rng.random() < 0.3,
        rng.choice(ACTIVATION_NAMES) if rng.random() < 0.4 else "none",
        rng.choice(ACTIVATION_NAMES) if rng.random() < 0.7 else "none",
        rng.getrandbits(31),
    )
    if not enough:
        return case
    outputs, image = math.prod(case.output_shape[-3:]), math.prod(case.input_shape[-3:])
    many = largest >= 40 and rng.random() < 0.12
    least_batch = -(-(MANY_RESULTS if many else MIN_RESULTS) // outputs)
    if least_batch > (case.batch or 1):
        case = replace(case, batch=least_batch)
    if case.batch is not None:
        most_batch = (MANY_ELEMENTS if many else MAX_ELEMENTS) // image
        case = replace(case, batch=max(1, -(-MIN_RESULTS // outputs), min(case.batch, most_batch)))
    return case


# --- layouts ----------------------------------------------------------------------------------


def _margin(like: Tensor) -> float:
    """What lies beside an image. On the CPU, aten itself multiplies it by zero (bfloat16 weight
    gradient, width 1), so there it is finite."""
    return math.nan if like.is_cuda else 1.0


def _dense(values: Tensor, order: tuple[int, ...], offset: int = 0) -> Tensor:
    """``values``, the dimensions laid out in ``order``, between margins."""
    count = values.numel()
    buffer = values.new_full((count + 2 * MARGIN,), _margin(values))
    sizes = [values.shape[dim] for dim in order]
    view = buffer[MARGIN + offset : MARGIN + offset + count].view(sizes)
    view = view.permute([order.index(dim) for dim in range(len(order))])
    return view.copy_(values)


def _sliced(values: Tensor, channels: int, rows: int, columns: int, last: bool = False) -> Tensor:
    """``values`` within a larger image."""
    n, c, h, w = values.shape
    buffer = values.new_full((n, c + channels, h + rows, w + columns), _margin(values))
    if last:
        buffer = buffer.contiguous(memory_format=torch.channels_last)
    view = buffer[:, channels // 2 :, rows // 2 :, columns // 2 :][:, :c, :h, :w]
    return view.copy_(values)


LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "contiguous": lambda x: _dense(x, (0, 1, 2, 3)),
    "channels_last": lambda x: _dense(x, (0, 2, 3, 1)),
    "offset": lambda x: _dense(x, (0, 1, 2, 3), 1),
    "offset_channels_last": lambda x: _dense(x, (0, 2, 3, 1), 1),
    # Aligned to a pair of channels, and to nothing more.
    "offset_by_pair": lambda x: _dense(x, (0, 2, 3, 1), 2),
    "offset_by_vector": lambda x: _dense(x, (0, 2, 3, 1), 8),
    "transposed": lambda x: _dense(x, (0, 1, 3, 2)),
    "batch_inside": lambda x: _dense(x, (1, 0, 2, 3)),
    "sliced": lambda x: _sliced(x, 0, 3, 5),
    "sliced_channels_last": lambda x: _sliced(x, 0, 3, 5, last=True),
    "channel_sliced": lambda x: _sliced(x, 5, 0, 0),
    "channel_sliced_channels_last": lambda x: _sliced(x, 5, 0, 0, last=True),
}
DENSE_LAYOUTS = ("contiguous", "channels_last")
ODD_LAYOUTS = tuple(name for name in LAYOUTS if name not in DENSE_LAYOUTS)


def place(values: Tensor, layout: str) -> Tensor:
    """``values``, 3-D or 4-D, with the strides and storage offset that ``layout`` names."""
    if values.dim() == 3:
        return LAYOUTS[layout](values[None])[0]
    return LAYOUTS[layout](values)


# --- the tensors of a case --------------------------------------------------------------------


class Tensors(NamedTuple):
    input: Tensor
    weight: Tensor
    bias: Tensor | None
    input_bias: Tensor | None

    def wide(self) -> Tensors:
        """Dense copies in float64."""
        return self.map(lambda tensor: tensor.detach().double().contiguous())

    def aligned(self) -> Tensors:
        """Copies with the same strides that begin an allocation: cuDNN has no half-precision kernel
        for some misaligned tensors, and others of its kernels fail on them."""
        return self.map(
            lambda tensor: torch.empty_strided(
                tensor.shape, tensor.stride(), dtype=tensor.dtype, device=tensor.device
            ).copy_(tensor)
        )

    def leaves(self) -> Tensors:
        """The same views, each a leaf that requires a gradient."""
        return self.map(lambda tensor: tensor.detach().requires_grad_())

    def map(self, function: Callable[[Tensor], Tensor]) -> Tensors:
        input, weight, *vectors = self
        return Tensors(
            function(input),
            function(weight),
            *(None if vector is None else function(vector) for vector in vectors),
        )


def make_tensors(case: Case, device: str, *, integers: bool = False) -> Tensors:
    """The tensors of ``case``, a function of its seed and the device alone.

    Integer values are such that no intermediate result exceeds 256, which bfloat16 still holds.
    """
    generator = torch.Generator(device).manual_seed(case.seed)

    def draw(shape: tuple[int, ...], scale: float, bound: int) -> Tensor:
        if integers:
            values = torch.randint(-bound, bound + 1, shape, generator=generator, device=device)
            return values.to(case.dtype)
        # float32, so that every dtype gets the same numbers.
        values = torch.randn(shape, generator=generator, device=device) * scale
        return values.to(case.dtype)

    taps = math.prod(case.kernel)
    outputs = case.weight_shape[0]
    odd = case.layout in ODD_LAYOUTS

    def vector(wanted: bool, length: int) -> Tensor | None:
        values = draw((2 * length + 1,), 1.0, 1)
        # Aligned, misaligned, and with gaps.
        views = (values[:length], values[1 : length + 1], values[: 2 * length : 2])
        return views[case.seed % 3 if odd else 0] if wanted else None

    return Tensors(
        place(draw(case.input_shape, 2.0, 1), case.layout),
        place(draw(case.weight_shape, 1.5 / math.sqrt(taps), 1), case.layout),
        vector(case.bias, outputs),
        vector(case.input_bias, case.channels),
    )
