"""Which nodes change a tensor in place, and which tensors a graph changes."""

from __future__ import annotations

import inspect
import operator
from collections.abc import Callable, Collection
from typing import Any

import torch
from torch import fx

from dwswap.passes.affine_call import value_of
from dwswap.pointwise import pointwise_residual
from dwswap.separable import separable_conv2d

__all__ = [
    "FUNCTIONS",
    "MODULES",
    "changed_operand",
    "changed_tensors",
    "changes_between",
    "is_in_place",
    "library_of",
]

FUNCTIONS = {"torch", "torchvision", "timm", "dwswap", "_operator", "math", "builtins"}
FUNCTIONS |= {"collections"}
"""Packages whose functions say what they change, by their name or an argument."""
MODULES = ("torch.nn.", "torch.ao.nn.", "torch.export.", "torchvision.", "timm.", "dwswap.")
"""Where classes come from that say so by their attribute ``inplace``."""

_OPERATORS = (
    *(operator.iadd, operator.isub, operator.imul, operator.itruediv, operator.ifloordiv),
    *(operator.imod, operator.ipow, operator.imatmul, operator.iand, operator.ior, operator.ixor),
    *(operator.ilshift, operator.irshift, operator.setitem, operator.delitem),
)
# The same as methods, of tensors that are no proxies in a trace.
_METHODS = frozenset(f"__{function.__name__}__" for function in _OPERATORS)
# Their result is new memory.
_ARITHMETIC = (
    *(operator.add, operator.sub, operator.mul, operator.truediv, operator.pow, operator.neg),
    *(torch.add, torch.sub, torch.mul, torch.div),
)
# Function of ours -> where its argument ``residual`` is, which it may change.
_RESIDUALS: tuple[tuple[Any, int], ...] = ((pointwise_residual, 2), (separable_conv2d, 5))


def is_in_place(graph_module: fx.GraphModule, node: fx.Node) -> bool:
    """Whether ``node`` may change one of its arguments."""
    if node.kwargs.get("out") is not None:
        return True
    if _is_foreign(graph_module, node):
        return True
    if node.op == "call_module":
        return bool(getattr(graph_module.get_submodule(str(node.target)), "inplace", False))
    if node.op == "call_method":
        return _is_in_place_name(str(node.target)) or node.target in _METHODS
    if node.op != "call_function":
        return False
    target: Any = node.target
    if isinstance(target, torch._ops.OpOverloadPacket):
        target = getattr(target, "default", target)
    if isinstance(target, torch._ops.OpOverload):
        return bool(target._schema.is_mutable)
    if _residual(node) is not None:
        return True
    if getattr(target, "__module__", "") == "_operator":
        return target in _OPERATORS
    return _is_in_place_name(getattr(target, "__name__", "")) or _asks_for_it(target, node)


def changed_operand(node: fx.Node) -> Any:
    """What ``node`` changes, where it is in place: ``out``, its first argument, or its residual."""
    if node.kwargs.get("out") is not None:
        return node.kwargs["out"]
    residual = _residual(node)
    return residual if residual is not None or not node.args else node.args[0]


def changes_between(
    graph_module: fx.GraphModule,
    first: fx.Node,
    last: fx.Node,
    apart: Collection[fx.Node] = (),
) -> bool:
    """Whether a node after ``first`` and before ``last`` changes any tensor in place; those of
    ``apart`` may."""
    node = first.next
    while node is not last:
        if node not in apart and is_in_place(graph_module, node):
            return True
        node = node.next
    return False


def changed_tensors(graph_module: fx.GraphModule) -> set[int]:
    """``id`` of every parameter and buffer that an in-place operation of the graph is given."""
    changed = set()
    for node in graph_module.graph.nodes:
        if not is_in_place(graph_module, node):
            continue
        foreign = _is_foreign(graph_module, node)
        for subject in node.all_input_nodes if foreign else [changed_operand(node)]:
            source = _viewed(subject)
            if source is not None:
                changed.add(id(value_of(graph_module, source)))
    return changed


def library_of(function: Any) -> str:
    """The package that a function of a graph comes from."""
    owner = getattr(function, "__module__", None) or type(function).__module__
    return str(owner).partition(".")[0]


def _viewed(subject: Any) -> fx.Node | None:
    """The parameter or buffer that ``subject`` may share its memory with."""
    while isinstance(subject, fx.Node) and subject.op != "get_attr":
        # Through views, which take what they view as the first argument.
        is_new = subject.target in _ARITHMETIC
        subject = subject.args[0] if subject.args and not is_new else None
    return subject if isinstance(subject, fx.Node) else None


def _is_foreign(graph_module: fx.GraphModule, node: fx.Node) -> bool:
    """Whether ``node`` calls code that may change what it is given and does not say so."""
    if node.op == "call_function":
        known = isinstance(node.target, torch._ops.OpOverload)
        return not known and library_of(node.target) not in FUNCTIONS
    if node.op != "call_module":
        return False
    module = graph_module.get_submodule(str(node.target))
    if type(module).__module__.startswith("torch.export."):  # guards, whose forward is generated
        return False
    names = ("forward", "_conv_forward")
    methods = [vars(module).get(name, getattr(type(module), name, None)) for name in names]
    return not all(str(m.__module__).startswith(MODULES) for m in methods if m is not None)


def _residual(node: fx.Node) -> Any:
    return next((node.args[i] for function, i in _RESIDUALS if node.target is function), None)


def _is_in_place_name(name: str) -> bool:
    return name.endswith("_") and not name.endswith("__")


def _asks_for_it(function: Callable[..., Any], node: fx.Node) -> bool:
    try:
        given = inspect.signature(function).bind(*node.args, **node.kwargs)
    except (TypeError, ValueError):  # builtins have no signature
        return False
    given.apply_defaults()
    return given.arguments.get("inplace", False) is not False
