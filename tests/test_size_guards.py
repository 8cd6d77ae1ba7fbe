"""Sizes that a compiled program takes: symbols, expressions of them, and equations between them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from tiny_models import depthwise, image
from torch import Tensor, nn
from torch.export import Dim, export

from dwswap.export.input_specs import InputSpecs
from dwswap.export.size_guards import evaluate, is_met, solved


class Unshuffled(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = depthwise(12)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.pixel_unshuffle(x, 2))


class Flattened(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = depthwise()

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x).flatten(2)


class Twice(nn.Module):
    """``y`` is a batch of twice the size."""

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return x.sum((2, 3)).repeat(2, 1) + y.sum((2, 3))


def specs_of(model: nn.Module, inputs: tuple[Tensor, ...], dynamic: Any) -> InputSpecs:
    program = export(model.eval(), inputs, dynamic_shapes=dynamic)
    return InputSpecs.from_json(InputSpecs.of_program(program).to_json())


@pytest.mark.parametrize("dim", [Dim.DYNAMIC, 2 * Dim("half", min=1, max=64)])
def test_sizes_that_a_program_forbids(dim: Any) -> None:
    x = torch.randn(2, 3, 16, 16)
    specs = specs_of(Unshuffled(), (x,), ({2: dim},))
    specs.conform((torch.randn(2, 3, 20, 16),), {})
    with pytest.raises(ValueError, match=r"must satisfy Eq\(.*, got s\d+ = 21|must have shape"):
        specs.conform((torch.randn(2, 3, 21, 16),), {})
    with pytest.raises(ValueError, match=r"must have shape \[2, 3, .*\], got \[2, 3, 20, 18\]"):
        specs.conform((torch.randn(2, 3, 20, 18),), {})


def test_a_multiple_of_a_size() -> None:
    specs = specs_of(Flattened(), (image(8, 16),), ({2: 8 * Dim("h", min=1, max=5)},))
    specs.conform((torch.randn(2, 8, 40, 16),), {})
    with pytest.raises(ValueError, match=r"must have shape \[2, 8, 8\*s\d+, 16\]"):
        specs.conform((torch.randn(2, 8, 41, 16),), {})
    with pytest.raises(ValueError, match="must be at least 0 and at most 5, got 6"):
        specs.conform((torch.randn(2, 8, 48, 16),), {})


@pytest.mark.parametrize("swapped", [False, True])
def test_sizes_of_several_inputs(swapped: bool) -> None:
    batch = Dim("batch", min=1, max=512)
    dims: Any = ({0: batch}, {0: 2 * batch})
    inputs = (torch.randn(3, 4, 8, 8), torch.randn(6, 4, 8, 8))

    class Other(nn.Module):
        def forward(self, y: Tensor, x: Tensor) -> Tensor:
            return Twice()(x, y)

    model: nn.Module = Twice()
    if swapped:
        model, inputs, dims = Other(), inputs[::-1], dims[::-1]
    specs = specs_of(model, inputs, dims)
    sizes = (10, 5) if swapped else (5, 10)
    specs.conform(tuple(torch.randn(n, 4, 8, 8) for n in sizes), {})
    with pytest.raises(ValueError, match=r"must have shape .*, got \[(9|2), 4, 8, 8\]"):
        specs.conform(tuple(torch.randn(n, 4, 8, 8) for n in ((9, 5) if swapped else (5, 2))), {})


def test_expressions() -> None:
    assert evaluate("Mod(7*s0 - 1, 4) + Max(s1, 2)**2//3", {"s0": 3, "s1": 5}) == 8
    assert is_met("Eq(2*s0, s1)", {"s0": 3, "s1": 6})
    assert not is_met("Eq(Mod(s0, s0//2), 0)", {"s0": 1})  # divides by zero
    assert solved("3*s0 + 1", 10) == {"s0": 3}
    assert solved("3*s0 + 1", 11) == solved("s0**2", 9) == solved("s0*s1", 9) == {}
    for text in ("__import__('os')", "s0.real", "Eq(a, b)", "[1][0]"):
        with pytest.raises(ValueError, match="cannot be checked"):
            evaluate(text, {"s0": 1})
