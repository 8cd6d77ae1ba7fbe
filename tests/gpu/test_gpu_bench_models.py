"""``dwswap bench models`` on a GPU: graphs, compiled peers, peak memory, kernels by family."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from dwswap.bench.latency import MemoryMeter, time_stream
from dwswap.bench.model_cases import Case
from dwswap.bench.model_peers import EAGER, OURS, Captured
from dwswap.bench.models import ModelBench

pytestmark = pytest.mark.gpu


def small(name: str) -> nn.Module:
    """The start of a MobileNet."""
    return nn.Sequential(
        nn.Conv2d(3, 32, 3, stride=2, padding=1, bias=False),
        nn.BatchNorm2d(32),
        nn.ReLU6(),
        nn.Conv2d(32, 32, 3, padding=1, groups=32, bias=False),
        nn.BatchNorm2d(32),
        nn.ReLU6(),
        nn.Conv2d(32, 16, 1),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
    )


@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_measure(dtype):
    device = torch.device("cuda", torch.cuda.current_device())
    bench = ModelBench(device, small, budget=0.01, profiled=True)
    found = bench.measure(
        Case("small", 4, dtype, "channels_last", 64),
        [*EAGER, "eager_graph", "fx_fuse", "reduce_overhead"],
    )
    assert found.passed
    assert [run.name for run in found.runs[:2]] == [*OURS]
    for run in found.runs:
        assert run.reason is None, run.name
        assert run.us > 0
        assert run.error <= found.error_limit
        # At least the first feature map, or the pool of a graph.
        assert run.peak_bytes > 4 * 32 * 32 * 32 * 2
    assert all(set(run.speedups) == {*OURS} for run in found.runs[2:])
    assert "depthwise" in {row.family for row in found.profile}


def test_captured_reads_its_argument_at_every_call():
    model = small("").cuda().eval()
    with torch.no_grad():
        x, y = torch.rand(2, 2, 3, 32, 32, device="cuda").unbind()
        replay = Captured(model, x)
        torch.testing.assert_close(replay(y).clone(), model(y))
        torch.testing.assert_close(replay(x), model(x))


def test_peak_memory_of_a_call_and_of_a_graph():
    x = torch.rand(1 << 20, device="cuda")
    meter = MemoryMeter(x.device)
    assert meter.peak(lambda: (x + 1).exp()) == 2 * x.nbytes
    meter = MemoryMeter(x.device)
    replay = Captured(lambda t: (t + 1).exp(), x)
    assert meter.peak(lambda: replay(x)) >= 3 * x.nbytes


def test_a_stream_of_calls_takes_the_longer_of_host_and_gpu():
    x = torch.rand(1 << 26, device="cuda")
    timing = time_stream(lambda: torch.relu(x), "cuda", budget=0.05)
    assert timing.microseconds > 2 * x.nbytes / 20e12 * 1e6
