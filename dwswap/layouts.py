"""Which memory format the operator's results have."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

__all__ = [
    "empty_image",
    "is_dense_image",
    "laid_out",
    "memory_format",
    "output_memory_format",
    "restored",
    "restored_layout",
    "to_layout",
]


def output_memory_format(input: Tensor, weight: Tensor) -> torch.memory_format:
    """channels_last where input or weight has its strides, contiguous otherwise.

    The rule of ``aten::conv2d`` (``cudnn_conv_suggest_memory_format`` in
    ``aten/src/ATen/native/ConvUtils.h``): on CUDA, float64 is contiguous always.
    """
    if input.dtype == torch.float64 and input.device.type == "cuda":
        return torch.contiguous_format
    # An image without a batch is judged as a batch of one.
    input = input.unsqueeze(0) if input.dim() == 3 else input
    if _suggests_channels_last(input) or _suggests_channels_last(weight):
        return torch.channels_last
    return torch.contiguous_format


def laid_out(output: Tensor, layout: torch.memory_format) -> Tensor:
    """``output`` in ``layout``; without a batch, as the only image of one."""
    if output.dim() == 3:
        return output.unsqueeze(0).contiguous(memory_format=layout).squeeze(0)
    return output.contiguous(memory_format=layout)


def empty_image(size: Sequence[int], like: Tensor, layout: torch.memory_format) -> Tensor:
    """Memory for an image, 4-D or 3-D, with the strides that ``layout`` gives new tensors."""
    output = torch.empty(
        size if len(size) == 4 else [1, *size],
        dtype=like.dtype,
        device=like.device,
        memory_format=layout,
    )
    return output if len(size) == 4 else output.squeeze(0)


def is_dense_image(image: Tensor) -> bool:
    """Whether a 4-D tensor is contiguous or channels_last, without gaps; it may be fake."""
    if image.is_contiguous(memory_format=torch.channels_last) or image.is_contiguous():
        return True
    # PyTorch 2.11 says no to channels_last in a compiled graph for batches of any size.
    _, channels, height, width = image.shape
    return image.stride() == (channels * height * width, 1, width * channels, channels)


def memory_format(tensor: Tensor) -> torch.memory_format:
    """channels_last where a 4-D tensor has its strides, contiguous otherwise."""
    return torch.channels_last if _suggests_channels_last(tensor) else torch.contiguous_format


def to_layout(value: Any, layout: torch.memory_format) -> Any:
    """An input of a graph in the layout in which it runs; what is no 4-D float tensor as it is,
    and so is one of ``torch.vmap``, which has a dimension more."""
    if not isinstance(value, Tensor) or value.dim() != 4 or not value.is_floating_point():
        return value
    if _is_batched(value):
        return value
    return value.to(memory_format=layout)


def restored(output: Tensor, channels_last_weights: bool, *inputs: Any) -> Tensor:
    """``output`` of a graph in the layout that the original model gives it.

    That is channels_last where its weights or ``inputs`` are, contiguous otherwise. What is no
    image is as it was: of other dimensions, or of three where inputs have a batch.
    """
    if output.dim() not in (3, 4) or _is_batched(output):
        return output
    if output.dim() == 3 and _with_batch(inputs):
        return output
    layout = restored_layout(channels_last_weights, *inputs)
    if output.dim() == 3:
        return laid_out(output, layout)
    # Not contiguous(), which keeps whatever strides dimensions of one element have.
    return output.to(memory_format=layout)


def _is_batched(value: Tensor) -> bool:
    """Whether ``torch.vmap`` made it, below other transforms of ``torch.func`` as well."""
    if torch.compiler.is_compiling():  # nobody compiles what asks for this
        return False
    functorch = torch._C._functorch
    while functorch.is_functorch_wrapped_tensor(value):
        if functorch.is_batchedtensor(value):
            return True
        value = functorch.get_unwrapped(value)
    return False


def restored_layout(channels_last_weights: bool, *inputs: Any) -> torch.memory_format:
    """In which layout :func:`restored` returns an output."""
    if channels_last_weights or any(map(_suggests_channels_last, _with_batch(inputs))):
        return torch.channels_last
    return torch.contiguous_format


def _with_batch(values: Sequence[Any]) -> list[Tensor]:
    return [value for value in values if isinstance(value, Tensor) and value.dim() == 4]


def _suggests_channels_last(tensor: Tensor) -> bool:
    """``suggest_memory_format() == ChannelsLast`` of ``c10/core/MemoryFormat.h``."""
    shape, strides = tensor.shape, tensor.stride()
    minimum = 0
    if strides[1] == 0:
        return False
    for dim in (1, 3, 2, 0):
        if shape[dim] == 0 or strides[dim] < minimum:
            return False
        if dim == 0 and minimum == strides[1]:
            return False
        minimum = strides[dim] * shape[dim]
    return True
