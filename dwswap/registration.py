"""Schema and every kernel of the operator that is not CUDA C++.

| dispatch key              | kernel                                                           |
| ------------------------- | ---------------------------------------------------------------- |
| CUDA                      | ``csrc/``, registered when ``build.load()`` loads the library     |
| CompositeExplicitAutograd | aten; on CUDA tensors it first loads the library and calls again |
| Meta (fake tensors)       | shapes and layout                                                |
| Autograd                  | autograd; aten where forward AD or functorch's grad is active    |
| Autocast                  | the user's autocast dtype, with aten's rules for ``conv2d``      |
| FuncTorchBatched (vmap)   | the batch folded into N, or into C where weights are batched     |
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from dwswap import build
from dwswap.activations import ACTIVATIONS
from dwswap.checks import check_arguments, check_dense, output_size, pair
from dwswap.layouts import laid_out, memory_format, output_memory_format
from dwswap.transforms import autocast_kernel, forward_vmap

__all__ = ["apply", "depthwise_conv2d", "depthwise_conv2d_backward", "kernel_family"]

Ints = Sequence[int]

_GEOMETRY = "SymInt[2] stride, SymInt[2] padding, SymInt[2] dilation"
# input_bias is not keyword-only: torch.library.register_vmap refuses keyword-only tensors.
_FORWARD_ARGUMENTS = (
    f"(Tensor input, Tensor weight, Tensor? bias, {_GEOMETRY}, Tensor? input_bias=None, "
    'str input_activation="none", str activation="none")'
)

_library = torch.library.Library("dwswap", "DEF")
_tags = (torch.Tag.pt2_compliant_tag,)
_library.define(f"depthwise_conv2d{_FORWARD_ARGUMENTS} -> Tensor", tags=_tags)
# What the CUDA kernels do not cover (integer and complex dtypes) they send here.
_library.define(f"_depthwise_conv2d_aten{_FORWARD_ARGUMENTS} -> Tensor", tags=_tags)
_library.define(f"_depthwise_conv2d_family{_FORWARD_ARGUMENTS} -> str", tags=_tags)
_library.define(
    f"_depthwise_conv2d_backward(Tensor grad_output, Tensor input, Tensor weight, {_GEOMETRY}, "
    "bool[3] output_mask) -> (Tensor, Tensor, Tensor)",
    tags=_tags,
)

depthwise_conv2d = torch.ops.dwswap.depthwise_conv2d.default
depthwise_conv2d_backward = torch.ops.dwswap._depthwise_conv2d_backward.default


# --- forward on every device ------------------------------------------------------------------


def _decomposed(
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
    stride, padding, dilation = _geometry(stride, padding, dilation)
    check_arguments(
        input, weight, bias, stride, padding, dilation, input_bias, input_activation, activation
    )
    hidden = _preactivate(input, input_bias, input_activation)
    output = torch.conv2d(hidden, weight, bias, stride, padding, dilation, input.shape[-3])
    return ACTIVATIONS[activation].forward(output)


def _preactivate(input: Tensor, input_bias: Tensor | None, input_activation: str) -> Tensor:
    hidden = input if input_bias is None else input + input_bias[:, None, None]
    return ACTIVATIONS[input_activation].forward(hidden)


def _geometry(stride: Ints, padding: Ints, dilation: Ints) -> tuple[Ints, Ints, Ints]:
    return (
        pair("stride", tuple(stride), 1),
        pair("padding", tuple(padding), 0),
        pair("dilation", tuple(dilation), 1),
    )


def _forward_aten(input: Tensor, weight: Tensor, *args: Any) -> Tensor:
    return laid_out(_decomposed(input, weight, *args), output_memory_format(input, weight))


def _forward(input: Tensor, weight: Tensor, *args: Any) -> Tensor:
    if input.is_cuda and build.load():
        # Dense tensors have a CUDA kernel from now on; others would come back here for ever.
        check_dense(input, weight, args[0], *args[4:5])
        return depthwise_conv2d(input, weight, *args)
    return _forward_aten(input, weight, *args)


def _forward_fake(
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
    stride, padding, dilation = _geometry(stride, padding, dilation)
    check_arguments(
        input, weight, bias, stride, padding, dilation, input_bias, input_activation, activation
    )
    size = output_size(input, weight, stride, padding, dilation)
    output = torch.empty(
        size if len(size) == 4 else [1, *size],
        dtype=input.dtype,
        device=input.device,
        memory_format=output_memory_format(input, weight),
    )
    return output if len(size) == 4 else output.squeeze(0)


# --- backward on every device -----------------------------------------------------------------


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


def _backward_aten(
    grad_output: Tensor, input: Tensor, weight: Tensor, *args: Any
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    # cuDNN fails on some half-precision tensors that do not begin at 16 bytes, even with an illegal
    # access.
    grad_output, input, weight = (
        tensor.clone() if tensor.data_ptr() % 16 else tensor
        for tensor in (grad_output, input, weight)
    )
    return _backward(grad_output, input, weight, *args)


def _backward_fake(
    grad_output: Tensor,
    input: Tensor,
    weight: Tensor,
    stride: Ints,
    padding: Ints,
    dilation: Ints,
    output_mask: Sequence[bool],
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    return (
        laid_out(torch.empty_like(input), output_memory_format(input, weight))
        if output_mask[0]
        else None,
        torch.empty_like(weight, memory_format=memory_format(weight)) if output_mask[1] else None,
        weight.new_empty(weight.shape[0]) if output_mask[2] else None,
    )


# --- autograd ---------------------------------------------------------------------------------


def _differentiated_elsewhere() -> bool:
    """Forward AD or a functorch transform is active: aten knows their rules, so use aten."""
    return forward_ad._current_level >= 0 or torch._C._are_functorch_transforms_active()


def _needs_gradient(*tensors: Tensor | None) -> bool:
    return torch.is_grad_enabled() and torch._C._any_requires_grad(*tensors)


def _below_autograd(*args: Any) -> Tensor:
    try:
        with torch._C._AutoDispatchBelowAutograd():
            return depthwise_conv2d(*args)
    except RuntimeError as error:
        # An exception loses its type on its way through the stable ABI.
        if type(error) is RuntimeError and "CUDA out of memory." in str(error):
            raise torch.OutOfMemoryError(str(error)) from None
        raise


_AUTOCAST = torch._C.DispatchKeySet(torch._C.DispatchKey.AutocastCUDA) | torch._C.DispatchKeySet(
    torch._C.DispatchKey.AutocastCPU
)


def _without_autocast(backward: Callable[..., Any]) -> Callable[..., Any]:
    """The dtypes of a backward are those of its forward, whatever region it is called in."""

    @functools.wraps(backward)
    def wrapped(ctx: Any, *grads: Any) -> Any:
        with torch._C._ExcludeDispatchKeyGuard(_AUTOCAST):
            return backward(ctx, *grads)

    return wrapped


class _DepthwiseConv2d(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *args: Any) -> Tensor:
        """``args``: all nine of the operator, in its order."""
        input, weight, bias, stride, padding, dilation, input_bias, *activations = args
        ctx.geometry = _geometry(stride, padding, dilation)
        ctx.input_activation, ctx.activation = activations
        ctx.save_for_backward(input, weight, bias, input_bias)
        return _below_autograd(*args)

    @staticmethod
    @_without_autocast
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        input, weight, bias, input_bias = ctx.saved_tensors
        needs_input, needs_weight, needs_bias = ctx.needs_input_grad[:3]
        needs_input_bias = ctx.needs_input_grad[6]
        hidden = _preactivate(input, input_bias, ctx.input_activation)
        if ctx.activation != "none":
            output = depthwise_conv2d(hidden, weight, bias, *ctx.geometry)
            grad_output = ACTIVATIONS[ctx.activation].backward(grad_output, output)
        grad_input, grad_weight, grad_bias = depthwise_conv2d_backward(
            grad_output,
            hidden,
            weight,
            *ctx.geometry,
            [needs_input or needs_input_bias, needs_weight, needs_bias],
        )
        grad_input_bias = None
        if needs_input or needs_input_bias:
            if ctx.input_activation != "none":
                before = _preactivate(input, input_bias, "none")
                grad_input = ACTIVATIONS[ctx.input_activation].backward(grad_input, before)
            if needs_input_bias:
                grad_input_bias = grad_input.sum(dim=(-1, -2) if input.dim() == 3 else (0, 2, 3))
        return (
            grad_input if needs_input else None,
            grad_weight,
            grad_bias,
            None,
            None,
            None,
            grad_input_bias,
            None,
            None,
        )


def _forward_autograd(
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
    args = (
        input,
        weight,
        bias,
        stride,
        padding,
        dilation,
        input_bias,
        input_activation,
        activation,
    )
    # aten differentiates a complex convolution as real ones, which convolution_backward does not.
    if _differentiated_elsewhere() or input.is_complex():
        return _decomposed(*args)
    if _needs_gradient(input, weight, bias, input_bias):
        return _DepthwiseConv2d.apply(*args)
    return _below_autograd(*args)


def apply(input: Tensor, weight: Tensor, bias: Tensor | None, *args: Any) -> Tensor:
    """Call the operator; where nothing needs a gradient, past the autograd kernel.

    That kernel is Python, and its microseconds count at batch 1.

    Args:
        args: stride, padding, dilation, input_bias, input_activation, activation.
    """
    if (
        torch.compiler.is_compiling()
        or _needs_gradient(input, weight, bias, args[3])
        or _differentiated_elsewhere()
    ):
        return depthwise_conv2d(input, weight, bias, *args)
    return _below_autograd(input, weight, bias, *args)


def kernel_family(input: Tensor, weight: Tensor, bias: Tensor | None, *args: Any) -> str:
    """Name the family of CUDA kernels that would run; ``"aten"`` where none would.

    Args:
        args: stride, padding, dilation and, optionally, input_bias, input_activation, activation.
    """
    if not (input.is_cuda and build.load()):
        return "aten"
    return torch.ops.dwswap._depthwise_conv2d_family.default(input, weight, bias, *args)


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
        ctx.geometry = _geometry(stride, padding, dilation)
        ctx.save_for_backward(grad_output, input, weight)
        ctx.set_materialize_grads(False)
        with torch._C._AutoDispatchBelowAutograd():
            return depthwise_conv2d_backward(
                grad_output, input, weight, stride, padding, dilation, output_mask
            )

    @staticmethod
    @_without_autocast
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


def _backward_autograd(
    grad_output: Tensor, input: Tensor, weight: Tensor, *args: Any
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    if _differentiated_elsewhere():
        return _backward(grad_output, input, weight, *args)
    if _needs_gradient(grad_output, input, weight):
        return _DepthwiseConv2dBackward.apply(grad_output, input, weight, *args)
    with torch._C._AutoDispatchBelowAutograd():
        return depthwise_conv2d_backward(grad_output, input, weight, *args)


# --- registration -----------------------------------------------------------------------------

_library.impl("depthwise_conv2d", _forward, "CompositeExplicitAutograd")
_library.impl("_depthwise_conv2d_aten", _forward_aten, "CompositeExplicitAutograd")
_library.impl("_depthwise_conv2d_backward", _backward_aten, "CompositeExplicitAutograd")
torch.library.register_fake("dwswap::depthwise_conv2d", _forward_fake, lib=_library)
torch.library.register_fake("dwswap::_depthwise_conv2d_aten", _forward_fake, lib=_library)
torch.library.register_fake("dwswap::_depthwise_conv2d_backward", _backward_fake, lib=_library)
_library.impl("depthwise_conv2d", _forward_autograd, "Autograd")
_library.impl("_depthwise_conv2d_backward", _backward_autograd, "Autograd")
for _device_type, _key in (("cuda", "AutocastCUDA"), ("cpu", "AutocastCPU")):
    _kernel = autocast_kernel(depthwise_conv2d, _device_type, _key)
    _library.impl("depthwise_conv2d", _kernel, _key)
torch.library.register_vmap(
    "dwswap::depthwise_conv2d", functools.partial(forward_vmap, depthwise_conv2d), lib=_library
)
