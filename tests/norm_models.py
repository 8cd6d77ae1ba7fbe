"""Models for the tests of BatchNorm in training, and what a step makes of them."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from typing import Any, cast

import pytest
import torch
from tiny_models import depthwise, image
from torch import Tensor, nn

KINDS = {"relu": nn.ReLU, "relu6": nn.ReLU6, "hardswish": nn.Hardswish, "silu": nn.SiLU}
EACH_KIND = pytest.mark.parametrize("name", KINDS)

Calls = list[str]
Change = Callable[[Any], object]


def block(*activations: nn.Module, **options: Any) -> nn.Sequential:
    return nn.Sequential(depthwise(bias=False), norm(**options), *activations)


def norm(**options: Any) -> nn.BatchNorm2d:
    result = nn.BatchNorm2d(8, **options)
    for parameter in result.parameters():
        nn.init.uniform_(parameter, -1, 1)
    return result


def silu(**options: Any) -> nn.Sequential:
    """Two blocks, and the norms of both take the activation."""
    torch.manual_seed(0)
    blocks = (block(nn.SiLU(), **options) for _ in range(2))
    return nn.Sequential(*blocks, nn.Flatten())


def at(model: nn.Module, path: str) -> Any:
    return model.get_submodule(path)


def step(model: nn.Module, x: Tensor, needs_gradient: bool = True) -> list[Tensor]:
    """The output, all gradients and all tensors of ``model`` after a step of SGD."""
    leaf = x.detach().requires_grad_(needs_gradient)
    output = model(leaf)
    results = [output.detach()]
    if output.requires_grad:
        learned = [t for t in (leaf, *model.parameters()) if t.requires_grad]
        grads = torch.autograd.grad(output.square().mean(), learned, materialize_grads=True)
        with torch.no_grad():
            for parameter, grad in zip(learned, grads, strict=True):
                if parameter is not leaf:
                    parameter -= 0.1 * grad
        results += grads
    return [*results, *(t.detach().clone() for t in model.state_dict().values())]


def same(ours: Any, theirs: Any, tolerance: float = 1e-5) -> None:
    torch.testing.assert_close(ours, theirs, rtol=tolerance, atol=tolerance, check_stride=True)


def trains_as(fast: nn.Module, model: nn.Module, x: Tensor | None = None) -> None:
    x = image(8) if x is None else x
    same(step(fast, x), step(model, x))


def pickled(module: Any) -> Any:
    return pickle.loads(pickle.dumps(module))


class Patient(nn.Sequential):
    """Reads what the activation is applied to."""

    def forward(self, input: Tensor) -> Tensor:
        hidden = self[1](self[0](input))
        return cast(Tensor, self[2](hidden) + hidden)
