"""BatchNorm in training takes the activation behind it only where nobody sees the difference."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from norm_models import Calls, Change, Patient, at, block, norm, same, silu, step, trains_as
from tiny_models import Backwards, Parts, depthwise, image
from torch import Tensor, nn
from torch.nn.modules import module as module_globals

import dwswap
from dwswap.training_modules import BatchNorm2d

# --- what must stay ------------------------------------------------------------------------------


class OwnNorm(nn.BatchNorm2d):
    pass


class OwnActivation(nn.SiLU):
    pass


def with_change(change: Change) -> nn.Module:
    result = block(nn.SiLU())
    change(result)
    return result


def shared_activation() -> nn.Module:
    activation = nn.SiLU()
    return nn.Sequential(block(activation), block(activation))


def shared_norm() -> nn.Module:
    first, second = block(nn.SiLU()), block(nn.SiLU())
    second[1] = first[1]
    return nn.Sequential(first, second)


def patch(index: int) -> Change:
    return lambda block: setattr(block[index], "forward", lambda x: 2 * x + 1)


def wrap(index: int) -> Change:
    def change(block: nn.Sequential) -> None:
        inner = block[index].forward
        patched: Any = lambda x: 2 * inner(x) + 1  # noqa: E731
        block[index].forward = patched

    return change


SPECIAL: dict[str, tuple[Callable[[], nn.Module], Calls]] = {
    "shared": (shared_activation, ["silu"] * 2),
    "shared norm": (shared_norm, ["silu"] * 2),
    "hook on the parent": (
        lambda: with_change(lambda b: b.register_forward_hook(lambda *_: None)),
        ["silu"],
    ),
    "patched": (lambda: with_change(patch(2)), ["none"]),
    "patched norm": (lambda: with_change(patch(1)), []),
    "subclass": (lambda: block(OwnActivation()), ["none"]),
    "norm of a subclass": (
        lambda: with_change(lambda b: b.__setitem__(1, OwnNorm(8))),
        [],
    ),
    "norm in eval mode": (lambda: with_change(lambda b: b[1].eval()), []),
    "own forward": (lambda: Patient(depthwise(), norm(), nn.SiLU()), ["none"]),
    "own order": (lambda: Backwards(nn.SiLU(), norm(), depthwise()), ["none"]),
    "indices": (lambda: Parts("indices", *block(nn.SiLU())), ["none"]),
    "slices": (lambda: Parts("slices", *block(nn.SiLU())), ["none"]),
    "loop": (lambda: Parts("loop", *block(nn.SiLU())), ["none"]),
    "calls": (lambda: Parts("call", *block(nn.SiLU())), ["silu"]),
}


@pytest.mark.parametrize("inplace", [True, False])
@pytest.mark.parametrize("kind", SPECIAL)
def test_is_taken_only_where_nothing_sees_the_difference(
    kind: str, inplace: bool, norm_calls: Calls
) -> None:
    torch.manual_seed(0)
    build, expected = SPECIAL[kind]
    model = nn.Sequential(depthwise(), build())
    fast = dwswap.optimize(copy.deepcopy(model), inplace=inplace)
    assert any(type(m) is BatchNorm2d for m in fast.modules()) == bool(expected)
    trains_as(fast, model)
    assert norm_calls == expected


class Listed(nn.Module):
    """Its modules are in a list as well, which ``eval()`` of a twin would not reach."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm, self.activation = block(nn.SiLU())
        self.steps: dict[str, Any] = {"all": [self.conv, (self.norm, self.activation)]}
        self.steps["again"] = self.steps

    def forward(self, x: Tensor) -> Tensor:
        conv, rest = self.steps["all"]
        for module in (conv, *rest):
            x = module(x)
        return x


def test_norms_in_lists_stay(norm_calls: Calls) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(depthwise(), Listed())
    fast = dwswap.optimize(model)
    assert type(at(fast, "1.norm")) is nn.BatchNorm2d
    trains_as(fast, model)
    same(fast.eval()(image(8)), model.eval()(image(8)))
    assert norm_calls == []


def test_other_norms_stay() -> None:
    others = (nn.SyncBatchNorm(8), nn.GroupNorm(2, 8), nn.InstanceNorm2d(8), nn.BatchNorm3d(8))
    model = nn.Sequential(depthwise(), *(nn.Sequential(n, nn.SiLU()) for n in others))
    fast = dwswap.optimize(model)
    assert [type(m) for m in fast.modules()][3:] == [type(m) for m in model.modules()][3:]
    assert dwswap.report(fast).elsewhere == {}


Hook = Callable[..., None]
HOOKS: dict[str, Callable[[nn.Module, nn.Module, Hook], Any]] = {
    "norm": lambda n, a, hook: n.register_forward_hook(hook),
    "norm, before": lambda n, a, hook: n.register_forward_pre_hook(hook),
    "norm, backward": lambda n, a, hook: n.register_full_backward_hook(hook),
    "norm, before backward": lambda n, a, hook: n.register_full_backward_pre_hook(hook),
    "activation": lambda n, a, hook: a.register_forward_hook(hook),
    "activation, before": lambda n, a, hook: a.register_forward_pre_hook(hook),
    "activation, backward": lambda n, a, hook: a.register_full_backward_hook(hook),
    "activation, before backward": lambda n, a, hook: a.register_full_backward_pre_hook(hook),
    "all": lambda n, a, hook: module_globals.register_module_forward_hook(hook),
    "all, before": lambda n, a, hook: module_globals.register_module_forward_pre_hook(hook),
    "all, backward": lambda n, a, hook: module_globals.register_module_full_backward_hook(hook),
    "all, before backward": lambda n, a, hook: (
        module_globals.register_module_full_backward_pre_hook(hook)
    ),
}


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("kind", HOOKS)
def test_hooks_see_what_they_saw(kind: str, when: str, norm_calls: Calls) -> None:
    seen: list[Tensor] = []

    def hook(_module: nn.Module, *found: Any) -> None:
        leaves = torch.utils._pytree.tree_leaves(found)
        seen.extend(t.detach().clone() for t in leaves if isinstance(t, Tensor))

    handles = []

    def register(of: nn.Module) -> None:
        handles.append(HOOKS[kind](at(of, "0.1"), at(of, "0.2"), hook))

    model = silu()
    if when == "before":
        register(model)
    fast = dwswap.optimize(model)
    if when == "after":
        register(fast)
        if "all" not in kind:
            register(model)
    try:
        theirs = step(model, image(8))
        theirs_seen = seen.copy()
        seen.clear()
        norm_calls.clear()
        same(step(fast, image(8)), theirs)
    finally:
        for handle in handles:
            handle.remove()
    assert theirs_seen
    same(seen, theirs_seen)
    assert "silu" not in norm_calls if "all" in kind else norm_calls.count("silu") == 1
    if when == "before" and "all" not in kind:
        hooked = "0.1" if "norm" in kind else "0.2"
        assert type(at(fast, hooked)) is type(at(model, hooked))
    if when == "after":
        norm_calls.clear()
        trains_as(fast, model)
        assert norm_calls == ["silu"] * 2


# --- what is changed afterwards ------------------------------------------------------------------


def set_at(index: int, module: Callable[[], nn.Module]) -> Change:
    return lambda block: block.__setitem__(index, module())


def delete(*indices: int) -> Change:
    def change(block: nn.Sequential) -> None:
        for index in indices:
            del block[index]

    return change


def own_order(block: nn.Sequential) -> None:
    block.forward = lambda x: block[1](block[0](x))  # type: ignore[method-assign]


CHANGES: dict[str, tuple[Change, Calls]] = {
    "another activation": (set_at(2, nn.GELU), ["none"]),
    "no activation": (set_at(2, nn.Identity), ["none"]),
    "its own again": (set_at(2, nn.SiLU), ["none"]),
    "a subclass": (set_at(2, OwnActivation), ["none"]),
    "activation deleted": (delete(2), ["none"]),
    "one between the two": (lambda b: b.insert(2, nn.AvgPool2d(2)), ["none"]),
    "nothing between the two": (lambda b: b.insert(2, nn.Identity()), ["none"]),
    "one in front": (lambda b: b.insert(0, nn.Identity()), ["silu"]),
    "convolution deleted": (delete(0), ["silu"]),
    "one behind": (lambda b: b.append(nn.SiLU()), ["silu"]),
    "no norm": (set_at(1, nn.Identity), []),
    "own norm": (set_at(1, lambda: OwnNorm(8)), []),
    "norm in eval mode": (lambda b: b[1].eval(), []),
    "activation in eval mode": (lambda b: b[2].eval(), ["silu"]),
    "norm patched": (patch(1), []),
    "norm wrapped": (wrap(1), ["none"]),
    "activation patched": (patch(2), ["none"]),
    "activation wrapped": (wrap(2), ["none"]),
    "activation compiled": (lambda b: b[2].compile(backend="eager"), ["none"]),
    "forward patched": (own_order, ["none"]),
    "weight parametrized": (
        lambda b: nn.utils.parametrize.register_parametrization(b[1], "weight", nn.Tanh()),
        [],
    ),
}


@pytest.mark.parametrize("kind", CHANGES)
def test_changed_afterwards(kind: str, norm_calls: Calls) -> None:
    torch.manual_seed(0)
    change, expected = CHANGES[kind]
    model = nn.Sequential(block(nn.SiLU()), nn.Flatten())
    fast = dwswap.optimize(model)
    change(at(fast, "0"))
    change(at(model, "0"))
    trains_as(fast, model)
    assert norm_calls == expected


def test_a_norm_in_front_of_another_activation_than_its_own(norm_calls: Calls) -> None:
    """Under the name of its own there is another of ours now."""
    torch.manual_seed(0)
    model = nn.Sequential(block(nn.SiLU(), norm(), nn.Hardswish()), nn.Flatten())
    fast = dwswap.optimize(model)
    for of in (fast, model):
        delete(3, 0)(at(of, "0"))
    trains_as(fast, model)


def test_an_activation_of_another_block_is_taken(norm_calls: Calls) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(block(nn.SiLU()), block(nn.ReLU()))
    fast = dwswap.optimize(model)
    for of in (fast, model):
        at(of, "0")[2] = at(of, "1")[2]
    trains_as(fast, model)
    assert norm_calls == ["relu", "relu"]


def test_activations_stay_where_norms_become_synchronized(norm_calls: Calls) -> None:
    model = silu()
    convert: Callable[[nn.Module], nn.Module] = nn.SyncBatchNorm.convert_sync_batchnorm
    fast = convert(dwswap.optimize(model))
    assert type(at(fast, "0.1")) is nn.SyncBatchNorm
    assert list(fast.state_dict()) == list(model.state_dict())
    same(at(fast, "0.2")(image(8)), F.silu(image(8)))


USES: dict[str, Callable[[nn.Module, Tensor], Any]] = {
    "the norm": lambda m, x: at(m, "0.1")(x),
    "the activation": lambda m, x: at(m, "0.2")(x),
    "a part": lambda m, x: at(m, "0")[:2](x),
    "a loop": lambda m, x: [x := layer(x) for layer in at(m, "0")],
    "elsewhere": lambda m, x: nn.Sequential(at(m, "0.1"), nn.GELU())(x),
    "all parts elsewhere": lambda m, x: nn.Sequential(*at(m, "0"), nn.GELU())(x),
    "only parts": lambda m, x: nn.Sequential(*m.children())(x),
}


@pytest.mark.parametrize("kind", USES)
def test_used_in_another_place(kind: str, norm_calls: Calls) -> None:
    model = silu()
    fast = dwswap.optimize(model)
    same(USES[kind](fast, image(8)), USES[kind](model, image(8)))
    norm_calls.clear()
    trains_as(fast, model)
    assert norm_calls == ["silu"] * 2


def test_a_norm_without_its_model(norm_calls: Calls) -> None:
    model = silu()
    alone = at(dwswap.optimize(model), "0.1")
    same(alone(image(8)), at(model, "0.1")(image(8)))
    assert norm_calls == ["none"]
    assert "activation" not in repr(alone)
