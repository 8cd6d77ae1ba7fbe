"""Layer normalization over the channels of every pixel, of images in either order of dimensions.

| dispatch key              | kernel of ``_channel_norm``                                       |
| ------------------------- | ----------------------------------------------------------------- |
| CUDA                      | ``csrc/``, registered when ``build.load()`` loads the library      |
| CompositeExplicitAutograd | aten                                                              |
| Meta (fake tensors)       | aten, with the strides of a new tensor                            |
| Autograd                  | none: what is differentiated, traced or compiled is aten's alone  |
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from dwswap import build
from dwswap.checks import check_rank, check_vector, value_check
from dwswap.plain import has_kernels, is_plain, needs_gradient
from dwswap.schema import channel_norm as operator
from dwswap.schema import library

__all__ = ["channel_norm"]

NAME = "dwswap._channel_norm"


def channel_norm(
    input: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, *, last: bool
) -> Tensor:
    """``(input - mean) / sqrt(variance + eps) * weight + bias`` over the channels of each pixel.

    ``F.layer_norm`` (Ba et al., "Layer Normalization", 2016, section 3). On CUDA a kernel of our
    own where channels are side by side in memory: everything is float32, and rounded once.

    Args:
        input: ``(..., C)`` with ``last``, otherwise ``(N, C, H, W)`` or ``(C, H, W)``.
        weight, bias: ``(C,)``, optional, of the input's dtype.
        eps: added to the variance.
        last: whether the channels are the last dimension.

    Returns:
        Of the input's shape, as aten lays it out: contiguous with ``last``, otherwise
        channels_last, whatever the input is.

    Raises:
        ValueError: naming the argument, the rule and the value (RuntimeError when the CUDA operator
            or aten finds it).
    """
    at_once = is_plain(input, input, weight, bias) and not needs_gradient(input, weight, bias)
    call = operator if at_once and has_kernels(input) and build.load() else _channel_norm_aten
    return call(input, weight, bias, eps, last)


def _channel_norm_aten(
    input: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, last: bool
) -> Tensor:
    # Not proxies of a symbolic trace; Dynamo cannot trace the messages, and aten has its own.
    if isinstance(input, Tensor) and not torch.compiler.is_compiling():
        _check_arguments(input, weight, bias, last)
    rows = input if last else input.movedim(-3, -1)
    result = F.layer_norm(rows, rows.shape[-1:], weight, bias, eps)
    return result if last else result.movedim(-1, -3)


def _check_arguments(input: Tensor, weight: Tensor | None, bias: Tensor | None, last: bool) -> None:
    if last:
        value_check(
            input.dim() > 0, lambda: f"{NAME}: input must be at least 1-D (..., C), got a scalar"
        )
    else:
        check_rank(input, NAME)
    channels = input.shape[-1 if last else -3]
    check_vector("weight", weight, channels, NAME)
    check_vector("bias", bias, channels, NAME)


def _channel_norm_fake(
    input: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, last: bool
) -> Tensor:
    # aten's own keeps strides of dimensions of size 1 that the result does not have.
    result = _channel_norm_aten(input, weight, bias, eps, last)
    shape = result.shape if last else result.movedim(-3, -1).shape
    fresh = torch.empty(shape, dtype=result.dtype, device=result.device)
    return fresh if last else fresh.movedim(-1, -3)


for _name in ("_channel_norm", "_channel_norm_aten"):
    library.impl(_name, _channel_norm_aten, "CompositeExplicitAutograd")
    torch.library.register_fake(f"dwswap::{_name}", _channel_norm_fake, lib=library)
    library.impl(_name, torch.library.fallthrough_kernel, "Autograd")
