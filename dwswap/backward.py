"""The backward operator: on every device, for fake tensors, and its own derivative."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from dwswap import build
from dwswap.checks import check_dense, geometry, raise_typed
from dwswap.layouts import empty_image, laid_out, memory_format, output_memory_format
from dwswap.plain import any_autocast, differentiated_elsewhere, is_plain, needs_gradient
from dwswap.schema import depthwise_conv2d, depthwise_conv2d_backward

__all__ = [
    "apply_backward",
    "backward_aten",
    "backward_autograd",
    "backward_composite",
    "backward_fake",
    "backward_families",
    "without_autocast",
]

Ints = Sequence[int]


def _backward(
    grad_output: Tensor,
    input: Tensor,
    weight: Tensor,
    stride: Ints,
    padding: Ints,
    dilation: Ints,
    output_mask: Sequence[bool],
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    unbatched = input.dim() == 3
    grads = torch.ops.aten.convolution_backward(
        grad_output.unsqueeze(0) if unbatched else grad_output,
        input.unsqueeze(0) if unbatched else input,
        weight,
        [weight.shape[0]],
        stride,
        padding,
        dilation,
        False,
        [0, 0],
        input.shape[-3],
        output_mask,
    )
    grad_input, grad_weight, grad_bias = (
        grad if wanted else None for grad, wanted in zip(grads, output_mask, strict=True)
    )
    if grad_input is not None:
        layout = output_memory_format(input, weight)
        grad_input = laid_out(grad_input.squeeze(0) if unbatched else grad_input, layout)
    if grad_weight is not None:
        grad_weight = grad_weight.contiguous(memory_format=memory_format(weight))
    return grad_input, grad_weight, grad_bias


def backward_aten(
    grad_output: Tensor, input: Tensor, weight: Tensor, *args: Any
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    # cuDNN fails on some half-precision tensors that do not begin at 16 bytes, even with an illegal
    # access.
    grad_output, input, weight = (
        tensor.clone() if tensor.data_ptr() % 16 else tensor
        for tensor in (grad_output, input, weight)
    )
    return _backward(grad_output, input, weight, *args)


def backward_composite(
    grad_output: Tensor, input: Tensor, weight: Tensor, *args: Any
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    if input.is_cuda and build.load():
        # Dense tensors have a CUDA kernel from now on; others would come back here for ever.
        check_dense(input, weight, grad_output, names=("input", "weight", "grad_output"))
        return depthwise_conv2d_backward(grad_output, input, weight, *args)
    return backward_aten(grad_output, input, weight, *args)


def backward_families(
    grad_output: Tensor, input: Tensor, weight: Tensor, *args: Any
) -> tuple[str, str]:
    """Name the families of CUDA kernels that would run; ``"aten"`` where none would.

    Args:
        args: stride, padding, dilation, output_mask.

    Returns:
        Of the gradient of the input, and of those of weight and bias; empty where not wanted.
    """
    if not (input.is_cuda and build.load()):
        wants_input, *wants_sums = args[3]
        return "aten" if wants_input else "", "aten" if any(wants_sums) else ""
    family = torch.ops.dwswap._depthwise_conv2d_backward_family.default
    of_input, of_sums = family(grad_output, input, weight, *args).split(",")
    return of_input, of_sums


def backward_fake(
    grad_output: Tensor,
    input: Tensor,
    weight: Tensor,
    stride: Ints,
    padding: Ints,
    dilation: Ints,
    output_mask: Sequence[bool],
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    return (
        empty_image(input.shape, input, output_memory_format(input, weight))
        if output_mask[0]
        else None,
        torch.empty_like(weight, memory_format=memory_format(weight)) if output_mask[1] else None,
        weight.new_empty(weight.shape[0]) if output_mask[2] else None,
    )


# --- autograd ---------------------------------------------------------------------------------


_AUTOCAST = torch._C.DispatchKeySet(torch._C.DispatchKey.AutocastCUDA) | torch._C.DispatchKeySet(
    torch._C.DispatchKey.AutocastCPU
)


def without_autocast(backward: Callable[..., Any]) -> Callable[..., Any]:
    """The dtypes of a backward are those of its forward, whatever region it is called in."""

    @functools.wraps(backward)
    def wrapped(ctx: Any, *grads: Any) -> Any:
        if not any_autocast():
            return backward(ctx, *grads)
        with torch._C._ExcludeDispatchKeyGuard(_AUTOCAST):
            return backward(ctx, *grads)

    return wrapped


class _DepthwiseConv2dBackward(torch.autograd.Function):
    """Double backward. The convolution is bilinear, so its gradients are convolutions again."""

    @staticmethod
    def forward(
        ctx: Any,
        grad_output: Tensor,
        input: Tensor,
        weight: Tensor,
        stride: Ints,
        padding: Ints,
        dilation: Ints,
        output_mask: Sequence[bool],
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        ctx.geometry = geometry(stride, padding, dilation)
        ctx.save_for_backward(grad_output, input, weight)
        ctx.set_materialize_grads(False)
        return _below_autograd(grad_output, input, weight, stride, padding, dilation, output_mask)

    @staticmethod
    @without_autocast
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        grad_output, input, weight = ctx.saved_tensors
        grad_grad_input, grad_grad_weight, grad_grad_bias = grads
        needs_grad_output, needs_input, needs_weight = ctx.needs_input_grad[:3]
        for_grad_output = for_input = for_weight = None
        if needs_grad_output:
            terms = []
            if grad_grad_input is not None:
                terms.append(depthwise_conv2d(grad_grad_input, weight, None, *ctx.geometry))
            if grad_grad_weight is not None:
                terms.append(depthwise_conv2d(input, grad_grad_weight, None, *ctx.geometry))
            if grad_grad_bias is not None:
                terms.append(grad_grad_bias[:, None, None].expand_as(grad_output))
            for_grad_output = sum(terms[1:], start=terms[0]) if terms else None
        if needs_input and grad_grad_weight is not None:
            for_input = depthwise_conv2d_backward(
                grad_output, input, grad_grad_weight, *ctx.geometry, [True, False, False]
            )[0]
        if needs_weight and grad_grad_input is not None:
            for_weight = depthwise_conv2d_backward(
                grad_output, grad_grad_input, weight, *ctx.geometry, [False, True, False]
            )[1]
        return for_grad_output, for_input, for_weight, None, None, None, None


def apply_backward(
    grad_output: Tensor, input: Tensor, weight: Tensor, *args: Any
) -> tuple[Any, Any, Any]:
    """Call the operator; where nothing is differentiated again, past its autograd kernel."""
    tensors = (grad_output, input, weight)
    if is_plain(*tensors, None) and not needs_gradient(*tensors):
        return _below_autograd(*tensors, *args)
    return depthwise_conv2d_backward(*tensors, *args)


def _below_autograd(*args: Any) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    try:
        with torch._C._AutoDispatchBelowAutograd():
            return depthwise_conv2d_backward(*args)
    except RuntimeError as error:
        raise_typed(error)


def backward_autograd(
    grad_output: Tensor, input: Tensor, weight: Tensor, *args: Any
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    if differentiated_elsewhere():
        return _backward(grad_output, input, weight, *args)
    if needs_gradient(grad_output, input, weight):
        return _DepthwiseConv2dBackward.apply(grad_output, input, weight, *args)
    return _below_autograd(grad_output, input, weight, *args)
