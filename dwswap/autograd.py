"""A call of the operator as part of a graph of autograd, past its dispatch keys."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from dwswap.activations import ACTIVATIONS
from dwswap.backward import apply_backward, without_autocast
from dwswap.schema import depthwise_conv2d

__all__ = ["preactivated", "recorded"]

Ints = Sequence[int]


def recorded(
    run: Callable[..., Tensor],
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: Ints,
    padding: Ints,
    dilation: Ints,
    input_bias: Tensor | None,
    *activations: str,
) -> Tensor:
    """What ``run`` returns for the arguments after it, as part of a graph of autograd."""
    tensors_and_geometry = (run, input, weight, bias, (stride, padding, dilation))
    if input_bias is None and activations == ("none", "none"):
        return _DepthwiseConv2d.apply(*tensors_and_geometry)
    return _WithNeighbours.apply(*tensors_and_geometry, input_bias, *activations)


def preactivated(
    input: Tensor, input_bias: Tensor | None, input_activation: str, *, in_place: bool = False
) -> Tensor:
    """What the convolution itself is computed of; ``in_place``: the sum may be changed."""
    activation = ACTIVATIONS[input_activation]
    if input_bias is None:
        return activation.forward(input)
    hidden = input + input_bias[:, None, None]
    return activation.in_place(hidden) if in_place else activation.forward(hidden)


class _DepthwiseConv2d(torch.autograd.Function):
    """The convolution alone, as a model has it that was not fused: on the CPU, or where a call is
    not plain. Plain calls on CUDA have a node in C++."""

    @staticmethod
    def forward(
        ctx: Any,
        run: Callable[..., Tensor],
        input: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        geometry: tuple[Ints, Ints, Ints],
    ) -> Tensor:
        """``run``: what computes it, with the nine arguments of the operator."""
        ctx.geometry = geometry
        ctx.save_for_backward(input, weight)
        return run(input, weight, bias, *geometry, None, "none", "none")

    @staticmethod
    @without_autocast
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        input, weight = ctx.saved_tensors
        grad_input, grad_weight, grad_bias = apply_backward(
            grad_output, input, weight, *ctx.geometry, list(ctx.needs_input_grad[1:4])
        )
        return None, grad_input, grad_weight, grad_bias, None


class _WithNeighbours(torch.autograd.Function):
    """The convolution with what it has absorbed."""

    @staticmethod
    def forward(
        ctx: Any,
        run: Callable[..., Tensor],
        input: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        geometry: tuple[Ints, Ints, Ints],
        input_bias: Tensor | None,
        *activations: str,
    ) -> Tensor:
        """``run``: what computes it, with the nine arguments of the operator."""
        ctx.geometry = geometry
        ctx.input_activation, ctx.activation = activations
        ctx.save_for_backward(input, weight, bias, input_bias)
        return run(input, weight, bias, *geometry, input_bias, *activations)

    @staticmethod
    @without_autocast
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        input, weight, bias, input_bias = ctx.saved_tensors
        needs_input, needs_weight, needs_bias = ctx.needs_input_grad[1:4]
        needs_input_bias = ctx.needs_input_grad[5]
        hidden = preactivated(input, input_bias, ctx.input_activation)
        if ctx.activation != "none":
            output = depthwise_conv2d(hidden, weight, bias, *ctx.geometry)
            grad_output = ACTIVATIONS[ctx.activation].backward(grad_output, output)
        grad_input, grad_weight, grad_bias = apply_backward(
            grad_output,
            hidden,
            weight,
            *ctx.geometry,
            [needs_input or needs_input_bias, needs_weight, needs_bias],
        )
        grad_input_bias = None
        if needs_input or needs_input_bias:
            if ctx.input_activation != "none":
                before = preactivated(input, input_bias, "none")
                grad_input = ACTIVATIONS[ctx.input_activation].backward(grad_input, before)
            if needs_input_bias:
                grad_input_bias = grad_input.sum(dim=(-1, -2) if input.dim() == 3 else (0, 2, 3))
        return (
            None,
            grad_input if needs_input else None,
            grad_weight,
            grad_bias,
            None,
            grad_input_bias,
            None,
            None,
        )
