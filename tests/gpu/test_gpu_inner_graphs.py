"""Graphs inside models that are none as a whole, on a real GPU."""

from __future__ import annotations

import copy

import pytest
import torch

import dwswap
from dwswap import build
from dwswap.comparison import compare
from dwswap.cuda_graph_module import CudaGraphModule

torchvision = pytest.importorskip("torchvision")

pytestmark = pytest.mark.gpu


def calibrate(model: torch.nn.Module, x: torch.Tensor) -> None:
    """Give the fixed BatchNorms the statistics of ``x``, without which it fades to nothing."""

    def measure(norm: torch.nn.Module, inputs: tuple[torch.Tensor]) -> None:
        norm.running_mean.copy_(inputs[0].mean((0, 2, 3)))
        norm.running_var.copy_(inputs[0].var((0, 2, 3)))

    norms = [m for m in model.modules() if hasattr(m, "running_var")]
    hooks = [norm.register_forward_pre_hook(measure) for norm in norms]
    with torch.no_grad():
        model(x)
    for hook in hooks:
        hook.remove()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_a_detection_model_replays_its_backbone(dtype: torch.dtype) -> None:
    assert build.load(), build.status().reason
    torch.manual_seed(0)
    model = torchvision.models.detection.fasterrcnn_mobilenet_v3_large_320_fpn(
        weights=None, weights_backbone=None
    )
    model = model.eval()
    calibrate(model.backbone, torch.rand(2, 3, 320, 320))
    model = model.to("cuda", dtype)
    fast = dwswap.optimize(model, cuda_graph=True)
    report = dwswap.report(fast)
    assert report.traced == ("backbone",)
    assert report.cuda_graph is not None
    assert report.cuda_graph.startswith("on in backbone")
    assert isinstance(fast.backbone, CudaGraphModule)
    exact = copy.deepcopy(model).double()
    for size in ((320, 320), (240, 320)):
        x = torch.rand(1, 3, *size, device="cuda", dtype=dtype)
        with torch.no_grad():
            expected, theirs = exact.backbone(x.double()), model.backbone(x)
            for _ in range(4):
                fast([x[0]])
                features = fast.backbone(x)
        assert list(features) == list(expected)
        for name, feature in features.items():
            assert feature.dtype == dtype
            assert feature.stride() == theirs[name].stride()
            assert expected[name].std() > 1e-2
            errors = compare(feature, theirs[name], expected[name])
            assert errors.passed, (name, errors)
    assert len(fast.backbone.cuda_graphs) > 0
