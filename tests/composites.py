"""Functions of ours where no kernel runs: what PyTorch compiles, exports and traces of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn


def check_forms(
    model: nn.Module,
    images: Sequence[Tensor],
    expected: Callable[[Tensor], Tensor],
    operator: Any,
    plain: set[Any],
    differentiated: bool,
) -> None:
    """One graph for all of ``images`` without a break; exported and traced, ``model`` calls one of
    ``plain`` and not ``operator``."""
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, dynamic=True, backend="aot_eager")
    for x in images:
        torch.testing.assert_close(compiled(x), expected(x))
        assert compiled(x).requires_grad == differentiated
    program = torch.export.export(model, (x,))
    traced = fx.symbolic_trace(model)
    for graph_module in (program.graph_module, traced):
        targets = {node.target for node in graph_module.graph.nodes}
        assert targets & plain
        assert operator not in targets
    for form in (program.module(), traced):
        torch.testing.assert_close(form(x), expected(x))
