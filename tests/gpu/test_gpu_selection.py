"""select="measured" on a real GPU and a real model."""

from __future__ import annotations

import pytest
import torch

import dwswap
from dwswap import build, selection
from dwswap.passes.unswap_calls import swapped_calls

torchvision = pytest.importorskip("torchvision")

pytestmark = pytest.mark.gpu


def test_mobilenet_v2_is_measured_once(tmp_path, monkeypatch):
    assert build.load(), build.status().reason
    # The times go to a cache of their own; the library is loaded from the usual one already.
    monkeypatch.setenv("DWSWAP_CACHE_DIR", str(tmp_path))
    torch.manual_seed(0)
    model = torchvision.models.mobilenet_v2(weights=None).eval().cuda()
    model = model.to(dtype=torch.half, memory_format=torch.channels_last)
    x = torch.randn(8, 3, 224, 224, device="cuda", dtype=torch.half)
    x = x.to(memory_format=torch.channels_last)

    fast = dwswap.optimize(model, x, select="measured", verify=True)

    verification, layers = dwswap.report(fast).verification, dwswap.report(fast).layers
    assert verification.passed, str(dwswap.report(fast))
    depthwise = [layer for layer in layers if layer.groups != 1]
    assert len(depthwise) == 17
    assert {(layer.decision, layer.reason) for layer in depthwise} <= {
        ("swapped", "depthwise"),
        ("kept", "slower_here"),
    }
    swapped = sum(layer.decision == "swapped" for layer in depthwise)
    # The projection of the first block and the expansion of the second are one.
    folded = [name for name in fast.state_dict() if "_folded" in name and name.endswith("weight")]
    assert len(folded) == 51
    # With the projection behind it a layer may be one call.
    assert len(list(swapped_calls(fast))) == swapped

    monkeypatch.setattr(selection, "measure", lambda *_: pytest.fail("measured again"))
    again = dwswap.optimize(model, x, select="measured")
    decisions = [(layer.decision, layer.detail) for layer in dwswap.report(again).layers]
    assert decisions == [(layer.decision, layer.detail) for layer in layers]


def test_times_are_of_the_gpu():
    assert build.load(), build.status().reason
    size = (32, 96, 112, 112)
    layout = selection.Strided.of(torch.empty(size, memory_format=torch.channels_last))
    weight = selection.Strided.of(torch.empty(96, 1, 3, 3))
    problem = selection.Problem(torch.half, layout, weight, False, (1, 1), (1, 1), (1, 1))
    state = torch.cuda.get_rng_state()
    times = selection.measure(problem, torch.device("cuda", torch.cuda.current_device()))
    assert torch.equal(torch.cuda.get_rng_state(), state)
    # 77 MB in and 77 MB out, at less than 10 TB/s: memory was read, not a cache.
    assert all(15 < time < 5_000 for time in times)
