"""Models of torchvision in eval mode: nothing elementwise is left, and the error stays."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from test_torchvision import DEPTHWISE, build_with_data
from torch import Tensor, fx, nn
from torch.nn.modules.batchnorm import _BatchNorm

import dwswap
from dwswap.passes.activation_call import activation_call
from dwswap.passes.affine_call import affine_call

pytest.importorskip("torchvision")

# Model -> operations per forward before and after.
CALLS = {
    "mobilenet_v2": (151, 65),
    "mobilenet_v3_small": (155, 54),
    "shufflenet_v2_x0_5": (184, 96),
    "mnasnet0_5": (151, 65),
    "efficientnet_b0": (238, 77),
    "convnext_tiny": (137, 119),
}
# Layers, none of them depthwise, that took up something else: the scales of ConvNeXt's blocks.
ELSEWHERE = {"convnext_tiny": 18}


def images(count: int, seed: int) -> Tensor:
    return torch.rand(count, 3, 64, 64, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="module", params=CALLS)
def pair(request: pytest.FixtureRequest) -> tuple[str, nn.Module, Any]:
    """Name, model and result; the statistics are those of many images.

    The few values of two images at the last layers make statistics that blow up what other images
    give, and every rounding error with it.
    """
    model = build_with_data(request.param)
    norms = [m for m in model.modules() if isinstance(m, _BatchNorm)]
    for norm in norms:
        norm.reset_running_stats()
        norm.train()
    with torch.no_grad():
        model(images(48, 2))
    return request.param, model.eval(), dwswap.optimize(model)


def rms(values: Tensor) -> float:
    return float(values.square().mean().sqrt())


def test_error_is_that_of_the_model(pair: tuple[str, nn.Module, Any]) -> None:
    _, model, fast = pair
    x = images(24, 3)
    with torch.no_grad():
        exact = copy.deepcopy(model).double()(x.double())
        ours, eager = (rms(m(x).double() - exact) for m in (fast, model))
        assert ours <= 1.2 * eager + torch.finfo(torch.float32).eps * rms(exact)


def test_in_float64(pair: tuple[str, nn.Module, Any]) -> None:
    """The same function: what is left are sums in another order."""
    _, model, _ = pair
    model = copy.deepcopy(model).double()
    x = images(2, 4).double()
    with torch.no_grad():
        expected = model(x)
        torch.testing.assert_close(dwswap.optimize(model)(x), expected, rtol=0, atol=1e-10)


def test_no_batchnorm_is_left(pair: tuple[str, nn.Module, Any]) -> None:
    name, _, fast = pair
    assert not any(isinstance(module, _BatchNorm) for module in fast.modules())
    report = dwswap.report(fast)
    assert len(report.swapped) == DEPTHWISE[name]
    assert (report.calls_before, report.calls_after) == CALLS[name]
    changes = [change for layer in report.elsewhere.values() for change in layer]
    assert len(report.elsewhere) == ELSEWHERE.get(name, 0)
    assert all(change.done for change in changes), changes
    left = [c for layer in report.layers for c in layer.changes if not c.done and c.kind != "bias"]
    # ConvNeXt's downsampling feeds a depthwise layer and the residual sum.
    assert {c.reason for c in left} == ({"other_users"} if name == "convnext_tiny" else set())


def test_no_activation_is_left_beside_depthwise(pair: tuple[str, nn.Module, Any]) -> None:
    name, _, fast = pair
    found = 0
    for node in fast.graph.nodes:
        call = affine_call(fast, node)
        if call is None or not call.depthwise:
            continue
        found += 1
        for neighbour in (call.input, *node.users):
            assert activation_call(fast, neighbour) is None, neighbour
        before = affine_call(fast, call.input)
        assert before is None or before.bias is None or name == "convnext_tiny"
    assert found


def test_backbones_of_detection_models_are_fused() -> None:
    torchvision = pytest.importorskip("torchvision")
    norm = torchvision.ops.FrozenBatchNorm2d
    fast = dwswap.optimize(torchvision.models.mobilenet_v3_small(norm_layer=norm).eval())
    report = dwswap.report(fast)
    assert (report.calls_before, report.calls_after) == CALLS["mobilenet_v3_small"]


def test_mobilenet_is_convolutions_and_additions() -> None:
    fast = dwswap.optimize(build_with_data("mobilenet_v2"))
    assert isinstance(fast, fx.GraphModule)
    rest = [
        str(node.target)
        for node in fast.graph.nodes
        if node.op.startswith("call") and affine_call(fast, node) is None
    ]
    kinds = {target for target in rest if "add" not in target}
    # The head: activation, pooling, flatten.
    assert len(kinds) == 3, kinds
    assert len([target for target in rest if "add" in target]) == 10


def test_compiles_and_copies(pair: tuple[str, nn.Module, Any]) -> None:
    name, _, fast = pair
    x = images(1, 5)
    with torch.no_grad():
        again = copy.deepcopy(fast)
        assert torch.equal(again(x), fast(x))
        if name == "mobilenet_v2":
            torch._dynamo.reset()
            compiled = torch.compile(fast, fullgraph=True, backend="aot_eager")
            torch.testing.assert_close(compiled(x), fast(x))
