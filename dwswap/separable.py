"""A depthwise convolution and the pointwise one behind it, as one kernel where pixels are few.

| dispatch key              | kernel of ``_separable_conv2d``                                   |
| ------------------------- | ----------------------------------------------------------------- |
| CUDA                      | ``csrc/``, registered when ``build.load()`` loads the library      |
| CompositeExplicitAutograd | the operator for depthwise convolutions, and aten                 |
| Meta (fake tensors)       | the same                                                          |
| Autograd                  | none: what is differentiated, traced or compiled are two calls    |
"""

from __future__ import annotations

import functools
import math
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from dwswap import build
from dwswap.activations import PAIRS, pair_of
from dwswap.ops import depthwise_conv2d
from dwswap.plain import is_plain, needs_gradient
from dwswap.pointwise import pointwise_product, pointwise_residual, suits
from dwswap.schema import library
from dwswap.schema import separable_conv2d as operator

__all__ = ["CLAMPS", "STRIDES", "Cut", "choose_cut", "fits", "separable_conv2d", "shared_bytes"]

KERNELS = (3, 5)
STRIDES = (1, 2)
CLAMPS = ("none", "relu", "relu6")
MOST_SLICES = 8
# Channels of a block times its pixels, or its outputs, of which 32 take the time of one pixel.
_MOST_WORK = 4000


class Cut(NamedTuple):
    """How the kernel cuts a problem.

    Attributes:
        pixels: of a block.
        slices: of the channels; a block has one, and those of a cluster have all of them.
    """

    pixels: int
    slices: int


def separable_conv2d(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    point_weight: Tensor,
    point_bias: Tensor | None = None,
    residual: Tensor | None = None,
    *,
    stride: int = 1,
    padding: int = 0,
    input_bias: Tensor | None = None,
    input_activation: str = "none",
    activation: str = "none",
) -> Tensor:
    """``residual + conv2d(h, point_weight, point_bias)`` with ``h = depthwise_conv2d(input, ...)``;
    may change ``residual``.

    On CUDA in half precision and channels_last, with activations of :data:`CLAMPS`, and where
    :func:`choose_cut` finds it faster, one kernel of our own: ``h`` is rounded, as the operator
    rounds it, and the sums are float32. Otherwise the two layers.

    Args:
        input: ``(N, C, H, W)`` or ``(C, H, W)``.
        weight: ``(C, 1, k, k)``.
        bias: ``(C,)``, optional, of the input's dtype, as ``input_bias``, ``(C,)``.
        point_weight: ``(K, C, 1, 1)``.
        point_bias: ``(K,)``, optional; none where there is a residual.
        residual: ``(N, K, H_out, W_out)``, optional; also the input itself.
        stride, padding: of the depthwise convolution, for height and width.
        input_activation, activation: names in ``dwswap.activations.ACTIVATIONS``, in front of the
            depthwise convolution and behind it.

    Returns:
        ``(N, K, H_out, W_out)``, or without N.

    Raises:
        ValueError: both a bias and a residual.
        RuntimeError, ValueError: an argument does not fit, as aten or the CUDA operator finds; it
            says which.
    """
    if point_bias is not None and residual is not None:
        raise ValueError("separable_conv2d: point_bias must be None where there is a residual")
    at_once = (
        is_plain(input, weight, bias, input_bias)
        and is_plain(point_weight, point_weight, point_bias, residual)
        and not needs_gradient(input, weight, bias, input_bias, point_weight, point_bias, residual)
    )
    if at_once and suits(input) and _is_dense(input) and build.load():
        cut = choose_cut(
            tuple(input.shape),
            point_weight.shape[0],
            weight.shape[-1],
            stride,
            padding,
            *_device(input.get_device()),
        )
        if cut is not None:
            return operator(
                input,
                weight,
                bias,
                input_bias,
                stride,
                padding,
                PAIRS[input_activation, activation],
                point_weight,
                point_bias,
                residual,
                *cut,
            )
    hidden = depthwise_conv2d(
        input,
        weight,
        bias,
        stride,
        padding,
        input_bias=input_bias,
        input_activation=input_activation,
        activation=activation,
    )
    if residual is not None:
        return pointwise_residual(hidden, point_weight, residual)
    if point_bias is not None:
        return pointwise_product(hidden, point_weight, point_bias)
    return F.conv2d(hidden, point_weight)


def fits(weight: Tensor, point_weight: Tensor) -> bool:
    """Whether the kernel takes weights of these shapes."""
    channels, multiplicity, *kernel = weight.shape
    outputs, inputs = point_weight.shape[:2]
    is_depthwise = multiplicity == 1 and kernel[0] == kernel[1] and kernel[0] in KERNELS
    return is_depthwise and inputs == channels and channels % 8 == 0 and outputs % 8 == 0


@functools.lru_cache(maxsize=4096)
def choose_cut(
    shape: tuple[int, ...],
    outputs: int,
    kernel: int,
    stride: int,
    padding: int,
    multiprocessors: int,
    shared: int,
) -> Cut | None:
    """How to cut the problem; None where a kernel for each convolution is known to be faster.

    No more blocks than multiprocessors. As few pixels to a block as leave half of these a tile, if
    8 or 16 do; and the fewest slices of those that leave a block the fewest channels. A block must
    not have more to do than two kernels take; measured on an H200 with the layers of MobileNets and
    MNASNet.

    Args:
        shape: of the input, in channels_last.
        outputs: of the pointwise convolution.
        kernel, stride, padding: of the depthwise convolution.
        shared: bytes of shared memory that a block may have.
    """
    batch, channels, *size = shape
    height, width = ((side + 2 * padding - kernel) // stride + 1 for side in size)
    # Pixels of a row are taken by pairs.
    pixels = batch * height * math.ceil(width / 2) * 2

    def tiles(each: int) -> int:
        return math.ceil(pixels / each)

    def padded(slices: int) -> int:
        return _padded(math.ceil(channels / 8 / slices) * 8)

    each = next((few for few in (8, 16) if 2 * tiles(few) <= multiprocessors), 32)
    most = min(MOST_SLICES, multiprocessors // tiles(each)) if pixels > 0 else 0
    if most == 0:
        return None
    cut = Cut(each, min(range(1, most + 1), key=padded))
    work = padded(cut.slices) * (each + outputs / 32)
    enough = shared_bytes(cut, channels, outputs, kernel) <= shared
    return cut if enough and work <= _MOST_WORK else None


def shared_bytes(cut: Cut, channels: int, outputs: int, kernel: int) -> int:
    """Of a block, as ``csrc/separable_conv2d/cut.h`` has them: half precision, and sums in
    float32."""
    share = math.ceil(channels / 8 / cut.slices) * 8
    padded = _padded(share)
    pitch = padded + 32 if padded % 64 == 0 else padded
    units = math.ceil(outputs / 16) * (cut.pixels // 8)
    parts = max(1, min(8 // units, padded // 32))
    sums = 512 * cut.slices * parts * math.ceil(units / cut.slices)
    return 2 * (share * kernel * kernel + (outputs + cut.pixels) * pitch) + sums


def _padded(channels: int) -> int:
    """To a number that two matrix instructions multiply."""
    return math.ceil(channels / 32) * 32


def _is_dense(image: Tensor) -> bool:
    """Whether a batch in channels_last has no gaps."""
    return image.dim() == 4 and image.is_contiguous(memory_format=torch.channels_last)


@functools.cache
def _device(index: int) -> tuple[int, int]:
    """Its multiprocessors, and the bytes of shared memory that a block may have; none of a GPU
    without clusters, for which there is no kernel."""
    found: Any = torch.cuda.get_device_properties(index)
    if found.major < 9:
        return 0, 0
    return found.multi_processor_count, found.shared_memory_per_block_optin


def _separable_conv2d_apart(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    input_bias: Tensor | None,
    stride: int,
    padding: int,
    activations: int,
    point_weight: Tensor,
    point_bias: Tensor | None,
    residual: Tensor | None,
    pixels: int,
    slices: int,
) -> Tensor:
    before, behind = pair_of(activations)
    hidden = depthwise_conv2d(
        input,
        weight,
        bias,
        stride,
        padding,
        input_bias=input_bias,
        input_activation=before,
        activation=behind,
    )
    output = F.conv2d(hidden, point_weight, point_bias)
    return output if residual is None else residual + output


for _name in ("_separable_conv2d", "_separable_conv2d_apart"):
    library.impl(_name, _separable_conv2d_apart, "CompositeExplicitAutograd")
    library.impl(_name, torch.library.fallthrough_kernel, "Autograd")
