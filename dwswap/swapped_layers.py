"""The swapped layers of a rewritten model: watch them at work, put them back."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor, fx, nn

from dwswap.copying import modules_by_path
from dwswap.example_inputs import Arguments, run, runnable_copy
from dwswap.inference_graph import graph_at
from dwswap.modules import DepthwiseConv2d
from dwswap.ops import depthwise_conv2d
from dwswap.passes.context import PATH
from dwswap.passes.substitution import unswap_modules
from dwswap.passes.unswap_calls import swapped_calls, unswap_call
from dwswap.report import Report
from dwswap.separable import separable_conv2d

__all__ = ["LayerCall", "put_back", "run_watched"]

_POINTWISE = ("point_weight", "point_bias", "residual")


@dataclass(frozen=True)
class LayerCall:
    """One call of a swapped layer inside the model.

    Attributes:
        path: of the layer, as in its report.
        geometry: stride, padding, dilation and groups, as ``torch.conv2d`` takes them.
        output: what the dwswap operator returned.
        input_bias, input_activation, activation: what the call has absorbed.
        point_weight, point_bias, residual: of the pointwise convolution that is part of the call,
            and what is added to it.
    """

    path: str
    input: Tensor
    weight: Tensor
    bias: Tensor | None
    geometry: tuple[Any, ...]
    output: Tensor
    input_bias: Tensor | None = None
    input_activation: str = "none"
    activation: str = "none"
    point_weight: Tensor | None = None
    point_bias: Tensor | None = None
    residual: Tensor | None = None


def run_watched(
    model: nn.Module, report: Report, arguments: Arguments, watch: Callable[[LayerCall], None]
) -> Any:
    """Outputs of ``model`` in eval mode; ``watch`` sees every call of a swapped layer on the way.

    A layer that the model calls several times is seen as often, in graphs with functional calls
    twice as often. Nothing of ``model`` changes.
    """
    subject = runnable_copy(model)
    modules = modules_by_path(subject)
    for layer in report.layers:
        module = modules.get(layer.path)
        # One that has absorbed its neighbours is a call in the graph.
        if layer.reason == "depthwise" and isinstance(module, DepthwiseConv2d):
            module.register_forward_hook(_module_hook(layer.path, watch), with_kwargs=True)
    for prefix in report.traced:
        graph_module = graph_at(subject, prefix)
        ours = {layer.path for layer in report.layers if layer.reason == "depthwise"}
        if any(node.meta.get(PATH) in ours for node in swapped_calls(graph_module)):
            graph_module.register_forward_pre_hook(_graph_hook(watch, ours), with_kwargs=True)
    return run(subject, arguments)


def put_back(model: nn.Module, traced: tuple[str, ...], paths: set[str]) -> nn.Module:
    """Undo the swaps of the layers at ``paths``; returns the new root."""
    for prefix in traced:
        graph_module = graph_at(model, prefix)
        for node in list(swapped_calls(graph_module)):
            if node.meta.get(PATH) in paths:
                unswap_call(graph_module, node, expand=True)
        graph_module.recompile()
    return unswap_modules(model, paths)


def _module_hook(path: str, watch: Callable[[LayerCall], None]) -> Callable[..., None]:
    def hook(module: DepthwiseConv2d, args: Any, kwargs: Any, output: Tensor) -> None:
        x = args[0] if args else kwargs["input"]
        geometry = (module.stride, module.padding, module.dilation, module.groups)
        watch(LayerCall(path, x, module.weight, module.bias, geometry, output))

    return hook


def _graph_hook(watch: Callable[[LayerCall], None], ours: set[str]) -> Callable[..., None]:
    class Watcher(fx.Interpreter):
        def run_node(self, n: fx.Node) -> Any:
            if n.target is separable_conv2d and n.meta.get(PATH) in ours:
                return self.run_separable(n)
            output = super().run_node(n)
            if n.target is depthwise_conv2d and n.meta.get(PATH) in ours:
                (x, weight, bias), given = self.fetch_args_kwargs_from_env(n)
                names = ("stride", "padding", "dilation", "groups")
                geometry = tuple(given[name] for name in names)
                absorbed = {name: given[name] for name in given.keys() - set(names)}
                watch(LayerCall(n.meta[PATH], x, weight, bias, geometry, output, **absorbed))
            return output

        def run_separable(self, n: fx.Node) -> Any:
            (x, weight, bias, *point), given = self.fetch_args_kwargs_from_env(n)
            absorbed: dict[str, Any] = dict(zip(_POINTWISE, point, strict=True))
            if absorbed["residual"] is not None:
                # The call may change the residual, which may be the input.
                x, absorbed["residual"] = x.clone(), absorbed["residual"].clone()
            output = super().run_node(n)
            absorbed |= {name: given[name] for name in given.keys() - {"stride", "padding"}}
            geometry = (given["stride"], given["padding"], 1, weight.shape[0])
            watch(LayerCall(n.meta[PATH], x, weight, bias, geometry, output, **absorbed))
            return output

    def hook(module: fx.GraphModule, args: Any, kwargs: Any) -> None:
        # Of its own: what the forward returns may be an argument that it changes.
        given = Arguments(args, kwargs).map(Tensor.clone)
        # The call that follows starts from the same state.
        Watcher(runnable_copy(module)).run(*given.positional(module.forward))

    return hook
