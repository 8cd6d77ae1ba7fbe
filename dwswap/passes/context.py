"""What the passes know beside the graph, and where they write what they did."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TypeAlias

from torch import fx

from dwswap.convolution_call import Shapes
from dwswap.report import Layer

__all__ = ["Context", "GraphPass"]


@dataclass
class Context:
    """Shared by the passes over one graph.

    Attributes:
        layers: the report so far, by path in the whole model; decisions on modules are in it.
        prefix: path of the graph module inside the model.
        shapes: shapes of values, from ``example_inputs``.
        skip: the user's predicate for calls, given the path of the module that makes them.
    """

    layers: dict[str, Layer]
    prefix: str = ""
    shapes: Shapes = field(default_factory=dict)
    skip: Callable[[str], bool] | None = None

    def path(self, name: str) -> str:
        """Path in the whole model of ``name`` in the graph module."""
        return f"{self.prefix}.{name}" if self.prefix and name else self.prefix or name


GraphPass: TypeAlias = Callable[[fx.GraphModule, Context], None]
