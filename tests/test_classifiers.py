"""A linear layer on means where no kernel of ours runs, and the pass that makes such calls."""

from __future__ import annotations

import copy
import itertools
import pickle
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from numerics import ACTIVATIONS
from test_fold_batchnorm import changes
from test_memory_format import same
from test_torchvision import models
from tiny_models import depthwise, image
from torch import Tensor, fx, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.export import export
from torch.library import opcheck

import dwswap
from dwswap.activations import PAIRS
from dwswap.bench.random_weights import randomize
from dwswap.classifiers import fits, pooled_linear
from dwswap.means import channel_means

NAMED = torch.ops.dwswap._pooled_linear.default
APART = torch.ops.dwswap._pooled_linear_apart.default
CHANNELS, OUTPUTS = 8, 16


@pytest.fixture
def kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """As in half precision on a GPU."""
    for name in ("pointwise_call.suits", "absorbing.has_kernels"):
        monkeypatch.setattr(f"dwswap.passes.{name}", lambda tensor: True)


def draw(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64)


def tensors(batch: int = 2, with_biases: bool = True) -> list[Tensor | None]:
    biases = [draw(OUTPUTS, seed=2), draw(CHANNELS, seed=3)] if with_biases else [None, None]
    return [draw(batch, CHANNELS, 5, 3), draw(OUTPUTS, CHANNELS, seed=1), *biases]


Given = Sequence[Tensor | None]
"""Input, weight, bias, input_bias."""


def theirs(
    given: Given, before: str = "none", behind: str = "none", table: Any = ACTIVATIONS
) -> Tensor:
    x, weight, bias, input_bias = given
    x = x if input_bias is None else x + input_bias[:, None, None]
    return table[behind](F.linear(table[before](x).mean((-2, -1)), weight, bias))


def ours(given: Given, before: str = "none", behind: str = "none") -> Tensor:
    x, weight, bias, input_bias = given
    return pooled_linear(
        x, weight, bias, input_bias=input_bias, input_activation=before, activation=behind
    )


def test_fits() -> None:
    for shape in ((1000, 1280), (8, 8), (16, 2048)):
        assert fits(torch.empty(shape))
    for shape in ((10, 1280), (1000, 1284), (16, 2056)):
        assert not fits(torch.empty(shape))


@pytest.mark.parametrize("batch", [1, 2, 0])
def test_values(batch: int) -> None:
    for with_biases, before, behind in itertools.product((False, True), ACTIVATIONS, ACTIVATIONS):
        given = tensors(batch, with_biases)
        expected = theirs(given, before, behind)
        torch.testing.assert_close(ours(given, before, behind), expected)
        torch.testing.assert_close(NAMED(*given, PAIRS[before, behind]), expected)


@pytest.mark.parametrize("operator", [NAMED, APART], ids=str)
def test_pytorch_can_work_with_it(operator: torch._ops.OpOverload) -> None:
    given = (*tensors(1), PAIRS["relu6", "hardswish"])
    real = operator(*given)
    with FakeTensorMode(allow_non_fake_inputs=False) as mode:
        fake = operator(*(mode.from_tensor(t) for t in given[:4]), given[4])
    meta = operator(*(t.to("meta") for t in given[:4]), given[4])
    for other in (fake, meta):
        assert (other.shape, other.stride(), other.dtype) == (real.shape, real.stride(), real.dtype)
    opcheck(operator, given)
    primals = tuple(t.requires_grad_() for t in tensors())
    assert torch.autograd.gradcheck(lambda *t: ours(t, "silu", "sigmoid"), primals)
    images = torch.stack([primals[0], 2 * primals[0]]).detach()
    rest = [t.detach() for t in primals[1:]]
    batched = torch.vmap(lambda x: ours((x, *rest), "relu"))(images)
    torch.testing.assert_close(batched, torch.stack([ours((x, *rest), "relu") for x in images]))


@torch.no_grad()
def test_autocast_is_that_of_aten() -> None:
    given = [t.float() for t in tensors()]
    with torch.autocast("cpu", torch.bfloat16):
        result, expected = ours(given), theirs(given)
    assert result.dtype == expected.dtype == torch.bfloat16
    torch.testing.assert_close(result, expected, rtol=2e-2, atol=2e-2)


class Head(nn.Module):
    """A depthwise and a pointwise convolution, ``act``, a mean, ``head``."""

    def __init__(
        self,
        *head: nn.Module,
        act: Any = None,
        bias: bool = True,
        pool: Callable[[Tensor], Tensor] | None = None,
        call: Callable[..., Any] | None = None,
    ) -> None:
        super().__init__()
        self.start, self.last = depthwise(), nn.Conv2d(8, CHANNELS, 1, bias=bias)
        self.act = act or nn.Identity()
        self.pool = pool or (lambda x: torch.flatten(F.adaptive_avg_pool2d(x, 1), 1))
        self.head = nn.Sequential(*head)
        self.call = call or (lambda head, means: head(means))

    def forward(self, x: Tensor) -> Any:
        return self.call(self.head, self.pool(self.act(self.last(self.start(x)))))


def linear(outputs: int = OUTPUTS, channels: int = CHANNELS, bias: bool = True) -> nn.Linear:
    return nn.Linear(channels, outputs, bias)


def optimize(model: nn.Module) -> Any:
    return dwswap.optimize(model.eval(), memory_format="channels_last")


def calls(fast: Any) -> list[fx.Node]:
    return list(fast.graph.find_nodes(op="call_function", target=pooled_linear))


BOTH = {"input_bias", "input_activation"}
FUSED: dict[str, tuple[Callable[[], nn.Module], set[str]]] = {
    "relu6": (lambda: Head(linear(), act=nn.ReLU6(True)), BOTH),
    "no bias": (lambda: Head(linear(bias=False), act=nn.SiLU(), bias=False), {"input_activation"}),
    "bare": (lambda: Head(linear(), bias=False), set()),
    "mean": (lambda: Head(linear(), act=nn.ReLU(), pool=lambda x: x.mean([2, 3])), BOTH),
    "module": (
        lambda: Head(nn.Flatten(), linear(), act=nn.ReLU(), pool=nn.AdaptiveAvgPool2d(1)),
        BOTH,
    ),
    "dropout": (lambda: Head(nn.Dropout(0.2), linear(), act=nn.ReLU()), BOTH),
    "two layers": (
        lambda: Head(linear(), nn.Hardswish(True), nn.Dropout(0.2), linear(10, OUTPUTS)),
        {"activation"},
    ),
    "function": (
        lambda: Head(linear(), call=lambda head, x: F.linear(x, head[0].weight, head[0].bias)),
        set(),
    ),
    "no activation of ours": (lambda: Head(linear(), nn.ELU(), act=nn.Hardswish()), BOTH),
    "read twice": (
        lambda: Head(linear(), call=lambda head, x: (y := head(x)).relu() + y),
        set(),
    ),
}


@pytest.mark.usefixtures("kernels")
@pytest.mark.parametrize("name", FUSED)
@torch.no_grad()
def test_fuses(name: str) -> None:
    torch.manual_seed(0)
    make, options = FUSED[name]
    model = make().eval()
    fast = optimize(model)
    (node,) = calls(fast)
    assert set(node.kwargs) == options
    assert not fast.graph.find_nodes(op="call_function", target=channel_means)
    means = [change for change in changes(fast, "mean") if change.done]
    assert len(means) == 1
    assert "absorbed the mean" in dwswap.report(fast).render(400)
    for batch, each in itertools.product(
        (1, 3, 0), (fast, copy.deepcopy(fast), pickle.loads(pickle.dumps(fast)))
    ):
        torch.testing.assert_close(each(image(8, batch=batch)), model(image(8, batch=batch)))
    program = export(fast, (image(8),))
    assert NAMED not in {n.target for n in program.graph.nodes}
    torch.testing.assert_close(program.module()(image(8)), model(image(8)))
    if options:
        with pytest.raises(ValueError, match="cannot be restored: "):
            dwswap.restore(fast)


def hooked() -> nn.Module:
    layer = linear()
    layer.register_forward_hook(lambda module, args, output: output + 1)
    return layer


STAYS: dict[str, Callable[[], nn.Module]] = {
    "outputs": lambda: Head(linear(10)),
    "channels": lambda: Head(linear(16, 4), pool=lambda x: x[:, :4].mean((2, 3))),
    "hook": lambda: Head(hooked()),
    "means read elsewhere": lambda: Head(linear(), call=lambda head, x: (head(x), x)),
    "computed": lambda: Head(linear(), call=lambda head, x: F.linear(x, head[0].weight.exp())),
    "computed bias": lambda: Head(
        linear(), call=lambda head, x: F.linear(x, head[0].weight, head[0].bias.exp())
    ),
    "something between": lambda: Head(nn.LayerNorm(CHANNELS), linear()),
    "another pool": lambda: Head(linear(), pool=lambda x: x.amax((2, 3))),
    "pixels": lambda: Head(linear(), pool=lambda x: F.adaptive_avg_pool2d(x, 1).movedim(1, -1)),
    "convolution": lambda: Head(
        nn.Conv2d(CHANNELS, OUTPUTS, 1), pool=lambda x: F.adaptive_avg_pool2d(x, 1)
    ),
}


@pytest.mark.usefixtures("kernels")
@pytest.mark.parametrize("name", STAYS)
@torch.no_grad()
def test_stays(name: str) -> None:
    torch.manual_seed(0)
    model = STAYS[name]().eval()
    fast = optimize(model)
    assert not calls(fast)
    assert not changes(fast, "mean")
    same(fast(image(8)), model(image(8)))


def test_not_on_the_cpu() -> None:
    assert not calls(optimize(FUSED["relu6"][0]()))


@pytest.mark.usefixtures("kernels")
@torch.no_grad()
def test_not_in_an_exported_program() -> None:
    model = FUSED["relu6"][0]().eval()
    fast = dwswap.optimize(export(model, (image(8),)), memory_format="channels_last")
    assert pooled_linear not in {node.target for node in fast.graph.nodes}
    same(fast.module()(image(8)), model(image(8)))


@pytest.mark.usefixtures("kernels")
@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("mobilenet_v2", BOTH),
        ("mobilenet_v3_small", {"activation", *BOTH}),
        ("shufflenet_v2_x0_5", BOTH),
    ],
)
@torch.no_grad()
def test_torchvision(name: str, options: set[str]) -> None:
    model = getattr(models, name)(weights=None).eval().double()
    images = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0)).double()
    randomize(model, images)
    fast = optimize(model)
    (node,) = calls(fast)
    assert set(node.kwargs) == options
    torch.testing.assert_close(fast(images), model(images), rtol=1e-9, atol=1e-9)
