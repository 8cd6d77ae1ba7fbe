"""What ``torch.utils.flop_counter`` counts for the operators that convolve or multiply matrices.

As there, a multiplication with its addition counts as two, and biases, activations and batch
normalization as none. The gradient of a depthwise weight counts what each of its channels takes;
PyTorch counts that of its own as if every channel saw all others.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Sequence
from typing import Any

import torch

import dwswap.schema  # noqa: F401 - defines the operators

__all__ = ["register"]

Shape = Sequence[int]

_lock = threading.Lock()


def register() -> None:
    """Make the formulas known, but for operators that have one. Counters that exist do not see it.

    Not when ``dwswap`` is imported: the counter's module imports Triton, which takes a tenth of a
    second where nothing else did.
    """
    from torch.utils.flop_counter import flop_registry, register_flop_formula

    operators = torch.ops.dwswap
    formulas: dict[Any, Callable[..., int]] = {
        operators.depthwise_conv2d: _convolution,
        operators._depthwise_conv2d_direct: _convolution,
        operators._stem_conv2d: _convolution,
        operators._depthwise_conv2d_backward: _depthwise_backward,
        operators._separable_conv2d: _separable,
        operators.squeeze_excitation: _squeeze_excitation,
        operators._pointwise_product: _pointwise,
        operators._pointwise_residual_: _pointwise,
        operators._pooled_linear: _pooled_linear,
    }
    with _lock:
        for operator, formula in formulas.items():
            if operator not in flop_registry:
                register_flop_formula(operator)(formula)


def _convolution(input: Shape, weight: Shape, *_: Any, out_shape: Shape, **__: Any) -> int:
    return 2 * math.prod(out_shape) * math.prod(weight[1:])


def _depthwise_backward(
    grad_output: Shape, input: Shape, weight: Shape, *args: Any, out_shape: Any
) -> int:
    wants_input, wants_weight, _ = args[3]
    return (wants_input + wants_weight) * 2 * math.prod(grad_output) * math.prod(weight[1:])


def _separable(input: Shape, weight: Shape, *args: Any, out_shape: Shape) -> int:
    products, pixels = math.prod(out_shape), out_shape[0] * math.prod(out_shape[2:])
    return 2 * (math.prod(weight) * pixels + products * weight[0])


def _squeeze_excitation(
    input: Shape, reduce_weight: Shape, _: Any, expand_weight: Shape, *args: Any, out_shape: Shape
) -> int:
    return 2 * math.prod(input[:-3]) * (math.prod(reduce_weight) + math.prod(expand_weight))


def _pointwise(input: Shape, weight: Shape, *_: Any, out_shape: Any) -> int:
    return 2 * math.prod(input) * weight[0]


def _pooled_linear(input: Shape, weight: Shape, *_: Any, out_shape: Shape) -> int:
    return 2 * math.prod(input[:-3]) * math.prod(weight)
