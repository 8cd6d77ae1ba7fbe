"""The means that BatchNorms tell, against those of the values that a graph computes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from dwswap.activations import ACTIVATIONS
from dwswap.bench.random_weights import randomize
from dwswap.passes.expected_means import expected_means
from dwswap.passes.rounding import Moments


class Values(fx.Interpreter):
    """Runs a graph and keeps the images that it computes, by the name of the node."""

    def __init__(self, graph_module: fx.GraphModule, *inputs: Tensor) -> None:
        super().__init__(graph_module)
        self.images: dict[str, Tensor] = {}
        with torch.no_grad():
            self.run(*inputs)

    def run_node(self, n: fx.Node) -> Any:
        value = super().run_node(n)
        if isinstance(value, Tensor) and value.dim() == 4:
            self.images[n.name] = value.clone()
        return value


def norm(channels: int = 6, deviation: float | None = None) -> nn.BatchNorm2d:
    """A BatchNorm whose outputs all have their own mean, and 0 as deviation."""
    made = nn.BatchNorm2d(channels).double()
    nn.init.uniform_(made.bias, -2, 2)
    nn.init.zeros_(made.weight)
    return made.eval()


class Net(nn.Module):
    def __init__(self, forward: Callable[[Net, Tensor], Any]) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 6, 1).double()
        self.norm, self.other = norm(), norm()
        self.pool, self.flat = nn.MaxPool2d(2), nn.Flatten()
        self.mean, self.dropout = nn.AdaptiveAvgPool2d(1), nn.Dropout()
        self.function = forward

    def forward(self, x: Tensor) -> Any:
        x = self.conv(x)
        return self.function(self, x)


def traced(forward: Callable[[Net, Tensor], Any]) -> fx.GraphModule:
    torch.manual_seed(0)
    return fx.symbolic_trace(Net(forward).eval())


def last(graph_module: fx.GraphModule) -> tuple[fx.Node, Moments | None]:
    """The output of the graph, and what is expected of it."""
    output = next(reversed(graph_module.graph.nodes)).args[0]
    assert isinstance(output, fx.Node)
    return output, expected_means(graph_module).get(output)


def shuffled(x: Tensor, groups: int = 3) -> Tensor:
    n, c, h, w = x.size()
    x = x.view(n, groups, c // groups, h, w)
    return torch.transpose(x, 1, 2).contiguous().view(n, -1, h, w)


def shuffled_by_size(x: Tensor) -> Tensor:
    return shuffled(x, x.size(1) // 2)


KNOWN: dict[str, Callable[[Net, Tensor], Any]] = {
    "norm": lambda net, x: net.norm(x),
    "function": lambda net, x: F.batch_norm(
        x, net.norm.running_mean, net.norm.running_var, net.norm.weight, net.norm.bias
    ),
    "sum": lambda net, x: net.norm(x) + net.other(x),
    "sum in place": lambda net, x: net.norm(x).add_(net.other(x)),
    "concatenation": lambda net, x: torch.cat((net.norm(x), net.other(x)), 1),
    "named": lambda net, x: torch.cat([net.norm(x), net.other(x)], dim=1),
    "chunk": lambda net, x: net.norm(x).chunk(2, dim=1)[1],
    "split": lambda net, x: torch.split(net.norm(x), 4, 1)[1],
    "sizes": lambda net, x: net.norm(x).split([1, 2, 3], dim=1)[2],
    "shuffle": lambda net, x: shuffled(net.norm(x)),
    "dropout": lambda net, x: net.dropout(net.norm(x)),
    "max pool": lambda net, x: net.pool(net.norm(x)),
    "average": lambda net, x: F.avg_pool2d(net.norm(x), 2),
    "mean": lambda net, x: net.mean(net.norm(x)),
    "mean, method": lambda net, x: net.norm(x).mean((2, 3), keepdim=True),
    "flat": lambda net, x: net.flat(net.mean(net.norm(x)))[:, :, None, None],
    **{
        name: lambda net, x, name=name: getattr(F, name)(net.norm(x))
        for name in ("relu", "relu6", "silu", "hardswish", "gelu", "sigmoid", "hardsigmoid")
    },
}
UNKNOWN: dict[str, Callable[[Net, Tensor], Any]] = {
    "no norm": lambda net, x: F.relu(x),
    "convolution": lambda net, x: net.conv(net.norm(x)[:, :3]),
    "part": lambda net, x: net.norm(x) + x,
    "number": lambda net, x: net.norm(x) + 1,
    "scaled": lambda net, x: torch.add(net.norm(x), net.other(x), alpha=2),
    "other dimension": lambda net, x: torch.cat((net.norm(x), net.other(x)), 2),
    "default dimension": lambda net, x: torch.cat((net.norm(x), net.other(x))),
    "product": lambda net, x: net.norm(x) * net.other(x),
    "own gate": lambda net, x: net.norm(x) * net.norm(x).sigmoid(),
    "rows": lambda net, x: net.norm(x).chunk(2, dim=2)[0],
    "samples": lambda net, x: net.norm(x).chunk(2)[0],
    "range": lambda net, x: net.norm(x)[:, 1:3],
    "wrong sizes": lambda net, x: net.norm(x).split([1, 2], dim=1)[0],
    "computed": lambda net, x: net.norm(x).split(x.size(1) // 2, 1)[0],
    "no such part": lambda net, x: net.norm(x).chunk(2, dim=1)[5],
    "computed groups": lambda net, x: shuffled_by_size(net.norm(x)),
    "unlike": lambda net, x: net.norm(x).chunk(2, 1)[0] + net.other(x),
    "list": lambda net, x: torch.cat(net.norm(x).chunk(2, 1), 1),
    "no list": lambda net, x: torch.cat(dim=1, tensors=[net.norm(x), net.norm(x)]),
    "sample": lambda net, x: net.norm(x)[0],
    "activation": lambda net, x: F.elu(net.norm(x)),
    "statistics of the batch": lambda net, x: F.batch_norm(x, None, None, training=True),
}


@pytest.mark.parametrize("name", KNOWN)
def test_known_means(name: str) -> None:
    """Exact without deviations, and in the right order."""
    graph_module = traced(KNOWN[name])
    values = Values(graph_module, torch.randn(2, 3, 4, 4).double())
    node, moments = last(graph_module)
    if name == "flat":
        moments = expected_means(graph_module)[node.args[0]]  # type: ignore[index]
    assert moments is not None
    measured = values.images[node.name].mean((0, 2, 3))
    torch.testing.assert_close(moments.mean, measured)
    assert len(set(measured.tolist())) > 1
    torch.testing.assert_close(moments.deviation, torch.zeros_like(measured))


@pytest.mark.parametrize("name", UNKNOWN)
def test_unknown_means(name: str) -> None:
    assert last(traced(UNKNOWN[name]))[1] is None


def test_what_has_no_values_is_unknown() -> None:
    graph_module = fx.symbolic_trace(nn.Sequential(norm().to("meta"), nn.ReLU()))
    assert last(graph_module)[1] is None

    class Indexed(nn.Module):
        def forward(self, x: Any) -> Any:
            return x[0] + x[1].chunk(2)[0]

    assert not expected_means(fx.symbolic_trace(Indexed()))


def test_gates_of_unknown_values_are_a_half() -> None:
    graph_module = traced(lambda net, x: net.norm(x) * net.conv(x[:, :3]).mean((2, 3)).sigmoid())
    moments = last(graph_module)[1]
    assert moments is not None
    torch.testing.assert_close(moments.mean, graph_module.norm.bias / 2)


def test_deviations_of_a_sum_add_up_in_squares_and_a_maximum_is_larger() -> None:
    graph_module = traced(lambda net, x: net.pool(net.norm(x) + net.other(x)))
    nn.init.constant_(graph_module.norm.weight, -3)
    nn.init.constant_(graph_module.other.weight, 4)
    moments = last(graph_module)[1]
    assert moments is not None
    torch.testing.assert_close(moments.deviation, torch.full((6,), 5.0).double())
    total = graph_module.norm.bias + graph_module.other.bias
    assert ((moments.mean - total > 4) & (moments.mean - total < 9)).all()


@pytest.mark.parametrize("name", [name for name in ACTIVATIONS if name != "none"])
def test_activations_of_normal_values(name: str) -> None:
    function = getattr(F, name.removesuffix("_tanh"))
    options = {"approximate": "tanh"} if name.endswith("_tanh") else {}
    graph_module = traced(lambda net, x: function(net.norm(x), **options))
    nn.init.uniform_(graph_module.norm.weight, 0.3, 3)
    moments = last(graph_module)[1]
    assert moments is not None
    generator = torch.Generator().manual_seed(1)
    noise = torch.randn(400_000, 1, generator=generator, dtype=torch.float64)
    values = ACTIVATIONS[name].forward(
        noise * graph_module.norm.weight.detach() + graph_module.norm.bias.detach()
    )
    torch.testing.assert_close(moments.mean, values.mean(0), atol=0.02, rtol=0)
    torch.testing.assert_close(moments.deviation, values.std(0), atol=0.02, rtol=0)


def test_relu_has_its_exact_mean() -> None:
    graph_module = traced(lambda net, x: F.relu(net.norm(x)))
    nn.init.ones_(graph_module.norm.weight)
    moments = last(graph_module)[1]
    assert moments is not None
    normal = torch.distributions.Normal(torch.zeros(()).double(), torch.ones(()).double())
    mean = graph_module.norm.bias.detach()
    exact = mean * normal.cdf(mean) + normal.log_prob(mean).exp()
    torch.testing.assert_close(moments.mean, exact, atol=1e-3, rtol=0)


@pytest.mark.parametrize("name", ["mobilenet_v2", "shufflenet_v2_x0_5"])
def test_means_of_whole_models(name: str) -> None:
    torchvision = pytest.importorskip("torchvision")
    torch.manual_seed(0)
    model, x = torchvision.models.get_model(name), torch.randn(8, 3, 64, 64)
    randomize(model, x)
    graph_module = fx.symbolic_trace(model.double())
    images = Values(graph_module, x.double()).images
    expected = expected_means(graph_module)
    off = []
    for node in graph_module.graph.nodes:
        if node in expected and node.name in images:
            measured = images[node.name].mean((0, 2, 3))
            off.append(float((expected[node].mean - measured).norm() / measured.norm()))
    assert len(off) > 90
    # Deep in a model, where an image has four pixels, means are those of a small sample.
    assert sorted(off)[len(off) // 2] < 0.12
    assert max(off) < 0.7
