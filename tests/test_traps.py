"""Every reason to keep a convolution as it is, and every trap of a naive rewrite."""

from __future__ import annotations

import collections
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from tiny_models import Block, OwnForward, UntraceableConv, depthwise, image
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize, prune

import dwswap
from dwswap import DepthwiseConv2d
from dwswap.eligibility import reason_to_keep
from dwswap.report import REASONS


class Doubled(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return 2 * weight


class TaggedTensor(torch.Tensor):
    """A tensor subclass that computes like a tensor."""

    def new_empty(self, *args: Any, **options: Any) -> TaggedTensor:
        return super().new_empty(*args, **options).as_subclass(TaggedTensor)


def _hooked(register: str) -> nn.Conv2d:
    conv = depthwise()
    getattr(conv, register)(lambda *_: None)
    return conv


def _compiled_in_place() -> nn.Conv2d:
    conv = depthwise()
    conv.compile(backend="eager")
    return conv


def _patched_forward() -> nn.Conv2d:
    conv = depthwise()
    conv.forward = lambda x: F.relu(nn.Conv2d.forward(conv, x))  # type: ignore[method-assign]
    return conv


def _parametrized() -> nn.Module:
    conv = depthwise()
    parametrize.register_parametrization(conv, "weight", Doubled())
    return conv


def _plain_weight() -> nn.Conv2d:
    conv = depthwise()
    weight = conv.weight.detach()
    del conv.weight
    conv.weight = weight
    return conv


def _subclass_weight() -> nn.Conv2d:
    conv = depthwise()
    conv.weight = nn.Parameter(conv.weight.detach().as_subclass(TaggedTensor), requires_grad=False)
    return conv


def _sparse_weight() -> nn.Conv2d:
    conv = depthwise()
    conv.weight = nn.Parameter(conv.weight.detach().to_sparse())
    return conv


def _pruned_by_hand() -> nn.Conv2d:
    conv = depthwise()
    conv.weight = nn.Parameter(conv.weight.detach()[:4])
    return conv


def _qat(kind: str) -> nn.Module:
    qconfig = torch.ao.quantization.get_default_qat_qconfig("x86")
    if kind == "conv":
        return torch.ao.nn.qat.Conv2d(8, 8, 3, groups=8, qconfig=qconfig)
    import torch.ao.nn.intrinsic.qat as intrinsic

    return intrinsic.ConvBnReLU2d(8, 8, 3, groups=8, qconfig=qconfig)


def _quantized() -> nn.Module:
    import torch.ao.nn.quantized

    return torch.ao.nn.quantized.Conv2d(8, 8, 3, groups=8)


KEPT: dict[str, list[Any]] = {
    "not_conv2d": [lambda: nn.Conv1d(8, 8, 3, groups=8), lambda: nn.Conv3d(8, 8, 3, groups=8)],
    "transposed": [lambda: nn.ConvTranspose2d(8, 8, 3, groups=8)],
    "not_depthwise": [lambda: nn.Conv2d(8, 8, 3), lambda: nn.Conv2d(8, 8, 3, groups=4)],
    "single_channel": [lambda: nn.Conv2d(1, 1, 3), lambda: nn.Conv2d(1, 4, 3, groups=1)],
    "subclass": [lambda: UntraceableConv(8, 8, 3, groups=8)],
    "quantized": [_quantized],
    "qat": [lambda: _qat("conv"), lambda: _qat("fused")],
    "scripted": [lambda: torch.jit.script(depthwise())],
    "lazy": [lambda: nn.LazyConv2d(8, 3, groups=8)],
    "parametrized": [
        _parametrized,
        lambda: parametrizations.weight_norm(depthwise()),
        lambda: parametrizations.spectral_norm(depthwise()),
    ],
    "weight_norm": [lambda: nn.utils.weight_norm(depthwise())],
    "spectral_norm": [lambda: nn.utils.spectral_norm(depthwise())],
    "pruned": [lambda: prune.l1_unstructured(depthwise(), "weight", amount=0.5)],
    "forward_pre_hook": [lambda: _hooked("register_forward_pre_hook")],
    "forward_hook": [lambda: _hooked("register_forward_hook")],
    "backward_hook": [
        lambda: _hooked("register_full_backward_hook"),
        lambda: _hooked("register_full_backward_pre_hook"),
    ],
    "state_dict_hook": [
        lambda: _hooked("register_state_dict_pre_hook"),
        lambda: _hooked("register_load_state_dict_post_hook"),
    ],
    "patched_forward": [_patched_forward],
    "compiled_in_place": [_compiled_in_place],
    "weight_not_parameter": [_plain_weight],
    "tensor_subclass": [_subclass_weight],
    "weight_layout": [_sparse_weight],
    "dtype": [
        lambda: depthwise(dtype=torch.complex64),
        lambda: depthwise(bias=False, device="meta").to(torch.float8_e4m3fn),
    ],
    "padding_mode": [lambda: depthwise(padding_mode="reflect")],
    "inconsistent_shape": [_pruned_by_hand],
}
CASES = [pytest.param(c, make, id=f"{c}-{i}") for c, m in KEPT.items() for i, make in enumerate(m)]

NOT_FLOAT32 = {"lazy", "weight_layout", "inconsistent_shape", "quantized", "dtype"}
FUNCTIONAL_ONLY = {"groups_unknown", "weight_unknown", "arguments_unknown"}  # test_optimize_graph
ELSEWHERE = {"depthwise", "already_swapped", "skipped", "slower_here", "verify_failed"}
ELSEWHERE |= {"quantization_prepared"}

# Deprecated or noisy constructors are what these cases are about.
pytestmark = pytest.mark.filterwarnings("ignore")


def test_every_reason_has_a_case() -> None:
    assert set(KEPT) | FUNCTIONAL_ONLY | ELSEWHERE == set(REASONS)


@pytest.mark.parametrize(("code", "make"), CASES)
@pytest.mark.parametrize("mode", ["eval", "train", "no fuse"])
def test_kept_with_its_reason(code: str, make: Any, mode: str) -> None:
    conv = make()
    model = nn.Sequential(collections.OrderedDict(kept=conv, swapped=depthwise()))
    model.train(mode == "train")
    assert reason_to_keep(conv) == code

    report = dwswap.explain(model, fuse=mode != "no fuse")

    first, second = report.layers
    assert (first.path, first.decision, first.reason) == ("kept", "kept", code)
    assert first.detail
    assert "{" not in first.detail
    assert (second.path, second.decision) == ("swapped", "swapped")
    assert type(model.swapped) is nn.Conv2d


@pytest.mark.parametrize(("code", "make"), [c for c in CASES if c.values[0] not in NOT_FLOAT32])
@pytest.mark.parametrize("fuse", [True, False])
def test_kept_convolution_still_computes_the_same(code: str, make: Any, fuse: bool) -> None:
    conv = make()
    channels = 1 if code == "single_channel" else 8
    dims = {nn.Conv1d: 1, nn.Conv3d: 3}.get(type(conv), 2)
    x = torch.randn(2, channels, *[7] * dims)
    model = nn.Sequential(nn.Identity(), conv).eval()
    if dims == 2 and conv.out_channels == 8:
        model.append(depthwise().eval())
    expected = model(x)

    fast = dwswap.optimize(model, fuse=fuse)

    torch.testing.assert_close(fast(x), expected, rtol=0, atol=1e-6)
    assert fast.state_dict().keys() == model.state_dict().keys()


def test_hooks_on_kept_layers_fire_in_a_graph() -> None:
    model = nn.Sequential(depthwise(), depthwise()).eval()
    calls: list[str] = []
    model[0].register_forward_pre_hook(lambda *_: calls.append("pre"))
    model[0].register_forward_hook(lambda *_: calls.append("post"))
    fast = dwswap.optimize(model)
    assert dwswap.report(fast).mode == "graph"
    calls.clear()
    fast(image(8))
    assert calls == ["pre", "post"]


def test_weight_norm_stays_live() -> None:
    """A copied weight would go stale: the norm recomputes it from weight_g and weight_v."""
    model = nn.Sequential(nn.utils.weight_norm(depthwise()), depthwise())
    x = image(8)
    model(x).sum().backward()  # leaves a non-leaf weight behind, which deepcopy alone refuses
    fast = dwswap.optimize(model)
    with torch.no_grad():
        for m in (model, fast):
            m[0].weight_g.mul_(3)
    torch.testing.assert_close(fast(x), model(x), rtol=0, atol=1e-6)


def test_batchnorm_in_train_mode_keeps_its_statistics_live() -> None:
    model = Block().eval()
    model.norm.train()
    fast = dwswap.optimize(model)
    assert dwswap.report(fast).mode == "substitution"
    x = image()
    torch.testing.assert_close(fast(x), model(x), rtol=0, atol=1e-6)
    torch.testing.assert_close(fast.norm.running_mean, model.norm.running_mean)


@pytest.mark.parametrize("fuse", [True, False])
def test_module_called_twice_and_aliased(fuse: bool) -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first = depthwise()
            self.second = self.first
            self.nested = nn.ModuleDict({"again": self.first})
            self.unused = nn.Sequential(depthwise())

        def forward(self, x: Tensor) -> Tensor:
            return self.second(self.first(x)) + self.nested["again"](x)

    model = Twice().eval()
    fast = dwswap.optimize(model, fuse=fuse)

    assert list(fast.state_dict()) == list(model.state_dict())
    assert isinstance(fast.first, DepthwiseConv2d)
    assert fast.first is fast.second is fast.get_submodule("nested.again")
    assert isinstance(fast.get_submodule("unused.0"), DepthwiseConv2d)
    layer, unused = dwswap.report(fast).layers
    assert layer.path == "first"
    assert layer.aliases == ("second", "nested.again")
    assert unused.path == "unused.0"
    x = image(8)
    torch.testing.assert_close(fast(x), model(x), rtol=0, atol=1e-5)


def test_tied_weights_stay_tied() -> None:
    model = nn.Sequential(depthwise(), depthwise())
    model[1].weight = model[0].weight
    fast = dwswap.optimize(model)
    assert fast[0].weight is fast[1].weight
    in_place = dwswap.optimize(model, inplace=True)
    assert in_place[0].weight is in_place[1].weight is model[0].weight


@pytest.mark.parametrize("fuse", [True, False])
@pytest.mark.parametrize("inplace", [True, False])
def test_frozen_meta_channels_last_and_dtypes_survive(fuse: bool, inplace: bool) -> None:
    model = Block().to(memory_format=torch.channels_last).half().eval()
    model.depthwise.weight.requires_grad_(False)
    strides = model.depthwise.weight.stride()
    fast = dwswap.optimize(model, fuse=fuse, inplace=inplace)
    name = "depthwise_folded" if fuse else "depthwise"
    layer = fast.get_submodule(name)
    assert not layer.weight.requires_grad
    assert layer.bias.requires_grad
    assert layer.weight.stride() == strides
    assert layer.weight.dtype == layer.bias.dtype == torch.float16

    on_meta = dwswap.optimize(Block().to("meta").eval(), fuse=fuse, inplace=inplace)
    assert on_meta.get_submodule(name).weight.is_meta
    assert on_meta(image().to("meta")).shape == (2, 8, 9, 9)


@pytest.mark.parametrize("fuse", [True, False])
@pytest.mark.parametrize("inplace", [True, False])
def test_inference_tensors(fuse: bool, inplace: bool) -> None:
    with torch.inference_mode():
        model = Block().eval()
        x = image()
        expected = model(x)
    assert model.depthwise.weight.is_inference()
    fast = dwswap.optimize(model, x, fuse=fuse, inplace=inplace, verify=True)
    assert dwswap.report(fast).verification.passed
    with torch.inference_mode():
        torch.testing.assert_close(fast(x), expected, rtol=0, atol=1e-6)
        again = dwswap.optimize(model, fuse=fuse)
        torch.testing.assert_close(again(x), expected, rtol=0, atol=1e-6)


def test_subclass_with_own_forward_becomes_a_functional_swap() -> None:
    model = nn.Sequential(OwnForward(8, 8, 3, groups=8)).eval()
    fast = dwswap.optimize(model)
    (layer,) = dwswap.report(fast).layers
    assert (layer.kind, layer.decision) == ("functional", "swapped")
    x = image(8)
    torch.testing.assert_close(fast(x), model(x), rtol=0, atol=1e-6)
    assert list(fast.state_dict()) == list(model.state_dict())


def test_convolution_as_root() -> None:
    conv = depthwise(multiplier=2).eval()
    fast = dwswap.optimize(conv)
    assert type(fast) is DepthwiseConv2d
    assert type(conv) is nn.Conv2d
    assert dwswap.report(fast).layers[0].path == ""
    x = image(8)
    torch.testing.assert_close(fast(x), conv(x), rtol=0, atol=1e-6)
    assert type(dwswap.restore(fast)) is nn.Conv2d
    shared = dwswap.optimize(conv, inplace=True)
    assert shared.weight is conv.weight
