"""BatchNorm that trains in ``torch.compile(model, backend="dwswap")``."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from test_backend import Rewritten
from tiny_models import InvertedResidual, depthwise, image
from torch import Tensor, nn

from dwswap.activations import pair_of
from dwswap.schema import batch_norm_recorded

pytestmark = pytest.mark.usefixtures("norm_calls")


@pytest.fixture(autouse=True)
def _fresh() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


class Normed(nn.Module):
    """A swapped convolution, BatchNorm, and what ``after`` makes of its module and its input."""

    def __init__(self, after: Callable[[nn.Module, Tensor], Tensor], **options: Any) -> None:
        super().__init__()
        self.conv, self.norm, self.after = depthwise(), nn.BatchNorm2d(8, **options), after

    def forward(self, x: Tensor) -> Tensor:
        return self.after(self.norm, self.conv(x))


def step(model: nn.Module, compiler: str, x: Tensor) -> tuple[Rewritten, list[str]]:
    """Two steps of training with and without the compiler agree; what was made, and the
    activations of BatchNorm."""
    plain, made = copy.deepcopy(model), Rewritten(torch._dynamo.lookup_backend(compiler))
    fast = torch.compile(model, backend=made, fullgraph=True)
    for each in (plain, fast):
        for _ in range(2):
            each(x).pow(3).mean().backward()  # squares of BatchNorm have next to no gradients
    pairs = [*zip(model.parameters(), plain.parameters(), strict=True)]
    for ours, theirs in pairs:
        torch.testing.assert_close(ours.grad, theirs.grad)
    for ours, theirs in zip(model.buffers(), plain.buffers(), strict=True):
        torch.testing.assert_close(ours, theirs)
    (graph_module,) = made.graphs
    calls = [node for node in graph_module.graph.nodes if node.target is batch_norm_recorded]
    return made, [pair_of(node.args[-1])[1] for node in calls]


@pytest.mark.parametrize(
    ("after", "activation"),
    [
        (lambda norm, y: norm(y), "none"),
        (lambda norm, y: F.relu(norm(y)), "relu"),
        (lambda norm, y: F.relu6(norm(y), inplace=True), "relu6"),
        (lambda norm, y: F.hardswish(norm(y)), "hardswish"),
        (lambda norm, y: norm(y).clamp(0, 6), "relu6"),
        (lambda norm, y: F.gelu(norm(y)), "none"),
        (lambda norm, y: (z := norm(y)) + F.relu(z), "none"),
    ],
)
def test_activations(after: Callable[[nn.Module, Tensor], Tensor], activation: str) -> None:
    torch.manual_seed(0)
    made, activations = step(Normed(after), "aot_eager", image(8))
    assert activations == [activation]
    assert F.batch_norm not in made.targets
    (graph_module,) = made.graphs
    assert not any(node.target == "add_" for node in graph_module.graph.nodes)
    (change,) = next(iter(made.reports[0].elsewhere.values()))
    assert (change.kind, change.done) == ("batch_norm", True)
    assert change.name == (None if activation == "none" else activation)


@pytest.mark.parametrize(
    "options",
    [{"affine": False}, {"track_running_stats": False}, {"momentum": 0.3, "eps": 1e-2}],
)
def test_options(options: dict[str, Any]) -> None:
    torch.manual_seed(0)
    _, activations = step(Normed(lambda norm, y: F.silu(norm(y)), **options), "aot_eager", image(8))
    assert activations == ["silu"]


def test_counts_that_are_read_are_counted_apart() -> None:
    class Reads(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.norm = depthwise(), nn.BatchNorm2d(8)

        def forward(self, x: Tensor) -> Tensor:
            y = self.conv(x)
            count = self.norm.num_batches_tracked.add_(1)
            norm = self.norm
            arguments = (norm.running_mean, norm.running_var, norm.weight, norm.bias, True)
            return F.batch_norm(y, *arguments) + count

    _, activations = step(Reads(), "aot_eager", image(8))
    assert activations == ["none"]


@pytest.mark.parametrize(
    "change",
    [
        lambda model: model.norm.eval(),
        lambda model: model.double(),  # has no kernels, the fixture says
        lambda model: setattr(model, "after", lambda norm, y: norm(y.permute(0, 1, 3, 2))),
    ],
)
def test_what_must_stay(change: Callable[[nn.Module], Any]) -> None:
    model = Normed(lambda norm, y: F.relu(norm(y)))
    change(model)
    x = image(8).to(next(model.parameters()).dtype)
    made, activations = step(model, "aot_eager", x)
    assert (activations, made.targets.count(F.batch_norm)) == ([], 1)


@pytest.mark.slow
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_a_block_with_inductor_and_batches_of_any_size(layout: torch.memory_format) -> None:
    torch.manual_seed(0)
    model = InvertedResidual().to(memory_format=layout)
    plain, made = copy.deepcopy(model), Rewritten(torch._dynamo.lookup_backend("inductor"))
    fast = torch.compile(model, backend=made, fullgraph=True)
    for batch in (2, 5, 3):
        x = image(batch=batch).contiguous(memory_format=layout)
        torch._dynamo.mark_dynamic(x, 0)
        ours, theirs = fast(x), plain(x)
        torch.testing.assert_close(ours, theirs)
        ours.pow(3).mean().backward()
        theirs.pow(3).mean().backward()
    for one, other in zip(model.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(one.grad, other.grad, rtol=1e-4, atol=1e-5)
    assert made.targets.count(batch_norm_recorded) == 3
