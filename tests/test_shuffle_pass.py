"""Channel shuffles of two concatenated images: one copy, or as they are."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from test_memory_format import same
from test_torchvision import build_with_data
from tiny_models import depthwise, image
from torch import Tensor, fx, nn

import dwswap
from dwswap.shuffling import interleaved

FORMATS = (torch.contiguous_format, torch.channels_last)


def shuffle(x: Tensor, groups: int = 2) -> Tensor:
    """As torchvision has it."""
    batch, channels, height, width = x.size()
    x = x.view(batch, groups, channels // groups, height, width)
    return torch.transpose(x, 1, 2).contiguous().view(batch, channels, height, width)


def count(model: nn.Module) -> int:
    assert isinstance(model, fx.GraphModule)
    return [node.target for node in model.graph.nodes].count(interleaved)


class Unit(nn.Module):
    """Two halves of the channels; the second goes through a layer, then both are joined."""

    def __init__(self, join: Callable[[Tensor, Tensor], Any]) -> None:
        super().__init__()
        self.start, self.body, self.join = depthwise(), nn.Conv2d(4, 4, 1), join

    def forward(self, x: Tensor) -> Any:
        first, second = self.start(x).chunk(2, dim=1)
        return self.join(first, self.body(second))


@pytest.mark.parametrize("first_layout", FORMATS)
@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("sliced", [False, True])
@pytest.mark.parametrize("size", [1, 5])
def test_function(
    first_layout: torch.memory_format, channels_last: bool, sliced: bool, size: int
) -> None:
    wide = image(12, size=size).to(memory_format=first_layout)
    first = wide[:, 3:9] if sliced else wide[:, 3:9].clone()
    second = image(6, size=size).exp()
    result = interleaved(first, second, channels_last)
    expected = shuffle(torch.cat((first, second), 1).contiguous())
    torch.testing.assert_close(result, expected, rtol=0, atol=0)
    assert result.is_contiguous(memory_format=FORMATS[channels_last])
    assert interleaved(first[:0], second[:0], channels_last).shape == (0, 12, size, size)


@pytest.mark.parametrize("channels_last", [False, True])
def test_function_of_different_channels(channels_last: bool) -> None:
    first, second = image(2), image(6).exp()
    expected = shuffle(torch.cat((first, second), 1))
    result = interleaved(first, second, channels_last)
    torch.testing.assert_close(result, expected, rtol=0, atol=0)


@pytest.mark.parametrize("layout", ["preserve", "channels_last", "contiguous"])
@pytest.mark.parametrize(
    "join",
    [
        lambda a, b: shuffle(torch.cat((a, b), dim=1)),
        lambda a, b: shuffle(torch.cat([b, a], 1)),
        lambda a, b: shuffle(torch.cat((a, torch.cat((b, b), 1)), 1)),
    ],
)
def test_interleaves(layout: Any, join: Callable[[Tensor, Tensor], Tensor]) -> None:
    model = Unit(join).eval()
    fast = dwswap.optimize(model, memory_format=layout)
    assert count(fast) == 1
    assert "size" not in str(fast.code)
    torch._dynamo.reset()
    compiled = torch.compile(fast, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        for x in (image(8), image(8).to(memory_format=torch.channels_last)):
            for other in (fast, copy.deepcopy(fast), compiled):
                same(other(x), model(x))
                assert other(x).stride() == model(x).stride()
    if layout == "preserve":
        same(pickle.loads(pickle.dumps(fast))(image(8)), fast(image(8)))


def twice(a: Tensor, b: Tensor) -> Any:
    joined = torch.cat((a, b), 1)
    return shuffle(joined), joined


def sized(a: Tensor, b: Tensor) -> Tensor:
    joined = torch.cat((a, b), 1)
    return shuffle(joined) + joined.size(0)


def changed(a: Tensor, b: Tensor) -> Tensor:
    joined = torch.cat((a, b), 1)
    b.mul_(2)
    return shuffle(joined) + torch.cat((b, b), 1)


@pytest.mark.parametrize(
    "join",
    [
        twice,
        sized,
        changed,
        lambda a, b: shuffle(torch.cat((a, b), 1), 4),
        lambda a, b: shuffle(torch.cat((a, b, a, b), 1)),
        lambda a, b: shuffle(torch.cat((a, b), 0)),
        lambda a, b: shuffle(a),
    ],
)
@pytest.mark.parametrize("layout", ["preserve", "channels_last"])
def test_leaves_alone(layout: Any, join: Callable[[Tensor, Tensor], Any]) -> None:
    model = Unit(join).eval()
    fast = dwswap.optimize(model, memory_format=layout)
    assert count(fast) == 0
    with torch.no_grad():
        ours, theirs = fast(image(8)), model(image(8))
    same(ours, theirs)


@pytest.mark.parametrize("layout", ["preserve", "channels_last"])
def test_shufflenet(layout: Any) -> None:
    model = build_with_data("shufflenet_v2_x0_5").double()
    fast = dwswap.optimize(model, memory_format=layout)
    assert count(fast) == 16
    assert not any(node.target is torch.cat for node in fast.graph.nodes)
    x = torch.rand(2, 3, 64, 64, dtype=torch.float64)
    with torch.no_grad():
        expected = model(x)
        assert float((fast(x) - expected).abs().max() / expected.abs().max()) < 1e-12


# --- what the shuffle absorbs -------------------------------------------------------------------


@pytest.fixture
def absorbing(monkeypatch: pytest.MonkeyPatch) -> None:
    """On the CPU as on a GPU."""
    monkeypatch.setattr("dwswap.passes.absorbing.has_kernels", lambda tensor: True)


def absorbed(model: nn.Module) -> list[dict[str, Any]]:
    """Of every shuffle: the activations and the places of the biases that it took."""
    assert isinstance(model, fx.GraphModule)
    found = [node.kwargs for node in model.graph.nodes if node.target is interleaved]
    return [{key: str(value) for key, value in sorted(kwargs.items())} for kwargs in found]


def check_forms(fast: nn.Module, model: nn.Module, *, compiled: bool) -> None:
    """``fast``, a copy of it, and what it is compiled to give what ``model`` does, for images of 8
    channels in both layouts."""
    forms = [fast, copy.deepcopy(fast)]
    if compiled:
        torch._dynamo.reset()
        forms.append(torch.compile(fast, fullgraph=True, backend="aot_eager"))
    with torch.no_grad():
        for x in (image(8), image(8).to(memory_format=torch.channels_last)):
            for form in forms:
                torch.testing.assert_close(form(x), model(x))


class Branches(nn.Module):
    """Two convolutions, each followed by what ``first`` and ``second`` are, joined."""

    def __init__(self, first: Any, second: Any, twice: str = "") -> None:
        super().__init__()
        self.start, self.left, self.right = depthwise(), nn.Conv2d(8, 6, 1), nn.Conv2d(8, 6, 1)
        self.first, self.second, self.twice = first, second, twice

    def forward(self, x: Tensor) -> Any:
        x = self.start(x)
        left, right = self.left(x), self.right(x)
        first = left if self.first is None else self.first(left)
        second = right if self.second is None else self.second(right)
        joined = shuffle(torch.cat((first, second), 1))
        extra = {"value": first, "input": left}.get(self.twice)
        return joined if extra is None else (joined, extra)


BOTH = [f"{name}_{what}" for name in ("first", "second") for what in ("activation", "bias")]


@pytest.mark.usefixtures("absorbing")
@pytest.mark.parametrize("layout", ["preserve", "channels_last"])
@pytest.mark.parametrize(
    ("first", "second", "keys"),
    [
        (nn.ReLU(), nn.ReLU6(inplace=True), BOTH),
        (nn.Hardswish(inplace=True), None, [*BOTH[:2], BOTH[3]]),
        (nn.SiLU(), nn.GELU(approximate="tanh"), BOTH),
        (None, nn.ELU(), BOTH[1:2]),
        (nn.Tanh(), nn.Softplus(), []),
        (nn.Sequential(nn.ReLU(), nn.MaxPool2d(1)), nn.ReLU(), BOTH[2:]),
    ],
)
def test_absorbs_what_is_in_front(
    layout: Any, first: nn.Module | None, second: nn.Module | None, keys: list[str]
) -> None:
    model = Branches(first, second).eval()
    with torch.no_grad():
        model.left.bias.copy_(torch.linspace(-2, 2, 6))
    fast = dwswap.optimize(model, memory_format=layout)
    assert [list(found) for found in absorbed(fast)] == [keys]
    changes = {layer.path: layer.changes for layer in dwswap.report(fast).layers}
    done = [change for found in changes.values() for change in found if change.done]
    # No layer says that it keeps the bias that it gave.
    for found in changes.values():
        assert len({change.done for change in found if change.kind == "bias"}) <= 1
    assert len([c for c in done if c.kind in ("shuffle", "bias")]) == len(keys)
    assert all("channel shuffle" in str(change) for change in done if change.kind == "shuffle")
    check_forms(fast, model, compiled=layout == "channels_last")
    if layout == "preserve":
        same(pickle.loads(pickle.dumps(fast))(image(8)), fast(image(8)))


@pytest.mark.usefixtures("absorbing")
@pytest.mark.parametrize("twice", ["value", "input"])
@pytest.mark.parametrize("in_place", [False, True])
def test_leaves_what_is_read_elsewhere(twice: str, in_place: bool) -> None:
    model = Branches(nn.ReLU(in_place), nn.ReLU(in_place), twice).eval()
    fast = dwswap.optimize(model)
    # Out of place, the activation alone may go where its input is read elsewhere.
    first = BOTH[:1] if twice == "input" and not in_place else []
    assert [list(found) for found in absorbed(fast)] == [[*first, *BOTH[2:]]]
    with torch.no_grad():
        torch.testing.assert_close(fast(image(8)), model(image(8)))


@pytest.mark.usefixtures("absorbing")
def test_leaves_one_value_on_both_sides() -> None:
    class Doubled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.start, self.body = depthwise(), nn.Conv2d(8, 6, 1)

        def forward(self, x: Tensor) -> Tensor:
            value = self.body(self.start(x)).relu()
            return shuffle(torch.cat((value, value), 1))

    model = Doubled().eval()
    fast = dwswap.optimize(model)
    assert absorbed(fast) == [{}]
    same(fast(image(8)), model(image(8)))


@pytest.mark.usefixtures("absorbing")
@torch.no_grad()
def test_autocast_keeps_its_dtype() -> None:
    model = Branches(nn.ReLU(), nn.ReLU()).eval()
    fast = dwswap.optimize(model)
    assert [list(found) for found in absorbed(fast)] == [BOTH]
    with torch.autocast("cpu", torch.bfloat16):
        ours, theirs = fast(image(8)), model(image(8))
    assert ours.dtype is theirs.dtype is torch.bfloat16
    torch.testing.assert_close(ours, theirs, rtol=2e-2, atol=2e-2)


@pytest.mark.usefixtures("absorbing")
def test_restore_refuses_what_a_shuffle_absorbed() -> None:
    fast = dwswap.optimize(Branches(nn.ReLU(), None).eval())
    with pytest.raises(ValueError, match="a channel shuffle absorbed the biases or activations"):
        dwswap.restore(fast, inplace=True)
    assert [list(found) for found in absorbed(fast)] == [[*BOTH[:2], BOTH[3]]]


def test_the_cpu_leaves_biases_to_the_convolutions() -> None:
    fast = dwswap.optimize(Branches(nn.ReLU(), nn.ReLU()).eval())
    assert absorbed(fast) == [{}]


@pytest.mark.usefixtures("absorbing")
def test_shufflenet_absorbs_all_activations() -> None:
    model = build_with_data("shufflenet_v2_x0_5").double()
    fast = dwswap.optimize(model)
    counts = [len(found) for found in absorbed(fast)]
    assert sorted(counts) == [2] * 13 + [4] * 3
    x = torch.rand(2, 3, 64, 64, dtype=torch.float64)
    with torch.no_grad():
        torch.testing.assert_close(fast(x), model(x), rtol=1e-9, atol=1e-9)
