"""``dwswap bench models --train`` on a GPU: our gradients, all ways to run a step, memory."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from dwswap.bench.model_cases import Case
from dwswap.bench.training import TrainingBench
from dwswap.bench.training_step import CapturedStep, Step, without_randomness

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
    peers = ["eager", "compile"] if layout == "channels_last" else ["eager", "eager_graph"]
    found = bench.measure(Case("small", 8, dtype, layout, 64), peers)
    assert found.problem is None
    assert [run.reason for run in found.runs] == [None] * (5 if "compile" in peers else 4)
    assert found.passed
    for run in found.runs:
        assert run.us > 0
        # At least the first feature map.
        assert run.peak_bytes > 8 * 32 * 32 * 32 * 2
    ours = [run for run in found.runs if run.name in found.ours]
    for run in [*ours, *(found.run(name) for name in peers if name != "compile")]:
        assert 0 < run.error <= found.error_limit < 0.5
        assert run.loss_error <= found.loss_limit
    assert found.best_speedup(peers[-1]) > 0
    assert "depthwise" in {row.family for row in found.profile}


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_captured_steps_are_those_of_a_plain_one(dtype):
    """From the same weights: the capture leaves no trace, though it takes steps before it."""
    torch.manual_seed(0)
    model = without_randomness(small("small")).cuda()
    images = torch.randn(8, 3, 64, 64, device="cuda")
    labels = torch.arange(8, device="cuda")
    steps = [
        kind(copy.deepcopy(model), images, labels, dtype, 2.0**8) for kind in (Step, CapturedStep)
    ]
    for _ in range(3):
        plain, captured = (float(step()) for step in steps)
        assert captured == pytest.approx(plain, rel=1e-3)
        for expected, found in zip(*(step.gradients() for step in steps), strict=True):
            assert (found - expected).norm() <= 0.02 * expected.norm() + 1e-4
    for expected, found in zip(*(step.model.parameters() for step in steps), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4)
    assert int(steps[1].model[1].num_batches_tracked) == 3
