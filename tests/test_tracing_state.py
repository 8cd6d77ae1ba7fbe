"""State that a forward changes, wherever it is: a graph would freeze it."""

from __future__ import annotations

import functools
import itertools
import random
from collections import deque
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any, ClassVar

import pytest
import torch
from tiny_models import depthwise, image
from torch import Tensor, nn

import dwswap


class Counter:
    def __init__(self) -> None:
        self.calls = 0

    def count(self) -> int:
        self.calls += 1
        return self.calls


class Model(nn.Module):
    shared: ClassVar[list[int]] = []
    calls = 0

    def __init__(self) -> None:
        super().__init__()
        self.depthwise = depthwise()
        self.counter, self.options = Counter(), SimpleNamespace(calls=0)
        self.nested: dict[str, Any] = {"calls": {"number": 0}, "factor": 2}
        self.recent: deque[int] = deque([0], maxlen=2)
        self.pair: tuple[list[int], int] = [], 3


calls = 0
history: list[int] = []
cache: dict[str, int] = {}
counter = Counter()


class Object(Model):
    def forward(self, x: Tensor) -> Tensor:
        self.counter.calls += 1
        return self.depthwise(x) * self.counter.calls


class Namespace(Model):
    def forward(self, x: Tensor) -> Tensor:
        self.options.calls += 1
        return self.depthwise(x) * self.options.calls


class Nested(Model):
    def forward(self, x: Tensor) -> Tensor:
        self.nested["calls"]["number"] += 1
        return self.depthwise(x) * self.nested["calls"]["number"]


class Queue(Model):
    def forward(self, x: Tensor) -> Tensor:
        self.recent.append(self.recent[-1] + 1)
        return self.depthwise(x) * self.recent[-1]


class ListInTuple(Model):
    def forward(self, x: Tensor) -> Tensor:
        self.pair[0].append(1)
        return self.depthwise(x) * len(self.pair[0])


class ListOfClass(Model):
    def forward(self, x: Tensor) -> Tensor:
        self.shared.append(1)
        return self.depthwise(x) * len(self.shared)


class NumberOfClass(Model):
    def forward(self, x: Tensor) -> Tensor:
        Model.calls += 1
        return self.depthwise(x) * Model.calls


class GlobalNumber(Model):
    def forward(self, x: Tensor) -> Tensor:
        global calls
        calls += 1
        return self.depthwise(x) * calls


class GlobalList(Model):
    def forward(self, x: Tensor) -> Tensor:
        return self.depthwise(x) * self.count()

    def count(self) -> int:
        history.append(1)
        return len(history)


class GlobalDict(Model):
    def forward(self, x: Tensor) -> Tensor:
        return self.depthwise(x) * cache.setdefault("factor", 2)


class GlobalObject(Model):
    def forward(self, x: Tensor) -> Tensor:
        counter.calls += 1
        return self.depthwise(x) * counter.calls


class Around(Model):
    """A module inside changes it."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = GlobalObject()

    def forward(self, x: Tensor) -> Tensor:
        return self.depthwise(self.inner(x))


random_numbers = torch.Generator()


class OwnGenerator(Model):
    def __init__(self) -> None:
        super().__init__()
        self.generator = torch.Generator()

    def forward(self, x: Tensor) -> Tensor:
        return self.depthwise(x + torch.randn(4, 1, 1, generator=self.generator))


class GlobalGenerator(Model):
    def forward(self, x: Tensor) -> Tensor:
        return self.depthwise(x + torch.randn(4, 1, 1, generator=random_numbers))


class OfPython(Model):
    def __init__(self) -> None:
        super().__init__()
        self.generator = random.Random(0)

    def forward(self, x: Tensor) -> Tensor:
        return self.depthwise(x + self.generator.random())


class OfNumPy(Model):
    def __init__(self) -> None:
        super().__init__()
        self.generator = pytest.importorskip("numpy").random.default_rng(0)

    def forward(self, x: Tensor) -> Tensor:
        return self.depthwise(x + float(self.generator.random()))


class OfNumPyBefore(OfNumPy):
    def __init__(self) -> None:
        super().__init__()
        self.generator = pytest.importorskip("numpy").random.RandomState(0)

    def forward(self, x: Tensor) -> Tensor:
        return self.depthwise(x + float(self.generator.rand()))


class Count(Model):
    def __init__(self) -> None:
        super().__init__()
        self.steps = itertools.count()

    def forward(self, x: Tensor) -> Tensor:
        return self.depthwise(x + next(self.steps))


def counting() -> Callable[..., int]:
    calls = 0

    def count(step: int = 1) -> int:
        nonlocal calls
        calls += step
        return calls

    return count


count_elsewhere, count_too = counting(), counting()


def count_as_attribute() -> int:
    count_as_attribute.calls = getattr(count_as_attribute, "calls", 0) + 1  # type: ignore[attr-defined]
    return int(count_as_attribute.calls)  # type: ignore[attr-defined]


def count_by_default(calls: list[int] = []) -> int:  # noqa: B006
    calls.append(1)
    return len(calls)


class AroundFunction(Model):
    def forward(self, x: Tensor) -> Tensor:
        return self.depthwise(x) * count_elsewhere()


class AroundFirst(Model):
    """Of two functions of the same name."""

    def forward(self, x: Tensor) -> Tensor:
        return self.depthwise(x) * count_elsewhere() * count_too(0)


class AroundSecond(Model):
    def forward(self, x: Tensor) -> Tensor:
        return self.depthwise(x) * count_elsewhere(0) * count_too()


class AsAttribute(Model):
    def forward(self, x: Tensor) -> Tensor:
        return self.depthwise(x) * count_as_attribute()


class ByDefault(Model):
    def forward(self, x: Tensor) -> Tensor:
        return self.depthwise(x) * count_by_default()


class OwnFunction(Model):
    def __init__(self, function: Callable[..., int] | None = None) -> None:
        super().__init__()
        self.count = function or counting()

    def forward(self, x: Tensor) -> Tensor:
        return self.depthwise(x) * self.count()


class OwnPartial(OwnFunction):
    def __init__(self) -> None:
        super().__init__(functools.partial(count_by_default, []))


class OwnMethod(OwnFunction):
    def __init__(self) -> None:
        super().__init__(Counter().count)


@pytest.mark.parametrize(
    ("cls", "what"),
    [
        (OwnGenerator, "the attribute generator"),
        (GlobalGenerator, "test_tracing_state.random_numbers"),
        (OfPython, "the attribute generator"),
        (OfNumPy, "the attribute generator"),
        (OfNumPyBefore, "the attribute generator"),
        (Count, "the attribute steps"),
        (Object, "the attribute counter"),
        (Namespace, "the attribute options"),
        (Nested, "the attribute nested"),
        (Queue, "the attribute recent"),
        (ListInTuple, "the attribute pair"),
        (ListOfClass, "Model.shared"),
        (NumberOfClass, "Model.calls"),
        (GlobalNumber, "test_tracing_state.calls"),
        (GlobalList, "test_tracing_state.history"),
        (GlobalDict, "test_tracing_state.cache"),
        (GlobalObject, "test_tracing_state.counter"),
        (Around, "test_tracing_state.counter"),
        (AroundFunction, "test_tracing_state.counting.<locals>.count"),
        (AroundFirst, "test_tracing_state.counting.<locals>.count"),
        (AroundSecond, "test_tracing_state.counting.<locals>.count"),
        (AsAttribute, "test_tracing_state.count_as_attribute"),
        (ByDefault, "test_tracing_state.count_by_default"),
        (OwnFunction, "the attribute count"),
        (OwnPartial, "the attribute count"),
        (OwnMethod, "the attribute count"),
    ],
)
def test_changed_state_rules_out_a_graph(cls: type[Model], what: str) -> None:
    report = dwswap.report(dwswap.optimize(cls().eval()))
    assert report.mode == "substitution"
    assert f"its forward changes {what}" in str(report.not_traced)


@torch.no_grad()
def test_state_that_is_read_leaves_a_graph() -> None:
    class Reading(Model):
        def forward(self, x: Tensor) -> Tensor:
            factor = self.nested["factor"] + len(history) + counter.calls + Model.calls
            return self.depthwise(x) * (factor + self.pair[1] + self.options.calls)

    model = Reading().eval()
    fast = dwswap.optimize(model)
    assert dwswap.report(fast).mode == "graph"
    torch.testing.assert_close(fast(image(8)), model(image(8)))
