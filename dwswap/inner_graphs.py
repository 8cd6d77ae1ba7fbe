"""Graphs in the place of submodules, of a model that is none as a whole."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from torch import nn

from dwswap.called_modules import Held, held_in, only_called
from dwswap.convolution_call import ConvolutionCall, find_calls
from dwswap.inference_graph import FOLDED, InferenceGraph
from dwswap.passes import EXACT_PASSES, Context, run_passes
from dwswap.passes.substitution import replace_modules
from dwswap.tracing import (
    NotTraceable,
    build_graph_module,
    check_not_compiled,
    traceable_submodules,
)

__all__ = ["rewrite_submodules"]


def rewrite_submodules(
    workspace: nn.Module, model: nn.Module, context: Context
) -> Iterator[Context]:
    """Replace submodules with layers to swap by graphs with swapped ones; yields their contexts.

    A graph has no methods and cannot be indexed, which a parent may do with its child. So the
    largest submodules that can be traced are replaced where they are only called; of others the
    smallest around each functional call that is swapped, which nothing else can swap.

    Args:
        workspace: changed in place; its modules are swapped already.
        model: what it is a copy of.
        context: for the whole model; gets a layer per functional call.
    """
    for path, module in workspace.named_modules():
        if isinstance(module, InferenceGraph) and FOLDED in module.meta:  # it cannot be traced anew
            context.layers |= {c.layer.path: c.layer for c in find_calls(module, prefix=path)}
    held = held_in(model)
    for path, graph_module in list(traceable_submodules(workspace)):
        calls = list(find_calls(graph_module, prefix=path, skip=context.skip))
        wanted = [call for call in calls if call.layer.reason == "depthwise"]
        swaps = bool(wanted) or any(
            layer.swapped and _inside(layer.path, [path]) for layer in context.layers.values()
        )
        if swaps and _is_replaceable(model, path, held):
            chosen = {path: graph_module}
        else:
            chosen = dict(_smallest_graph(workspace, call, path, graph_module) for call in wanted)
            chosen = {p: g for p, g in chosen.items() if not _inside(p, chosen.keys() - {p})}
        for call in calls:
            if not _inside(call.owner, chosen):
                context.layers.pop(call.owner, None)
                context.layers[call.layer.path] = call.layer
        for where, graph in chosen.items():
            own = Context(context.layers, prefix=where, skip=context.skip)
            run_passes(graph, own, EXACT_PASSES)
            replace_modules(workspace, {workspace.get_submodule(where): graph})
            yield own


def _is_replaceable(model: nn.Module, path: str, held: Held) -> bool:
    try:
        check_not_compiled(model.get_submodule(path))
    except NotTraceable:
        return False
    return only_called(model, path, held)


def _smallest_graph(
    workspace: nn.Module, call: ConvolutionCall, largest: str, graph_module: InferenceGraph
) -> tuple[str, InferenceGraph]:
    where = call.owner
    while where != largest and _inside(where, [largest]):
        try:
            return where, build_graph_module(workspace.get_submodule(where))
        except NotTraceable:
            where = where.rpartition(".")[0]
    return largest, graph_module


def _inside(path: str, others: Iterable[str]) -> bool:
    return any(path == other or path.startswith(f"{other}.") for other in others)
