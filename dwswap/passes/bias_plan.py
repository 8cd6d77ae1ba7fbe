"""Where every bias of a graph can go: the decisions of ``push_bias``."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from functools import reduce
from types import MappingProxyType

import torch
from torch import Tensor, fx
from torch.utils import _pytree as pytree

from dwswap.passes.affine_call import value_of
from dwswap.passes.offsets import Role

__all__ = ["BiasPlan", "Offset"]


@dataclass(frozen=True)
class Offset:
    """A constant per channel, in float64.

    Attributes:
        origins: the layers whose biases are in it.
        trained: whether any of these requires a gradient.
    """

    value: Tensor
    origins: frozenset[fx.Node]
    trained: bool

    def __add__(self, other: Offset) -> Offset:
        value = self.value + other.value.to(self.value.device)
        return Offset(value, self.origins | other.origins, self.trained or other.trained)


class BiasPlan:
    """A value that carries an offset is computed without it: ``value - offset[channel]``.

    Attributes:
        carries: the values that may have an offset, because every reader can deal with it.
        keepers: of other values, the layer in whose bias the offset stays that arrives there.
        biases: what the bias of a layer, or the input bias of a depthwise call, becomes.
        arriving: the offset of a layer's input.
        passed: modules whose output carries one.
    """

    def __init__(
        self,
        graph_module: fx.GraphModule,
        roles: dict[fx.Node, Role],
        kept: Collection[fx.Node] = (),
        values: bool = True,
        exact: Mapping[fx.Node, Mapping[str, Tensor]] = MappingProxyType({}),
    ) -> None:
        """
        Args:
            kept: layers and calls that take no offset.
            values: as in ``Context``.
            exact: ``"weight"`` and ``"bias"`` of nodes, which are taken in place of what these
                have been rounded to.
        """
        self.graph_module, self.roles, self.kept, self.values = graph_module, roles, kept, values
        self.exact = exact
        self.carries: set[fx.Node] = set()
        self.keepers: dict[fx.Node, fx.Node] = {}
        self.biases: dict[fx.Node, Offset | None] = {}
        self.arriving: dict[fx.Node, Offset] = {}
        self.passed: list[fx.Node] = []
        for node in reversed(roles):
            if roles[node].axis is None:
                continue
            if all(self.refusal(user, node) is None for user in node.users):
                self.carries.add(node)
            else:
                keeper = self._keeper(node)
                if keeper is not None:
                    self.keepers[node] = keeper
        self._flow()

    def refusal(self, user: fx.Node, value: fx.Node) -> str | None:
        """Why ``user`` needs the true ``value``: a reason code."""
        role = self.roles.get(user)
        if role is None:
            return "not_linear"
        if role.operands.count(value) != len([n for n in _inputs(user) if n is value]):
            return "not_constant" if role.call is not None else "not_linear"
        if user in self.kept:
            return "overflow"
        if role.kind == "depthwise" or user in self.carries or user in self.keepers:
            return None  # a layer with a bias is the keeper of its own output
        return "bias_there" if role.kind == "layer" else "not_linear"

    def _keeper(self, node: fx.Node) -> fx.Node | None:
        """A layer with a bias whose output reaches ``node`` and nothing else."""
        role = self.roles[node]
        if role.call is not None:
            return node if role.kind == "layer" and role.call.bias is not None else None
        for operand in role.operands:
            alone = len(operand.users) == 1 and role.operands.count(operand) == 1
            keeper = self._keeper(operand) if alone else None
            if keeper is not None and keeper not in self.kept:
                return keeper
        return None

    def _flow(self) -> None:
        offsets: dict[fx.Node, Offset] = {}
        for node, role in self.roles.items():
            found = [self._own(node)]
            found += [self._after(node, offsets[o]) for o in role.operands if o in offsets]
            known = [offset for offset in found if offset is not None]
            if role.kind == "depthwise":
                if any(offset is not None for offset in found[1:]):
                    self.biases[node] = reduce(Offset.__add__, known)
            elif known:
                offset = reduce(Offset.__add__, known)
                if node in self.carries:
                    offsets[node] = offset
                    if role.kind == "layer":
                        self.biases[node] = None
                    elif node.op == "call_module":
                        self.passed.append(node)
                elif offset.origins == {self.keepers[node]}:
                    self.biases.pop(self.keepers[node], None)  # its own, and nothing else
                else:
                    self.biases[self.keepers[node]] = offset

    def _own(self, node: fx.Node) -> Offset | None:
        """The bias of a layer, or the input bias of a depthwise call."""
        role = self.roles[node]
        if role.call is None:
            return None
        operand = role.call.option("input_bias") if role.call.depthwise else role.call.bias
        tensor = None if operand is None else value_of(self.graph_module, operand)
        if tensor is None:
            return None
        origins = frozenset([node] if role.kind == "layer" else [])
        exact = self.exact.get(node, {}).get("bias")
        wide = self._wide(tensor if exact is None else exact)
        return Offset(wide, origins, tensor.requires_grad)

    @torch.no_grad()
    def _after(self, node: fx.Node, offset: Offset) -> Offset:
        """What ``offset`` of the input is in the output; for a depthwise call as it is."""
        role = self.roles[node]
        if role.call is None or role.kind != "layer":
            return offset
        self.arriving[node] = offset
        weight = self.exact.get(node, {}).get("weight")
        if weight is None:
            weight = value_of(self.graph_module, role.call.weight)
        assert weight is not None
        # (out, in / groups), the taps summed: every tap sees the same constant.
        matrix = self._wide(weight).reshape(*weight.shape[:2], -1).sum(2)
        groups = int(role.call.option("groups") or 1)
        column = offset.value.to(matrix.device).view(groups, -1, 1)
        value = torch.bmm(matrix.view(groups, -1, matrix.shape[1]), column).flatten()
        return Offset(value, offset.origins, offset.trained)

    def _wide(self, tensor: Tensor) -> Tensor:
        return tensor.detach().to(tensor.device if self.values else "meta", torch.float64)


def _inputs(node: fx.Node) -> Iterator[fx.Node]:
    """The nodes among the arguments, with repetitions."""
    leaves = pytree.tree_leaves((node.args, node.kwargs))
    return (leaf for leaf in leaves if isinstance(leaf, fx.Node))
