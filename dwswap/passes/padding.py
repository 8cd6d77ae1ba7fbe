"""What the padding of a convolution is, as far as the passes ask."""

from __future__ import annotations

from torch import Tensor, fx

from dwswap.checks import pair
from dwswap.passes.affine_call import AffineCall, value_of

__all__ = ["is_symmetric", "is_unpadded"]


def is_symmetric(graph_module: fx.GraphModule, call: AffineCall) -> bool:
    """Whether the padding is the same on both sides, so that the operator can add it."""
    if call.option("padding") != "same":
        return True
    weight = value_of(graph_module, call.weight)
    if weight is None:
        return False
    dilation = pair("dilation", call.option("dilation"), 1)
    return all(d * (k - 1) % 2 == 0 for d, k in zip(dilation, weight.shape[2:], strict=True))


def is_unpadded(call: AffineCall, weight: Tensor) -> bool:
    """Whether the layer adds no zeros around its input."""
    padding = call.option("padding")
    if call.spatial == 0 or padding == "valid":
        return True
    if padding == "same":
        return all(size == 1 for size in weight.shape[2:])
    sizes = padding if isinstance(padding, (list, tuple)) else [padding]
    return all(isinstance(size, int) and size == 0 for size in sizes)
