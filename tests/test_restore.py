"""restore: back to plain PyTorch."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from tiny_models import Block, ControlFlow, Functional, depthwise, image
from torch import Tensor, fx, nn
from torch.nn.utils import parametrizations, parametrize

import dwswap
from dwswap import DepthwiseConv2d, depthwise_conv2d


def call(x: Tensor, w: Tensor, b: Tensor, c: int) -> Tensor:
    return F.conv2d(x, w, b, padding="same", stride=1, groups=c)


def has_swaps(model: nn.Module) -> bool:
    return any(
        isinstance(m, DepthwiseConv2d)
        or (isinstance(m, fx.GraphModule) and "depthwise_conv2d" in m.code)
        for m in model.modules()
    )


@pytest.mark.parametrize("inplace", [True, False])
@pytest.mark.parametrize("kind", ["graph", "no fuse", "train", "functional", "untraceable"])
def test_round_trip(kind: str, inplace: bool) -> None:
    model: nn.Module = Block()
    if kind == "graph":
        model = nn.Sequential(depthwise(), nn.MaxPool2d(2))
    elif kind == "functional":
        model = nn.Sequential(Functional(call), depthwise())
    elif kind == "untraceable":
        model = ControlFlow(nn.Sequential(Functional(call), depthwise()))
    model.train(kind == "train")
    x = image(3 if kind in ("no fuse", "train") else 8)
    fast = dwswap.optimize(model, fuse=kind != "no fuse")
    parameters = dict(fast.named_parameters())
    swapped = len(dwswap.report(fast).swapped)
    assert has_swaps(fast)

    restored = dwswap.restore(fast, inplace=inplace)

    assert (restored is fast) == inplace
    assert not has_swaps(restored)
    assert has_swaps(fast) == (not inplace)
    assert type(restored).__name__ == type(fast).__name__
    assert list(restored.state_dict()) == list(model.state_dict())
    if inplace:
        assert all(p is parameters[name] for name, p in restored.named_parameters())
    assert [m.training for m in restored.modules()] == [m.training for m in fast.modules()]
    for m in (model, restored):
        m.load_state_dict(model.state_dict())
    torch.manual_seed(0)
    expected = model(x)
    torch.manual_seed(0)
    torch.testing.assert_close(restored(x), expected, rtol=0, atol=1e-6)
    again = dwswap.optimize(restored)
    assert len(dwswap.report(again).swapped) == swapped


def test_after_pickle_the_groups_are_static_again() -> None:
    fast = pickle.loads(pickle.dumps(dwswap.optimize(Functional(call).eval())))
    restored = dwswap.restore(fast)
    (node,) = (n for n in restored.graph.nodes if n.target is torch.conv2d)
    assert node.args[-1] == 8


def test_hooks_and_attributes_stay() -> None:
    fast = dwswap.optimize(nn.Sequential(depthwise()), fuse=False)
    fast[0].register_forward_hook(lambda _m, _args, output: output + 1)
    fast[0].note = "kept"
    restored = dwswap.restore(fast)
    assert restored[0].note == "kept"
    torch.testing.assert_close(restored(image(8)), fast(image(8)), rtol=0, atol=1e-6)


def test_aliases_stay_one_module() -> None:
    model = nn.Sequential(depthwise())
    model.append(model[0])
    restored = dwswap.restore(dwswap.optimize(model))
    assert type(restored[0]) is nn.Conv2d
    assert restored[0] is restored[1]


def test_subclass_is_not_ours_to_restore() -> None:
    class Own(DepthwiseConv2d):
        def forward(self, input: Tensor) -> Tensor:
            return super().forward(input) + 1

    model = nn.Sequential(Own(8, 8, 3))
    assert dwswap.restore(model) is model
    assert [layer.reason for layer in dwswap.explain(model).layers] == ["subclass"]


@pytest.mark.parametrize("inplace", [True, False])
def test_layers_parametrized_after_optimize(inplace: bool) -> None:
    model = nn.Sequential(depthwise(), nn.BatchNorm2d(8), depthwise()).train()
    fast = dwswap.optimize(model)
    parametrizations.weight_norm(fast[0])
    kinds = [type(module) for module in fast]
    with pytest.raises(ValueError, match=r"parametrized after .*, got '0': call torch\."):
        dwswap.restore(fast, inplace=inplace)
    assert [type(module) for module in fast] == kinds
    assert dwswap.report(fast).swapped

    parametrize.remove_parametrizations(fast[0], "weight")
    restored = dwswap.restore(fast, inplace=inplace)
    assert [type(m) for m in restored] == [nn.Conv2d, nn.BatchNorm2d, nn.Conv2d]


def test_layers_that_were_parametrized_before_stay() -> None:
    model = nn.Sequential(parametrizations.weight_norm(depthwise()), depthwise()).train()
    restored = dwswap.restore(dwswap.optimize(model))
    assert type(restored[1]) is nn.Conv2d
    assert isinstance(restored[0], nn.Conv2d)
    assert parametrize.is_parametrized(restored[0], "weight")


def test_root() -> None:
    fast = dwswap.optimize(depthwise())
    restored = dwswap.restore(fast, inplace=True)
    assert type(restored) is nn.Conv2d
    assert restored.weight is fast.weight


def test_nothing_to_restore() -> None:
    model = nn.Sequential(nn.Conv2d(3, 3, 1))
    assert dwswap.restore(model) is model
    unchanged = dwswap.optimize(model)
    restored = dwswap.restore(unchanged)
    assert type(restored) is nn.Sequential
    with pytest.raises(ValueError, match="without a report"):
        dwswap.report(restored)


@pytest.mark.parametrize("inplace", [True, False])
def test_absorbed_neighbours_cannot_be_restored(inplace: bool) -> None:
    fast = dwswap.optimize(nn.Sequential(Functional(call), depthwise()).eval())
    (node,) = (n for n in fast.graph.nodes if n.target is depthwise_conv2d)
    node.kwargs = {**node.kwargs, "activation": "relu"}
    fast.recompile()
    code = fast.code
    before = copy.deepcopy(list(fast.graph.nodes))
    with pytest.raises(ValueError, match=r"absorbed its neighbours \(activation\)"):
        dwswap.restore(fast, inplace=inplace)
    assert fast.code == code
    assert len(fast.graph.nodes) == len(before)
    assert type(fast.get_submodule("1")) is DepthwiseConv2d
    assert dwswap.report(fast).swapped


@pytest.mark.parametrize("inplace", [True, False])
def test_folded_weights_cannot_be_restored(inplace: bool) -> None:
    fast = dwswap.optimize(nn.Sequential(depthwise(), nn.BatchNorm2d(8)).eval())
    again = pickle.loads(pickle.dumps(copy.deepcopy(fast)))
    for result in (fast, again, nn.Sequential(fast)):
        with pytest.raises(ValueError, match=r"BatchNorm was folded.*fuse=False"):
            dwswap.restore(result, inplace=inplace)
        assert has_swaps(result)
        assert result(image(8)).shape == (2, 8, 9, 9)


def test_wrong_argument() -> None:
    with pytest.raises(TypeError, match=r"model must be an nn\.Module, got int"):
        dwswap.restore(3)  # type: ignore[arg-type]
    fast = dwswap.optimize(Block(), fuse=False)
    with pytest.raises(TypeError, match="inplace must be True or False, got 'no'"):
        dwswap.restore(fast, inplace="no")  # type: ignore[arg-type]
    assert has_swaps(fast)
