"""BatchNorm in a compiled graph that trains, with the activations behind it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx

from dwswap.activations import PAIRS
from dwswap.batch_norm import NORM_ACTIVATIONS, takes_batch_norm
from dwswap.changes import CHANGE_REASONS, Change
from dwswap.convolution_call import example_of
from dwswap.passes.activation_call import only_activation
from dwswap.passes.context import Context
from dwswap.passes.norm_call import norm_arguments
from dwswap.schema import batch_norm_recorded

__all__ = ["swap_norm_calls"]

_TENSORS = ("input", "weight", "bias", "running_mean", "running_var")


def swap_norm_calls(graph_module: fx.GraphModule, context: Context) -> None:
    """Replace BatchNorm by the statistics of each batch, where there are kernels for it.

    Pattern: a function of BatchNorm with ``training=True``, the activation that alone reads its
    result, and the count of batches right before it. Reason: the operator launches two kernels
    forward and two backward, and keeps nothing of what lies between the two. Limits: tensors of the
    graph have examples, and ``momentum`` and ``eps`` are numbers.
    """
    graph = graph_module.graph
    for node in list(graph.nodes):
        given = norm_arguments(node)
        if given is None or not _has_kernels(given):
            continue
        behind = only_activation(graph_module, node)
        if behind is not None and behind.name not in NORM_ACTIVATIONS:
            behind = None
        name, last = ("none", node) if behind is None else (str(behind.name), behind.node)
        count = _count_before(node, given["input"])
        batches = None if count is None else count.args[0]
        tensors = [given.get(key) for key in _TENSORS]
        numbers = (given["momentum"], given["eps"], PAIRS["none", name])
        with graph.inserting_before(node):
            new = graph.call_function(batch_norm_recorded, (*tensors, batches, *numbers))
        new.meta = dict(last.meta)
        last.replace_all_uses_with(new)
        path, code = context.path_of(node), "training_kernel"
        absorbed = None if behind is None else name
        change = Change("batch_norm", path, True, code, CHANGE_REASONS[code], absorbed)
        context.changes.setdefault(path, []).append(change)
        for old in dict.fromkeys((last, node, count)):
            if old is not None:
                graph.erase_node(old)


def _has_kernels(given: dict[str, Any]) -> bool:
    numbers = (given["momentum"], given["eps"])
    if given["training"] is not True or not all(isinstance(n, float) for n in numbers):
        return False
    tensors = [given.get(key) for key in _TENSORS]
    examples: list[Any] = [example_of(t) if isinstance(t, fx.Node) else None for t in tensors]
    for tensor, example in zip(tensors, examples, strict=True):
        if tensor is not None and not isinstance(example, Tensor):
            return False
    return examples[0] is not None and takes_batch_norm(*examples)


def _count_before(node: fx.Node, input: fx.Node) -> fx.Node | None:
    """The ``batches.add_(1)`` right before ``node``, whose result nothing else needs."""
    before = node.prev
    if (before.op, before.target) != ("call_method", "add_") or before.users or before.kwargs:
        return None
    batches, *added = before.args
    example = example_of(batches) if isinstance(batches, fx.Node) else None
    if added != [1] or not isinstance(example, Tensor) or example.dtype is not torch.int64:
        return None
    return before if example.dim() == 0 and example.device == example_of(input).device else None
