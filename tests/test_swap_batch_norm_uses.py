"""BatchNorm in training: copies, files, the way back, inference, graphs and transforms."""

from __future__ import annotations

import copy
import gc
import weakref
from collections.abc import Callable
from itertools import chain
from typing import Any, cast

import pytest
import torch
from norm_models import Calls, Patient, at, block, pickled, same, silu, step, trains_as
from tiny_models import depthwise, image
from torch import Tensor, fx, nn
from torch._dynamo.eval_frame import _debug_get_cache_entry_list
from torch.autograd import forward_ad
from torch.utils.checkpoint import checkpoint, checkpoint_sequential

import dwswap
from dwswap.training_modules import ABSORBABLE, BatchNorm2d, base_of

# --- back, copies and files ----------------------------------------------------------------------


@pytest.mark.parametrize("copied", [copy.deepcopy, pickled])
def test_copies_absorb_as_well(copied: Callable[[Any], Any], norm_calls: Calls) -> None:
    model = silu()
    fast = dwswap.optimize(model)
    other = copied(fast)
    at(fast, "0")[2] = nn.GELU()  # is none of the copy's
    trains_as(other, model)
    assert norm_calls == ["silu"] * 2
    norm_calls.clear()
    model = silu()
    block = copied(at(dwswap.optimize(model), "1"))
    trains_as(block, at(model, "1"))
    assert norm_calls == ["silu"]


@pytest.mark.parametrize("copied", [copy.deepcopy, pickled])
def test_the_copy_of_a_norm_is_alone(copied: Callable[[Any], Any], norm_calls: Calls) -> None:
    model = silu()
    fast = dwswap.optimize(model)
    trains_as(copied(at(fast, "0.1")), at(model, "0.1"))
    assert norm_calls == ["none"]


def test_in_place_the_modules_of_the_caller_absorb(norm_calls: Calls) -> None:
    model = silu()
    original, block, parameters = copy.deepcopy(model), model[0], list(model.parameters())
    assert dwswap.optimize(model, inplace=True) is model
    assert model[0] is block
    assert all(map(lambda a, b: a is b, model.parameters(), parameters))
    gc.collect()
    trains_as(model, original)
    assert norm_calls == ["silu"] * 2
    for of in (model, original):
        at(of, "0")[2] = nn.GELU()
    norm_calls.clear()
    trains_as(model, original)
    assert norm_calls == ["none", "silu"]


@pytest.mark.parametrize("inplace", [True, False])
def test_optimize_twice(inplace: bool, norm_calls: Calls) -> None:
    model = silu()
    fast = dwswap.optimize(dwswap.optimize(model), inplace=inplace)
    trains_as(fast, model)
    assert norm_calls == ["silu"] * 2


def test_optimize_again_after_the_layers_got_another_forward(norm_calls: Calls) -> None:
    model = silu()
    fast = dwswap.optimize(model)
    for of in (fast, model):
        layers: Any = at(of, "0")
        of.add_module("0", Patient(*layers))
    trains_as(dwswap.optimize(fast), model)


@pytest.mark.parametrize("copied", [lambda m: m, copy.deepcopy, pickled])
def test_the_model_is_freed_at_once(copied: Callable[[Any], Any], norm_calls: Calls) -> None:
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
def test_restore(inplace: bool, restore_inplace: bool, norm_calls: Calls) -> None:
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
        assert norm_calls == ["relu6", "silu", "relu", "none"]
        norm_calls.clear()
    trains_as(restored, original)
    assert norm_calls == []
    trains_as(dwswap.optimize(restored), original)
    assert norm_calls == ["relu6", "silu", "relu", "none"]


def test_restore_of_a_part(norm_calls: Calls) -> None:
    model = silu()
    part = nn.Sequential(*at(dwswap.optimize(model), "0"))
    restored = dwswap.restore(part)
    assert [type(m) for m in restored.children()] == [nn.Conv2d, nn.BatchNorm2d, nn.SiLU]
    trains_as(restored, at(model, "0"))
    assert not [name for m in restored.modules() for name in m.__dict__ if "dwswap" in name]


def test_restore_after_a_weight_was_parametrized(norm_calls: Calls) -> None:
    model = silu()
    fast = dwswap.optimize(model)
    for of in (fast, model):
        nn.utils.parametrize.register_parametrization(at(of, "0.1"), "weight", nn.Tanh())
    trains_as(dwswap.restore(fast), model)


# --- inference, graphs and transforms ------------------------------------------------------------


@pytest.mark.parametrize("inplace", [True, False])
def test_then_for_inference(inplace: bool, norm_calls: Calls) -> None:
    model = silu()
    fast = dwswap.optimize(model)
    trains_as(fast, model)
    norm_calls.clear()
    fast.eval(), model.eval()
    same(fast(image(8)), model(image(8)))
    same(dwswap.optimize(fast, fuse=False)(image(8)), model(image(8)))
    graph = dwswap.optimize(fast, inplace=inplace)
    assert isinstance(graph, fx.GraphModule)
    assert "folded 2 BatchNorm" in str(dwswap.report(graph))
    same(graph(image(8)), model(image(8)))
    if not inplace:
        trains_as(fast.train(), model.train())
    assert norm_calls == ([] if inplace else ["silu"] * 2)


@pytest.mark.parametrize("train", [True, False])
def test_symbolic_trace(train: bool, norm_calls: Calls) -> None:
    """As a module of torch.nn: one node, which counts, averages and follows the mode."""
    model = silu().train(train)
    fast = dwswap.optimize(silu()).train(train)
    traced = fx.symbolic_trace(fast)
    assert len(traced.graph.find_nodes(op="call_module", target="0.1")) == 1
    for mode in (train, not train):
        same(traced.train(mode)(image(8)), model.train(mode)(image(8)))
    same(dict(traced.named_buffers()), dict(model.named_buffers()))
    assert "silu" not in norm_calls


class Breaks(nn.Module):
    """Dynamo compiles what is before and what is behind it."""

    def forward(self, input: Tensor) -> Tensor:
        self.seen = float(input.detach().abs().max())
        return input


def test_torch_compile_of_parts(norm_calls: Calls) -> None:
    """More norms than a code object is compiled for: the rest run eagerly, activations compiled."""
    torch.manual_seed(0)
    blocks = [
        nn.Sequential(
            *(depthwise(channels), nn.BatchNorm2d(channels), nn.SiLU(), Breaks()),
            nn.Conv2d(channels, channels + 4, 1),
        )
        for channels in range(8, 56, 4)
    ]
    model = nn.Sequential(*blocks)
    fast = dwswap.optimize(model)
    try:
        compiled = torch.compile(fast, backend="eager")(image(8))
    finally:
        torch._dynamo.reset()  # else code that was compiled too often is not any more
    same(compiled, model(image(8)), 1e-4)
    assert norm_calls
    assert "silu" not in norm_calls


def test_torch_compile(norm_calls: Calls) -> None:
    model = silu()
    fast = dwswap.optimize(model)
    compiled = torch.compile(fast, backend="eager", fullgraph=True)
    same(compiled(image(8)), model(image(8)))
    same(list(fast.buffers()), list(model.buffers()))
    assert norm_calls == []
    trains_as(fast, model)
    assert norm_calls == ["silu"] * 2


def test_compiled_code_asks_no_module_for_its_classes() -> None:
    """``super()`` would, and then no guard of the module can be skipped in a later call."""
    norms = [[nn.BatchNorm2d(8), kind()] for kind in ABSORBABLE]
    layers = [depthwise(8), nn.BatchNorm2d(8), *chain.from_iterable(norms)]
    fast = dwswap.optimize(nn.Sequential(*layers))
    assert all(base_of(module) is not None for module in list(fast.children())[1:])

    def run(input: Tensor) -> Tensor:
        return cast(Tensor, fast(input))

    torch.compile(run, backend="eager", fullgraph=True)(image(8))
    (entry,) = _debug_get_cache_entry_list(run.__code__)
    guards = str(entry.guard_manager)
    assert "training_modules.BatchNorm2d" in guards
    assert "__mro__" not in guards
    assert "TypeGuardAccessor" not in guards


def test_torch_export(norm_calls: Calls) -> None:
    model = silu()
    program = torch.export.export(dwswap.optimize(model), (image(8),))
    module = program.module()
    same(module(image(8)), model(image(8)))
    same(dict(module.named_buffers()), dict(model.named_buffers()))
    assert norm_calls == []


def test_functional_call(norm_calls: Calls) -> None:
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
    assert norm_calls == ["silu"] * 2
    same(dict(fast.named_buffers()), dict(silu().named_buffers()))


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpoint(reentrant: bool, norm_calls: Calls) -> None:
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
    assert norm_calls == ["silu"] * 4


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpoints_between_norm_and_activation(reentrant: bool, norm_calls: Calls) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(block(nn.SiLU(), depthwise(), nn.Flatten()), nn.Identity())

    def learn(of: nn.Module) -> list[Any]:
        leaf = image(8).requires_grad_()
        output = checkpoint_sequential(at(of, "0"), 5, leaf, use_reentrant=reentrant)
        output.square().mean().backward()
        return [output, leaf.grad, [p.grad for p in of.parameters()], list(of.buffers())]

    same(learn(dwswap.optimize(model)), learn(model))


def test_autocast(norm_calls: Calls) -> None:
    model = silu()
    fast = dwswap.optimize(model)
    with torch.autocast("cpu", torch.bfloat16):
        ours, theirs = (step(m, image(8)) for m in (fast, model))
    assert ours[0].dtype is theirs[0].dtype is torch.bfloat16
    same(ours, theirs, 2e-2)
    assert norm_calls == ["silu"] * 2


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_forward_mode_and_vmap_are_left_to_pytorch(norm_calls: Calls) -> None:
    model = silu(track_running_stats=False)
    fast = dwswap.optimize(model)
    found = []
    for of in (fast, model):
        with forward_ad.dual_level():
            dual = forward_ad.make_dual(image(8), image(8).cos())
            found.append([*forward_ad.unpack_dual(of(dual))])
        found[-1].append(torch.func.vmap(of)(torch.stack([image(8), image(8) ** 2])))
    same(found[0], found[1])
    assert norm_calls == []


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_batched_gradients(layout: torch.memory_format, norm_calls: Calls) -> None:
    model = silu()
    fast = dwswap.optimize(model)
    found = []
    for of in (fast, model):
        leaf = image(8).contiguous(memory_format=layout).requires_grad_()
        output = of(leaf)
        rows = torch.eye(output.numel())[:5].view(5, *output.shape)
        given = {"retain_graph": True, "is_grads_batched": True}
        (legacy,) = torch.autograd.grad(output, leaf, rows, **given)

        def gradient(row: Tensor, output: Tensor = output, leaf: Tensor = leaf) -> Tensor:
            return torch.autograd.grad(output, leaf, row, retain_graph=True)[0]

        found.append([legacy, torch.func.vmap(gradient)(rows)])
    torch.testing.assert_close(*found, rtol=1e-4, atol=1e-5)
    assert norm_calls == ["silu"] * 2


def test_jit_trace(norm_calls: Calls) -> None:
    model = silu()
    traced = torch.jit.trace(dwswap.optimize(model), image(8), check_trace=False)
    model(image(8))
    same(traced(image(8)), model(image(8)))
    assert norm_calls == []
