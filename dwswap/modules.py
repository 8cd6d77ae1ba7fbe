"""The module form of the operator."""

from __future__ import annotations

from typing import Any, TypeVar, cast

import torch
from torch import Tensor, nn

from dwswap.checks import whole
from dwswap.ops import depthwise_conv2d

__all__ = ["DepthwiseConv2d", "as_class"]

M = TypeVar("M", bound=nn.Module)


class DepthwiseConv2d(nn.Conv2d):
    """Drop-in for ``nn.Conv2d(..., groups=in_channels)`` that runs the dwswap operator.

    Same constructor arguments, same parameters and ``state_dict`` keys. ``groups`` may be left
    out; where it is given it must equal ``in_channels``. ``out_channels`` is a multiple of
    ``in_channels``.

    Shape:
        ``(N, C, H, W)`` or ``(C, H, W)`` to ``(N, C * m, H_out, W_out)`` or without N.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | tuple[int, int],
        stride: int | tuple[int, int] = 1,
        padding: int | tuple[int, int] | str = 0,
        dilation: int | tuple[int, int] = 1,
        groups: int | None = None,
        bias: bool = True,
        padding_mode: str = "zeros",
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        if groups is not None and groups != in_channels:
            raise ValueError(
                f"DepthwiseConv2d: groups must equal in_channels ({in_channels}), got {groups}"
            )
        super().__init__(
            in_channels,
            out_channels,
            kernel_size,
            stride,
            padding,
            dilation,
            in_channels,
            bias,
            cast(Any, padding_mode),
            device=device,
            dtype=dtype,
        )

    def forward(self, input: Tensor) -> Tensor:
        """``(N, C, H, W)`` to ``(N, C * m, H_out, W_out)``."""
        # nn.Module.__getattr__ takes a microsecond for each of them, the convolution takes five.
        parameters = self._parameters
        if type(input) is Tensor and "weight" in parameters and "bias" in parameters:
            return self._conv_forward(input, cast(Tensor, parameters["weight"]), parameters["bias"])
        return self._conv_forward(input, self.weight, self.bias)

    def _conv_forward(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        padding: Any = self.padding
        if self.padding_mode != "zeros":
            input = nn.functional.pad(
                input, self._reversed_padding_repeated_twice, mode=self.padding_mode
            )
            padding = 0
        return depthwise_conv2d(
            input, weight, bias, self.stride, padding, self.dilation, groups=self.groups
        )

    @classmethod
    def from_conv2d(cls, conv: nn.Conv2d) -> DepthwiseConv2d:
        """The same convolution as a ``DepthwiseConv2d``: shares the Parameters, keeps the mode.

        Raises:
            TypeError: ``conv`` is no ``nn.Conv2d``.
            ValueError: ``conv`` is not depthwise, or does more than ``nn.Conv2d``: a subclass, a
                parametrized weight, a ``forward`` of its own.
        """
        if not isinstance(conv, nn.Conv2d):
            raise TypeError(
                f"DepthwiseConv2d.from_conv2d: conv must be an nn.Conv2d, got {type(conv).__name__}"
            )
        own_forward = " with a forward of its own" if "forward" in conv.__dict__ else ""
        if type(conv) not in (nn.Conv2d, cls) or own_forward:
            raise ValueError(
                "DepthwiseConv2d.from_conv2d: conv must be a plain nn.Conv2d, "
                f"got {type(conv).__name__}{own_forward}"
            )
        if conv._parameters.get("weight") is None:
            raise ValueError(
                "DepthwiseConv2d.from_conv2d: conv.weight must be a Parameter of its own, "
                "got one that is computed"
            )
        if conv.groups != conv.in_channels:
            raise ValueError(
                "DepthwiseConv2d.from_conv2d: conv must have groups == in_channels, got "
                f"groups={conv.groups}, in_channels={conv.in_channels}"
            )
        result = as_class(conv, cls)
        for name in ("stride", "padding", "dilation", "groups"):
            # torch.compile takes an integer of NumPy for a tensor, which no check can read.
            setattr(result, name, whole(getattr(conv, name)))
        return result

    def to_conv2d(self) -> nn.Conv2d:
        """The inverse of :meth:`from_conv2d`: a plain ``nn.Conv2d`` with the same Parameters."""
        return as_class(self, nn.Conv2d)


def as_class(source: nn.Module, cls: type[M]) -> M:
    """``source`` as an instance of ``cls``: everything it holds is shared, nothing is copied."""
    result = cls.__new__(cls)
    # Containers of its own, so that what is added to the one does not appear in the other.
    result.__dict__.update(
        {
            name: value.copy() if isinstance(value, (dict, set)) else value
            for name, value in source.__dict__.items()
        }
    )
    return result
