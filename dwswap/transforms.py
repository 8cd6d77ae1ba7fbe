"""The operator under autocast and vmap: what they call is given, not imported."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

__all__ = ["AUTOCAST_KEYS", "autocast_kernel", "cast", "forward_vmap"]

Ints = Sequence[int]
Operator = Callable[..., Tensor]

# Device type -> the dispatch key that is excluded where autocast is off for it.
AUTOCAST_KEYS = {"cuda": "AutocastCUDA", "cpu": "AutocastCPU"}


def cast(tensor: Tensor | None, device_type: str, dtype: torch.dtype) -> Tensor | None:
    """``tensor`` in ``dtype``, where autocast of ``device_type`` casts it."""
    if tensor is None:
        return None
    given = tensor.dtype
    # The cheapest questions first. In a model most inputs have the dtype: the layer before was cast
    # as well.
    if given is dtype or given is torch.float64 or not given.is_floating_point:
        return tensor
    return tensor.to(dtype) if tensor.device.type == device_type else tensor


def autocast_kernel(operator: Operator, device_type: str, key: str) -> Operator:
    """The kernel of dispatch key ``key``: aten's rules for ``conv2d``, to the user's dtype."""
    keys = torch._C.DispatchKeySet(getattr(torch._C.DispatchKey, key))

    def forward_autocast(
        input: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        stride: Ints,
        padding: Ints,
        dilation: Ints,
        input_bias: Tensor | None = None,
        input_activation: str = "none",
        activation: str = "none",
    ) -> Tensor:
        dtype = torch.get_autocast_dtype(device_type)
        with torch._C._ExcludeDispatchKeyGuard(keys):
            return operator(
                cast(input, device_type, dtype),
                cast(weight, device_type, dtype),
                cast(bias, device_type, dtype),
                stride,
                padding,
                dilation,
                cast(input_bias, device_type, dtype),
                input_activation,
                activation,
            )

    return forward_autocast


def forward_vmap(
    operator: Operator,
    info: Any,
    in_dims: tuple[int | None, ...],
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: Ints,
    padding: Ints,
    dilation: Ints,
    input_bias: Tensor | None = None,
    input_activation: str = "none",
    activation: str = "none",
) -> tuple[Tensor, int]:
    """The vmap rule: fold the mapped dimension into N, or into C where a parameter has one."""
    size = info.batch_size
    in_dims = (*in_dims, *(None for _ in range(9 - len(in_dims))))
    unbatched = input.dim() - (in_dims[0] is not None) == 3
    geometry = (stride, padding, dilation)

    if in_dims[0] is not None and all(in_dims[i] is None for i in (1, 2, 6)):
        batched = input.movedim(in_dims[0], 0)
        batched = batched if unbatched else batched.flatten(0, 1)
        output = operator(
            batched, weight, bias, *geometry, input_bias, input_activation, activation
        )
        return (output if unbatched else output.unflatten(0, (size, -1))), 0

    def mapped(tensor: Tensor, dim: int | None) -> Tensor:
        return tensor.expand(size, *tensor.shape) if dim is None else tensor.movedim(dim, 0)

    def folded(tensor: Tensor | None, dim: int | None) -> Tensor | None:
        return None if tensor is None else mapped(tensor, dim).flatten(0, 1)

    # (..., B * C, H, W): input channel b * C + c feeds output channels b * C * m + c * m + j.
    channels = mapped(input, in_dims[0]).movedim(0, -4).flatten(-4, -3)
    output = operator(
        channels,
        folded(weight, in_dims[1]),
        folded(bias, in_dims[2]),
        *geometry,
        folded(input_bias, in_dims[6]),
        input_activation,
        activation,
    )
    return output.unflatten(-3, (size, -1)), output.dim() - 3
