"""``torch.compile(model, backend="dwswap")``: our passes on Dynamo's graph, then Inductor.

Where gradients are recorded, depthwise convolutions are swapped, and BatchNorm that trains with the
activation behind it. Without gradients the activations beside convolutions are absorbed.

Dynamo makes parameters inputs of its graph, so that weights which change in place count in the next
call; BatchNorm is then part of the graph, and Inductor fuses it with its neighbours. Where
PyTorch's freezing is on (``torch._inductor.config.freezing``, ``TORCHINDUCTOR_FREEZING=1``) and no
gradients are recorded, parameters are constants of the graph, by the user's own wish: then
BatchNorm is folded, biases are pushed, and weights that change in place later do not count.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch._dynamo.source
import torch._inductor
from torch import Tensor, fx

from dwswap.convolution_call import example_of
from dwswap.fusion import fuse
from dwswap.kernels_in_use import kernels_in_use
from dwswap.lowering import lower_depthwise
from dwswap.passes import COMPILED_PASSES, EXACT_PASSES, TRAINING_PASSES, Context, run_passes
from dwswap.passes.count_calls import count_calls
from dwswap.report import Report

__all__ = ["compile_graph", "rewrite_graph"]

logger = logging.getLogger("dwswap")


def compile_graph(
    graph_module: fx.GraphModule,
    example_inputs: Sequence[Any],
    *,
    mode: str | None = None,
    options: dict[str, Any] | None = None,
) -> Callable[..., Any]:
    """The Dynamo backend ``dwswap``: a function with the inputs and outputs of ``graph_module``.

    Args:
        mode, options: of ``torch.compile``; Inductor gets them.

    Raises:
        ValueError: a mode or an option that Inductor does not have.
    """
    patches = _inductor_options(mode, options)
    rewrite_graph(graph_module)
    inductor: Any = torch._dynamo.lookup_backend("inductor")
    return inductor(graph_module, list(example_inputs), config_patches=patches)


def rewrite_graph(graph_module: fx.GraphModule) -> Report:
    """Run the passes that fit over a graph of Dynamo, which they edit in place."""
    context = Context({})
    report = Report(model="the graph of torch.compile", mode="graph")
    report.calls_before = count_calls(graph_module)
    run_passes(graph_module, context, EXACT_PASSES)
    report.layers = list(context.layers.values())
    if not report.swapped:
        report.mode = "unchanged"
        return report
    report.kernels = kernels_in_use(_tensors(graph_module), load=True)
    known = set(dict(graph_module.named_parameters()))
    passes = TRAINING_PASSES if _records_gradients(graph_module) else COMPILED_PASSES
    report = fuse(graph_module, report, context, passes)
    _name_sources(graph_module, known)
    lower_depthwise(graph_module.graph)
    graph_module.recompile()
    logger.info("%s", report.summary())
    return report


def _records_gradients(graph_module: fx.GraphModule) -> bool:
    """Whether a backward may follow, as far as known when the graph is compiled."""
    switches = any(node.target is torch._C._set_grad_enabled for node in graph_module.graph.nodes)
    if switches:
        return True
    return torch.is_grad_enabled() and any(t.requires_grad for t in _tensors(graph_module))


def _tensors(graph_module: fx.GraphModule) -> list[Tensor]:
    """What the graph reads: its inputs, fake, and its parameters and buffers."""
    inputs = [example_of(node) for node in graph_module.graph.nodes if node.op == "placeholder"]
    own = (*graph_module.parameters(), *graph_module.buffers())
    return [value for value in (*inputs, *own) if isinstance(value, Tensor)]


def _name_sources(graph_module: fx.GraphModule, known: set[str]) -> None:
    """Tell AOTAutograd where new parameters are from, as Dynamo has done of all others."""
    sources = getattr(graph_module, "_param_name_to_source", None)
    if sources is None:
        return
    for name, _ in graph_module.named_parameters():
        if name not in known:
            sources[name] = torch._dynamo.source.LocalSource(f"dwswap.{name}")


def _inductor_options(mode: str | None, options: dict[str, Any] | None) -> dict[str, Any]:
    modes = torch._inductor.list_mode_options()
    mode = mode or "default"
    if mode not in modes:
        raise ValueError(f"mode must be one of {', '.join(modes)}, got {mode!r}")
    patches = dict(modes[mode])
    known = torch._inductor.list_options()
    for name, value in (options or {}).items():
        key = name.replace("-", "_")
        if key not in known:
            raise ValueError(f"options must be those of Inductor, got {name!r}")
        patches[key] = value
    return patches
