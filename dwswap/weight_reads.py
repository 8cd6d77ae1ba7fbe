"""What a forward computes during a trace from weights that it reads past their names."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import Tensor, nn
from torch._ops import OpOverload
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

__all__ = ["WeightReads"]


class WeightReads(TorchDispatchMode):
    """Notes whether a tensor of ``model`` is computed with while the mode is entered.

    By their names (``self.weight``) a forward gets proxies in a trace, past them
    (``next(self.parameters())``) the tensors: a graph would have what it computes from these as a
    constant. Shape, dtype and device are free to ask for.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.found = False
        tensors = (*model.parameters(), *model.buffers())
        self._storages = {_storage(tensor) for tensor in tensors} - {None}

    def __torch_dispatch__(
        self,
        func: OpOverload,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        name = func._schema.name
        takes_no_values = name.startswith("aten::new_") or name.endswith("_like")
        if not takes_no_values and self.are_among(pytree.tree_leaves((args, kwargs))):
            self.found = True
        return func(*args, **(kwargs or {}))

    def are_among(self, values: Iterable[Any]) -> bool:
        """Whether one of ``values`` is a tensor of the model, or has its memory."""
        return any(isinstance(v, Tensor) and _storage(v) in self._storages for v in values)


def _storage(tensor: Tensor) -> int | None:
    """What tensors with the same memory have in common, data or not."""
    try:
        return tensor.untyped_storage()._cdata
    except (NotImplementedError, ValueError):  # sparse, or not initialized
        return None
