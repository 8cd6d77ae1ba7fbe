"""Graphs inside models that are none as a whole, on a real GPU."""

from __future__ import annotations

import pytest
import torch

import dwswap
from dwswap import build
from dwswap.cuda_graph_module import CudaGraphModule

torchvision = pytest.importorskip("torchvision")

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_a_detection_model_replays_its_backbone(dtype: torch.dtype) -> None:
    assert build.load(), build.status().reason
    torch.manual_seed(0)
    model = torchvision.models.detection.fasterrcnn_mobilenet_v3_large_320_fpn(
        weights=None, weights_backbone=None
    )
    model = model.eval().to("cuda", dtype)
    fast = dwswap.optimize(model, cuda_graph=True)
    report = dwswap.report(fast)
    assert report.traced == ("backbone",)
    assert report.cuda_graph is not None
    assert report.cuda_graph.startswith("on in backbone")
    assert isinstance(fast.backbone, CudaGraphModule)
    exact = model.double()
    for size in ((320, 320), (240, 320)):
        x = torch.rand(1, 3, *size, device="cuda", dtype=dtype)
        with torch.no_grad():
            expected = exact.backbone(x.double())
            for _ in range(4):
                fast([x[0]])
                features = fast.backbone(x)
        assert list(features) == list(expected)
        for name, feature in features.items():
            assert feature.dtype == dtype
            assert feature.stride() == expected[name].stride()
            error = (feature.double() - expected[name]).abs().max() / expected[name].abs().max()
            assert error < (1e-2 if dtype == torch.float16 else 1e-4), name
    assert len(fast.backbone.cuda_graphs) > 0
