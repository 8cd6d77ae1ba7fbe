"""Pointwise convolutions as matrix products, with a bias or what they are added to.

In channels_last, pixels are rows: ``(N H W, C) @ (C, K)`` on views. In any other layout, dtype or
device, under autocast and where gradients are recorded, each function is the convolution and the
sum.

| dispatch key              | kernels of ``_pointwise_product``, ``_pointwise_residual_``       |
| ------------------------- | ----------------------------------------------------------------- |
| CUDA                      | ``csrc/``, registered when ``build.load()`` loads the library      |
| CompositeExplicitAutograd | aten                                                              |
| Meta (fake tensors)       | the same                                                          |
| Autograd                  | none: what is differentiated, traced or compiled is aten's alone  |

They are the same products in one call each: aten's views cost the host more than the product.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.graph import increment_version

from dwswap import build
from dwswap.layouts import memory_format
from dwswap.plain import is_plain, needs_gradient
from dwswap.schema import library
from dwswap.schema import pointwise_product as product_operator
from dwswap.schema import pointwise_residual_ as residual_operator

__all__ = ["pointwise_product", "pointwise_residual", "suits"]


def pointwise_product(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """``conv2d(input, weight, bias)`` for a weight ``(K, C, 1, 1)``.

    BLAS adds a bias to what it is about to store; with cuDNN's convolutions a kernel of its own
    does, which reads and writes the result again. (BLAS has a ReLU too, but makes 0 of NaN.)

    Args:
        input: ``(N, C, H, W)``; also some of the channels of a wider image, which a product reads
            where they are.
        bias: ``(K,)``.
    """
    call = product_operator if _is_at_once(input, weight, bias) else _pointwise_product_aten
    return call(input, weight, bias)


def pointwise_residual(input: Tensor, weight: Tensor, residual: Tensor) -> Tensor:
    """``residual + conv2d(input, weight)``, pointwise; may change ``residual``.

    The product is added to what the rows of ``residual`` hold (``beta * C`` in BLAS). Rounded
    once, not twice.

    Args:
        input: ``(N, C, H, W)``, of other memory than ``residual``.
        weight: ``(K, C, 1, 1)`` of a convolution or ``(K, C)`` of a linear layer.
        residual: ``(N, K, H, W)``.
    """
    if _is_at_once(input, weight, residual) and residual_operator(input, weight, residual):
        # As ADInplaceOrView does for aten's operators: for this one it would be Python, and slow.
        increment_version(residual)
        return residual
    if _pointwise_residual_aten_(input, weight, residual):
        return residual
    return residual + F.conv2d(input, weight[..., None, None] if weight.dim() == 2 else weight)


def suits(tensor: Tensor) -> bool:
    """Whether products of such tensors are as exact as convolutions, and known to be as fast.

    In float32 convolutions may round to TF32, and products may not.
    """
    return tensor.is_cuda and tensor.dtype in (torch.float16, torch.bfloat16)


def _is_at_once(input: Tensor, weight: Tensor, other: Tensor | None) -> bool:
    """Whether the operators may run: they see layouts themselves, and nothing else of the call."""
    return (
        is_plain(input, weight, other, None)
        and suits(input)
        and not needs_gradient(input, weight, other)
        and build.load()
    )


def _pointwise_product_aten(input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    rows = _rows(input) if _are_alike(input, weight, bias) else None
    if rows is None:
        return F.conv2d(input, weight, bias)
    matrix = weight.flatten(1).t()
    product = torch.mm(rows, matrix) if bias is None else torch.addmm(bias, rows, matrix)
    size = (input.shape[0], *input.shape[2:], weight.shape[0])
    return product.view(size).permute(0, 3, 1, 2)


def _pointwise_residual_aten_(input: Tensor, weight: Tensor, residual: Tensor) -> bool:
    """Whether the sum is in ``residual`` now."""
    if not (_are_alike(input, weight, residual) and _fits(input, weight, residual)):
        return False
    rows, sums = _rows(input), _rows(residual)
    if rows is None or sums is None:
        return False
    sums.addmm_(rows, weight.flatten(1).t())
    return True


def _are_alike(input: Tensor, *others: Tensor | None) -> bool:
    """Whether they can be multiplied, with the result that the convolution has."""
    tensors = [input, *(tensor for tensor in others if tensor is not None)]
    if not suits(input) or any(tensor.dtype != input.dtype for tensor in tensors):
        return False
    if torch.is_autocast_enabled(input.device.type):
        return False
    return not (torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors))


def _fits(input: Tensor, weight: Tensor, residual: Tensor) -> bool:
    """Whether ``residual`` has the shape of the result, so that nothing is broadcast."""
    shape = (*input.shape[:1], *weight.shape[:1], *input.shape[2:])
    return residual.shape == shape


def _rows(image: Tensor) -> Tensor | None:
    """``image`` as the rows ``(N H W, C)``, a view; None where a convolution would not see it, and
    lay out its result, as channels_last."""
    if image.dim() != 4 or memory_format(image) is not torch.channels_last:
        return None
    height, width = image.shape[2:]
    by_image, by_channel, by_row, by_pixel = image.stride()
    if by_channel != 1 or by_row != width * by_pixel or by_image != height * by_row:
        return None
    return image.permute(0, 2, 3, 1).flatten(0, 2)


for _name in ("_pointwise_product", "_pointwise_product_aten"):
    library.impl(_name, _pointwise_product_aten, "CompositeExplicitAutograd")
    torch.library.register_fake(f"dwswap::{_name}", _pointwise_product_aten, lib=library)
    library.impl(_name, torch.library.fallthrough_kernel, "Autograd")
library.impl("_pointwise_residual_", _pointwise_residual_aten_, "CompositeExplicitAutograd")
torch.library.register_fake("dwswap::_pointwise_residual_", _pointwise_residual_aten_, lib=library)
library.impl("_pointwise_residual_", torch.library.fallthrough_kernel, "Autograd")
