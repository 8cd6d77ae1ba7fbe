"""Whether a graph still has the modules and tensors that it had."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from itertools import chain
from operator import is_, itemgetter
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn.modules import module as module_globals
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.dropout import _DropoutNd

__all__ = ["NotCapturable", "WeightGuard", "trains"]

_data_ptr = torch._C.TensorBase.data_ptr
_training = itemgetter("training")
# What computes something else in train mode.
_TRAINABLE = (_NormBase, _DropoutNd, nn.RReLU, nn.MultiheadAttention)


class NotCapturable(Exception):
    """The call cannot become a CUDA graph; the message says why."""


class WeightGuard:
    """The modules, parameters and buffers that the code of a graph reads, as they are now.

    A CUDA graph reads the memory that it read when it was captured. The guard holds that memory,
    so that a replay reads what exists, and notices when a tensor or a module was replaced, or a
    tensor was given other memory. Values that change in place are none of its business.

    Attributes:
        tensors: what is read, each once.
    """

    def __init__(self, module: fx.GraphModule) -> None:
        """Look at what the graph of ``module`` reads.

        Raises:
            NotCapturable: a tensor subclass, or memory that cannot be watched.
        """
        holders: dict[int, dict[str, Any]] = {}
        parents: dict[int, dict[str, Any]] = {}
        leaves: dict[int, nn.Module] = {}
        for node in module.graph.nodes:
            if node.op not in ("call_module", "get_attr"):
                continue
            owner: nn.Module = module
            *path, name = str(node.target).split(".")
            for step in path:
                parents[id(owner._modules)] = owner._modules
                owner = owner.get_submodule(step)
            if name in owner._modules:
                parents[id(owner._modules)] = owner._modules
                leaf = owner.get_submodule(name)
                leaves.update((id(inner), inner) for inner in leaf.modules())
            elif name in owner._parameters or name in owner._buffers:
                for held in (owner._parameters, owner._buffers):
                    holders[id(held)] = held
            else:
                raise NotCapturable(f"{node.target} is neither a parameter nor a buffer")
        for inner in leaves.values():
            for held in (inner._parameters, inner._buffers):
                if held:
                    holders[id(held)] = held
            if inner._modules:
                parents[id(inner._modules)] = inner._modules

        # Views, which show what the dicts hold now without a call per dict.
        self._slot_views = [held.values() for held in holders.values()]
        self._module_views = [held.values() for held in parents.values()]
        self._slots = list(chain.from_iterable(self._slot_views))
        self._modules = list(chain.from_iterable(self._module_views))
        self.tensors = list(_distinct(self._slots))
        for tensor in self.tensors:
            if type(tensor) not in (Tensor, nn.Parameter):
                raise NotCapturable(f"it has a weight that is a {type(tensor).__name__}")
            if tensor.layout is not torch.strided or tensor.is_quantized:
                raise NotCapturable(f"it has a weight with the layout {tensor.layout}")
        # Their memory stays while a replay may read it, so that no other tensor can get it.
        self._memory = [tensor.detach() for tensor in self.tensors]
        self._pointers = list(map(_data_ptr, self.tensors))
        self._hooks: list[Collection[Any]] = [
            module_globals._global_forward_hooks,
            module_globals._global_forward_pre_hooks,
        ]
        for inner in leaves.values():
            self._hooks += (inner._forward_hooks, inner._forward_pre_hooks)
        self._modes = [m.__dict__ for m in leaves.values() if isinstance(m, _TRAINABLE)]

    def holds(self) -> bool:
        """Whether all that was there is there, at the same place."""
        slots = list(chain.from_iterable(self._slot_views))
        return (
            len(slots) == len(self._slots)
            and all(map(is_, slots, self._slots))
            and list(map(_data_ptr, self.tensors)) == self._pointers
            and list(chain.from_iterable(self._module_views)) == self._modules
        )

    def is_disturbed(self) -> bool:
        """A hook on a module inside, which a replay would not call, or a module in train mode."""
        return any(self._hooks) or any(map(_training, self._modes))

    def needs_gradient(self, inputs: list[Tensor]) -> bool:
        """The result of a call belongs to a graph of autograd."""
        return torch.is_grad_enabled() and torch._C._any_requires_grad(*inputs, *self.tensors)

    def versions(self) -> list[int]:
        """Counters that show which of :attr:`tensors` changed in place."""
        return [0 if tensor.is_inference() else tensor._version for tensor in self.tensors]


def trains(module: nn.Module) -> bool:
    """``module`` is in train mode and computes something else in it."""
    return module.training and isinstance(module, _TRAINABLE)


def _distinct(values: list[Tensor | None]) -> Iterator[Tensor]:
    seen: set[int] = set()
    for value in values:
        if value is not None and id(value) not in seen:
            seen.add(id(value))
            yield value
