"""BatchNorm in training and the activation behind it: one operator, and the same results."""

from __future__ import annotations

import copy
import importlib
from collections.abc import Callable
from typing import Any, cast

import pytest
import torch
import torch.nn.functional as F
from norm_models import (
    EACH_KIND,
    KINDS,
    Calls,
    Change,
    at,
    block,
    norm,
    pickled,
    same,
    silu,
    step,
    trains_as,
)
from tiny_models import depthwise, image
from torch import Tensor, nn

import dwswap
from dwswap.activations import PAIRS
from dwswap.batch_norm import NORM_ACTIVATIONS
from dwswap.training_modules import ABSORBABLE, BatchNorm2d

norms = importlib.import_module("dwswap.batch_norm")


@EACH_KIND
@pytest.mark.parametrize("inplace", [True, False])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_a_model_trains_as_before(
    name: str,
    inplace: bool,
    layout: torch.memory_format,
    norm_calls: Calls,
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
    assert norm_calls == [name] * 6
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
def test_a_norm_alone(build: Callable[[], nn.Module], norm_calls: Calls) -> None:
    model = nn.Sequential(build(), nn.Flatten())
    fast = dwswap.optimize(model)
    trains_as(fast, model)
    assert norm_calls == ["none"]


class Building(nn.Sequential):
    """As torchvision's ``Conv2dNormActivation``: a subclass that only builds."""

    def __init__(self, activation: nn.Module) -> None:
        super().__init__(depthwise(bias=False), norm(), activation)


def test_a_subclass_of_sequential_that_only_builds(norm_calls: Calls) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(Building(nn.SiLU()), nn.Flatten())
    fast = dwswap.optimize(model)
    assert type(at(fast, "0")) is Building
    trains_as(fast, model)
    assert norm_calls == ["silu"]


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
def test_norms_of_all_kinds(kind: str, when: str, norm_calls: Calls) -> None:
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
    assert norm_calls == expected * 2


@pytest.mark.parametrize("when", ["before", "after"])
def test_statistics_that_are_not_tracked_any_more_stay(when: str, norm_calls: Calls) -> None:
    """PyTorch looks at the flag, and not only at whether there are buffers."""
    model = silu()
    fast = dwswap.optimize(model) if when == "after" else model
    at(model, "0.1").track_running_stats = False
    at(fast, "0.1").track_running_stats = False
    fast = dwswap.optimize(model) if when == "before" else fast
    trains_as(fast, model)


@pytest.mark.parametrize("learns", [True, False])
def test_a_norm_of_the_input_itself(learns: bool, norm_calls: Calls) -> None:
    model = nn.Sequential(nn.Sequential(norm(), nn.SiLU()), depthwise())
    model.requires_grad_(learns)
    fast = dwswap.optimize(model)
    for needs_gradient in (True, False):
        ours, theirs = (step(m, image(8), needs_gradient) for m in (fast, model))
        same(ours, theirs)
    assert norm_calls == ["silu"] * 2


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_without_gradients_statistics_move_too(mode: Any, norm_calls: Calls) -> None:
    model = silu()
    fast = dwswap.optimize(model)
    counters = [b for b in fast.buffers() if not b.dim()]
    versions = [b._version for b in counters]
    with mode():
        same(fast(image(8)), model(image(8)))
    same(list(fast.buffers()), list(model.buffers()))
    assert all(b._version > v for b, v in zip(counters, versions, strict=True))
    assert norm_calls == ["silu"] * 2


@pytest.mark.parametrize("shape", [(1, 8, 1, 1), (8, 5, 5), (2, 8, 3, 3, 3)])
def test_errors_are_those_of_pytorch(shape: tuple[int, ...], norm_calls: Calls) -> None:
    model = nn.Sequential(nn.Sequential(norm(), nn.SiLU()), depthwise())
    fast = dwswap.optimize(model)
    with pytest.raises(ValueError) as theirs:  # noqa: PT011
        model(torch.randn(shape))
    with pytest.raises(ValueError) as ours:  # noqa: PT011
        fast(torch.randn(shape))
    assert str(ours.value) == str(theirs.value)
    assert norm_calls == []


INPUTS: dict[str, Callable[[], Tensor]] = {
    "empty": lambda: torch.empty(0, 8, 9, 9),
    "not dense": lambda: image(8, size=18)[:, :, ::2, ::2],
    "expanded": lambda: image(8, batch=1).expand(4, -1, -1, -1),
    "float64": lambda: image(8).double(),
}


@pytest.mark.parametrize("kind", INPUTS)
def test_inputs_that_are_left_to_pytorch(kind: str, norm_calls: Calls) -> None:
    x = INPUTS[kind]()
    model = nn.Sequential(nn.Sequential(norm(), nn.SiLU()), depthwise()).train().to(x.dtype)
    ours, theirs = step(dwswap.optimize(model), x), step(model, x)
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5, equal_nan=True)
    assert norm_calls == []


@pytest.mark.parametrize("dtype", [torch.int32, torch.float32])
def test_a_counter_of_another_dtype(dtype: torch.dtype, norm_calls: Calls) -> None:
    """Or on another device, as PyTorch makes one for a checkpoint without."""
    model = silu()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.num_batches_tracked = module.num_batches_tracked.to(dtype)
    fast = dwswap.optimize(model)
    trains_as(fast, model)
    assert norm_calls == ["silu"] * 2
    assert int(at(fast, "0.1").num_batches_tracked) == 1


def test_graphs_before_do_not_mind_that_statistics_move(norm_calls: Calls) -> None:
    model = silu()
    fast = dwswap.optimize(model)
    results = []
    for of in (fast, model):
        leaf = image(8).requires_grad_()
        first = of.eval()(leaf).square().mean()
        (first + of.train()(leaf).square().mean()).backward()
        results.append([leaf.grad, *(p.grad for p in of.parameters())])
    same(*results)


def test_a_bias_may_change_before_the_backward(norm_calls: Calls) -> None:
    """But not before one that is differentiated again, which needs it."""
    model = silu()
    fast = dwswap.optimize(model)
    grads = []
    for of in (fast, model):
        leaf = image(8).requires_grad_()
        output = of(leaf).square().mean()
        with torch.no_grad():
            at(of, "1.1").bias += 0.0
        grads.append(torch.autograd.grad(output, leaf))
    same(*grads)
    leaf = image(8).requires_grad_()
    output = fast(leaf).square().mean()
    with torch.no_grad():
        at(fast, "1.1").bias += 1.0
    with pytest.raises(RuntimeError, match=r"bias of a BatchNorm .*, got one .* changed 1 times"):
        torch.autograd.grad(output, leaf, create_graph=True)


# --- second gradients ----------------------------------------------------------------------------


def penalty(model: nn.Module) -> list[Tensor]:
    """Gradients, and the gradients of a penalty on them."""
    tensors = (image(8).requires_grad_(), *model.parameters())
    first = torch.autograd.grad(model(tensors[0]).square().sum(), tensors, create_graph=True)
    of_slope = sum((slope.square().sum() for slope in first), torch.zeros(()))
    return [*first, *torch.autograd.grad(of_slope, tensors)]


@EACH_KIND
def test_second_gradients(name: str, norm_calls: Calls) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(block(KINDS[name]()), block(KINDS[name]()))
    for ours, theirs in zip(penalty(dwswap.optimize(model)), penalty(model), strict=True):
        same(ours / theirs.abs().max(), theirs / theirs.abs().max(), 1e-4)
    assert norm_calls == [name] * 2


class Twice(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.block = block(nn.SiLU())

    def forward(self, x: Tensor) -> Tensor:
        return cast(Tensor, self.block(self.block(x)))


def test_gradients_of_a_norm_that_is_called_on_what_it_computed(norm_calls: Calls) -> None:
    """Its input depends on its weight."""
    torch.manual_seed(0)
    model = Twice()
    fast = dwswap.optimize(model)
    trains_as(fast, model)
    for ours, theirs in zip(penalty(fast), penalty(model), strict=True):
        same(ours / theirs.abs().max(), theirs / theirs.abs().max(), 1e-4)
    assert norm_calls == ["silu"] * 4


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


# --- timm ---------------------------------------------------------------------------------------


def timm_model(**options: Any) -> nn.Sequential:
    module = pytest.importorskip("timm.layers.norm_act")
    torch.manual_seed(0)
    norm = module.BatchNormAct2d(8, **{"act_layer": nn.SiLU} | options)
    return nn.Sequential(nn.Sequential(depthwise(bias=False), norm), nn.Flatten())


@pytest.mark.parametrize("inplace", [True, False])
@EACH_KIND
def test_a_model_of_timm_trains_as_before(name: str, inplace: bool, norm_calls: Calls) -> None:
    model = timm_model(act_layer=KINDS[name], inplace=inplace)
    fast = dwswap.optimize(model)
    for copied in (fast, copy.deepcopy(fast), pickled(fast)):
        trains_as(copied, copy.deepcopy(model))
    assert norm_calls == [name] * 3
    assert dwswap.report(fast).elsewhere["0.1"][0].name == name
    restored = dwswap.restore(fast)
    assert [type(m) for m in restored.modules()] == [type(m) for m in model.modules()]


def test_a_norm_of_timm_takes_x(norm_calls: Calls) -> None:
    model = timm_model()
    fast = dwswap.optimize(model)
    same(at(fast, "0.1")(x=image(8)), at(model, "0.1")(x=image(8)))
    assert norm_calls == ["silu"]


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
def test_a_norm_of_timm_that_is_changed_afterwards(kind: str, norm_calls: Calls) -> None:
    model = timm_model()
    fast = dwswap.optimize(model)
    change, expected = TIMM_CHANGES[kind]
    change(at(fast, "0.1"))
    change(at(model, "0.1"))
    trains_as(fast, model)
    assert norm_calls == expected


def test_an_activation_of_timm_that_was_patched_before(norm_calls: Calls) -> None:
    model = timm_model()
    at(model, "0.1.act").forward = lambda x: 2 * x
    trains_as(dwswap.optimize(copy.deepcopy(model)), model)
    assert norm_calls == []


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
