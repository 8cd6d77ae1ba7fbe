"""Run the passes for inference over a graph, and report what they did."""

from __future__ import annotations

import dataclasses

from torch import fx

from dwswap.inference_graph import FOLDED
from dwswap.passes import Context, GraphPass, run_passes
from dwswap.passes.count_calls import count_calls
from dwswap.passes.module_tree import remove_released
from dwswap.report import Report

__all__ = ["fuse"]


def fuse(
    graph_module: fx.GraphModule, report: Report, context: Context, passes: tuple[GraphPass, ...]
) -> Report:
    """``report`` with what ``passes`` did to ``graph_module``, which they edit in place."""
    keys = list(graph_module.state_dict())
    context = dataclasses.replace(context, layers={layer.path: layer for layer in report.layers})
    run_passes(graph_module, context, passes)
    remove_released(graph_module, context.released)
    graph_module.graph.lint()
    graph_module.recompile()
    left = graph_module.state_dict().keys()
    folded = (*graph_module.meta.get(FOLDED, ()), *(key for key in keys if key not in left))
    if folded:
        graph_module.meta[FOLDED] = folded
    layers = [
        dataclasses.replace(layer, changes=(*layer.changes, *context.changes.pop(layer.path, ())))
        for layer in report.layers
    ]
    elsewhere = {path: tuple(changes) for path, changes in context.changes.items()}
    return dataclasses.replace(
        report,
        layers=layers,
        elsewhere=report.elsewhere | elsewhere,
        calls_after=(report.calls_after or 0) + count_calls(graph_module),
        memory_format=_joined(report, context),
    )


def _joined(report: Report, context: Context) -> str:
    """The memory formats of all graphs so far."""
    if not context.prefix:
        return context.layout
    known = [] if report.calls_after is None else [report.memory_format]
    return "; ".join([*known, f"{context.prefix}: {context.layout}"])
