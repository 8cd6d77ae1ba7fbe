"""Which memory format the operator's results have."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["laid_out", "memory_format", "output_memory_format"]


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


def memory_format(tensor: Tensor) -> torch.memory_format:
    """channels_last where a 4-D tensor has its strides, contiguous otherwise."""
    return torch.channels_last if _suggests_channels_last(tensor) else torch.contiguous_format


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
