"""The activations that the operator can absorb: one table for every layer of the package.

The order of :data:`ACTIVATIONS` is the numbering of ``enum class Activation`` in
``csrc/common/activation.h``; a test compares the two.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["ACTIVATIONS", "PAIRS", "Activation", "pair_of"]

aten = torch.ops.aten


@dataclass(frozen=True)
class Activation:
    """One elementwise activation.

    Attributes:
        forward: ``x -> activation(x)``, the aten form; the meaning of the name.
        in_place: the same, with ``x`` changed and returned: for temporaries of our own.
        backward: ``(grad_output, x) -> grad_x``, made of differentiable aten operators.
    """

    forward: Callable[[Tensor], Tensor]
    in_place: Callable[[Tensor], Tensor]
    backward: Callable[[Tensor, Tensor], Tensor]


def _silu_backward(grad: Tensor, x: Tensor) -> Tensor:
    if not torch.is_grad_enabled():
        return aten.silu_backward(grad, x)
    # aten has no derivative for silu_backward; this form is differentiable again.
    gate = aten.sigmoid(x)
    return grad * gate * (1 + x * (1 - gate))


ACTIVATIONS: dict[str, Activation] = {
    "none": Activation(lambda x: x, lambda x: x, lambda grad, x: grad),
    "relu": Activation(aten.relu, aten.relu_, lambda grad, x: aten.threshold_backward(grad, x, 0)),
    "relu6": Activation(
        lambda x: aten.hardtanh(x, 0.0, 6.0),
        lambda x: aten.hardtanh_(x, 0.0, 6.0),
        lambda grad, x: aten.hardtanh_backward(grad, x, 0.0, 6.0),
    ),
    "hardswish": Activation(aten.hardswish, aten.hardswish_, aten.hardswish_backward),
    "silu": Activation(aten.silu, aten.silu_, _silu_backward),
    "gelu": Activation(aten.gelu, aten.gelu_, aten.gelu_backward),
    "gelu_tanh": Activation(
        lambda x: aten.gelu(x, approximate="tanh"),
        lambda x: aten.gelu_(x, approximate="tanh"),
        lambda grad, x: aten.gelu_backward(grad, x, approximate="tanh"),
    ),
    "hardsigmoid": Activation(
        # hardsigmoid_backward has no derivative in aten; torch.where has.
        aten.hardsigmoid,
        aten.hardsigmoid_,
        lambda grad, x: torch.where((x > -3) & (x < 3), grad / 6, 0.0),
    ),
    "sigmoid": Activation(
        aten.sigmoid,
        aten.sigmoid_,
        lambda grad, x: aten.sigmoid_backward(grad, aten.sigmoid(x)),
    ),
}

PAIRS = {
    (one, other): 16 * i + j
    for i, one in enumerate(ACTIVATIONS)
    for j, other in enumerate(ACTIVATIONS)
}
"""Two names as the number that operators take where strings cost microseconds;
``parse_activations`` of ``csrc/common/tensor.h`` reads it."""
_NAMES = tuple(ACTIVATIONS)


def pair_of(number: int) -> tuple[str, str]:
    """The names whose number in :data:`PAIRS` it is."""
    return _NAMES[number // 16], _NAMES[number % 16]
