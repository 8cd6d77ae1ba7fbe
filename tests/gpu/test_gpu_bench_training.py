"""``dwswap bench models --train`` on a GPU: our gradients, compiled peers, peak memory."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from dwswap.bench.model_cases import Case
from dwswap.bench.training import TrainingBench

pytestmark = pytest.mark.gpu


def small(name: str) -> nn.Module:
    """The start of a MobileNet, with what draws random numbers."""
    return nn.Sequential(
        nn.Conv2d(3, 32, 3, stride=2, padding=1, bias=False),
        nn.BatchNorm2d(32),
        nn.ReLU6(inplace=True),
        nn.Conv2d(32, 32, 3, padding=1, groups=32, bias=False),
        nn.BatchNorm2d(32),
        nn.ReLU6(inplace=True),
        nn.Conv2d(32, 16, 1),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Dropout(0.2),
        nn.Linear(16, 10),
    )


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_measure(dtype, layout):
    device = torch.device("cuda", torch.cuda.current_device())
    bench = TrainingBench(device, small, budget=0.01, profiled=True)
    peers = ["eager", "compile"] if layout == "channels_last" else ["eager"]
    found = bench.measure(Case("small", 8, dtype, layout, 64), peers)
    assert found.problem is None
    assert [run.reason for run in found.runs] == [None] * 2 * len(peers)
    assert found.passed
    for run in found.runs:
        assert run.us > 0
        # At least the first feature map.
        assert run.peak_bytes > 8 * 32 * 32 * 32 * 2
    assert 0 < found.run("dwswap").error <= found.error_limit < 0.5
    assert found.run("dwswap").loss_error <= found.loss_limit
    assert found.best_speedup(peers[-1]) > 0
    assert "depthwise" in {row.family for row in found.profile}
