"""``train()`` of a model with graphs for inference inside: refused, it changes nothing."""

from __future__ import annotations

import functools
from typing import Any

from torch import fx, nn

from dwswap.inference_graph import InferenceGraph

__all__ = ["guard_train"]


def guard_train(model: nn.Module) -> None:
    """Let a ``train()`` that a graph inside ``model`` refuses leave every mode as it was.

    PyTorch sets the mode of a module before it asks the children: when the graph refuses, what is
    around it and before it trains already. So each module around a graph, ``model`` and those
    inside it, gets a ``train`` that puts the modes back. Copies and files keep it; that of a
    shallow copy (``copy.copy``) sets the mode of its original, and returns that. What a user puts
    around ``model`` has none: ``nn.Sequential(model).train()`` leaves ``model`` as it was, but
    itself and what it has before ``model`` in train mode, until its ``eval()``.
    ``torch.compile(model)``, whose mode is that of ``model``, leaves ``model.training`` true in the
    same way.
    """
    for module in model.modules():
        # A GraphModule is rebuilt from its attributes: pickle would find it there without end.
        if isinstance(module, fx.GraphModule) or "train" in module.__dict__:
            continue
        if any(isinstance(m, InferenceGraph) for m in module.modules()):
            # Not by a class of its own, as optimize keeps that of the model.
            module.__dict__["train"] = functools.partial(_train, module)


def _train(module: nn.Module, mode: bool = True) -> Any:
    before = {m: _mode(m) for m in module.modules()}
    try:
        return type(module).train(module, mode)
    except Exception:
        _put_back(before)
        raise


def _put_back(before: dict[nn.Module, bool]) -> None:
    """Set the modes to those in ``before``, which has parents before their children."""
    for module, mode in before.items():
        if _mode(module) == mode:
            continue
        if type(module).train is nn.Module.train:
            module.training = mode
        else:  # it changes more than flags: a feature extractor of torchvision its graph
            type(module).train(module, mode)


def _mode(module: nn.Module) -> bool:
    # A frozen TorchScript module has none before its first train() or eval().
    return getattr(module, "training", False)
