"""What a proxy would answer for a value: whether it is None, its hash, its text."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from tiny_models import depthwise, image
from torch import Tensor, nn

import dwswap


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.depthwise, self.inner = depthwise(), Inner()
        self.norm, self.act = nn.BatchNorm2d(8), nn.SiLU()
        self.attention = nn.MultiheadAttention(8, 1, batch_first=True)
        self.mask = None


class Inner(nn.Module):
    def forward(self, x: Tensor, skip: Any = None) -> Tensor:
        return x if skip is None else x + skip


class NoneArgument(Model):
    def forward(self, x: Tensor, mask: Tensor | None) -> Tensor:
        x = self.depthwise(x)
        return x * mask if mask is not None else x


class NoneInside(Model):
    def forward(self, x: Tensor, skip: Tensor | None) -> Tensor:
        return self.inner(self.depthwise(x), skip)


class Flag(Model):
    def forward(self, x: Tensor, double: bool = False) -> Tensor:
        return self.depthwise(x * 2 if double is True else x)


class FlagOfMethod(Model):
    def forward(self, x: Tensor, double: bool = False) -> Tensor:
        return self.scaled(x, double)

    def scaled(self, x: Tensor, yes: bool) -> Tensor:
        return self.depthwise(x) if False is yes else self.depthwise(x * 2)


def factor(double: bool) -> int:
    return 2 if double is True else 1


class FlagOfFunction(Model):
    def forward(self, x: Tensor, double: bool = False) -> Tensor:
        return self.depthwise(x) * factor(double)


class Matched(Model):
    def forward(self, x: Tensor, mask: Tensor | None) -> Tensor:
        match mask:
            case None:
                return self.depthwise(x)
            case _:
                return self.depthwise(x) * mask


class GradientFunction(Model):
    def forward(self, x: Tensor) -> Tensor:
        return self.depthwise(x * 2 if x.grad_fn is None else x)


class Gradient(Model):
    def forward(self, x: Tensor) -> Tensor:
        if (found := x.grad) is not None:
            x = x * found
        return self.depthwise(x)


class Type(Model):
    def forward(self, x: Tensor) -> Tensor:
        return self.depthwise(x * 2 if x.dtype is torch.float32 else x)


class Contiguous(Model):
    def forward(self, x: Tensor) -> Tensor:
        return self.depthwise(x * 2 if x.is_contiguous() is True else x)


class SameValue(Model):
    def forward(self, x: Tensor) -> Tensor:
        y = nn.Identity()(self.depthwise(x))
        return y if y is x else y * 2


class AttentionWeights(Model):
    def forward(self, x: Tensor) -> Tensor:
        x = self.depthwise(x).flatten(2).transpose(1, 2)
        x, weights = self.attention(x, x, x, need_weights=False)
        return x * 2 if weights is None else x


class Key(Model):
    def forward(self, x: Tensor, mode: str) -> Tensor:
        return self.depthwise({"double": x * 2}.get(mode, x))


class InSet(Model):
    def forward(self, x: Tensor, mode: str) -> Tensor:
        return self.depthwise(x * 2 if mode in {"double"} else x)


@functools.lru_cache
def scale(dtype: torch.dtype) -> float:
    return 2.0 if dtype == torch.float32 else 1.0


class Cached(Model):
    def forward(self, x: Tensor) -> Tensor:
        return self.depthwise(x * scale(x.dtype))


class Formatted(Model):
    def forward(self, x: Tensor) -> Tensor:
        return self.depthwise(x * getattr(self, f"scale_{x.shape[1]}", 2))


class Text(Model):
    def forward(self, x: Tensor) -> Tensor:
        return self.depthwise(x * 2 if str(x.dtype) == "torch.float32" else x)


class Representation(Model):
    def forward(self, x: Tensor) -> Tensor:
        return self.depthwise(x * 2 if "float32" in repr(x.dtype) else x)


class Rows(Model):
    """As many parts as there are rows, up to two."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([part.relu() for part in self.depthwise(x).chunk(2, 2)], 2)


class Image(Model):
    """Of a batch these are channels, of one image without a batch rows."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([part.relu() for part in self.depthwise(x).chunk(2, 1)], 1)


class Pieces(Model):
    def forward(self, x: Tensor) -> Tensor:
        return self.depthwise(x) * len(x.split(2, 1))


@pytest.mark.parametrize(
    ("cls", "arguments", "reason"),
    [
        (NoneArgument, (None,), "forward in test_tracing_answers compares mask with `is`"),
        (NoneInside, (None,), "compares skip with `is`"),
        (Flag, (True,), "compares double with `is`"),
        (FlagOfMethod, (True,), "compares yes with `is`"),
        (FlagOfFunction, (True,), "factor may compare double with `is`"),
        (Matched, (None,), "compares mask with `is`"),
        (GradientFunction, (), "compares the attribute grad_fn with `is`"),
        (Gradient, (), "compares the attribute grad with `is`"),
        (Type, (), "compares the attribute dtype with `is`"),
        (Contiguous, (), "compares is_contiguous with `is`"),
        (SameValue, (), "with `is`"),
        (AttentionWeights, (), "with `is`"),
        (Key, ("double",), "needs the hash of mode"),
        (InSet, ("double",), "needs the hash of mode"),
        (Cached, (), "needs the hash of"),
        (Formatted, (), "makes text of a value"),
        (Text, (), "makes text of a value"),
        (Representation, (), "makes text of a value"),
        (Image, (), "depends on the length of chunk, which is iterated"),
        (Rows, (), "depends on the length of chunk, which is iterated"),
        (Pieces, (), "needs the length of split"),
    ],
)
@torch.no_grad()
def test_answers_of_a_proxy_rule_out_a_graph(
    cls: type[Model], arguments: tuple[Any, ...], reason: str
) -> None:
    model, inputs = cls().eval(), (image(8), *arguments)
    for example_inputs in (None, inputs):
        fast = dwswap.optimize(model, example_inputs)
        report = dwswap.report(fast)
        assert (report.mode, len(report.swapped)) == ("substitution", 1)
        assert reason in str(report.not_traced)
        torch.testing.assert_close(fast(*inputs), model(*inputs))


class Skip(Model):
    """Values of the trace that are never None, and None itself."""

    def forward(self, x: Tensor) -> Tensor:
        y = self.depthwise(x)
        first, second = y.chunk(2, 1)
        if self.mask is None and second is not None:
            y = y + torch.cat([second, first], 1)
        return self.inner(self.inner(y, x * 2))


class Asserting(Model):
    def forward(self, x: Tensor) -> Tensor:
        torch._assert(x.dim() == 4, f"needs 4 dimensions, got {x.dim()} of {x.shape!r}")
        return self.depthwise(x)


class Unused(Model):
    def forward(self, x: Tensor, double: bool = False) -> Tensor:
        return self.depthwise(x) * factor(self.mask is None)


class Grown(Model):
    """A list of parts that grows, as in YOLO's C2f; 8 channels in 5 parts are 4 of 2."""

    def forward(self, x: Tensor) -> Tensor:
        y = self.act(self.norm(self.depthwise(x)))
        parts = list(y.chunk(2, 1))
        more = torch.chunk(y, chunks=5, dim=1)
        parts.extend(part * len(parts) / len(more) for part in more)
        return torch.cat(parts, 1)


class Mixed(Model):
    """A factor for each part, as in MixConv."""

    def forward(self, x: Tensor) -> Tensor:
        x = self.depthwise(x)
        first, *rest = x.split_with_sizes([1, 3, 4], dim=1)
        y = x.split([2, 2, 4], 1)
        parts = [factor * part for factor, part in zip((2, 3, 5), y, strict=True)]
        parts += [-part for part in torch.split(x, split_size_or_sections=(3, 5), dim=1)]
        return torch.cat([first, *parts, *rest], 1)


@pytest.mark.parametrize("cls", [Skip, Asserting, Unused, Grown, Mixed])
@torch.no_grad()
def test_answers_that_are_right_leave_a_graph(cls: type[Model]) -> None:
    model = cls().eval()
    fast = dwswap.optimize(model)
    assert dwswap.report(fast).mode == "graph"
    torch.testing.assert_close(fast(image(8)), model(image(8)))
