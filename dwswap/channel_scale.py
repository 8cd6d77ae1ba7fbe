"""The two ends of squeeze-and-excitation in training: the means, and gates that scale the channels.

| dispatch key              | kernels of ``_channel_scale`` and ``_channel_scale_backward``      |
| ------------------------- | ------------------------------------------------------------------ |
| CUDA                      | ``csrc/``, registered when ``build.load()`` loads the library       |
| CompositeExplicitAutograd | aten; on CUDA tensors it first loads the library and calls again   |
| Autograd                  | none: ``_squeeze_recorded`` and ``_excite_recorded`` of            |
|                           | ``csrc/autograd/`` record                                          |

The gradient of the image has two parts: that of the product, and that of the means, which is known
only when the layers between the two have had their backward. One pass computes both at once, so
what the product hands back to the means is no gradient yet: :func:`squeeze` gives :func:`excite`,
and nobody else, two tensors of a node of its own. For the gradient of the one it gets that of the
output, and for that of the other the gates.

Only plain calls come here: whatever is traced, compiled or transformed is aten's alone, and so is a
backward that is transformed.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from dwswap import build
from dwswap.activations import ACTIVATIONS, PAIRS, pair_of
from dwswap.layouts import is_dense_image
from dwswap.plain import has_kernels, is_plain_but_for_autocast, needs_gradient
from dwswap.schema import channel_means, excite_recorded, library, squeeze_recorded
from dwswap.schema import channel_scale as operator
from dwswap.schema import channel_scale_backward as backward_operator

__all__ = ["GATES", "Squeezed", "excite", "has_channel_scale", "squeeze", "takes_gates"]

GATES = frozenset({"none", "sigmoid", "hardsigmoid"})
"""The activations of gates that the kernels have."""

_MOST = 1 << 30  # planes, and pixels of each: covers_channel_scale of csrc/channel_scale/launch.cpp
_MOST_ELEMENTS = 1 << 40


def has_channel_scale(input: Tensor) -> bool:
    """Whether :func:`squeeze` and :func:`excite` take such an image and have kernels for it.

    A plain call in which it is dense, ``(N, C, H, W)``, contiguous or channels_last and not empty,
    on a CUDA device of compute capability 8.0 or later.
    """
    # Asked for every call of every block.
    if not (
        has_kernels(input)
        and is_plain_but_for_autocast(input, input, None, None)
        and input.dim() == 4
        and is_dense_image(input)
    ):
        return False
    batch, channels, height, width = input.shape
    planes, pixels = batch * channels, height * width
    if not (0 < planes <= _MOST and 0 < pixels <= _MOST and planes * pixels <= _MOST_ELEMENTS):
        return False
    return build.load_for(input.device)


class Squeezed(NamedTuple):
    """What :func:`squeeze` gives.

    Attributes:
        means: of the channels, ``(N, C, 1, 1)``, differentiable like any other.
        input: the image itself.
        carriers: what :func:`excite` alone may use; both None where no gradient is recorded.
    """

    means: Tensor
    input: Tensor
    carriers: tuple[Tensor | None, Tensor | None]


def squeeze(input: Tensor, activation: str) -> Squeezed:
    """The means of the channels of ``input``, for gates that :func:`excite` scales it by.

    Args:
        input: ``(N, C, H, W)``, see :func:`has_channel_scale`, which is to be asked first.
        activation: of the gates, one of :data:`GATES`.

    Raises:
        NotImplementedError: there is no library, as :func:`has_channel_scale` would have said.
    """
    image = carrier = None
    if needs_gradient(input):
        means, image, carrier = squeeze_recorded(input, PAIRS["none", activation])
    else:
        means = channel_means(input, None, 0)
    batch, channels = means.shape
    # As the pooling of aten has it, an image in the layout of the input.
    if input.is_contiguous():
        squeezed = means.view(batch, channels, 1, 1)
    else:
        squeezed = means.view(batch, 1, 1, channels).permute(0, 3, 1, 2)
    return Squeezed(squeezed, input, (image, carrier))


def takes_gates(squeezed: Squeezed, gates: Tensor) -> bool:
    """Whether :func:`excite` takes such gates; ``(N, C, 1, 1)``, dense, on the image's device, of
    its dtype or, with a float32 image, of half precision."""
    input = squeezed.input
    return (
        is_plain_but_for_autocast(input, gates, None, None)
        and gates.shape == squeezed.means.shape
        and gates.device == input.device
        and (
            gates.dtype is input.dtype
            or (input.dtype is torch.float32 and gates.dtype in (torch.float16, torch.bfloat16))
        )
        and _is_dense(gates)
    )


def _is_dense(planes: Tensor) -> bool:
    """Of ``(N, C, 1, 1)``; its own ``is_contiguous`` would do, but for N or C of 1."""
    (batch, channels), strides = planes.shape[:2], planes.stride()
    return (batch == 1 or strides[0] == channels) and (channels == 1 or strides[1] == 1)


def excite(squeezed: Squeezed, gates: Tensor, activation: str) -> Tensor:
    """``input * activation(gates)``. Deterministic, as are the gradients.

    Args:
        squeezed: of :func:`squeeze`; of one call, for one call of this.
        gates: see :func:`takes_gates`, which is to be asked first.
        activation: what :func:`squeeze` got.

    Returns:
        Of the input's shape, dtype and strides.

    Raises:
        RuntimeError: of the CUDA operator, naming the argument, the rule and the value.
        NotImplementedError: there is no library, as :func:`has_channel_scale` would have said.
    """
    return excite_recorded(*squeezed.carriers, gates, squeezed.input, PAIRS["none", activation])


# --- on every device --------------------------------------------------------------------------


def _forward(input: Tensor, *args: Any) -> Tensor:
    if input.is_cuda and build.load():
        return operator(input, *args)  # has a CUDA kernel from now on
    return _forward_aten(input, *args)


def _backward(grad_output: Tensor, *args: Any) -> Tensor:
    if grad_output.is_cuda and build.load():
        return backward_operator(grad_output, *args)
    return _backward_aten(grad_output, *args)


def _forward_aten(input: Tensor, gates: Tensor, spread: Tensor | None, activation: int) -> Tensor:
    batch, channels, height, width = input.shape
    factors = ACTIVATIONS[pair_of(activation)[1]].forward(gates)
    output = input * factors.reshape(batch, channels, 1, 1).to(input.dtype)
    if spread is not None:
        output = output + spread.reshape(batch, channels, 1, 1) / (height * width)
    return output


def _backward_aten(grad_output: Tensor, input: Tensor, gates: Tensor, activation: int) -> Tensor:
    grad = (grad_output * input).sum((2, 3)).reshape(gates.shape).to(gates.dtype)
    return ACTIVATIONS[pair_of(activation)[1]].backward(grad, gates)


library.impl("_channel_scale", _forward, "CompositeExplicitAutograd")
library.impl("_channel_scale_backward", _backward, "CompositeExplicitAutograd")
library.impl("_channel_scale_aten", _forward_aten, "CompositeImplicitAutograd")
library.impl("_channel_scale_backward_aten", _backward_aten, "CompositeImplicitAutograd")
for _name in ("_channel_scale", "_channel_scale_backward"):
    library.impl(_name, torch.library.fallthrough_kernel, "Autograd")
