"""The functional faces of the operators."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.overrides import handle_torch_function, has_torch_function

from dwswap import excitation_registration, registration
from dwswap.checks import NAME, pair, whole
from dwswap.plain import is_plain, is_plain_but_for_autocast

__all__ = ["depthwise_conv2d", "squeeze_excitation"]


def depthwise_conv2d(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: int | Sequence[int] = 1,
    padding: int | Sequence[int] | str = 0,
    dilation: int | Sequence[int] = 1,
    *,
    groups: int | None = None,
    input_bias: Tensor | None = None,
    input_activation: str = "none",
    activation: str = "none",
) -> Tensor:
    """Depthwise 2-D convolution with its elementwise neighbours absorbed.

    ``y = activation(bias + conv2d(input_activation(input + input_bias), weight))`` with zeros as
    padding (after the input activation), ``groups = C``. Output channel ``k`` reads input channel
    ``k // m``.

    Args:
        input: ``(N, C, H, W)`` or ``(C, H, W)``, any strides; contiguous and channels_last are
            fast. float32, float16 and bfloat16 (float32 accumulation) and float64 have CUDA
            kernels; other dtypes use ``aten::conv2d``.
        weight: ``(C * m, 1, kH, kW)``, channel multiplier ``m >= 1``.
        bias: ``(C * m,)``, optional.
        stride, dilation: int or (height, width).
        padding: int, (height, width), ``"valid"`` or ``"same"`` (stride 1 only).
        groups: where given, it must equal ``C``; it changes nothing else.
        input_bias: ``(C,)``, added to every element of the input first, optional.
        input_activation, activation: a name in ``dwswap.activations.ACTIVATIONS``.

    Returns:
        ``(N, C * m, H_out, W_out)``, or without N, of the input's dtype. channels_last where
        input or weight is channels_last, as ``aten::conv2d``; contiguous otherwise.

    Raises:
        TypeError, ValueError: naming the argument, the rule and the value (RuntimeError when the
            CUDA operator finds it).
    """
    plain = is_plain_but_for_autocast(input, weight, bias, input_bias)
    if not plain:
        tensors = (input, weight, bias, input_bias)
        if has_torch_function(tensors):  # one node in a symbolic trace, as the functions of torch
            return handle_torch_function(
                depthwise_conv2d,
                tensors,
                input,
                weight,
                bias,
                stride,
                padding,
                dilation,
                groups=groups,
                input_bias=input_bias,
                input_activation=input_activation,
                activation=activation,
            )
        for name, tensor in (("input", input), ("weight", weight)):
            if not isinstance(tensor, Tensor):
                raise TypeError(f"{NAME}: {name} must be a tensor, got {type(tensor).__name__}")
    known = groups is None or type(groups) is int  # as a rule
    if not known and not isinstance(whole(groups), (int, torch.SymInt)):
        raise TypeError(f"{NAME}: groups must be an integer or None, got {groups!r}")
    if groups is not None and input.dim() >= 3 and input.shape[-3] != groups:
        raise ValueError(
            f"{NAME}: input must have groups = {groups} channels, got shape {list(input.shape)}"
        )
    stride = pair("stride", stride, 1)
    dilation = pair("dilation", dilation, 1)
    if isinstance(padding, str):
        transformed = input_bias is not None or input_activation != "none"
        input, padding = _named_padding(input, weight, stride, padding, dilation, transformed)
    else:
        padding = pair("padding", padding, 0)
    return registration.apply(
        plain,
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


def squeeze_excitation(
    input: Tensor,
    reduce_weight: Tensor,
    reduce_bias: Tensor | None,
    expand_weight: Tensor,
    expand_bias: Tensor | None,
    *,
    activation: str = "relu",
    gate: str = "sigmoid",
) -> Tensor:
    """Squeeze-and-excitation (Hu et al., "Squeeze-and-Excitation Networks", 2018, eq. 2 to 4).

    ``y = input * gate(expand(activation(reduce(mean of input over H and W))))``, where ``reduce``
    and ``expand`` are linear layers, or 1 x 1 convolutions.

    Args:
        input: ``(N, C, H, W)`` or ``(C, H, W)``, any strides; contiguous and channels_last are
            fast. float32, float16 and bfloat16 have CUDA kernels, which compute the means, the
            hidden units and the gates in float32; float64 uses aten.
        reduce_weight: ``(K, C)`` or ``(K, C, 1, 1)``.
        reduce_bias: ``(K,)``, optional.
        expand_weight: ``(C, K)`` or ``(C, K, 1, 1)``.
        expand_bias: ``(C,)``, optional.
        activation, gate: a name in ``dwswap.activations.ACTIVATIONS``.

    Returns:
        Of the input's shape and dtype; channels_last where the input is, contiguous otherwise.

    Raises:
        TypeError, ValueError: naming the argument, the rule and the value (RuntimeError when the
            CUDA operator finds it).
    """
    tensors = (input, reduce_weight, reduce_bias, expand_weight, expand_bias)
    plain = is_plain(input, reduce_weight, reduce_bias, expand_bias)
    plain = plain and is_plain(input, expand_weight, None, None)
    if not plain and has_torch_function(tensors):
        return handle_torch_function(
            squeeze_excitation, tensors, *tensors, activation=activation, gate=gate
        )
    return excitation_registration.apply(plain, *tensors, activation, gate)


def _named_padding(
    input: Tensor,
    weight: Tensor,
    stride: tuple[int, int],
    padding: str,
    dilation: tuple[int, int],
    transformed: bool,
) -> tuple[Tensor, tuple[int, int]]:
    """Input and symmetric padding that mean the same as ``padding`` "same" or "valid"."""
    if padding == "valid":
        return input, (0, 0)
    if padding != "same":
        raise ValueError(
            f'{NAME}: padding must be an int, a pair of ints, "same" or "valid", got {padding!r}'
        )
    if stride != (1, 1):
        raise ValueError(f'{NAME}: padding="same" needs stride 1, got stride {stride}')
    if weight.dim() != 4:
        raise ValueError(
            f"{NAME}: weight must be 4-D (C * m, 1, kH, kW), got shape {list(weight.shape)}"
        )
    kernel = tuple(weight.shape[-2:])
    if torch._C._get_tracing_state() is not None:  # of torch.jit, where sizes are tensors
        kernel = tuple(map(int, kernel))
    total = [d * (k - 1) for d, k in zip(dilation, kernel, strict=True)]
    if any(t % 2 for t in total):
        if transformed:
            raise ValueError(
                f'{NAME}: padding="same" needs an asymmetric border for kernel {kernel}, dilation '
                f"{dilation}, and that cannot be combined with input_bias or input_activation"
            )
        # aten pads the odd element at the end as well.
        input = torch.nn.functional.pad(input, (0, total[1] % 2, 0, total[0] % 2))
    return input, (total[0] // 2, total[1] // 2)
