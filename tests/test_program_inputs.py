"""``example_inputs`` of a ``torch.export.ExportedProgram``: those that the program takes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from tiny_models import Block, image
from torch import Tensor
from torch.export import Dim, ExportedProgram, export

import dwswap

Dialect = Callable[[ExportedProgram], ExportedProgram]
DIALECTS = [
    pytest.param(lambda program: program, id="training"),
    pytest.param(lambda program: program.run_decompositions(), id="aten"),
]


class Several(Block):
    def forward(self, x: Tensor, scale: float, more: dict[str, Any]) -> Tensor:  # type: ignore[override]
        return super().forward(x) * scale + more["b"].sum()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": 3}, "x must be a tensor, got 3"),
        ({"x": image()[0]}, r"x must be of 4 dimensions, got shape \[3, 9, 9\]"),
        ({"x": image().double()}, "x must be of torch.float32, got torch.float64"),
        ({"x": image(batch=5)[..., :8]}, r"x.shape\[3\] must be 9, got 8"),
        ({"x": image(batch=2)}, r"x.shape\[0\] must be at least 3, got 2"),
        ({"x": image(batch=17), "b": torch.ones(34)}, r"x.shape\[0\] must be at most 16, got 17"),
        ({"b": torch.ones(9)}, r"more_b.shape\[0\] must be 10, got 9"),
        ({"scale": 0.25}, "scale must be 0.5, which it was in the export, got 0.25"),
        ({"scale": "a"}, "scale must be 0.5, which it was in the export, got 'a'"),
        ({"scale": torch.ones(2)}, "scale must be 0.5, which it was in the export, got a Tensor"),
        ({"none": 0}, "more_none must be None, which it was in the export, got 0"),
    ],
)
@pytest.mark.parametrize("dialect", DIALECTS)
def test_example_inputs_that_the_program_refuses(
    dialect: Dialect, change: dict[str, Any], message: str
) -> None:
    def inputs(x: Any, b: Any, scale: Any = 0.5, none: Any = None) -> tuple[Any, ...]:
        return (x, scale, {"b": b, "none": none})

    batch = Dim("batch", min=3, max=16)
    shapes = ({0: batch}, None, {"b": {0: 2 * batch}, "none": None})
    program = dialect(
        export(Several().eval(), inputs(image(batch=5), torch.ones(10)), dynamic_shapes=shapes)
    )
    fast = dwswap.optimize(program, inputs(image(batch=4), torch.ones(8)), verify=True)
    assert dwswap.report(fast).swapped[0].input_shape == (4, 8, 9, 9)
    for function in (dwswap.optimize, dwswap.explain):
        with pytest.raises(ValueError, match=f"as the program's own: {message}$"):
            function(program, inputs(**{"x": image(batch=5), "b": torch.ones(10), **change}))  # type: ignore[operator]


def test_an_int_that_varies() -> None:
    class Scaled(Block):
        def forward(self, x: Tensor, scale: int) -> Tensor:  # type: ignore[override]
            return super().forward(x) * scale

    shapes = (None, Dim.DYNAMIC)
    program = export(Scaled().eval(), (image(), 4), dynamic_shapes=shapes)
    fast = dwswap.optimize(program, (image(), 7), verify=True)
    assert dwswap.report(fast).swapped
    with pytest.raises(ValueError, match=r"scale must be an int, got 7\.0$"):
        dwswap.optimize(program, (image(), 7.0))
