"""Models of a few layers for the tests of the rewriting: each has one thing to get wrong."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, cast

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import dwswap


def depthwise(channels: int = 8, multiplier: int = 1, **options: Any) -> nn.Conv2d:
    options = {"kernel_size": 3, "padding": 1, "groups": channels} | options
    return nn.Conv2d(channels, channels * multiplier, **options)


def image(channels: int = 3, size: int = 9, batch: int = 2) -> Tensor:
    generator = torch.Generator().manual_seed(7)
    return torch.randn(batch, channels, size, size, generator=generator)


class Block(nn.Module):
    """Pointwise, depthwise, BatchNorm, activation, dropout: the part of a MobileNet."""

    def __init__(self, channels: int = 8, **options: Any) -> None:
        super().__init__()
        self.expand = nn.Conv2d(3, channels, 1)
        self.depthwise = depthwise(channels, **options)
        self.norm = nn.BatchNorm2d(self.depthwise.out_channels)
        self.dropout = nn.Dropout(0.5)
        self.name = "block"
        nn.init.uniform_(self.norm.running_mean, -1, 1)
        nn.init.uniform_(self.norm.running_var, 0.5, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.dropout(F.relu6(self.norm(self.depthwise(self.expand(x)))))

    def method(self) -> str:
        return self.name


class Unfusable(Block):
    """A Block of the same modules in which nothing can be folded or absorbed.

    ELU is no activation of the operator, it keeps BatchNorm from the convolution, and there is no
    bias before the depthwise convolution; so every module stays, under its path.
    """

    def __init__(self, channels: int = 8, **options: Any) -> None:
        super().__init__(channels, **options)
        self.expand = nn.Conv2d(3, channels, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.dropout(self.norm(F.elu(self.depthwise(self.expand(x)))))


class InvertedResidual(nn.Module):
    """The block of MobileNetV2: BatchNorm everywhere, ReLU6 in place, a residual connection."""

    def __init__(self, channels: int = 3, hidden: int = 8) -> None:
        super().__init__()
        self.conv = nn.Sequential(
            nn.Sequential(
                nn.Conv2d(channels, hidden, 1, bias=False),
                nn.BatchNorm2d(hidden),
                nn.ReLU6(inplace=True),
            ),
            nn.Sequential(
                depthwise(hidden, bias=False), nn.BatchNorm2d(hidden), nn.ReLU6(inplace=True)
            ),
            nn.Conv2d(hidden, channels, 1, bias=False),
            nn.BatchNorm2d(channels),
        )
        for module in self.modules():
            if isinstance(module, nn.BatchNorm2d):
                nn.init.uniform_(module.running_mean, -1, 1)
                nn.init.uniform_(module.running_var, 0.5, 2)
                nn.init.uniform_(module.bias, -1, 1)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.conv(x)


class ControlFlow(nn.Module):
    """Cannot be traced: control flow that depends on a value."""

    def __init__(self, child: nn.Module | None = None) -> None:
        super().__init__()
        self.block = child or Block()

    def forward(self, x: Tensor) -> Tensor:
        if x.sum() > 1e30:
            return x
        return self.block(x)


class Functional(nn.Module):
    """A depthwise convolution in functional form; ``call`` says which."""

    def __init__(
        self, call: Callable[..., Tensor], channels: int = 8, multiplier: int = 1, kernel: int = 3
    ) -> None:
        super().__init__()
        self.channels = channels
        self.weight = nn.Parameter(torch.randn(channels * multiplier, 1, kernel, kernel))
        self.bias = nn.Parameter(torch.randn(channels * multiplier))
        self.call = call

    def forward(self, x: Tensor) -> Tensor:
        return self.call(x, self.weight, self.bias, self.channels) + 1


class OwnForward(nn.Conv2d):
    """A subclass that computes something else around its convolution."""

    def forward(self, input: Tensor) -> Tensor:
        return F.relu(self._conv_forward(input, self.weight, self.bias)) - 1


class UntraceableConv(nn.Conv2d):
    """A subclass whose forward cannot be traced."""

    def forward(self, input: Tensor) -> Tensor:
        if input.sum() > 1e30:
            return input
        return super().forward(input)


MODES = [
    pytest.param({"train": False, "fuse": True}, id="graph"),
    pytest.param({"train": False, "fuse": False}, id="no-fuse"),
    pytest.param({"train": True, "fuse": True}, id="train"),
]


def optimized(how: dict[str, bool], **options: Any) -> tuple[Block, Any]:
    model = Block().train(how["train"])
    return model, dwswap.optimize(model, fuse=how["fuse"], **options)


def snapshot(model: nn.Module) -> list[Any]:
    """Everything that identifies the state of a model, and the values of its tensors."""
    modules = [
        (path, id(m), type(m), m.training, sorted(m.__dict__), list(m._modules))
        for path, m in model.named_modules(remove_duplicate=False)
    ]
    tensors = [(name, id(p), p.requires_grad) for name, p in model.named_parameters()]
    values = [
        (k, v.sum().item(), v.data_ptr())
        for k, v in model.state_dict().items()
        if k != "_extra_state"
    ]
    return [*modules, *tensors, *values]


class Backwards(nn.Sequential):
    def __iter__(self) -> Iterator[nn.Module]:
        return iter(list(self._modules.values())[::-1])


class Parts(nn.Module):
    """A Sequential of three layers of which the model takes parts."""

    def __init__(self, how: str, *layers: nn.Module) -> None:
        super().__init__()
        self.how, self.layers = how, nn.Sequential(*layers)

    def forward(self, x: Tensor) -> Tensor:
        if self.how == "indices":
            return cast(Tensor, self.layers[1](self.layers[0](x)))
        if self.how == "slices":
            hidden = self.layers[:2](x)
            return cast(Tensor, self.layers[2:](hidden) + hidden)
        if self.how == "loop":
            seen = []
            for layer in self.layers:
                x = layer(x)
                seen.append(x)
            return seen[1] + seen[2]
        return cast(Tensor, self.layers(x))
