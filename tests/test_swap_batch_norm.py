"""BatchNorm in training and the activation behind it: one operator where that is safe, and back."""

from __future__ import annotations

import copy
import gc
import importlib
import pickle
import weakref
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
import torch.nn.functional as F
from tiny_models import depthwise, image
from torch import Tensor, fx, nn
from torch.autograd import forward_ad
from torch.nn.modules import module as module_globals
from torch.utils.checkpoint import checkpoint, checkpoint_sequential

import dwswap
from dwswap.activations import PAIRS
from dwswap.batch_norm import NORM_ACTIVATIONS
from dwswap.training_modules import ABSORBABLE, BatchNorm2d

norms = importlib.import_module("dwswap.batch_norm")

KINDS = {"relu": nn.ReLU, "relu6": nn.ReLU6, "hardswish": nn.Hardswish, "silu": nn.SiLU}
EACH_KIND = pytest.mark.parametrize("name", KINDS)

Calls = list[str]
Change = Callable[[Any], object]


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> Calls:
    """Lets the operator run on the CPU, by aten; the activations that it is called with."""
    seen: Calls = []

    def counted(*arguments: Any) -> Tensor:
        seen.append(arguments[8])
        return cast(Tensor, norms.batch_norm(*arguments))

    monkeypatch.setattr(norms, "has_kernels", lambda tensor: tensor.dtype is not torch.float64)
    monkeypatch.setattr(norms, "_capability", lambda device: 9)
    monkeypatch.setattr(norms, "build", SimpleNamespace(load=lambda: True))
    monkeypatch.setattr("dwswap.training_modules.batch_norm", counted)
    return seen


def block(*activations: nn.Module, **options: Any) -> nn.Sequential:
    return nn.Sequential(depthwise(bias=False), norm(**options), *activations)


def norm(**options: Any) -> nn.BatchNorm2d:
    result = nn.BatchNorm2d(8, **options)
    for parameter in result.parameters():
        nn.init.uniform_(parameter, -1, 1)
    return result


def silu(**options: Any) -> nn.Sequential:
    """Two blocks, and the norms of both take the activation."""
    torch.manual_seed(0)
    blocks = (block(nn.SiLU(), **options) for _ in range(2))
    return nn.Sequential(*blocks, nn.Flatten())


def at(model: nn.Module, path: str) -> Any:
    return model.get_submodule(path)


def step(model: nn.Module, x: Tensor, needs_gradient: bool = True) -> list[Tensor]:
    """The output, all gradients and all tensors of ``model`` after a step of SGD."""
    leaf = x.detach().requires_grad_(needs_gradient)
    output = model(leaf)
    results = [output.detach()]
    if output.requires_grad:
        learned = [t for t in (leaf, *model.parameters()) if t.requires_grad]
        grads = torch.autograd.grad(output.square().mean(), learned, materialize_grads=True)
        with torch.no_grad():
            for parameter, grad in zip(learned, grads, strict=True):
                if parameter is not leaf:
                    parameter -= 0.1 * grad
        results += grads
    return [*results, *(t.detach().clone() for t in model.state_dict().values())]


def same(ours: Any, theirs: Any, tolerance: float = 1e-5) -> None:
    torch.testing.assert_close(ours, theirs, rtol=tolerance, atol=tolerance, check_stride=True)


def trains_as(fast: nn.Module, model: nn.Module, x: Tensor | None = None) -> None:
    x = image(8) if x is None else x
    same(step(fast, x), step(model, x))


@EACH_KIND
@pytest.mark.parametrize("inplace", [True, False])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_a_model_trains_as_before(
    name: str,
    inplace: bool,
    layout: torch.memory_format,
    calls: Calls,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    torch.manual_seed(0)
    kind = cast(Callable[..., nn.Module], KINDS[name])
    model = nn.Sequential(block(kind(inplace=inplace)), block(kind(inplace=inplace)))
    model.to(memory_format=layout)
    fast = dwswap.optimize(model)
    inputs = [image(8, batch=2 + i).contiguous(memory_format=layout) for i in range(3)]
    theirs = [step(model, x) for x in inputs]
    monkeypatch.setattr(KINDS[name], "forward", None)  # has nothing left to do
    same([step(fast, x) for x in inputs], theirs)
    assert calls == [name] * 6
    assert int(at(fast, "0.1").num_batches_tracked) == 3


def test_without_a_kernel_both_compute_what_they_did() -> None:
    model = silu()
    for ours, theirs in zip(
        step(dwswap.optimize(model), image(8)), step(model, image(8)), strict=True
    ):
        assert torch.equal(ours, theirs)


def test_the_names_are_those_of_the_operator() -> None:
    assert frozenset(KINDS) | {"none"} == NORM_ACTIVATIONS
    assert set(KINDS.values()) == set(ABSORBABLE)


class Functional(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = depthwise(), norm()

    def forward(self, x: Tensor) -> Tensor:
        return F.silu(self.norm(self.conv(x)))


@pytest.mark.parametrize(
    "build",
    [block, lambda: block(nn.GELU()), lambda: block(nn.Dropout(0.0), nn.SiLU()), Functional],
    ids=["nothing", "GELU", "not behind it", "functional"],
)
def test_a_norm_alone(build: Callable[[], nn.Module], calls: Calls) -> None:
    model = nn.Sequential(build(), nn.Flatten())
    fast = dwswap.optimize(model)
    trains_as(fast, model)
    assert calls == ["none"]


class Building(nn.Sequential):
    """As torchvision's ``Conv2dNormActivation``: a subclass that only builds."""

    def __init__(self, activation: nn.Module) -> None:
        super().__init__(depthwise(bias=False), norm(), activation)


def test_a_subclass_of_sequential_that_only_builds(calls: Calls) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(Building(nn.SiLU()), nn.Flatten())
    fast = dwswap.optimize(model)
    assert type(at(fast, "0")) is Building
    trains_as(fast, model)
    assert calls == ["silu"]


# --- kinds of norms and inputs -------------------------------------------------------------------


def frozen(model: nn.Module, *names: str) -> None:
    for name in names:
        model.get_parameter(name).requires_grad_(False)


NORMS: dict[str, tuple[dict[str, Any], Change, Calls]] = {
    "not affine": ({"affine": False}, len, ["silu"] * 2),
    "no statistics": ({"track_running_stats": False}, len, ["silu"] * 2),
    "neither": ({"affine": False, "track_running_stats": False}, len, ["silu"] * 2),
    "large eps": ({"eps": 0.5, "momentum": 0.7}, len, ["silu"] * 2),
    "no momentum": ({"momentum": 0.0}, len, ["silu"] * 2),
    "a mean of all batches": ({"momentum": None}, len, []),
    "frozen weight": ({}, lambda m: frozen(m, "0.1.weight", "1.1.weight"), ["silu"] * 2),
    "frozen bias": ({}, lambda m: frozen(m, "0.1.bias"), ["silu"] * 2),
    "frozen": ({}, lambda m: m.requires_grad_(False), ["silu"] * 2),
    "no bias": ({}, lambda m: setattr(at(m, "0.1"), "bias", None), ["silu"]),
    "no counter": ({}, lambda m: setattr(at(m, "0.1"), "num_batches_tracked", None), ["silu"] * 2),
    "one in eval mode": ({}, lambda m: at(m, "0.1").eval(), ["silu"]),
}


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("kind", NORMS)
def test_norms_of_all_kinds(kind: str, when: str, calls: Calls) -> None:
    options, change, expected = NORMS[kind]
    model = silu(**options)
    if when == "before":
        change(model)
    fast = dwswap.optimize(model)
    if when == "after":
        change(fast)
        change(model)
    trains_as(fast, model)
    trains_as(fast, model)
    assert calls == expected * 2


@pytest.mark.parametrize("when", ["before", "after"])
def test_statistics_that_are_not_tracked_any_more_stay(when: str, calls: Calls) -> None:
    """PyTorch looks at the flag, and not only at whether there are buffers."""
    model = silu()
    fast = dwswap.optimize(model) if when == "after" else model
    at(model, "0.1").track_running_stats = False
    at(fast, "0.1").track_running_stats = False
    fast = dwswap.optimize(model) if when == "before" else fast
    trains_as(fast, model)


@pytest.mark.parametrize("learns", [True, False])
def test_a_norm_of_the_input_itself(learns: bool, calls: Calls) -> None:
    model = nn.Sequential(nn.Sequential(norm(), nn.SiLU()), depthwise())
    model.requires_grad_(learns)
    fast = dwswap.optimize(model)
    for needs_gradient in (True, False):
        ours, theirs = (step(m, image(8), needs_gradient) for m in (fast, model))
        same(ours, theirs)
    assert calls == ["silu"] * 2


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_without_gradients_statistics_move_too(mode: Any, calls: Calls) -> None:
    model = silu()
    fast = dwswap.optimize(model)
    versions = [b._version for b in fast.buffers()]
    with mode():
        same(fast(image(8)), model(image(8)))
    same(list(fast.buffers()), list(model.buffers()))
    assert all(b._version > v for b, v in zip(fast.buffers(), versions, strict=True))
    assert calls == ["silu"] * 2


@pytest.mark.parametrize("shape", [(1, 8, 1, 1), (8, 5, 5), (2, 8, 3, 3, 3)])
def test_errors_are_those_of_pytorch(shape: tuple[int, ...], calls: Calls) -> None:
    model = nn.Sequential(nn.Sequential(norm(), nn.SiLU()), depthwise())
    fast = dwswap.optimize(model)
    with pytest.raises(ValueError) as theirs:  # noqa: PT011
        model(torch.randn(shape))
    with pytest.raises(ValueError) as ours:  # noqa: PT011
        fast(torch.randn(shape))
    assert str(ours.value) == str(theirs.value)
    assert calls == []


INPUTS: dict[str, Callable[[], Tensor]] = {
    "empty": lambda: torch.empty(0, 8, 9, 9),
    "not dense": lambda: image(8, size=18)[:, :, ::2, ::2],
    "expanded": lambda: image(8, batch=1).expand(4, -1, -1, -1),
    "float64": lambda: image(8).double(),
}


@pytest.mark.parametrize("kind", INPUTS)
def test_inputs_that_are_left_to_pytorch(kind: str, calls: Calls) -> None:
    x = INPUTS[kind]()
    model = nn.Sequential(nn.Sequential(norm(), nn.SiLU()), depthwise()).train().to(x.dtype)
    ours, theirs = step(dwswap.optimize(model), x), step(model, x)
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5, equal_nan=True)
    assert calls == []


# --- second gradients ----------------------------------------------------------------------------


def penalty(model: nn.Module) -> list[Tensor]:
    """Gradients, and the gradients of a penalty on them."""
    tensors = (image(8).requires_grad_(), *model.parameters())
    first = torch.autograd.grad(model(tensors[0]).square().sum(), tensors, create_graph=True)
    of_slope = sum((slope.square().sum() for slope in first), torch.zeros(()))
    return [*first, *torch.autograd.grad(of_slope, tensors)]


@EACH_KIND
def test_second_gradients(name: str, calls: Calls) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(block(KINDS[name]()), block(KINDS[name]()))
    for ours, theirs in zip(penalty(dwswap.optimize(model)), penalty(model), strict=True):
        same(ours / theirs.abs().max(), theirs / theirs.abs().max(), 1e-4)
    assert calls == [name] * 2


class Twice(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.block = block(nn.SiLU())

    def forward(self, x: Tensor) -> Tensor:
        return cast(Tensor, self.block(self.block(x)))


def test_gradients_of_a_norm_that_is_called_on_what_it_computed(calls: Calls) -> None:
    """Its input depends on its weight."""
    torch.manual_seed(0)
    model = Twice()
    fast = dwswap.optimize(model)
    trains_as(fast, model)
    for ours, theirs in zip(penalty(fast), penalty(model), strict=True):
        same(ours / theirs.abs().max(), theirs / theirs.abs().max(), 1e-4)
    assert calls == ["silu"] * 4


@pytest.mark.parametrize("name", sorted(NORM_ACTIVATIONS))
@pytest.mark.parametrize("wanted", [(True, True, True), (True, False, True), (False, True, False)])
def test_the_formulas(name: str, wanted: tuple[bool, ...]) -> None:
    torch.manual_seed(3)
    tensors = [torch.randn(s, dtype=torch.float64) for s in ((3, 2, 2, 2), (2,), (2,))]
    leaves = [t.requires_grad_(needed) for t, needed in zip(tensors, wanted, strict=True)]

    def call(*of: Tensor) -> Tensor:
        return cast(Tensor, norms.batch_norm(*of, None, None, None, 0.1, 1e-5, name))

    def backward(grad: Tensor, *of: Tensor) -> list[Tensor]:
        pair = PAIRS["none", name]
        found = norms._differentiable_backward(grad, *of, 1e-5, pair, wanted)
        assert [f is not None for f in found] == list(wanted)
        return [f for f in found if f is not None]

    assert torch.autograd.gradcheck(call, leaves)
    assert torch.autograd.gradgradcheck(call, leaves)
    grad = torch.randn(3, 2, 2, 2, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(backward, (grad, *leaves))
    expected = torch.autograd.grad(call(*leaves), [t for t in leaves if t.requires_grad], grad)
    same(backward(grad, *leaves), list(expected), 1e-12)


# --- what must stay ------------------------------------------------------------------------------


class Patient(nn.Sequential):
    """Reads what the activation is applied to."""

    def forward(self, input: Tensor) -> Tensor:
        hidden = self[1](self[0](input))
        return cast(Tensor, self[2](hidden) + hidden)


class Backwards(nn.Sequential):
    def __iter__(self) -> Iterator[nn.Module]:
        return iter(list(self._modules.values())[::-1])


class OwnNorm(nn.BatchNorm2d):
    pass


class OwnActivation(nn.SiLU):
    pass


class Parts(nn.Module):
    """A Sequential of which the model takes parts."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how, self.layers = how, block(nn.SiLU())

    def forward(self, x: Tensor) -> Tensor:
        if self.how == "indices":
            return cast(Tensor, self.layers[1](self.layers[0](x)))
        if self.how == "slices":
            hidden = self.layers[:2](x)
            return cast(Tensor, self.layers[2:](hidden) + hidden)
        if self.how == "loop":
            seen = []
            for layer in self.layers:
                x = layer(x)
                seen.append(x)
            return seen[1] + seen[2]
        return cast(Tensor, self.layers(x))


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
    "indices": (lambda: Parts("indices"), ["none"]),
    "slices": (lambda: Parts("slices"), ["none"]),
    "loop": (lambda: Parts("loop"), ["none"]),
    "calls": (lambda: Parts("call"), ["silu"]),
}


@pytest.mark.parametrize("inplace", [True, False])
@pytest.mark.parametrize("kind", SPECIAL)
def test_is_taken_only_where_nothing_sees_the_difference(
    kind: str, inplace: bool, calls: Calls
) -> None:
    torch.manual_seed(0)
    build, expected = SPECIAL[kind]
    model = nn.Sequential(depthwise(), build())
    fast = dwswap.optimize(copy.deepcopy(model), inplace=inplace)
    assert any(type(m) is BatchNorm2d for m in fast.modules()) == bool(expected)
    trains_as(fast, model)
    assert calls == expected


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
def test_hooks_see_what_they_saw(kind: str, when: str, calls: Calls) -> None:
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
        calls.clear()
        same(step(fast, image(8)), theirs)
    finally:
        for handle in handles:
            handle.remove()
    assert theirs_seen
    same(seen, theirs_seen)
    assert "silu" not in calls if "all" in kind else calls.count("silu") == 1
    if when == "before" and "all" not in kind:
        hooked = "0.1" if "norm" in kind else "0.2"
        assert type(at(fast, hooked)) is type(at(model, hooked))
    if when == "after":
        calls.clear()
        trains_as(fast, model)
        assert calls == ["silu"] * 2


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
def test_changed_afterwards(kind: str, calls: Calls) -> None:
    torch.manual_seed(0)
    change, expected = CHANGES[kind]
    model = nn.Sequential(block(nn.SiLU()), nn.Flatten())
    fast = dwswap.optimize(model)
    change(at(fast, "0"))
    change(at(model, "0"))
    trains_as(fast, model)
    assert calls == expected


def test_a_norm_in_front_of_another_activation_than_its_own(calls: Calls) -> None:
    """Under the name of its own there is another of ours now."""
    torch.manual_seed(0)
    model = nn.Sequential(block(nn.SiLU(), norm(), nn.Hardswish()), nn.Flatten())
    fast = dwswap.optimize(model)
    for of in (fast, model):
        delete(3, 0)(at(of, "0"))
    trains_as(fast, model)


def test_an_activation_of_another_block_is_taken(calls: Calls) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(block(nn.SiLU()), block(nn.ReLU()))
    fast = dwswap.optimize(model)
    for of in (fast, model):
        at(of, "0")[2] = at(of, "1")[2]
    trains_as(fast, model)
    assert calls == ["relu", "relu"]


def test_activations_stay_where_norms_become_synchronized(calls: Calls) -> None:
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
def test_used_in_another_place(kind: str, calls: Calls) -> None:
    model = silu()
    fast = dwswap.optimize(model)
    same(USES[kind](fast, image(8)), USES[kind](model, image(8)))
    calls.clear()
    trains_as(fast, model)
    assert calls == ["silu"] * 2


def test_a_norm_without_its_model(calls: Calls) -> None:
    model = silu()
    alone = at(dwswap.optimize(model), "0.1")
    same(alone(image(8)), at(model, "0.1")(image(8)))
    assert calls == ["none"]
    assert "activation" not in repr(alone)


# --- back, copies and files ----------------------------------------------------------------------


def pickled(module: Any) -> Any:
    return pickle.loads(pickle.dumps(module))


@pytest.mark.parametrize("copied", [copy.deepcopy, pickled])
def test_copies_absorb_as_well(copied: Callable[[Any], Any], calls: Calls) -> None:
    model = silu()
    fast = dwswap.optimize(model)
    other = copied(fast)
    at(fast, "0")[2] = nn.GELU()  # is none of the copy's
    trains_as(other, model)
    assert calls == ["silu"] * 2
    calls.clear()
    model = silu()
    block = copied(at(dwswap.optimize(model), "1"))
    trains_as(block, at(model, "1"))
    assert calls == ["silu"]


@pytest.mark.parametrize("copied", [copy.deepcopy, pickled])
def test_the_copy_of_a_norm_is_alone(copied: Callable[[Any], Any], calls: Calls) -> None:
    model = silu()
    fast = dwswap.optimize(model)
    trains_as(copied(at(fast, "0.1")), at(model, "0.1"))
    assert calls == ["none"]


def test_in_place_the_place_is_in_the_modules_of_the_caller(calls: Calls) -> None:
    model = silu()
    original, block, parameters = copy.deepcopy(model), model[0], list(model.parameters())
    assert dwswap.optimize(model, inplace=True) is model
    assert model[0] is block
    assert all(map(lambda a, b: a is b, model.parameters(), parameters))
    gc.collect()
    trains_as(model, original)
    assert calls == ["silu"] * 2
    for of in (model, original):
        at(of, "0")[2] = nn.GELU()
    calls.clear()
    trains_as(model, original)
    assert calls == ["none", "silu"]


@pytest.mark.parametrize("inplace", [True, False])
def test_optimize_twice(inplace: bool, calls: Calls) -> None:
    model = silu()
    fast = dwswap.optimize(dwswap.optimize(model), inplace=inplace)
    trains_as(fast, model)
    assert calls == ["silu"] * 2


def test_optimize_again_after_the_layers_got_another_forward(calls: Calls) -> None:
    model = silu()
    fast = dwswap.optimize(model)
    for of in (fast, model):
        layers: Any = at(of, "0")
        of.add_module("0", Patient(*layers))
    trains_as(dwswap.optimize(fast), model)


@pytest.mark.parametrize("copied", [lambda m: m, copy.deepcopy, pickled])
def test_the_model_is_freed_at_once(copied: Callable[[Any], Any], calls: Calls) -> None:
    fast = copied(dwswap.optimize(silu()))
    gc.collect()
    gc.disable()
    try:
        step(fast, image(8))
        alive = [weakref.ref(module) for module in fast.modules()]
        del fast
        assert [ref() for ref in alive] == [None] * len(alive)
    finally:
        gc.enable()


@pytest.mark.parametrize("restore_inplace", [True, False])
@pytest.mark.parametrize("inplace", [True, False])
def test_restore(inplace: bool, restore_inplace: bool, calls: Calls) -> None:
    torch.manual_seed(0)
    kinds = (nn.ReLU6(inplace=True), nn.SiLU(), nn.ReLU(inplace=True), nn.GELU())
    model = nn.Sequential(*map(block, kinds))
    original = copy.deepcopy(model)
    parameters = list(model.parameters())
    fast = dwswap.optimize(model, inplace=inplace)
    assert type(at(fast, "2.1")) is BatchNorm2d
    assert list(fast.state_dict()) == list(original.state_dict())
    ours = list(fast.parameters())
    restored = dwswap.restore(fast, inplace=restore_inplace)
    assert (restored is fast) == restore_inplace
    assert list(restored.state_dict()) == list(original.state_dict())
    for module, before in zip(restored.modules(), original.modules(), strict=True):
        assert type(module) is type(before)
        assert module.__dict__.keys() == before.__dict__.keys()
        assert module.__dict__.get("inplace") == before.__dict__.get("inplace")
    if inplace and restore_inplace:
        assert all(map(lambda a, b: a is b, restored.parameters(), parameters))
    if not restore_inplace:  # the other is as it was
        assert type(at(fast, "2.1")) is BatchNorm2d
        assert all(map(lambda a, b: a is b, fast.parameters(), ours))
        trains_as(copy.deepcopy(fast), copy.deepcopy(original))
        assert calls == ["relu6", "silu", "relu", "none"]
        calls.clear()
    trains_as(restored, original)
    assert calls == []
    trains_as(dwswap.optimize(restored), original)
    assert calls == ["relu6", "silu", "relu", "none"]


def test_restore_of_a_part(calls: Calls) -> None:
    model = silu()
    part = nn.Sequential(*at(dwswap.optimize(model), "0"))
    restored = dwswap.restore(part)
    assert [type(m) for m in restored.children()] == [nn.Conv2d, nn.BatchNorm2d, nn.SiLU]
    trains_as(restored, at(model, "0"))
    assert not [name for m in restored.modules() for name in m.__dict__ if "dwswap" in name]


def test_restore_after_a_weight_was_parametrized(calls: Calls) -> None:
    model = silu()
    fast = dwswap.optimize(model)
    for of in (fast, model):
        nn.utils.parametrize.register_parametrization(at(of, "0.1"), "weight", nn.Tanh())
    trains_as(dwswap.restore(fast), model)


# --- inference, graphs and transforms ------------------------------------------------------------


@pytest.mark.parametrize("inplace", [True, False])
def test_then_for_inference(inplace: bool, calls: Calls) -> None:
    model = silu()
    fast = dwswap.optimize(model)
    trains_as(fast, model)
    calls.clear()
    fast.eval(), model.eval()
    same(fast(image(8)), model(image(8)))
    same(dwswap.optimize(fast, fuse=False)(image(8)), model(image(8)))
    graph = dwswap.optimize(fast, inplace=inplace)
    assert isinstance(graph, fx.GraphModule)
    assert "folded 2 BatchNorm" in str(dwswap.report(graph))
    same(graph(image(8)), model(image(8)))
    if not inplace:
        trains_as(fast.train(), model.train())
    assert calls == ([] if inplace else ["silu"] * 2)


@pytest.mark.parametrize("train", [True, False])
def test_symbolic_trace(train: bool, calls: Calls) -> None:
    model = silu().train(train)
    fast = dwswap.optimize(silu()).train(train)
    traced = fx.symbolic_trace(fast)
    same(traced(image(8)), model(image(8)))
    statistics = ("0.1.running_mean", "1.1.running_var")
    same([fast.get_buffer(n) for n in statistics], [model.get_buffer(n) for n in statistics])
    assert calls == []


def test_torch_compile(calls: Calls) -> None:
    model = silu()
    fast = dwswap.optimize(model)
    compiled = torch.compile(fast, backend="eager", fullgraph=True)
    same(compiled(image(8)), model(image(8)))
    same(list(fast.buffers()), list(model.buffers()))
    assert calls == []
    trains_as(fast, model)
    assert calls == ["silu"] * 2


def test_torch_export(calls: Calls) -> None:
    model = silu()
    program = torch.export.export(dwswap.optimize(model), (image(8),))
    module = program.module()
    same(module(image(8)), model(image(8)))
    same(dict(module.named_buffers()), dict(model.named_buffers()))
    assert calls == []


def test_functional_call(calls: Calls) -> None:
    model = silu()
    fast = dwswap.optimize(model)
    results = []
    for of in (fast, model):
        parameters = {n: 2 * p.detach() for n, p in of.named_parameters()}
        buffers = {n: b.clone() for n, b in of.named_buffers()}

        def loss(p: Any, b: Any, x: Tensor, of: nn.Module = of) -> Tensor:
            return cast(Tensor, torch.func.functional_call(of, (p, b), (x,)).square().mean())

        results.append([loss(parameters, buffers, image(8)), buffers])
        results[-1].append(torch.func.grad(loss)(parameters, buffers, image(8)))
    same(results[0], results[1])
    assert calls == ["silu"] * 2
    same(dict(fast.named_buffers()), dict(silu().named_buffers()))


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpoint(reentrant: bool, calls: Calls) -> None:
    model = silu()

    class Checkpointed(nn.Module):
        def __init__(self, inner: nn.Module) -> None:
            super().__init__()
            self.inner = inner

        def forward(self, x: Tensor) -> Tensor:
            return cast(Tensor, checkpoint(self.inner, x, use_reentrant=reentrant))

    def learn(of: nn.Module) -> list[Any]:
        leaf = image(8).requires_grad_()
        output = Checkpointed(of)(leaf)
        output.square().mean().backward()
        return [output, leaf.grad, [p.grad for p in of.parameters()], list(of.buffers())]

    same(learn(dwswap.optimize(model)), learn(model))
    assert calls == ["silu"] * 4


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpoints_between_norm_and_activation(reentrant: bool, calls: Calls) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(block(nn.SiLU(), depthwise(), nn.Flatten()), nn.Identity())

    def learn(of: nn.Module) -> list[Any]:
        leaf = image(8).requires_grad_()
        output = checkpoint_sequential(at(of, "0"), 5, leaf, use_reentrant=reentrant)
        output.square().mean().backward()
        return [output, leaf.grad, [p.grad for p in of.parameters()], list(of.buffers())]

    same(learn(dwswap.optimize(model)), learn(model))


def test_autocast(calls: Calls) -> None:
    model = silu()
    fast = dwswap.optimize(model)
    with torch.autocast("cpu", torch.bfloat16):
        ours, theirs = (step(m, image(8)) for m in (fast, model))
    assert ours[0].dtype is theirs[0].dtype is torch.bfloat16
    same(ours, theirs, 2e-2)
    assert calls == ["silu"] * 2


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_forward_mode_and_vmap_are_left_to_pytorch(calls: Calls) -> None:
    model = silu(track_running_stats=False)
    fast = dwswap.optimize(model)
    found = []
    for of in (fast, model):
        with forward_ad.dual_level():
            dual = forward_ad.make_dual(image(8), image(8).cos())
            found.append([*forward_ad.unpack_dual(of(dual))])
        found[-1].append(torch.func.vmap(of)(torch.stack([image(8), image(8) ** 2])))
    same(found[0], found[1])
    assert calls == []


@pytest.mark.filterwarnings("ignore")
def test_jit_trace(calls: Calls) -> None:
    model = silu()
    traced = torch.jit.trace(dwswap.optimize(model), image(8), check_trace=False)
    model(image(8))
    same(traced(image(8)), model(image(8)))
    assert calls == []


# --- timm ---------------------------------------------------------------------------------------


def timm_model(**options: Any) -> nn.Sequential:
    module = pytest.importorskip("timm.layers.norm_act")
    torch.manual_seed(0)
    norm = module.BatchNormAct2d(8, **{"act_layer": nn.SiLU} | options)
    return nn.Sequential(nn.Sequential(depthwise(bias=False), norm), nn.Flatten())


@pytest.mark.parametrize("inplace", [True, False])
@EACH_KIND
def test_a_model_of_timm_trains_as_before(name: str, inplace: bool, calls: Calls) -> None:
    model = timm_model(act_layer=KINDS[name], inplace=inplace)
    fast = dwswap.optimize(model)
    for copied in (fast, copy.deepcopy(fast), pickled(fast)):
        trains_as(copied, copy.deepcopy(model))
    assert calls == [name] * 3
    assert dwswap.report(fast).elsewhere["0.1"][0].name == name
    restored = dwswap.restore(fast)
    assert [type(m) for m in restored.modules()] == [type(m) for m in model.modules()]


TIMM_CHANGES: dict[str, tuple[Callable[[Any], object], Calls]] = {
    "no activation": (lambda n: setattr(n, "act", nn.Identity()), ["none"]),
    "another": (lambda n: setattr(n, "act", nn.ReLU()), ["relu"]),
    "unknown": (lambda n: setattr(n, "act", nn.GELU()), []),
    "dropout": (lambda n: setattr(n, "drop", nn.Dropout(0.0)), []),
    "hook": (lambda n: n.act.register_forward_hook(lambda _m, _args, output: output + 1), []),
    "hook on it": (
        lambda n: n.register_forward_hook(lambda _m, _args, output: output + 1),
        ["silu"],
    ),
    "patched": (lambda n: setattr(n.act, "forward", lambda x: 2 * x), []),
    "eval mode": (lambda n: n.eval(), []),
}


@pytest.mark.parametrize("kind", TIMM_CHANGES)
def test_a_norm_of_timm_that_is_changed_afterwards(kind: str, calls: Calls) -> None:
    model = timm_model()
    fast = dwswap.optimize(model)
    change, expected = TIMM_CHANGES[kind]
    change(at(fast, "0.1"))
    change(at(model, "0.1"))
    trains_as(fast, model)
    assert calls == expected


def test_an_activation_of_timm_that_was_patched_before(calls: Calls) -> None:
    model = timm_model()
    at(model, "0.1.act").forward = lambda x: 2 * x
    trains_as(dwswap.optimize(copy.deepcopy(model)), model)
    assert calls == []


# --- the report ----------------------------------------------------------------------------------


def test_the_report() -> None:
    model = nn.Sequential(block(nn.SiLU()), block(nn.GELU()), block(nn.ReLU6(inplace=True)))
    fast = dwswap.optimize(model)
    for report in (dwswap.explain(model), dwswap.report(fast), dwswap.report(pickled(fast))):
        found = [c for changes in report.elsewhere.values() for c in changes]
        changes = {c.subject: c for c in found if c.kind == "batch_norm"}
        assert [(path, c.name) for path, c in changes.items()] == [
            *(("0.1", "silu"), ("1.1", None), ("2.1", "relu6"))
        ]
        assert all(c.done and c.reason == "training_kernel" for c in changes.values())
        assert str(changes["0.1"]).endswith("in training on CUDA, and silu after it")
        assert str(changes["1.1"]).endswith("in training on CUDA")
        assert "runs 3 BatchNorm, and 2 activations with them, on kernels of dwswap" in str(report)
    assert not [m for m in model.modules() if type(m) in (BatchNorm2d, *ABSORBABLE.values())]


@pytest.mark.parametrize("options", [{"fuse": False}, {"skip": lambda *_: True}])
def test_norms_stay_where_nothing_is_to_be_fused_or_swapped(options: dict[str, Any]) -> None:
    fast = dwswap.optimize(silu(), **options)
    assert [type(m) for m in at(fast, "0")][1:] == [nn.BatchNorm2d, nn.SiLU]
    assert dwswap.report(fast).elsewhere == {}
    assert dwswap.explain(silu(), **options).elsewhere == {}


def test_a_model_without_depthwise_convolutions_stays() -> None:
    model = nn.Sequential(nn.Sequential(nn.Conv2d(8, 8, 3), norm(), nn.SiLU()))
    fast = dwswap.optimize(model, inplace=True)
    assert fast is model
    assert [type(m) for m in at(fast, "0")] == [nn.Conv2d, nn.BatchNorm2d, nn.SiLU]
    assert dwswap.report(fast).elsewhere == {}


def test_eval_mode_is_none_of_it() -> None:
    fast = dwswap.optimize(silu().eval(), fuse=False)
    assert not [m for m in fast.modules() if type(m) in (BatchNorm2d, *ABSORBABLE.values())]
