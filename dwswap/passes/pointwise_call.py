"""Which layers are pointwise: a matrix product for every pixel."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, fx

from dwswap.passes.affine_call import AffineCall, value_of
from dwswap.passes.padding import is_unpadded
from dwswap.pointwise import suits

__all__ = ["bias_fits", "is_pointwise", "linear_weight", "product_weight"]


def bias_fits(bias: Tensor | None, weight: Tensor) -> bool:
    """Whether ``bias`` is known, and what a kernel adds to the outputs of ``weight``."""
    return bias is not None and bias.shape == weight.shape[:1] and bias.dtype == weight.dtype


def is_pointwise(call: AffineCall, weight: Tensor) -> bool:
    """Whether it is a linear layer on an image of one pixel, where the stride does not matter."""
    return weight.shape[2:] == (1, 1) and call.option("groups") == 1 and is_unpadded(call, weight)


def product_weight(graph_module: fx.GraphModule, call: AffineCall) -> Tensor | None:
    """The weight where ``call`` is one product for all pixels, and may become one."""
    if call.spatial != 2 or call.transposed or call.depthwise or call.refusal is not None:
        return None
    weight = value_of(graph_module, call.weight)
    if weight is None or not suits(weight) or not is_pointwise(call, weight):
        return None
    return weight if call.is_size("stride", 1) else None


def linear_weight(graph_module: fx.GraphModule, call: AffineCall) -> Tensor | None:
    """The weight where ``call`` is a linear layer that may become such a product."""
    if call.function is not F.linear or call.refusal is not None:
        return None
    weight = value_of(graph_module, call.weight)
    return weight if weight is not None and suits(weight) else None
