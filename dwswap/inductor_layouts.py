"""In which layout code that ``torch.compile`` generates hands its images to the operators."""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable
from typing import Any

import torch

from dwswap.layouts import memory_format
from dwswap.schema import (
    batch_norm,
    batch_norm_backward,
    depthwise_conv2d,
    depthwise_conv2d_backward,
)

__all__ = ["prefer_channels_last"]

logger = logging.getLogger(__name__)

_OPERATORS = (depthwise_conv2d, depthwise_conv2d_backward, batch_norm, batch_norm_backward)
_IMAGES = {"input", "grad_output"}


def prefer_channels_last() -> None:
    """Let Inductor, where it is loaded, hand images over as a convolution of aten would get them.

    The operators take any strides, and for such Inductor leaves what it computes right in front of
    a call contiguous, even where everything around it is in channels_last: the kernels would copy,
    or run in the slower layout. To be called by fake kernels, which run before Inductor comes to
    the call, and do not import it.
    """
    lowering: Any = sys.modules.get("torch._inductor.lowering")
    if lowering is None:
        return
    for operator in _OPERATORS:
        if operator in lowering.lowerings:
            continue
        try:
            lower = _lowering_of(operator, lowering)
            lowering.register_lowering(operator, type_promotion_kind=None)(lower)
        except AttributeError:  # another Inductor than this was written for: slower, as right
            logger.warning("Inductor chooses the layouts in front of %s", operator, exc_info=True)
            lowering.lowerings.pop(operator, None)
            return


def _lowering_of(operator: Any, lowering: Any) -> Callable[..., Any]:
    """A call of ``operator`` with its images in channels_last, where the input is that as traced,
    or Inductor runs convolutions in that layout whatever was traced."""
    call, virtualized = lowering.fallback_handler(operator), lowering.V
    channels_last = lowering.ir.ExternKernel.require_channels_last
    names = [argument.name for argument in operator._schema.arguments]
    images = [place for place, name in enumerate(names) if name in _IMAGES]
    input = names.index("input")

    def lower(*args: Any, **kwargs: Any) -> Any:
        graph, given = virtualized.graph, list(args)
        if _is_channels_last(graph.current_node.args[input], graph.layout_opt):
            for place in images:
                given[place] = channels_last(given[place])
        return call(*given, **kwargs)

    return lower


def _is_channels_last(input: Any, preferred: bool) -> bool:
    traced = input.meta["val"]
    return traced.dim() == 4 and (preferred or memory_format(traced) is torch.channels_last)
