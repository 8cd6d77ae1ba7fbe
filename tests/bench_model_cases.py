"""A small model and made-up results, for the tests of ``dwswap bench models``."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from dwswap.bench.kernel_families import FamilyTime
from dwswap.bench.model_cases import Case
from dwswap.bench.model_peers import OURS
from dwswap.bench.model_results import Measured, ModelResult
from dwswap.bench.models import ModelBench

CPU = torch.device("cpu")
HERE = "bench_model_cases:small"
CASE = Case("small", 3, "float32", "channels_last", 16)


class Small(nn.Module):
    """One block of a MobileNet."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8), nn.ReLU6())
        self.depthwise = nn.Conv2d(8, 8, 3, groups=8, bias=False)
        self.norm = nn.BatchNorm2d(8)
        self.head = nn.Linear(8, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.norm(self.depthwise(self.stem(x))).relu().mean((2, 3)))


def small() -> nn.Module:
    return Small()


def interrupt_after_one(monkeypatch: pytest.MonkeyPatch) -> list[object]:
    """Ctrl-C while the second case is measured; the cases that were, so an entry more ends that."""
    measured: list[object] = []
    original = ModelBench.measure

    def measure(self, case, peers):
        if len(measured) == 1:
            raise KeyboardInterrupt
        measured.append(case)
        return original(self, case, peers)

    monkeypatch.setattr(ModelBench, "measure", measure)
    return measured


def bench(**changes) -> ModelBench:
    return ModelBench(CPU, lambda name: small(), **({"budget": 0.0} | changes))


def run(name, us=2000.0, plain=2.0, graph=2.5, **changes) -> Measured:
    values = {
        "images_per_second": 1e6 * 256 / us,
        "speedups": {} if name in OURS else dict(zip(OURS, (plain, graph), strict=True)),
        "build_s": 0.5,
        "first_call_s": 1.0,
        "peak_bytes": 50_000_000,
        "error": 1e-3,
        "error_ratio": 1.0,
    }
    return Measured(name, us=us, **(values | changes))


def result(*runs: Measured, **changes) -> ModelResult:
    values = {
        "model": "mobilenet_v2",
        "batch": 256,
        "dtype": "float16",
        "layout": "channels_last",
        "size": 224,
        "summary": "17 of 52",
        "error_limit": 2e-3,
        "runs": [run("dwswap", 1000.0), run("dwswap_graph", 800.0), *runs],
        "profile": [FamilyTime("depthwise", 600.0, 60.0, 17.0, "kernel")],
        "problem": None,
        "passed": True,
    }
    return ModelResult(**(values | changes))
