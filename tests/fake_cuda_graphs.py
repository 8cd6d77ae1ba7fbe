"""A recorder of CUDA graphs that needs no GPU: replays read the memory that a graph would read."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from tiny_models import Block
from torch import Tensor, nn

import dwswap
from dwswap.cuda_graph_module import CudaGraphModule
from dwswap.cuda_graphs import CudaGraphOptions, CudaGraphs

Function = Callable[[list[Tensor]], list[Tensor]]


class FakeRecording:
    def __init__(self, recorder: FakeRecorder, function: Function, inputs: list[Tensor]) -> None:
        self.recorder = recorder
        self.function = function
        self.released = False
        with torch.inference_mode(False), torch.no_grad():
            self.inputs = [
                torch.empty_strided(t.shape, t.stride(), dtype=t.dtype).copy_(t) for t in inputs
            ]
            self.outputs = [t.clone() for t in function(self.inputs)]

    def replay(self, tensors: list[Tensor]) -> list[Tensor]:
        assert not self.released
        self.recorder.replays += 1
        self.recorder.enter()
        for mine, given in zip(self.inputs, tensors, strict=True):
            assert (mine.shape, mine.stride(), mine.dtype) == (
                given.shape,
                given.stride(),
                given.dtype,
            )
            mine.copy_(given)
        if self.recorder.computes:
            for mine, new in zip(self.outputs, self.function(self.inputs), strict=True):
                mine.copy_(new)
        outputs = self.outputs
        if self.recorder.clone_outputs:
            outputs = [output.clone() for output in outputs]
        self.recorder.leave()
        return outputs

    def release(self) -> None:
        self.released = True
        self.recorder.alive.remove(self)


class FakeRecorder:
    """Counts what happens; ``fails`` is raised by the next recordings."""

    device_type = "cpu"

    def __init__(self, clone_outputs: bool = True, computes: bool = True) -> None:
        self.clone_outputs = clone_outputs
        self.computes = computes
        self.capturing = False
        self.fails: Exception | None = None
        self.records = self.replays = self.resets = 0
        self.alive: list[FakeRecording] = []
        self.busy = 0
        self.most_busy = 0

    def enter(self) -> None:
        self.busy += 1
        self.most_busy = max(self.most_busy, self.busy)

    def leave(self) -> None:
        self.busy -= 1

    def reset(self) -> None:
        assert not self.alive
        self.resets += 1

    def is_capturing(self, device: torch.device) -> bool:
        return self.capturing

    def record(self, function: Function, inputs: list[Tensor]) -> FakeRecording:
        self.records += 1
        if self.fails is not None:
            raise self.fails
        recording = FakeRecording(self, function, inputs)
        self.alive.append(recording)
        return recording


def faked(model: nn.Module, **options: Any) -> tuple[CudaGraphModule, FakeRecorder]:
    """``model``, a result of ``optimize(..., cuda_graph=...)``, with a fake recorder."""
    assert isinstance(model, CudaGraphModule)
    assert model.cuda_graphs is not None
    chosen = model.cuda_graphs.options
    recorder = FakeRecorder(chosen.clone_outputs, **options)
    model.__dict__["_dwswap_cuda_graphs"] = CudaGraphs(chosen, recorder)
    model.recompile()
    return model, recorder


def graphed(model: nn.Module | None = None, **options: Any) -> tuple[Any, FakeRecorder]:
    model = Block().eval() if model is None else model
    return faked(dwswap.optimize(model, cuda_graph=CudaGraphOptions(**options)))


def calls(fast: Any, *inputs: Tensor) -> list[Any]:
    return [fast(x) for x in inputs]


def same(result: Any, expected: Any) -> None:
    torch.testing.assert_close(result, expected, rtol=0, atol=0)


def counts(recorder: FakeRecorder) -> tuple[int, int]:
    return recorder.records, recorder.replays


class Subclass(Tensor):
    pass


@pytest.fixture
def no_grad() -> Any:
    with torch.no_grad():
        yield
