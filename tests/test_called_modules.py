"""Which modules the code around them only calls."""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tiny_models import Block
from torch import Tensor, nn

from dwswap.called_modules import only_called


class Parent(nn.Module):
    """A child that has children, and a forward that uses it in some way."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(Block(), nn.Identity())
        self.head = nn.Identity()
        self.scale = 2.0


def parent(forward: Callable[..., Any]) -> nn.Module:
    return type("Uses", (Parent,), {"forward": forward})()


def call(self: Any, x: Tensor) -> Tensor:
    return self.head(self.body(x)) * self.scale


def call_by_keyword(self: Any, x: Tensor) -> Tensor:
    return self.body(input=x)


def call_with_all(self: Any, *args: Tensor, **kwargs: Any) -> Tensor:
    return self.head(self.body(*args, **kwargs))


def call_with_all_in_order(self: Any, *args: Tensor) -> Tensor:
    return self.head(self.body(*args))


def helper(model: Any, x: Tensor) -> Tensor:
    return model.body(x)


def use(*modules: Any, **others: Any) -> Tensor:
    raise NotImplementedError


def call_elsewhere(self: Any, x: Tensor) -> Tensor:
    return helper(self, x)


def index(self: Any, x: Tensor) -> Tensor:
    return self.body[0](x)


def iterate(self: Any, x: Tensor) -> Tensor:
    for block in self.body:
        x = block(x)
    return x


def name_it(self: Any, x: Tensor) -> Tensor:
    body = self.body
    return body(x)


def look_it_up(self: Any, x: Tensor) -> Tensor:
    return getattr(self, "bo" + "dy")(x)


def all_children(self: Any, x: Tensor) -> Tensor:
    for child in self.children():
        x = child(x)
    return x


def through_modules(self: Any, x: Tensor) -> Tensor:
    return self._modules["body"](x)


def replace(self: Any, x: Tensor) -> Tensor:
    self.body = nn.Identity()
    return self.body(x)


def read_an_attribute(self: Any, x: Tensor) -> Tensor:
    return self.body(x) if self.body.training else x


def in_a_lambda(self: Any, x: Tensor) -> Tensor:
    return (lambda: self.body[0])()(x)


def helper_that_indexes(model: Any, x: Tensor) -> Tensor:
    return model.body[0](x)


def index_elsewhere(self: Any, x: Tensor) -> Tensor:
    return helper_that_indexes(self, x)


def ask_for_the_dtype(self: Any, x: Tensor) -> Tensor:
    return self.body(x.to(next(self.parameters()).dtype))


def sum_of_parameters(self: Any, x: Tensor) -> Tensor:
    return self.body(x) + sum(p.sum() for p in self.parameters())


def sum_of_the_first(self: Any, x: Tensor) -> Tensor:
    return self.body(x) + next(self.parameters()).sum()


def sum_under_another_name(self: Any, x: Tensor) -> Tensor:
    dtype = next(self.parameters())
    return self.body(x) + dtype.sum()


def buffer_by_name(self: Any, x: Tensor) -> Tensor:
    return self.body(x) + dict(self.named_buffers())["body.0.norm.running_mean"].sum()


def from_the_state(self: Any, x: Tensor) -> Tensor:
    return self.body(x) + self.state_dict()["body.0.norm.weight"].sum()


def by_attrgetter(self: Any, x: Tensor) -> Tensor:
    return operator.attrgetter("body.0")(self)(x)


def give_it_all(self: Any, *args: Any, **kwargs: Any) -> Tensor:
    return use(self.body, *args, **kwargs)


def give_it_by_keyword(self: Any, x: Tensor) -> Tensor:
    return use(self.body, x=x)


def give_its_children(self: Any, **kwargs: Any) -> Tensor:
    return use(*self.body, **kwargs)


def give_its_children_in_order(self: Any, x: Tensor) -> Tensor:
    return use(x, *self.body)


def index_and_call_with_all(self: Any, *args: Tensor) -> Tensor:
    return self.body[0](*args)


CALLED = [call, call_by_keyword, call_with_all, call_with_all_in_order, call_elsewhere]
CALLED += [ask_for_the_dtype]


@pytest.mark.parametrize("forward", CALLED)
def test_called(forward: Callable[..., Any]) -> None:
    assert only_called(parent(forward), "body")


OTHERWISE = [index, iterate, name_it, look_it_up, all_children, through_modules, replace]
OTHERWISE += [read_an_attribute, in_a_lambda, index_elsewhere, sum_of_parameters]
OTHERWISE += [sum_of_the_first, sum_under_another_name, buffer_by_name]
OTHERWISE += [from_the_state, by_attrgetter, give_it_all, give_it_by_keyword, give_its_children]
OTHERWISE += [give_its_children_in_order, index_and_call_with_all]


@pytest.mark.parametrize("forward", OTHERWISE)
def test_used_otherwise(forward: Callable[..., Any]) -> None:
    assert not only_called(parent(forward), "body")


def test_every_module_above_counts() -> None:
    model = nn.Sequential(parent(call))
    assert only_called(model, "0.body")
    assert only_called(model, "0")

    def reach_in(self: Any, x: Tensor) -> Tensor:
        return self.inner.body[0](x)

    def pass_by(self: Any, x: Tensor) -> Tensor:
        return self.inner.body(x)

    for forward, expected in ((reach_in, False), (pass_by, True)):
        outer = type("Outer", (nn.Module,), {"forward": forward})()
        outer.inner = parent(call)
        assert only_called(outer, "inner.body") == expected


@pytest.mark.parametrize("container", [nn.ModuleList, lambda items: nn.ModuleDict({"0": items[0]})])
def test_whoever_owns_a_container_may_do_anything_with_its_items(container: Any) -> None:
    model = parent(call)
    model.blocks = container([Block()])
    assert not only_called(model, "blocks.0")


def test_code_that_cannot_be_read() -> None:
    assert not only_called(nn.DataParallel(Block()), "module")
    model = parent(call)
    model.register_forward_hook(lambda module, *_: print(module.body[0]))
    assert not only_called(model, "body")
    model = parent(call)
    model.forward = lambda x: model.body[0](x)  # type: ignore[method-assign]
    assert not only_called(model, "body")

    class Called(Parent):
        def __call__(self, x: Tensor) -> Any:
            return SimpleNamespace(first=self.body[0], all=super().__call__(x))

        def forward(self, x: Tensor) -> Tensor:
            return self.body(x)

    assert not only_called(Called(), "body")


class Helper:
    def __init__(self, model: nn.Module) -> None:
        self.model = model

    def __call__(self, x: Tensor) -> Any:
        return self.model.body[0](x)


def step(self: Any, x: Tensor) -> Tensor:
    return self.step(x) + self.body(x)


@pytest.mark.parametrize(
    "has_it",
    [
        lambda model: functools.partial(helper_that_indexes, model),
        lambda model: functools.partial(helper_that_indexes, model=model),
        lambda model: functools.partial(index, model).func.__get__(model),
        Helper,
    ],
)
def test_what_an_attribute_reaches(has_it: Callable[..., Any]) -> None:
    model = parent(step)
    model.step = abs
    assert only_called(model, "body")
    model.step = has_it(model)
    assert not only_called(model, "body")


class Peer(nn.Module):
    """A module beside ``body`` that has something of it, in a way that is no registration."""

    def __init__(self, held: Any) -> None:
        super().__init__()
        self.held = held

    def forward(self, x: Tensor) -> Tensor:
        return x


@pytest.mark.parametrize(
    "hold",
    [
        lambda model: [model.body],
        lambda model: (model.body[0],),
        lambda model: {"first": [model.body[0].norm]},
        lambda model: {model.body[0]},
        lambda model: [model.body[0].norm.weight],
        lambda model: {"sum": functools.partial(sum_of_parameters, model.body)},
        lambda model: SimpleNamespace(parts=[model.body]),
        lambda model: lambda x: model.body[0](x),
        lambda model: {"forward": model.body.forward},
        lambda model: [model],
    ],
)
def test_what_attributes_hold_of_it(hold: Callable[..., Any]) -> None:
    model = parent(call)
    model.head = Peer([nn.Identity(), "body", 3])
    assert only_called(model, "body")
    for owner in (model, model.head):
        owner.held = hold(model)
        assert not only_called(model, "body")
        del owner.held
    assert only_called(model, "body")
    # What is inside may have it.
    model.body.held = [model.body[0]]
    assert only_called(model, "body")


def test_code_that_runs_without_its_name() -> None:
    def penalized(self: Any, x: Tensor) -> Tensor:
        return self.body(x) + self.penalty

    def of_parameters(self: Any) -> Any:
        return sum(p.sum() for p in self.body.parameters())

    class Descriptor:
        def __init__(self, function: Callable[..., Any]) -> None:
            self.function, self.itself = function, self

        def __get__(self, owner: Any, cls: type) -> Any:
            return self.function(owner)

    for made in (functools.cached_property(of_parameters), Descriptor(of_parameters)):
        namespace: dict[str, Any] = {"forward": penalized, "penalty": made}
        cls = type("Uses", (Parent,), namespace)
        if isinstance(made, functools.cached_property):
            made.__set_name__(cls, "penalty")
        assert not only_called(cls(), "body")
    for name in ("__len__", "__iter__", "__bool__"):
        cls = type("Uses", (Parent,), {"forward": call, name: lambda self: self.body[0]})
        assert not only_called(cls(), "body")
    found = {"__getattr__": lambda self, name: nn.Module.__getattr__(self, name)}
    assert not only_called(type("Uses", (Parent,), {"forward": call, **found})(), "body")
    quiet = {"__repr__": index, "__getstate__": index, "__len__": lambda self: 2}
    assert only_called(type("Uses", (Parent,), {"forward": call, **quiet})(), "body")


def test_a_function_of_the_same_name_is_another() -> None:
    """``body`` of the file is no method, and not what ``self.body`` is."""
    namespace = {"torch": torch}
    code = "def forward(self, x):\n    return self.body(x)\n"
    code += "def body(model, x):\n    return model.body[0](x)\n"
    exec(code, namespace)
    assert only_called(parent(namespace["forward"]), "body")


def test_shared_modules_and_tensors() -> None:
    model = parent(call)
    model.again = model.body
    assert not only_called(model, "body")
    model = parent(call)
    model.inner = model.body[0].norm
    assert not only_called(model, "body")
    model = parent(call)
    model.tied = Block()
    model.tied.depthwise.weight = model.body[0].depthwise.weight
    assert not only_called(model, "body")
