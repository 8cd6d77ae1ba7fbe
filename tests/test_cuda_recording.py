"""The order in which CUDA is called for a CUDA graph, with every call replaced by a note."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor

from dwswap.cuda_recording import CudaRecorder
from dwswap.weight_guard import NotCapturable


class Cuda:
    """Stands for ``torch.cuda``: ``log`` has what was called."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.log: list[str] = []
        self.called_off = False
        log = self.log
        cuda = self

        class Stream:
            def wait_stream(self, other: Any) -> None:
                log.append("caller waits" if self is current else "capture stream waits")

        class Event:
            def wait(self, stream: Any) -> None:
                log.append("wait")

            def record(self, stream: Any) -> None:
                log.append("record")

            def synchronize(self) -> None:
                log.append("synchronize")

        class CUDAGraph:
            ended = False

            def replay(self) -> None:
                log.append("replay")

            def reset(self) -> None:
                log.append("reset")

            def pool(self) -> None:
                if not self.ended:
                    raise RuntimeError("without a preceding successful capture")

        class graph:
            def __init__(self, graph: Any, **_: Any) -> None:
                self.graph = graph

            def __enter__(self) -> None:
                log.append("begin")

            def __exit__(self, kind: Any, *_: Any) -> None:
                log.append("end")
                if kind is not None and cuda.called_off:
                    raise RuntimeError("capture invalidated")
                self.graph.ended = True

        current = Stream()
        for value in (Stream, Event, CUDAGraph, graph):
            monkeypatch.setattr(torch.cuda, value.__name__, value)
        for name in ("device", "stream"):
            monkeypatch.setattr(torch.cuda, name, lambda _: nullcontext())
        monkeypatch.setattr(torch.cuda, "current_stream", lambda _=None: current)
        monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: (0, 1))
        monkeypatch.setattr(torch.random, "fork_rng", lambda _: nullcontext())
        for name in ("clearCublasWorkspaces", "endAllocateToPool", "releasePool"):
            monkeypatch.setattr(torch._C, f"_cuda_{name}", lambda *_, note=name: log.append(note))

    def take(self) -> list[str]:
        taken = list(self.log)
        self.log.clear()
        return taken


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> Iterator[Cuda]:
    with monkeypatch.context() as patch:
        yield Cuda(patch)


WARM_UP = ["capture stream waits", "caller waits"]
CAPTURE = ["clearCublasWorkspaces", "begin", "end", "clearCublasWorkspaces"]


def test_capture_replay_and_release(cuda: Cuda) -> None:
    recorder = CudaRecorder()
    recording = recorder.record(lambda inputs: [inputs[0] + 1], [torch.ones(2)])
    assert cuda.take() == WARM_UP + CAPTURE
    x = torch.zeros(2)
    (first,) = recording.replay([x])
    assert cuda.take() == ["wait", "replay", "record"]
    assert first is not recording.replay([x])[0]
    assert torch.equal(recording._inputs[0], x)
    cuda.take()
    recording.release()
    recording.release()
    del recording
    assert cuda.take() == ["synchronize", "reset"]


def test_buffers_have_the_strides_of_the_inputs(cuda: Cuda) -> None:
    recorder = CudaRecorder(clone_outputs=False)
    x = torch.arange(24.0).view(2, 3, 4).transpose(0, 2)
    given = [x, x[::2], torch.ones(3, dtype=torch.int64)]
    recording = recorder.record(lambda inputs: [i.sum() for i in inputs], given)
    for buffer, tensor in zip(recording._inputs, given, strict=True):
        assert buffer.stride() == tensor.stride()
        assert torch.equal(buffer, tensor)
    more = [tensor + 1 for tensor in given]
    assert recording.replay(more) is recording._outputs
    assert all(map(torch.equal, recording._inputs, more))


def test_outputs_have_the_strides_of_the_code(cuda: Cuda) -> None:
    def function(inputs: list[Tensor]) -> list[Tensor]:
        x = inputs[0] + 1
        return [x, x.permute(0, 2, 1), x[:, :2], x[..., ::2], x.new_ones(3, 1).expand(3, 4), x[:1]]

    x = torch.arange(24.0).view(2, 3, 4)
    expected = function([x])
    for result, other in zip(
        CudaRecorder().record(function, [x]).replay([x]), expected, strict=True
    ):
        assert torch.equal(result, other)
        assert result.stride() == other.stride() or 0 in other.stride()
    assert gc.isenabled()


def test_a_device_mode_finds_what_waits(cuda: Cuda) -> None:
    functions = {
        "_local_scalar_dense.default waits": lambda inputs: [inputs[0] * inputs[0].sum().item()],
        "nonzero.default waits": lambda inputs: [inputs[0].nonzero()],
        "has a result on meta, not on cpu": lambda inputs: [inputs[0].to("meta")],
        "changes its input in place": lambda inputs: [inputs[0].add_(1)],
    }
    for message, function in functions.items():
        with pytest.raises(NotCapturable, match=message):
            CudaRecorder().record(function, [torch.ones(2)])
        assert cuda.take() == WARM_UP


@pytest.mark.parametrize("called_off", [False, True])
def test_after_a_capture_that_fails(cuda: Cuda, called_off: bool) -> None:
    cuda.called_off = called_off
    calls: list[int] = []

    def function(inputs: list[Tensor]) -> list[Tensor]:
        calls.append(1)
        if len(calls) == 3:
            raise ValueError("in the capture")
        return [inputs[0] + 1]

    with pytest.raises(RuntimeError if called_off else ValueError):
        CudaRecorder().record(function, [torch.ones(2)])
    undone = ["endAllocateToPool", "releasePool", "begin", "end"] if called_off else ["reset"]
    *capture, last = CAPTURE
    assert cuda.take() == [*WARM_UP, *capture, *undone, last]
    assert len(calls) == 3
