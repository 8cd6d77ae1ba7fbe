"""A step of training as PyTorch's documentation of mixed precision has it."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dwswap.bench.capture import capture

__all__ = ["CapturedStep", "Step", "without_randomness"]

RATE = 1e-3
"""So low that the same images over and over leave everything finite."""

MOMENTUM = 0.9

RANDOM = {"StochasticDepth": "p", "DropPath": "drop_prob"}
"""Attributes with the probability, by the names of the classes of torchvision and timm."""


class Step:
    """One step of SGD with momentum on the same images; call it again for the next.

    In float16 and bfloat16 the forward and the loss run under autocast, in float16 with a
    ``GradScaler`` too.

    Args:
        model: in train mode, or what ``torch.compile`` made of it; floating point weights.
        images: ``(N, 3, H, W)``, in the dtype of the weights.
        labels: ``(N,)``, numbers of classes.
        dtype: to compute in.
        scale: what the ``GradScaler`` starts with.

    Raises:
        TypeError: ``model`` has no parameters to train, as it is no module.
    """

    fused: ClassVar[bool | None] = None
    """Of the optimizer: None for its default."""

    def __init__(
        self,
        model: Callable[[Tensor], Any],
        images: Tensor,
        labels: Tensor,
        dtype: torch.dtype,
        scale: float,
    ) -> None:
        if not isinstance(model, nn.Module):
            raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
        self.model = model
        self._images, self._labels = images, labels
        self._dtype = dtype
        self._optimizer = torch.optim.SGD(
            model.parameters(), lr=RATE, momentum=MOMENTUM, fused=self.fused
        )
        self._scaler = torch.amp.GradScaler(
            images.device.type, init_scale=scale, enabled=dtype is torch.float16
        )

    @torch.enable_grad()
    def __call__(self) -> Tensor:
        """The loss before the step, a scalar. Gradients stay, unscaled, until the next step."""
        self._optimizer.zero_grad(set_to_none=True)
        with self._autocast():
            loss = F.cross_entropy(self.model(self._images), self._labels)
        self._scaler.scale(loss).backward()
        self._scaler.step(self._optimizer)
        self._scaler.update()
        return loss.detach()

    def gradients(self) -> list[Tensor]:
        """Those of the last step, in the order of the parameters; zeros where there is none."""
        return [
            torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
            for parameter in self.model.parameters()
        ]

    def _autocast(self) -> Any:
        if self._dtype.itemsize > 2:
            return nullcontext()
        return torch.autocast(self._images.device.type, self._dtype)


class CapturedStep(Step):
    """The same step, all of it in a CUDA graph: what the GPU takes where Python keeps up.

    The first call is the first step from the weights as they are when this is made. The optimizer
    is the fused one, as only that looks on the GPU whether gradients are finite.

    Args:
        model, images, labels, dtype, scale: see ``Step``; on a CUDA device.
    """

    fused = True

    def __init__(self, model: Callable[[Tensor], Any], *arguments: Any) -> None:
        super().__init__(model, *arguments)
        weights = {name: value.clone() for name, value in self.model.state_dict().items()}
        scaler = self._scaler.state_dict()
        self._graph, self._loss = capture(super().__call__)
        self.model.load_state_dict(weights)
        self._scaler.load_state_dict(scaler)
        for state in self._optimizer.state.values():
            state["momentum_buffer"].zero_()

    def __call__(self) -> Tensor:
        self._graph.replay()
        return self._loss


def without_randomness(model: nn.Module) -> nn.Module:
    """Set the probabilities of dropout and of stochastic depth in ``model`` to 0; returns it.

    One seed draws other numbers in another dtype, and compiled code others again: only without
    them are gradients to compare.
    """
    for module in model.modules():
        name = RANDOM.get(type(module).__name__)
        if isinstance(module, nn.modules.dropout._DropoutNd):
            name = "p"
        if name is not None:
            setattr(module, name, 0.0)
    return model
