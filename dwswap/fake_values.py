"""Fake values in ``Node.meta["val"]``: what an exported program says of its tensors."""

from __future__ import annotations

import contextlib
import operator
from collections.abc import Collection

import torch
from torch import Tensor, fx
from torch._subclasses import FakeTensor, FakeTensorMode

__all__ = ["fake_mode_of", "update_fake_values"]


def fake_mode_of(graph: fx.Graph) -> FakeTensorMode | None:
    """The mode of the fake values of ``graph``; None where there are none."""
    values = (node.meta.get("val") for node in graph.nodes)
    return next((value.fake_mode for value in values if isinstance(value, FakeTensor)), None)


def update_fake_values(graph: fx.Graph, changed: Collection[fx.Node]) -> None:
    """Compute the values that ``graph`` lacks, and those of ``changed`` and what they change.

    Constraints on dynamic shapes stay: what an operator asks about them here guards nothing.
    """
    mode = fake_mode_of(graph)
    if mode is None:
        return
    quiet = contextlib.nullcontext() if mode.shape_env is None else mode.shape_env.suppress_guards()
    different = {node for node in changed if node.op == "placeholder"}
    with mode, quiet, torch.no_grad():
        for node in graph.nodes:
            stale = node in changed or "val" not in node.meta
            stale = stale or not different.isdisjoint(node.all_input_nodes)
            if not stale or not _can_run(node):
                continue
            args, kwargs = fx.map_arg((node.args, node.kwargs), lambda n: n.meta["val"])
            value = node.target(*args, **kwargs)
            if not _is_alike(value, node.meta.get("val")):
                different.add(node)
                node.meta.pop("tensor_meta", None)
            node.meta["val"] = value


def _can_run(node: fx.Node) -> bool:
    """Whether running the node again tells its value and does nothing else."""
    if node.op != "call_function" or node.meta.get("unbacked_bindings"):
        return False
    if node.target is operator.getitem:
        return True
    return isinstance(node.target, torch._ops.OpOverload) and node.meta.get("val", ()) is not None


def _is_alike(value: object, before: object) -> bool:
    if not isinstance(value, Tensor) or not isinstance(before, Tensor):
        return False
    return (
        value.dtype == before.dtype
        and value.shape == before.shape
        and value.stride() == before.stride()
    )
