"""What the passes know beside the graph, and where they write what they did."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import torch
from torch import Tensor, fx

from dwswap.changes import CHANGE_REASONS, DONE, Change
from dwswap.convolution_call import example_of, owner_of
from dwswap.layouts import memory_format
from dwswap.passes.rounding import Moments
from dwswap.report import REASONS, Layer

__all__ = ["PATH", "Context", "GraphPass"]

PATH = "dwswap_path"
"""Key in ``Node.meta``: path of the layer that a node computes, as in the report."""


@dataclass
class Context:
    """Shared by the passes over one graph.

    Attributes:
        layers: the report so far, by path in the whole model; decisions on modules are in it.
        prefix: path of the graph module inside the model.
        shapes: shapes of values, from ``example_inputs``.
        ranks: numbers of dimensions of values, which the graph checks.
        skip: why a call stays, a reason code, given the path of the module that makes it.
        changes: what passes did to a layer and what they left, by the layer's path.
        released: paths of modules and tensors that the graph may not need any more.
        memory_format: as ``dwswap.optimize`` was asked.
        layout: what became of that, and why.
        moments: what is expected of values, where a fold has asked for it.
        exact: weights (in float32) and biases (in float64) of half precision by path, as they were
            before they were rounded; until the biases are where they stay.
        values: False where nobody runs the result, which then needs no new tensors.
    """

    layers: dict[str, Layer]
    prefix: str = ""
    shapes: dict[fx.Node, tuple[int, ...]] = field(default_factory=dict)
    ranks: dict[fx.Node, int] = field(default_factory=dict)
    skip: Callable[[str], str | None] | None = None
    changes: dict[str, list[Change]] = field(default_factory=dict)
    released: list[str] = field(default_factory=list)
    memory_format: str = "auto"
    layout: str = "preserve"
    moments: dict[fx.Node, Moments] = field(default_factory=dict)
    exact: dict[str, Tensor] = field(default_factory=dict)
    values: bool = True

    def path(self, name: str) -> str:
        """Path in the whole model of ``name`` in the graph module."""
        return f"{self.prefix}.{name}" if self.prefix and name else self.prefix or name

    def path_of(self, node: fx.Node) -> str:
        """Path of the layer that ``node`` computes, as in the report."""
        if PATH in node.meta:
            return str(node.meta[PATH])
        if node.op == "call_module":
            path = self.path(str(node.target))
            aliases = (p for p, layer in self.layers.items() if path in layer.aliases)
            return next(aliases, path)
        return ".".join(part for part in (self.path(owner_of(node)), node.name) if part)

    def keep_path(self, node: fx.Node, path: str) -> None:
        """Remember the path of a layer whose node may be replaced; ``meta`` goes along."""
        node.meta[PATH] = path

    def rank(self, node: fx.Node) -> int | None:
        """Number of dimensions of a value, where ``example_inputs``, the graph, an export or Dynamo
        told."""
        if node in self.shapes:
            return len(self.shapes[node])
        if node in self.ranks:
            return self.ranks[node]
        example = example_of(node)
        return example.dim() if isinstance(example, Tensor) else None

    def replaced(self, old: fx.Node, new: fx.Node) -> None:
        """``new`` computes what ``old`` did."""
        if old in self.shapes:
            self.shapes[new] = self.shapes[old]
        if old in self.ranks:
            self.ranks[new] = self.ranks[old]
        if old in self.moments:
            self.moments[new] = self.moments[old]

    def substitute(
        self,
        node: fx.Node,
        function: Callable[..., Tensor],
        arguments: Sequence[object],
        options: dict[str, Any] | None = None,
    ) -> fx.Node:
        """Put a call of ``function``, which computes the same, in the place of ``node``.

        Args:
            arguments: strings among them are the paths of tensors, which the call reads.
        """
        graph = node.graph
        with graph.inserting_before(node):
            given: Any = tuple(graph.get_attr(a) if isinstance(a, str) else a for a in arguments)
            new = graph.call_function(function, given, options)
        # torch.fx traces the generated code when it unpickles; is_wrapped keeps the call one node.
        new.meta = {**node.meta, "is_wrapped": True}
        self.replaced(node, new)
        node.replace_all_uses_with(new)
        graph.erase_node(node)
        self.release(node)
        return new

    def substitute_layer(
        self,
        node: fx.Node,
        function: Callable[..., Tensor],
        arguments: Sequence[object],
        options: dict[str, Any] | None = None,
    ) -> fx.Node:
        """:meth:`substitute` a layer, whose path the call keeps."""
        path = self.path_of(node)
        new = self.substitute(node, function, arguments, options)
        self.keep_path(new, path)
        return new

    def lays_out(self, weight: Tensor) -> bool:
        """Whether the result of a convolution with ``weight`` is channels_last: that of the graph
        is, or a weight in it makes it so."""
        by_graph = self.layout.startswith("channels_last")
        return by_graph or memory_format(weight) is torch.channels_last

    def note(
        self,
        layer: fx.Node,
        kind: str,
        subject: fx.Node,
        reason: str,
        facts: dict[str, Any] | None = None,
        name: str | None = None,
    ) -> None:
        """Write down what became of ``subject``, a neighbour of ``layer``."""
        sentence = CHANGE_REASONS.get(reason) or REASONS[reason]
        if reason not in CHANGE_REASONS:
            sentence = f"of the layer: {sentence}"
        done = reason in DONE
        detail = sentence.format(**facts or {})
        change = Change(kind, self.path_of(subject), done, reason, detail, name)
        known = self.changes.setdefault(self.path_of(layer), [])
        # A layer that is called several times says it once.
        if change not in known:
            known.append(change)

    def retract(self, layer: fx.Node, kind: str) -> None:
        """Forget why something of ``kind`` was left: a later pass did it."""
        path = self.path_of(layer)
        kept = [
            change for change in self.changes.get(path, []) if change.done or change.kind != kind
        ]
        self.changes[path] = kept

    def release(self, *operands: object) -> None:
        """Say that a module (its call) or a tensor has one reader less."""
        for operand in operands:
            if isinstance(operand, fx.Node) and operand.op in ("call_module", "get_attr"):
                operand = str(operand.target)
            if isinstance(operand, str) and operand not in self.released:
                self.released.append(operand)


GraphPass: TypeAlias = Callable[[fx.GraphModule, Context], None]
