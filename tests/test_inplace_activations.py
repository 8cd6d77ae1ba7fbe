"""Activations in place that autograd copies for: out of place in train mode, and back."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from tiny_models import Backwards, Parts, depthwise, image
from torch import Tensor, nn
from torch.nn.modules import module as module_globals
from torch.profiler import ProfilerActivity, profile

import dwswap
from dwswap.changes import CHANGE_REASONS

COPIED = (
    *(nn.ReLU6, nn.Hardtanh, nn.Hardswish, nn.Hardsigmoid, nn.SiLU, nn.Mish),
    lambda inplace: nn.Threshold(0.1, 0.0, inplace),
)
NOT_COPIED = (nn.ReLU, nn.LeakyReLU, nn.ELU, nn.CELU, nn.SELU)


class Block(nn.Sequential):
    """As torchvision's ``Conv2dNormActivation``: a subclass that only builds."""

    def __init__(self, activation: nn.Module) -> None:
        super().__init__(depthwise(), nn.BatchNorm2d(8), activation)


def blocks(kind: Callable[..., nn.Module]) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(Block(kind(inplace=True)), Block(kind(inplace=True)), nn.Flatten())


def in_place(model: nn.Module) -> list[bool]:
    return [m.inplace for m in model.modules() if hasattr(m, "inplace")]  # type: ignore[misc]


def changed(model: nn.Module) -> list[str]:
    """The paths of the activations that were changed."""
    found = dwswap.report(model).elsewhere.items()
    return [path for path, (change, *_) in found if change.kind == "inplace"]


def clones(model: nn.Module) -> int:
    x = image(8)
    with profile(activities=[ProfilerActivity.CPU]) as profiled:
        model(x)
    return sum(event.count for event in profiled.key_averages() if event.key == "aten::clone")


def three_steps(model: nn.Module) -> list[Tensor]:
    """Outputs, gradients and parameters of three steps."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    generator = torch.Generator().manual_seed(1)
    seen = []
    for _ in range(3):
        optimizer.zero_grad()
        output = model(torch.randn(2, 8, 9, 9, generator=generator))
        output.square().mean().backward()
        seen += [output, *(p.grad.clone() for p in model.parameters() if p.grad is not None)]
        optimizer.step()
        seen += [t.detach().clone() for t in model.state_dict().values()]
    return seen


@pytest.mark.parametrize("kind", COPIED)
def test_out_of_place_saves_the_copy_and_changes_no_bit(kind: Any) -> None:
    """Autograd copies for each of these in this release of PyTorch, and only in place."""
    model = blocks(kind).train()
    swapped = dwswap.optimize(model, fuse=False)
    fast = dwswap.optimize(model)
    assert in_place(model) == in_place(swapped) == [True, True]
    assert in_place(fast) == [False, False]
    assert clones(swapped) == clones(fast) + 2
    fast.load_state_dict(swapped.state_dict())
    for a, b in zip(three_steps(fast), three_steps(swapped), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("kind", NOT_COPIED)
def test_activations_that_keep_their_output_stay(kind: Any) -> None:
    model = blocks(kind).train()
    fast = dwswap.optimize(model)
    assert in_place(fast) == [True, True]
    assert clones(fast) == clones(dwswap.optimize(model, fuse=False))
    assert changed(fast) == []


def test_the_report() -> None:
    model = blocks(nn.SiLU).train()
    for report in (dwswap.explain(model), dwswap.report(dwswap.optimize(model))):
        ((change,), (other,)) = (report.elsewhere[path] for path in ("0.2", "1.2"))
        assert other.kind == "inplace"
        assert (change.kind, change.done, change.reason) == ("inplace", True, "input_kept")
        assert CHANGE_REASONS["input_kept"] in str(change)
        assert "from copying the input of 2 activations" in str(report)
    assert in_place(model) == [True, True]


def test_as_part_of_torchvision_models() -> None:
    models = pytest.importorskip("torchvision.models")
    fast = dwswap.optimize(models.mobilenet_v2().train())
    assert "input of 35 activations" in str(dwswap.report(fast))
    assert not any(in_place(fast))


# --- what must stay ------------------------------------------------------------------------------


class Patient(nn.Sequential):
    """Reads what the activation would change."""

    def forward(self, input: Tensor) -> Tensor:
        hidden = self[1](self[0](input))
        self[2](hidden)
        return hidden


class OwnActivation(nn.ReLU6):
    pass


def hooked(change: Callable[[nn.Sequential], object]) -> nn.Module:
    block = Block(nn.ReLU6(inplace=True))
    change(block)
    return block


def patched(block: nn.Sequential) -> None:
    block[2].forward = lambda x: nn.functional.relu6_(x) + 1  # type: ignore[attr-defined]


def shared() -> nn.Module:
    activation = nn.ReLU6(inplace=True)
    return nn.Sequential(Block(activation), Block(activation))


def frozen() -> nn.Module:
    block = Block(nn.ReLU6(inplace=True))
    block[2].eval()
    return block


STAY: dict[str, Callable[[], nn.Module]] = {
    "hook on it": lambda: hooked(lambda b: b[2].register_forward_hook(lambda *_: None)),
    "pre-hook on it": lambda: hooked(lambda b: b[2].register_forward_pre_hook(lambda *_: None)),
    "hook on the norm": lambda: hooked(lambda b: b[1].register_forward_hook(lambda *_: None)),
    "hook on gradients": lambda: hooked(lambda b: b[1].register_full_backward_hook(print)),
    "hook on the parent": lambda: hooked(lambda b: b.register_forward_hook(lambda *_: None)),
    "patched": lambda: hooked(patched),
    "subclass": lambda: Block(OwnActivation(inplace=True)),
    "shared": shared,
    "in eval mode": frozen,
    "own forward": lambda: Patient(depthwise(), nn.BatchNorm2d(8), nn.ReLU6(inplace=True)),
    "own order": lambda: Backwards(nn.ReLU6(inplace=True), nn.BatchNorm2d(8), depthwise()),
    "after a view": lambda: nn.Sequential(depthwise(), nn.Identity(), nn.ReLU6(inplace=True)),
    "first": lambda: nn.Sequential(nn.ReLU6(inplace=True), depthwise()),
    "no Sequential": lambda: nn.ModuleList([depthwise(), nn.ReLU6(inplace=True)]),
}


@pytest.mark.parametrize("kind", STAY)
def test_stays(kind: str) -> None:
    model = nn.Sequential(depthwise(), STAY[kind]())
    for inplace in (False, True):
        fast = dwswap.optimize(model, inplace=inplace)
        assert dwswap.report(fast).swapped
        assert all(in_place(fast))
        assert changed(fast) == []


def test_stays_while_there_are_global_hooks() -> None:
    handle = module_globals.register_module_forward_hook(lambda *_: None)
    try:
        assert in_place(dwswap.optimize(blocks(nn.SiLU).train())) == [True, True]
    finally:
        handle.remove()


def test_stays_without_a_swap() -> None:
    model = nn.Sequential(nn.Conv2d(8, 8, 3), nn.SiLU(inplace=True)).train()
    assert in_place(dwswap.optimize(model)) == [True]
    assert in_place(dwswap.optimize(blocks(nn.SiLU).train(), skip=lambda *_: True)) == [True, True]


def test_eval_mode_is_none_of_it() -> None:
    class Untraceable(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = blocks(nn.SiLU)

        def forward(self, x: Tensor) -> Tensor:
            return self.inner(x) if x.sum() > 0 else self.inner(-x)

    fast = dwswap.optimize(Untraceable().eval())
    assert dwswap.report(fast).mode == "substitution"
    assert all(in_place(fast))


# --- back, copies and files ----------------------------------------------------------------------


@pytest.mark.parametrize("restore_inplace", [True, False])
@pytest.mark.parametrize("inplace", [True, False])
def test_restore(inplace: bool, restore_inplace: bool) -> None:
    model = blocks(nn.ReLU6).train()
    model[1][2] = nn.ReLU6()  # is and stays out of place
    keys, parameters = list(model.state_dict()), list(model.parameters())
    attributes = [dict(m.__dict__) for m in model.modules()]
    fast = dwswap.optimize(model, inplace=inplace)
    assert in_place(fast) == [False, False]
    assert in_place(model) == ([False, False] if inplace else [True, False])
    restored = dwswap.restore(fast, inplace=restore_inplace)
    assert in_place(restored) == [True, False]
    assert list(restored.state_dict()) == keys
    if inplace and restore_inplace:
        assert restored is model
        assert all(map(lambda a, b: a is b, restored.parameters(), parameters))
    assert [m.__dict__.keys() for m in restored.modules()] == [a.keys() for a in attributes]
    assert in_place(dwswap.optimize(restored)) == [False, False]


def test_restore_of_a_part() -> None:
    fast = dwswap.optimize(blocks(nn.ReLU6).train())
    part = nn.Sequential(fast[0][1], fast[0][2])
    assert in_place(dwswap.restore(part)) == [True]


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_copies_restore_as_well(copied: Any) -> None:
    fast = copied(dwswap.optimize(blocks(nn.ReLU6).train()))
    assert in_place(fast) == [False, False]
    assert in_place(dwswap.restore(fast)) == [True, True]


@pytest.mark.parametrize("how", ["slices", "loop", "call"])  # code that does not run counts
def test_a_model_that_reads_what_the_activation_changes(how: str) -> None:
    torch.manual_seed(0)
    model = Parts(how, depthwise(), nn.BatchNorm2d(8), nn.ReLU6(inplace=True)).train()
    fast = dwswap.optimize(copy.deepcopy(model))
    assert in_place(fast) == [True]
    for ours, theirs in zip(three_steps(fast), three_steps(model), strict=True):
        torch.testing.assert_close(ours, theirs)
