"""Batch normalization in training and the activation behind it, as one operator.

| dispatch key              | kernels of ``_batch_norm`` and ``_batch_norm_backward``          |
| ------------------------- | ---------------------------------------------------------------- |
| CUDA                      | ``csrc/``, registered when ``build.load()`` loads the library     |
| CompositeExplicitAutograd | aten; on CUDA tensors it first loads the library and calls again |
| Autograd                  | none: ``_batch_norm_recorded`` of ``csrc/autograd/`` records      |

Only plain calls come here: whatever is traced, compiled or transformed is aten's alone, and so is a
backward that is transformed.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from dwswap import build
from dwswap.activations import ACTIVATIONS, PAIRS, pair_of
from dwswap.layouts import is_dense_image
from dwswap.plain import has_kernels, is_plain_but_for_autocast
from dwswap.schema import batch_norm as operator
from dwswap.schema import batch_norm_backward as backward_operator
from dwswap.schema import batch_norm_recorded, library

__all__ = ["NORM_ACTIVATIONS", "batch_norm", "has_batch_norm", "takes_batch_norm"]

NORM_ACTIVATIONS = frozenset({"none", "relu", "relu6", "hardswish", "silu"})
"""The activations whose derivatives the kernels have."""

_MOST = 1 << 30  # channels, and values of each: covers_batch_norm of csrc/batch_norm/launch.cpp


def has_batch_norm(
    input: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
) -> bool:
    """Whether :func:`batch_norm` takes such tensors and has kernels for them, in a plain call."""
    # Asked for every call of every layer; the operator itself checks shapes and devices.
    return is_plain_but_for_autocast(
        input, input if weight is None else weight, bias, running_mean
    ) and takes_batch_norm(input, weight, bias, running_mean, running_var)


def takes_batch_norm(
    input: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
) -> bool:
    """Whether there are kernels for such tensors, which may be fake.

    The input is dense, ``(N, C, H, W)``, contiguous or channels_last, with 2 to 2^30 values per
    channel, on a CUDA device of compute capability 8.0 or later; weight and bias are both there or
    neither, float32 or of the dtype of the input, and so are running statistics.
    """
    if not (
        has_kernels(input)
        and type(running_var) is type(running_mean)
        and (weight is None) is (bias is None)
        and input.dim() == 4
    ):
        return False
    dtype: torch.dtype | None = None
    for one, other in ((weight, bias), (running_mean, running_var)):
        if one is None or other is None:
            continue
        if not (one.dtype is other.dtype and one.is_contiguous() and other.is_contiguous()):
            return False
        if dtype not in (None, one.dtype):
            return False  # an error of PyTorch's
        dtype = one.dtype
    if dtype not in (None, torch.float32, input.dtype):
        return False
    # Whether such a tensor may be changed here is for PyTorch to say.
    if running_mean is not None and running_mean.is_inference():
        return False
    if not is_dense_image(input):
        return False
    channels = input.shape[1]
    if not 0 < channels <= _MOST or not 2 <= input.numel() // channels <= _MOST:
        return False
    return build.load_for(input.device)


def batch_norm(
    input: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    batches: Tensor | None,
    momentum: float,
    eps: float,
    activation: str = "none",
) -> Tensor:
    """``activation((input - mean) / sqrt(variance + eps) * weight + bias)`` in training.

    Mean and variance are those of the batch, of each channel (Ioffe and Szegedy, "Batch
    Normalization", 2015). What the activation is applied to is not kept for the backward, which
    computes it anew from the input. Deterministic.

    Args:
        input: ``(N, C, H, W)``, see :func:`has_batch_norm`, which is to be asked first.
        weight, bias: ``(C,)``, or None for 1 and 0.
        running_mean, running_var: ``(C,)``, changed in place: ``(1 - momentum)`` times the old
            value plus ``momentum`` times that of the batch, the variance without bias. Or None.
        batches: the number of batches seen, counted up in place. Or None.
        momentum, eps: as ``F.batch_norm`` has them.
        activation: one of :data:`NORM_ACTIVATIONS`.

    Returns:
        Of the input's shape, dtype and strides.

    Raises:
        RuntimeError: of the CUDA operator, naming the argument, the rule and the value.
        NotImplementedError: there is no library, as :func:`has_batch_norm` would have said.
    """
    counted = batches
    if batches is not None and not (
        batches.dtype is torch.int64 and batches.device == input.device
    ):
        batches.add_(1)  # old checkpoints have none, and PyTorch makes one on the CPU
        counted = None
    return batch_norm_recorded(
        input,
        weight,
        bias,
        running_mean,
        running_var,
        counted,
        momentum,
        eps,
        PAIRS["none", activation],
    )


def _backward_transformed(
    grad_output: Tensor,
    input: Tensor,
    stats: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    bias_version: int,
    eps: float,
    activation: int,
    output_mask: Sequence[bool],
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """The gradients by aten, where the backward is differentiated or mapped itself.

    Args:
        bias_version: the version of ``bias`` in the forward.

    Raises:
        RuntimeError: ``bias`` has changed since, and gradients of gradients are wanted.
    """
    if torch.is_grad_enabled():
        if bias is not None and not bias.is_inference() and bias._version != bias_version:
            raise RuntimeError(
                "the bias of a BatchNorm must stay as it was for gradients of its gradients, "
                f"got one that was changed {bias._version - bias_version} times"
            )
        return _differentiable_backward(
            grad_output, input, weight, bias, eps, activation, output_mask
        )
    return _backward_aten(grad_output, input, stats, weight, activation, output_mask)


def _differentiable_backward(
    grad_output: Tensor,
    input: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    activation: int,
    wanted: Sequence[bool],
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """The same gradients as a graph of aten's operators, for double backward."""
    # Aliases, as one of the three may have been computed from another, or be it.
    tensors = [None if t is None else t.view_as(t) for t in (input, weight, bias)]
    x, scale, shift = tensors
    assert x is not None
    normalized = F.batch_norm(x, None, None, scale, shift, True, 0.0, eps)
    output = ACTIVATIONS[pair_of(activation)[1]].forward(normalized)
    of: list[Any] = [tensor for tensor, needed in zip(tensors, wanted, strict=True) if needed]
    found = iter(torch.autograd.grad(output, of, grad_output, create_graph=True))
    grad_input, grad_weight, grad_bias = (next(found) if needed else None for needed in wanted)
    return grad_input, grad_weight, grad_bias


# --- on every device --------------------------------------------------------------------------


def _forward(input: Tensor, *args: Any) -> tuple[Tensor, Tensor]:
    if input.is_cuda and build.load():
        return operator(input, *args)  # has a CUDA kernel from now on
    return _forward_aten(input, *args)


def _backward(
    grad_output: Tensor, *args: Any
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    if grad_output.is_cuda and build.load():
        return backward_operator(grad_output, *args)
    return _backward_aten(grad_output, *args)


def _forward_aten(
    input: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    batches: Tensor | None,
    momentum: float,
    eps: float,
    activation: int,
) -> tuple[Tensor, Tensor]:
    if batches is not None:
        batches += 1
    normalized, mean, factor = torch.native_batch_norm(
        input, weight, bias, running_mean, running_var, True, momentum, eps
    )
    output = ACTIVATIONS[pair_of(activation)[1]].forward(normalized)
    scale = factor if weight is None else factor * weight
    added = torch.zeros_like(mean) if bias is None else bias.to(mean.dtype)
    return output, torch.stack([mean, factor, scale, added])


def _backward_aten(
    grad_output: Tensor,
    input: Tensor,
    stats: Tensor,
    weight: Tensor | None,
    activation: int,
    output_mask: Sequence[bool],
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    mean, factor, scale, added = stats[:, :, None, None].unbind()
    normalized = ((input - mean) * scale + added).to(input.dtype)
    grad = ACTIVATIONS[pair_of(activation)[1]].backward(grad_output, normalized)
    return torch.ops.aten.native_batch_norm_backward(
        grad,
        input,
        weight,
        None,
        None,
        mean.flatten(),
        factor.flatten(),
        True,
        0.0,  # eps is in the factor already
        list(output_mask),
    )


library.impl("_batch_norm", _forward, "CompositeExplicitAutograd")
library.impl("_batch_norm_backward", _backward, "CompositeExplicitAutograd")
library.impl("_batch_norm_backward_transformed", _backward_transformed, "CompositeImplicitAutograd")
for _name in ("_batch_norm", "_batch_norm_backward"):
    library.impl(_name, torch.library.fallthrough_kernel, "Autograd")
