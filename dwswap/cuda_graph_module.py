"""A graph module whose forward replays CUDA graphs."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import fx, nn
from torch.fx.graph import PythonCode

from dwswap.cuda_graphs import CudaGraphOptions, CudaGraphs
from dwswap.inference_graph import InferenceGraph, graph_at
from dwswap.passes.substitution import replace_modules
from dwswap.report import Report
from dwswap.weight_guard import trains

__all__ = ["CudaGraphModule", "disable_cuda_graphs", "with_cuda_graphs"]

_GRAPHS = "_dwswap_cuda_graphs"


class CudaGraphModule(InferenceGraph):
    """An :class:`InferenceGraph` with a CUDA graph per signature of its calls.

    Same code, parameters, keys and hooks: only ``forward`` differs, which replays where it can and
    runs the code of the graph where not. CUDA graphs are not copied and not saved.
    """

    @classmethod
    def from_graph_module(
        cls, module: fx.GraphModule, options: CudaGraphOptions
    ) -> CudaGraphModule:
        """``module`` with CUDA graphs: shares all modules and tensors, copies the graph."""
        result = cls._from_state(module, copy.deepcopy(module.graph))
        result.__dict__[_GRAPHS] = CudaGraphs(options)
        result.recompile()
        return result

    @classmethod
    def _from_state(cls, module: fx.GraphModule, graph: fx.Graph) -> CudaGraphModule:
        result = cls(module, graph, class_name=type(module).__name__)
        result.__dict__.update(
            {
                name: value.copy() if isinstance(value, (dict, set)) else value
                for name, value in module.__dict__.items()
                if name != "_graph"
            }
        )
        return result

    @property
    def cuda_graphs(self) -> CudaGraphs | None:
        """The graphs; None before they are set up and after :func:`dwswap.restore`."""
        graphs: CudaGraphs | None = self.__dict__.get(_GRAPHS)
        return graphs

    def release_cuda_graphs(self) -> None:
        """Give the memory of all CUDA graphs back; the next calls capture anew.

        To be called after a change that is not one of weights: the stride of a layer, say.
        """
        if self.cuda_graphs is not None:
            self.cuda_graphs.clear()

    def recompile(self) -> PythonCode:
        """As ever, but ``forward`` replays, and graphs of other code are dropped."""
        code = super().recompile()
        type(self).forward = _replaying(type(self).forward)
        if self.cuda_graphs is not None:
            self.cuda_graphs.use_code(code.src, code.globals)
        return code

    def load_state_dict(
        self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False
    ) -> Any:
        """As ever; with ``assign`` the memory of graphs of the old weights is given back."""
        if assign:
            self.release_cuda_graphs()
        return super().load_state_dict(state_dict, strict, assign)

    def extra_repr(self) -> str:
        """Shows how many signatures are captured."""
        graphs = self.cuda_graphs
        if graphs is None:
            return "cuda_graph=False"
        return f"cuda_graph={graphs.options}, signatures captured: {len(graphs)}"

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> CudaGraphModule:
        # Now, and not when the next call finds it out: memory that moves away is wanted back.
        self.release_cuda_graphs()
        result: CudaGraphModule = super()._apply(fn, recurse)
        return result

    def __reduce__(self) -> tuple[Any, ...]:
        rebuild, arguments = super().__reduce__()
        return _rebuild, (rebuild, *arguments)


def with_cuda_graphs(model: nn.Module, report: Report, options: CudaGraphOptions) -> nn.Module:
    """``model``, a result of optimizing, with CUDA graphs of itself or of the graphs inside.

    The code of a graph does nothing but compute its result, so a replay can stand for a call. The
    forward of any other module may do what a replay would leave out, so it runs as it is;
    ``report`` says so.
    """
    if not report.traced:
        why = report.not_traced or "nothing was swapped"
        report.cuda_graph = f"off: the model is no graph of dwswap ({why})"
        return model
    new: dict[nn.Module, nn.Module] = {}
    for path in report.traced:
        graph_module = graph_at(model, path)
        if any(map(trains, graph_module.modules())):
            report.cuda_graph = "off: the model is in train mode"
            return model
        new[graph_module] = CudaGraphModule.from_graph_module(graph_module, options)
    where = "" if report.mode == "graph" else f" in {', '.join(report.traced)}"
    report.cuda_graph = f"on{where}: at most {options.max_signatures} signatures, for calls on CUDA"
    return replace_modules(model, new)


def disable_cuda_graphs(model: nn.Module) -> None:
    """Let every graph in ``model`` run as ever."""
    for module in model.modules():
        if isinstance(module, CudaGraphModule):
            module.release_cuda_graphs()
            module.__dict__[_GRAPHS] = None


def _replaying(eager: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(eager)
    def forward(self: CudaGraphModule, *args: Any, **kwargs: Any) -> Any:
        # First of all, so that a trace of torch.compile sees nothing of what comes after.
        if torch.compiler.is_compiling():
            return eager(self, *args, **kwargs)
        graphs: CudaGraphs | None = self.__dict__.get(_GRAPHS)
        if graphs is None:
            return eager(self, *args, **kwargs)
        return graphs.call(self, eager, args, kwargs)

    return forward


def _rebuild(rebuild: Callable[..., InferenceGraph], *arguments: Any) -> CudaGraphModule:
    """Inverse of :meth:`CudaGraphModule.__reduce__`."""
    module = rebuild(*arguments)
    return CudaGraphModule._from_state(module, module.graph)
