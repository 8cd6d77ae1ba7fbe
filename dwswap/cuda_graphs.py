"""Which calls of a graph module replay a CUDA graph, and which run as ever."""

from __future__ import annotations

import logging
import sys
import threading
import warnings
from collections import OrderedDict
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from typing import Any

from torch import Tensor, fx

from dwswap.call_signature import (
    NoSignature,
    from_tensors,
    same_tensors_together,
    signature,
    surroundings,
)
from dwswap.cuda_recording import CudaRecorder, Recorder, Recording
from dwswap.plain import is_watched
from dwswap.weight_guard import NotCapturable, WeightGuard

__all__ = ["CudaGraphOptions", "CudaGraphs"]

logger = logging.getLogger("dwswap")

Eager = Callable[..., Any]


@dataclass(frozen=True)
class CudaGraphOptions:
    """What ``optimize(..., cuda_graph=CudaGraphOptions(...))`` can choose.

    Attributes:
        max_signatures: how many signatures have a graph at a time, at least 1. For one more, that
            which was not used for the longest time is dropped, with its memory.
        clone_outputs: outputs are the caller's own. False saves a copy: a call then may return
            buffers that the next call, of any signature and in any thread, overwrites.

    Raises:
        TypeError, ValueError: a value of the wrong kind.
    """

    max_signatures: int = 8
    clone_outputs: bool = True

    def __post_init__(self) -> None:
        values: tuple[Any, Any] = self.max_signatures, self.clone_outputs
        for name, value, kind in zip(self.__annotations__, values, (int, bool), strict=True):
            if type(value) is not kind:
                raise TypeError(f"{name} must be of type {kind.__name__}, got {value!r}")
        if self.max_signatures < 1:
            raise ValueError(f"max_signatures must be at least 1, got {self.max_signatures}")

    @classmethod
    def parse(cls, value: Any) -> CudaGraphOptions | None:
        """What the argument ``cuda_graph`` of ``optimize`` means; None is no CUDA graphs.

        Raises:
            TypeError: ``value`` is neither a bool nor :class:`CudaGraphOptions`.
        """
        if isinstance(value, cls):
            return value
        if not isinstance(value, bool):
            raise TypeError(
                f"cuda_graph must be a bool or dwswap.CudaGraphOptions, got {type(value).__name__}"
            )
        return cls() if value else None


@dataclass
class _Entry:
    """What is known of a signature; without a recording its calls run as ever."""

    recording: Recording | None = None
    rebuild: Callable[[list[Tensor]], Any] | None = None


_NO = object()
"""Returned for a call that is not to be replayed."""


class CudaGraphs:
    """The CUDA graphs of one module. Copies and pickles have the options and no graphs.

    Args:
        recorder: makes the graphs; a test gives one that needs no GPU.
    """

    def __init__(self, options: CudaGraphOptions, recorder: Recorder | None = None) -> None:
        self.options = options
        self._recorder: Recorder = recorder or CudaRecorder(options.clone_outputs)
        self._entries: OrderedDict[Hashable, _Entry] = OrderedDict()
        self._guard: WeightGuard | None = None
        # Replays share buffers and memory, so what one queues must not mix with another's.
        self._lock = threading.Lock()
        self._warned: set[str] = set()
        self._captures = 0
        self._code: tuple[Any, ...] = ()

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.options,)

    def __deepcopy__(self, memo: dict[int, Any]) -> CudaGraphs:
        return type(self)(self.options)

    def __len__(self) -> int:
        """How many signatures have a graph."""
        return sum(entry.recording is not None for entry in list(self._entries.values()))

    def use_code(self, *code: Any) -> None:
        """Drop all graphs if ``code`` differs from what was given before.

        A graph module is compiled anew also when it is saved, and then nothing has changed.
        """
        with self._lock:
            if code != self._code:
                self._clear()
            self._code = code

    def clear(self) -> None:
        """Drop all graphs, with their memory; the next calls capture anew."""
        with self._lock:
            self._clear()

    def call(
        self, module: fx.GraphModule, eager: Eager, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        """``eager(module, *args, **kwargs)`` or the same from a replay."""
        if is_watched():
            return eager(module, *args, **kwargs)
        try:
            key, tensors = signature(args, kwargs)
        except NoSignature:
            return eager(module, *args, **kwargs)
        key = key, surroundings()
        if key in self._entries:
            result = self._replay(module, key, tensors)
            return eager(module, *args, **kwargs) if result is _NO else result
        if not tensors or any(
            t.device != tensors[0].device or t.device.type != self._recorder.device_type
            for t in tensors
        ):
            return eager(module, *args, **kwargs)
        result, warning = self._first(module, eager, key, tensors, args, kwargs)
        if warning is not None and warning not in self._warned:
            self._warned.add(warning)
            warnings.warn(f"dwswap: {warning}", RuntimeWarning, stacklevel=7)
        return eager(module, *args, **kwargs) if result is _NO else result

    def _replay(self, module: fx.GraphModule, key: Hashable, tensors: list[Tensor]) -> Any:
        with self._lock:
            entry = self._entries.get(key)
            guard = self._guard
            if entry is None or entry.recording is None or guard is None:
                return _NO
            if guard.is_disturbed() or guard.needs_gradient(tensors):
                return _NO
            if self._recorder.is_capturing(tensors[0].device):
                return _NO
            self._entries.move_to_end(key)
            outputs = entry.recording.replay(tensors)
            # Looked at while the GPU works. A replay that comes too late read memory that the
            # guard kept and changed nothing, so its result is simply not used.
            if guard.holds():
                assert entry.rebuild is not None
                return entry.rebuild(outputs)
            self._renew(module)
            return _NO

    def _first(
        self,
        module: fx.GraphModule,
        eager: Eager,
        key: Hashable,
        tensors: list[Tensor],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> tuple[Any, str | None]:
        """A call whose signature has no entry: its result or ``_NO``, and a warning to give."""
        if self._recorder.is_capturing(tensors[0].device):
            return _NO, None
        with self._lock:
            if key in self._entries:  # another thread was faster
                return _NO, None
            if self._guard is not None and not self._guard.holds():
                # Captured at the next call: where weights come and go with every call, as with
                # torch.func.functional_call, a capture would never pay.
                self._renew(module)
                return _NO, None
            try:
                guard = self._guard = self._guard or WeightGuard(module)
                devices = {t.device for t in guard.tensors} - {tensors[0].device}
                if devices:
                    raise NotCapturable(f"it has weights on {devices.pop()}")
            except NotCapturable as error:
                return _NO, self._refuse(key, error)
            if guard.needs_gradient(tensors):
                return _NO, (
                    "cuda_graph has no effect while gradients are recorded; call the model under "
                    "torch.inference_mode() or torch.no_grad()"
                )
            if guard.is_disturbed():
                return _NO, None
            return self._capture(module, eager, key, tensors, guard, args, kwargs)

    def _capture(
        self,
        module: fx.GraphModule,
        eager: Eager,
        key: Hashable,
        tensors: list[Tensor],
        guard: WeightGuard,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> tuple[Any, str | None]:
        before = guard.versions()
        # The result of this call, whatever becomes of the capture. It is also the first warm-up,
        # the only one that may change what the model keeps.
        result = eager(module, *args, **kwargs)
        entry = _Entry()
        arguments = from_tensors(args, kwargs)

        def function(inputs: list[Tensor]) -> list[Tensor]:
            its_args, its_kwargs = arguments(inputs)
            outputs, entry.rebuild = same_tensors_together(eager(module, *its_args, **its_kwargs))
            return outputs

        handled = sys.exc_info()[1]
        try:
            if guard.versions() != before:
                raise NotCapturable("it changes a buffer in place")
            same_tensors_together(result)
            self._make_room()
            entry.recording = self._recorder.record(function, tensors)
        except Exception as error:
            return result, self._refuse(key, _cause(error, handled))
        self._entries[key] = entry
        self._captures += 1
        logger.debug("captured a CUDA graph for %s", key)
        if self._captures == 4 * self.options.max_signatures:
            return result, (
                f"{self._captures} CUDA graphs were captured, of which "
                f"max_signatures={self.options.max_signatures} are kept; if inputs have more "
                "shapes than that, each capture costs more than it saves: raise max_signatures"
            )
        return result, None

    def _refuse(self, key: Hashable, error: BaseException) -> str:
        self._make_room()
        self._entries[key] = _Entry()
        text = str(error).strip().partition("\n")[0]
        if not isinstance(error, (NotCapturable, NoSignature)):
            text = f"{type(error).__name__}: {text}"
        logger.debug("no CUDA graph for %s: %s", key, text)
        return f"calls like this one run without a CUDA graph: {text}"

    def _make_room(self) -> None:
        while len(self._entries) >= self.options.max_signatures:
            _, entry = self._entries.popitem(last=False)
            if entry.recording is not None:
                entry.recording.release()
        if not any(entry.recording for entry in self._entries.values()):
            # A memory pool that nothing uses any more cannot be used again.
            self._recorder.reset()

    def _clear(self) -> None:
        for entry in self._entries.values():
            if entry.recording is not None:
                entry.recording.release()
        self._entries.clear()
        self._recorder.reset()
        self._guard = None
        self._captures = 0

    def _renew(self, module: fx.GraphModule) -> None:
        """Drop all graphs and guard the weights as they are now."""
        self._clear()
        try:
            self._guard = WeightGuard(module)
        except NotCapturable:
            self._guard = None


def _cause(error: BaseException, handled: BaseException | None) -> BaseException:
    """What was raised first: the end of a capture that has failed raises again.

    Args:
        handled: what the caller was handling anyway.
    """
    while error.__context__ is not None and error.__context__ is not handled:
        error = error.__context__
    return error
