"""What a model can be run by: PyTorch's ways, and ours.

A builder takes the model in eval mode, on its device, and an argument to call it with. It may keep
or change the model, which is a copy for it alone. What it returns is called with that argument.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx.experimental.optimization import fuse as fuse_batch_norms

from dwswap.bench.capture import capture
from dwswap.rewrite import optimize

__all__ = [
    "EAGER",
    "OURS",
    "RUNNERS",
    "Runner",
    "chosen_peers",
    "eager",
    "optimize_with",
    "takes",
]

Forward = Callable[[Any], Any]
Build = Callable[[nn.Module, Any], Forward]

LARGE_BATCH = 64
"""From here on launches are hidden behind the GPU's work, and CUDA graphs gain nothing."""


@dataclass(frozen=True)
class Runner:
    """One way to run a model.

    Attributes:
        title: for tables.
        layout: None for that of the user's model.
        cuda: makes sense on CUDA only.
        compiled: leaves something in Dynamo's caches.
        captured: a step of training goes into a CUDA graph as a whole; a forward is up to
            ``build``.
    """

    title: str
    build: Build
    layout: str | None = None
    cuda: bool = False
    compiled: bool = False
    captured: bool = False


def takes(argument: str) -> bool:
    """Whether ``dwswap.optimize`` of this version has the argument."""
    return argument in inspect.signature(optimize).parameters


def optimize_with(model: nn.Module, **arguments: Any) -> nn.Module:
    """``dwswap.optimize(model)`` with those of ``arguments`` that it takes."""
    return optimize(model, **{name: value for name, value in arguments.items() if takes(name)})


class Captured:
    """``model`` in a CUDA graph; a call copies its argument in, and returns the graph's output.

    Raises:
        TypeError: the argument is no tensor.
    """

    def __init__(self, model: Forward, argument: Any) -> None:
        if not isinstance(argument, Tensor):
            got = type(argument).__name__
            raise TypeError(f"a CUDA graph needs one tensor as input, got {got}")
        self._model = model  # a graph does not keep the weights that it reads
        self._input = argument.clone()
        self._graph, self._output = capture(lambda: model(self._input))

    def __call__(self, argument: Tensor) -> Any:
        self._input.copy_(argument)
        self._graph.replay()
        return self._output


def eager(model: nn.Module, argument: Any) -> Forward:
    """The builder of PyTorch's own: the model as it is."""
    return model


def _fused(model: nn.Module, argument: Any) -> Forward:
    return fuse_batch_norms(model)


def _compiled(mode: str | None) -> Build:
    def build(model: nn.Module, argument: Any) -> Forward:
        return torch.compile(model, mode=mode, dynamic=False)

    return build


def _ours(model: nn.Module, argument: Any) -> Forward:
    return optimize_with(model)


def _ours_in_graph(model: nn.Module, argument: Any) -> Forward:
    if takes("cuda_graph"):
        return optimize_with(model, cuda_graph=True)
    return Captured(optimize_with(model), argument)


def _ours_compiled(model: nn.Module, argument: Any) -> Forward:
    return torch.compile(optimize_with(model), dynamic=False)


def _ours_as_backend(model: nn.Module, argument: Any) -> Forward:
    # Here, as it imports Inductor. The name "dwswap" is known where the package is installed only.
    from dwswap.backend import compile_graph

    return torch.compile(model, backend=compile_graph, dynamic=False)


OURS = ("dwswap", "dwswap_graph")
EAGER = ("eager_nchw", "eager_channels_last")

RUNNERS: dict[str, Runner] = {
    "dwswap": Runner("dwswap", _ours),
    "dwswap_graph": Runner("dwswap, cuda_graph", _ours_in_graph, cuda=True),
    "eager_nchw": Runner("eager NCHW", eager, layout="contiguous"),
    "eager_channels_last": Runner("eager channels_last", eager, layout="channels_last"),
    "eager_graph": Runner("eager, CUDA graph", Captured, cuda=True),
    "fx_fuse": Runner("fx fuse", _fused),
    "compile": Runner("compile", _compiled(None), compiled=True),
    "reduce_overhead": Runner(
        "compile reduce-overhead", _compiled("reduce-overhead"), cuda=True, compiled=True
    ),
    "max_autotune": Runner(
        "compile max-autotune", _compiled("max-autotune"), cuda=True, compiled=True
    ),
    "dwswap_compile": Runner("compile(dwswap)", _ours_compiled, compiled=True),
    "dwswap_backend": Runner("compile backend=dwswap", _ours_as_backend, compiled=True),
}
"""By the names that records and ``--peers`` use."""


def chosen_peers(
    asked: Sequence[str], batch: int, *, cuda: bool, max_autotune: bool = False
) -> list[str]:
    """Names of the peers to measure next to ours, in the order of ``RUNNERS``.

    Args:
        asked: names, or ``auto``, ``eager``, ``all``, ``none``. To compile takes most of a run, so
            ``auto`` compiles at each batch size in the one mode that suits it.
        batch: images per call.
        cuda: without it those that need CUDA are left out.
        max_autotune: add it, minutes per case; only its own name does so otherwise.
    """
    large = batch >= LARGE_BATCH or not cuda
    sets: dict[str, Sequence[str]] = {
        "none": (),
        "eager": EAGER,
        "all": [name for name in RUNNERS if name not in (*OURS, "max_autotune")],
        "auto": [*EAGER, "eager_graph", "fx_fuse"]
        + (["compile", "dwswap_compile"] if large else ["reduce_overhead"]),
    }
    wanted = {name for word in asked for name in sets.get(word, (word,))}
    if max_autotune:
        wanted.add("max_autotune")
    return [name for name in RUNNERS if name in wanted and (cuda or not RUNNERS[name].cuda)]
