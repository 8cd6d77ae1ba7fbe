"""A call in a CUDA graph, for the peers of the benchmarks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

__all__ = ["WARM_UP", "capture"]

WARM_UP = 3
"""Calls before: in them libraries choose kernels, and optimizers allocate what they keep."""


def capture(call: Callable[[], Any]) -> tuple[torch.cuda.CUDAGraph, Any]:
    """The graph of one ``call``, and what that call returned, which every replay fills anew.

    ``call`` has run :data:`WARM_UP` times on a stream of its own by then.
    """
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(WARM_UP):
            call()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        output = call()
    return graph, output
