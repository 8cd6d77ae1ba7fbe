"""CUDA graphs of a function of tensors: warm up, capture, replay, give back.

Nothing here decides whether a replay is right; see ``dwswap.cuda_graphs`` for that.
"""

from __future__ import annotations

import gc
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from dwswap.weight_guard import NotCapturable

__all__ = ["CudaRecorder", "Recorder", "Recording"]

Function = Callable[[list[Tensor]], list[Tensor]]

# A capture synchronizes the device and empties caches, which another capture must not see.
_one_capture = threading.Lock()
# The allocators may still hold a pointer to a graph whose capture CUDA called off.
_called_off: list[Any] = []
_WAITS = {torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape}


class Recording(Protocol):
    """One captured call."""

    def replay(self, tensors: list[Tensor]) -> list[Tensor]:
        """Outputs for inputs of the shapes, strides, dtypes and device that were recorded."""

    def release(self) -> None:
        """Wait for the last replay and give the memory back; nothing may be replayed after."""


class Recorder(Protocol):
    """Makes the recordings of one module, which share memory: one replay at a time."""

    device_type: str

    def is_capturing(self, device: torch.device) -> bool:
        """Whether the caller captures a graph on its current stream already."""

    def record(self, function: Function, inputs: list[Tensor]) -> Recording:
        """Capture ``function(inputs)``, which is called several times.

        Raises:
            NotCapturable: it waits for the GPU, changes an input or leaves the device.
            Exception: whatever else CUDA or ``function`` raises; nothing is kept then.
        """

    def reset(self) -> None:
        """All recordings are released: forget the memory and the device that they shared."""


class CudaRecording:
    """A CUDA graph with the buffers that it reads and writes."""

    def __init__(
        self,
        graph: torch.cuda.CUDAGraph,
        inputs: list[Tensor],
        outputs: list[Tensor],
        done: torch.cuda.Event,
        clone_outputs: bool,
    ) -> None:
        self._graph = graph
        self._inputs = inputs
        self._outputs = outputs
        self._only_input = inputs[0] if len(inputs) == 1 else None
        self._done = done
        self._device = inputs[0].device
        self._clone_outputs = clone_outputs
        self._copies = [
            # clone closes the gaps between the elements of a view.
            (torch.clone if torch.empty_like(t).stride() == t.stride() else _with_gaps, t)
            for t in outputs
        ]

    def replay(self, tensors: list[Tensor]) -> list[Tensor]:
        stream = torch.cuda.current_stream(self._device)
        # The replay before may run on another stream, with the same buffers and memory.
        self._done.wait(stream)
        try:
            if self._only_input is not None:
                self._only_input.copy_(tensors[0])
            else:
                torch._foreach_copy_(self._inputs, tensors)
            self._graph.replay()
            if self._clone_outputs:
                return [copy(output) for copy, output in self._copies]
            return self._outputs
        finally:
            self._done.record(stream)

    def release(self) -> None:
        if self._inputs:
            # Freed memory is reused in the order of the stream that allocated it, not of that
            # which replayed last.
            self._done.synchronize()
            self._inputs, self._outputs, self._copies, self._only_input = [], [], [], None
            self._graph.reset()

    def __del__(self) -> None:
        with suppress(Exception):  # at exit there may be no CUDA left
            self.release()


class CudaRecorder:
    """See :class:`Recorder`.

    Args:
        clone_outputs: False makes replays return the buffers that the next replay overwrites.
    """

    device_type = "cuda"

    def __init__(self, clone_outputs: bool = True) -> None:
        self._clone_outputs = clone_outputs
        self.reset()

    def reset(self) -> None:
        self._pool: Any = None
        self._stream: Any = None
        self._done: Any = None

    def is_capturing(self, device: torch.device) -> bool:
        if device.index == torch.cuda.current_device():
            return torch.cuda.is_current_stream_capturing()
        with torch.cuda.device(device):
            return torch.cuda.is_current_stream_capturing()

    def record(self, function: Function, inputs: list[Tensor]) -> CudaRecording:
        device = inputs[0].device
        with (
            _one_capture,
            torch.cuda.device(device),
            # Buffers must be tensors that keep a version and serve in every mode.
            torch.inference_mode(False),
            torch.no_grad(),
            _no_autocast_cache(),
        ):
            if self._pool is None:
                self._pool = torch.cuda.graph_pool_handle()
                self._stream = torch.cuda.Stream()
                self._done = torch.cuda.Event()
            buffers = [
                torch.empty_strided(*_geometry(t), dtype=t.dtype, device=t.device).copy_(t)
                for t in inputs
            ]
            self._warm_up(function, buffers, device)
            graph, outputs = self._capture(function, buffers, device)
            return CudaRecording(graph, buffers, outputs, self._done, self._clone_outputs)

    def _warm_up(self, function: Function, buffers: list[Tensor], device: torch.device) -> None:
        """Run on the stream of the capture what a capture does not allow to happen first in it."""
        caller = torch.cuda.current_stream()
        self._stream.wait_stream(caller)
        before = [buffer._version for buffer in buffers]
        try:
            # What is drawn here, the caller has not drawn.
            with torch.cuda.stream(self._stream), torch.random.fork_rng([device.index]):
                with _NothingWaits(device):
                    function(buffers)
                function(buffers)
        finally:
            # The buffers are the caller's stream's again, and may be freed.
            caller.wait_stream(self._stream)
        if [buffer._version for buffer in buffers] != before:
            raise NotCapturable("it changes its input in place")

    def _capture(
        self, function: Function, buffers: list[Tensor], device: torch.device
    ) -> tuple[torch.cuda.CUDAGraph, list[Tensor]]:
        graph = torch.cuda.CUDAGraph()
        # cuBLAS keeps a workspace per stream. One that was there before would be shared with
        # whatever else runs on the stream of the capture; a new one is the graph's own.
        torch._C._cuda_clearCublasWorkspaces()
        try:
            # The outer context puts the caller's stream back also where the inner one fails to.
            with (
                _no_garbage_collection(),
                torch.cuda.stream(self._stream),
                torch.cuda.graph(
                    graph,
                    pool=self._pool,
                    stream=self._stream,
                    # Other threads may allocate meanwhile.
                    capture_error_mode="thread_local",
                ),
            ):
                outputs = function(buffers)
        except BaseException:
            self._undo(graph, device)
            raise
        finally:
            torch._C._cuda_clearCublasWorkspaces()
        if any(output.device != device for output in outputs):
            graph.reset()
            raise NotCapturable(f"an output is not on {device}")
        return graph, outputs

    def _undo(self, graph: torch.cuda.CUDAGraph, device: torch.device) -> None:
        """Put the allocator and the random generator right after a capture that failed."""
        try:
            graph.pool()
        except RuntimeError:
            # CUDA called the capture off, and PyTorch did not get to its own clean-up.
            _called_off.append(graph)
            with suppress(RuntimeError):
                torch._C._cuda_endAllocateToPool(device.index, self._pool)
                torch._C._cuda_releasePool(device.index, self._pool)
            # The end of a capture that succeeds lets the generator draw again.
            with (
                suppress(RuntimeError),
                torch.cuda.stream(self._stream),
                torch.cuda.graph(
                    torch.cuda.CUDAGraph(),
                    stream=self._stream,
                    capture_error_mode="thread_local",
                ),
            ):
                torch.zeros((), device=device)
        else:
            graph.reset()


class _NothingWaits(TorchDispatchMode):
    """Refuses what cannot be captured, where it can be seen: before CUDA calls a capture off."""

    def __init__(self, device: torch.device) -> None:
        super().__init__()
        self._device = device

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if not _WAITS.isdisjoint(getattr(func, "tags", ())):
            raise NotCapturable(f"{func} waits for the GPU")
        result = func(*args, **(kwargs or {}))
        for leaf in pytree.tree_leaves(result):
            if isinstance(leaf, Tensor) and leaf.device != self._device:
                raise NotCapturable(f"{func} has a result on {leaf.device}, not on {self._device}")
        return result


def _with_gaps(tensor: Tensor) -> Tensor:
    """A copy with the strides of ``tensor``, unless elements of it share memory."""
    if any(size > 1 and stride == 0 for size, stride in zip(*_geometry(tensor), strict=True)):
        return tensor.clone()
    return torch.empty_strided(*_geometry(tensor), dtype=tensor.dtype, device=tensor.device).copy_(
        tensor
    )


def _geometry(tensor: Tensor) -> tuple[tuple[int, ...], tuple[int, ...]]:
    return tuple(tensor.shape), tensor.stride()


@contextmanager
def _no_garbage_collection() -> Iterator[None]:
    """What is collected may wait for the GPU as it goes, which calls a capture off."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


@contextmanager
def _no_autocast_cache() -> Iterator[None]:
    """Weights that are cast outside of the graph would not follow their originals."""
    before = torch.is_autocast_cache_enabled()
    torch.set_autocast_cache_enabled(False)
    try:
        yield
    finally:
        torch.set_autocast_cache_enabled(before)
