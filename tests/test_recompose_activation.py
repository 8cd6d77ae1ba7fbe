"""Activations that are written out become calls, and part of the operator's."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from tiny_models import depthwise, image
from torch import Tensor, nn

import dwswap
from dwswap.passes.unswap_calls import swapped_calls


class Written(nn.Module):
    """``activation`` between two depthwise convolutions, or beside one of them."""

    def __init__(self, activation: Callable[[Tensor], Tensor], where: str = "after") -> None:
        super().__init__()
        self.first = depthwise() if where == "after" else nn.Conv2d(8, 8, 1, bias=False)
        self.last = depthwise() if where == "before" else nn.Conv2d(8, 8, 1)
        self.activation = activation

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.activation(self.first(x)))


FORMS: dict[str, tuple[Callable[[Tensor], Tensor], str]] = {
    "swish": (lambda x: x * torch.sigmoid(x), "silu"),
    "swish, other order": (lambda x: x.sigmoid() * x, "silu"),
    "swish, methods": (lambda x: x.mul(x.sigmoid()), "silu"),
    "hswish": (lambda x: x * F.relu6(x + 3) / 6, "hardswish"),
    "hswish, gate first": (lambda x: x * (F.relu6(x + 3) / 6), "hardswish"),
    "hswish, by hardsigmoid": (lambda x: F.hardsigmoid(x) * x, "hardswish"),
    "hswish, in place": (
        lambda x: torch.mul(F.relu6(3 + x, inplace=True), x).div(6.0),
        "hardswish",
    ),
    "hswish, clamps": (lambda x: x * torch.clamp(x + 3, 0, 6) / 6, "hardswish"),
    "hsigmoid": (lambda x: F.relu6(x + 3) / 6, "hardsigmoid"),
    "hsigmoid, clamp": (lambda x: (x + 3).clamp(0, 6) / 6, "hardsigmoid"),
}
OTHERS: dict[str, Callable[[Tensor], Tensor]] = {
    "another offset": lambda x: x * F.relu6(x + 2) / 6,
    "another bound": lambda x: x * torch.clamp(x + 3, 0, 5) / 6,
    "another divisor": lambda x: x * F.relu6(x + 3) / 5,
    "upside down": lambda x: 6 / (F.relu6(x + 3) + 1),
    "another factor": lambda x: (x + 1) * torch.sigmoid(x),
    "another sigmoid": lambda x: x * torch.sigmoid(x + 1),
    "in place": lambda x: torch.sigmoid_(x + 0.0).mul(x) + x.sigmoid_() * x,
    "tanh": lambda x: x * torch.tanh(x),
}


def absorbed(model: nn.Module) -> list[dict[str, Any]]:
    fast = dwswap.optimize(model)
    x = image(8)
    torch.testing.assert_close(fast(x), model(x))
    names = ("activation", "input_activation")
    return [{k: v for k, v in n.kwargs.items() if k in names} for n in swapped_calls(fast)]


@pytest.mark.parametrize("form", FORMS)
def test_rewrites(form: str) -> None:
    activation, name = FORMS[form]
    assert absorbed(Written(activation).eval()) == [{"activation": name}]
    assert absorbed(Written(activation, "before").eval()) == [{"input_activation": name}]


@pytest.mark.parametrize("form", OTHERS)
def test_must_stay(form: str) -> None:
    assert all(not given for given in absorbed(Written(OTHERS[form]).eval()))


def test_parts_that_are_read_elsewhere_stay() -> None:
    def both(x: Tensor) -> Tensor:
        gate = torch.sigmoid(x)
        return x * gate + gate

    assert not any(absorbed(Written(both).eval()))


@pytest.mark.parametrize(
    ("first", "last"),
    [
        (torch.sigmoid, lambda x, gate: x * gate),
        (lambda x: F.relu6(x + 3), lambda x, gate: x * gate / 6),
        (lambda x: x + 3, lambda x, shifted: F.relu6(shifted) / 6),
    ],
)
def test_an_input_that_changes_before_the_last_part(
    first: Callable[[Tensor], Tensor], last: Callable[[Tensor, Tensor], Tensor]
) -> None:
    def changed(x: Tensor) -> Tensor:
        part = first(x)
        x.clamp_(-1, 1)
        return last(x, part)

    for where in ("before", "after"):
        assert not any(absorbed(Written(changed, where).eval()))


def test_elsewhere_the_parts_stay() -> None:
    model = nn.Sequential(depthwise(), nn.Conv2d(8, 8, 1), Written(lambda x: x * x.sigmoid(), "no"))
    fast = dwswap.optimize(model.eval())
    targets = [node.target for node in fast.graph.nodes]
    assert "sigmoid" in targets
    assert F.silu not in targets


@pytest.mark.parametrize("activation", [F.silu, F.hardswish, F.hardsigmoid, F.relu6, F.gelu])
@pytest.mark.parametrize("where", ["after", "before"])
def test_a_decomposed_program(activation: Callable[[Tensor], Tensor], where: str) -> None:
    model, x = Written(activation, where).eval(), image(8)
    program = torch.export.export(model, (x,)).run_decompositions()
    fast = dwswap.optimize(program)
    targets = [node.target for node in fast.graph.nodes if node.op == "call_function"]
    assert len(targets) == 2, targets
    torch.testing.assert_close(fast.module()(x), model(x))
