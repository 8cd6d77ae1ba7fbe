"""Layer by layer: our forward, PyTorch's in the same layout, and a copy of the same bytes.

A measurement is one CUDA graph of launches on rotating buffers (``dwswap.bench.timing``). What it
costs is mostly not the kernels: capture, instantiation and the outputs' memory take 10 to 20 ms, as
estimated, and the samples ``budget`` seconds (15 ms). So inputs are windows of one pool of random
numbers per dtype, and a copy is measured once per number of bytes. The 368 shapes in three dtypes
and two layouts make 4416 measurements (about 2.5 minutes), 500 copies, 2208 checks, 2000 plans that
cuDNN builds, and a second look where we are about as fast as PyTorch. ``dwswap.bench.side_by_side``
has other processes plan meanwhile.
"""

from __future__ import annotations

import dataclasses
import math
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor

from dwswap.activations import ACTIVATIONS
from dwswap.bench.gradient_results import Measured
from dwswap.bench.layer_results import LayerResult, Skipped
from dwswap.bench.other_code import OtherCode
from dwswap.bench.shapes import LayerShape
from dwswap.bench.timing import GraphMemory, buffers_needed, time_copy, time_launches
from dwswap.ops import depthwise_conv2d
from dwswap.precision import float32_convolutions
from dwswap.registration import kernel_family
from dwswap.report import LayerErrors
from dwswap.verify import compare

__all__ = [
    "CHECK_ELEMENTS",
    "CPU_BUFFERS",
    "DTYPES",
    "GPU_RESERVE",
    "LAYOUTS",
    "LayerBench",
    "available_bytes",
    "checked_elsewhere",
    "laid_out",
    "rounded",
]

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
LAYOUTS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}

T = TypeVar("T")

CHECK_ELEMENTS = 8_000_000
"""How much of an output, in whole samples, is compared with float64."""

CLOSE = 1.05
"""A speedup below this is measured again: there noise could decide who is faster."""

CPU_BUFFERS = 2
GRAPH_BYTES = 4_000_000_000
"""Memory of graphs is given back when it has grown to more."""

GPU_RESERVE = 1_000_000_000
"""Bytes for the float64 check, cuDNN's workspaces and the allocator's rounding."""


@dataclass(frozen=True)
class Calls:
    """The convolution of one shape as functions of its input."""

    ours: Callable[[Tensor], Tensor]
    plain: Callable[[Tensor], Tensor]
    pytorch: Callable[[Tensor], Tensor]
    exact: Callable[[Tensor], Tensor]
    family: Callable[[Tensor], str]


class LayerBench:
    """Measures shapes on one device; keeps the pool of inputs and the copies between them.

    Args:
        device: ``cpu`` is for trying the path out: two buffers instead of a full rotation, and
            ``time.perf_counter`` around each call.
        batch: N of every input.
        activation: applied to the input and to the output, by the kernel in ours and by calls of
            their own in PyTorch's; ``"none"`` leaves both out.
        budget: seconds of samples per measurement.
        cold_code: on CUDA, run the code of another kernel before every launch, ours and PyTorch's.
        copies: times of copies that are already known, by number of bytes.
    """

    def __init__(
        self,
        device: torch.device,
        *,
        batch: int,
        activation: str = "none",
        budget: float,
        cold_code: bool = False,
        copies: dict[int, float] | None = None,
    ) -> None:
        self.device = device
        self.batch = batch
        self.activation = activation
        self.budget = budget
        self.cold_code = cold_code and device.type == "cuda"
        self.copies = dict(copies or {})
        self._pool = torch.empty(0)
        self._graphs: GraphMemory | None = None
        self._other_code: OtherCode | None = None
        self._generator = torch.Generator(device).manual_seed(0)

    @torch.no_grad()
    def plan(self, shape: LayerShape, dtype: str, layout: str) -> None:
        """Have cuDNN plan what ``measure`` will run of PyTorch's; nothing runs on the GPU.

        For a new shape that takes a core 0.1 to 0.8 s. Plans are kept by the thread that calls.
        """
        needed = self.needed_bytes(shape, dtype)
        if self.device.type != "cuda" or needed > self._available_bytes(needed):
            return
        try:
            memory = self._graph_memory()
            assert memory is not None
            # What is captured is not run. Plans load code, which only this mode allows.
            with torch.cuda.device(self.device), memory.capture(torch.cuda.CUDAGraph(), "relaxed"):
                self._plan(shape, DTYPES[dtype], LAYOUTS[layout])
        except RuntimeError:
            # Out of memory, or of cuDNN, which says that in words of its own. What does not pass
            # comes back in ``measure``, where it counts.
            return

    @torch.no_grad()
    def measure(self, shape: LayerShape, dtype: str, layout: str) -> Measured:
        """Check one shape, then time it; ``Skipped`` where it does not fit into memory."""
        size = [self.batch, shape.channels, shape.height, shape.width]
        needed = self.needed_bytes(shape, dtype)
        available = self._available_bytes(needed)
        skipped = partial(Skipped, shape.index, dtype, layout, size)
        if needed > available:
            return skipped(f"needs about {needed / 1e9:.1f} GB, {available / 1e9:.1f} GB are free")
        try:
            return self._measure(shape, dtype, layout)
        except torch.OutOfMemoryError as error:
            return skipped(str(error).partition("\n")[0])

    def _measure(self, shape: LayerShape, dtype: str, layout: str) -> Measured:
        moved = self.moved_bytes(shape, dtype)
        inputs, calls = self._inputs_and_calls(shape, dtype, layout)
        errors = self._check(calls, inputs[0])
        times = self._compare(calls.ours, calls.pytorch, inputs)
        return self._result(
            shape,
            dtype,
            layout,
            family=calls.family(inputs[0]),
            moved_bytes=moved,
            times=times,
            plain_us=None if self.activation == "none" else self._time(calls.plain, inputs),
            copy_us=self._copy(moved),
            errors=errors,
        )

    def needed_bytes(self, shape: LayerShape, dtype: str) -> int:
        """What ``measure`` takes of the device's memory, about."""
        width = DTYPES[dtype].itemsize
        bytes_in = self.batch * shape.input_elements * width
        bytes_out = self.batch * shape.output_elements * width
        moved = self.moved_bytes(shape, dtype)
        buffers = self._buffers(moved)
        pool = max(self._pool.nbytes, buffers * rounded(bytes_in, 1))
        # The outputs of a graph, with what the warm-up before it, PyTorch's layout changes and the
        # check need; the copy has buffers of its own.
        return pool + max(buffers * moved, buffers * bytes_out + 4 * moved) + self._reserve

    @property
    def _reserve(self) -> int:
        return GPU_RESERVE if self.device.type == "cuda" else 0

    def _available_bytes(self, needed: int) -> int:
        """Free memory, with that of the pool; what graphs hold is given back where it is needed."""
        held = self._pool.nbytes
        if self.device.type == "cuda" and needed > torch.cuda.mem_get_info(self.device)[0] + held:
            self._release_graphs()
        return available_bytes(self.device) + held

    def moved_bytes(self, shape: LayerShape, dtype: str) -> int:
        """Of input and output."""
        elements = shape.input_elements + shape.output_elements
        return self.batch * elements * DTYPES[dtype].itemsize

    def launches(
        self, shape: LayerShape, dtype: str, layout: str
    ) -> tuple[str, list[Callable[[], Any]]]:
        """The family of kernels that runs a shape, and a launch of ours per buffer of a rotation.

        The next shape takes over the inputs, and memory is not looked at first.
        """
        inputs, calls = self._inputs_and_calls(shape, dtype, layout)
        return calls.family(inputs[0]), [partial(calls.ours, x) for x in inputs]

    def _inputs_and_calls(
        self, shape: LayerShape, dtype: str, layout: str
    ) -> tuple[list[Tensor], Calls]:
        """An input per buffer of a rotation, and the calls with weights of their own."""
        size = [self.batch, shape.channels, shape.height, shape.width]
        buffers = self._buffers(self.moved_bytes(shape, dtype))
        inputs = self._inputs(buffers, size, DTYPES[dtype], LAYOUTS[layout])
        weights = self._weights(shape, DTYPES[dtype], LAYOUTS[layout], self._random)
        return inputs, self._calls(shape, *weights)

    def _buffers(self, moved: int) -> int:
        return buffers_needed(moved) if self.device.type == "cuda" else CPU_BUFFERS

    def _result(
        self,
        shape: LayerShape,
        dtype: str,
        layout: str,
        *,
        family: str,
        moved_bytes: int,
        times: tuple[float, float, bool],
        copy_us: float,
        plain_us: float | None,
        errors: LayerErrors,
    ) -> LayerResult:
        ours, pytorch, remeasured = times
        return LayerResult(
            index=shape.index,
            dtype=dtype,
            layout=layout,
            shape=[self.batch, shape.channels, shape.height, shape.width],
            kernel=list(shape.kernel),
            stride=list(shape.stride),
            padding=list(shape.padding),
            dilation=list(shape.dilation),
            bias=shape.bias,
            family=family,
            moved_bytes=moved_bytes,
            ours_us=ours,
            pytorch_us=pytorch,
            copy_us=copy_us,
            plain_us=plain_us,
            speedup=pytorch / ours,
            percent_of_copy=100 * copy_us / ours,
            remeasured=remeasured,
            error=errors.ours,
            pytorch_error=errors.pytorch,
            error_limit=errors.limit,
            problem=errors.problem,
            passed=errors.passed,
        )

    def _inputs(
        self, count: int, size: list[int], dtype: torch.dtype, memory_format: torch.memory_format
    ) -> list[Tensor]:
        """``count`` windows of the pool, which grows to hold them."""
        n, c, h, w = size
        elements = n * c * h * w
        step = rounded(elements, dtype.itemsize)
        if self._pool.dtype != dtype or self._pool.numel() < count * step:
            self._pool = torch.empty(0)
            pool = torch.empty(count * step, dtype=dtype, device=self.device)
            self._pool = pool.normal_(generator=self._generator)
        windows = [self._pool[i * step : i * step + elements] for i in range(count)]
        return [laid_out(window, size, memory_format) for window in windows]

    def _random(self, dtype: torch.dtype, *size: int) -> Tensor:
        values = torch.empty(size, dtype=dtype, device=self.device)
        return values.normal_(generator=self._generator)

    def _unwritten(self, dtype: torch.dtype, *size: int) -> Tensor:
        return torch.empty(size, dtype=dtype, device=self.device)

    def _weights(
        self,
        shape: LayerShape,
        dtype: torch.dtype,
        memory_format: torch.memory_format,
        make: Callable[..., Tensor],
    ) -> tuple[Tensor, Tensor | None]:
        """Weight and bias; ``make`` is ``_random`` or ``_unwritten``."""
        weight = make(dtype, shape.out_channels, 1, *shape.kernel)
        bias = make(dtype, shape.out_channels) if shape.bias else None
        return weight.contiguous(memory_format=memory_format), bias

    def _plan(
        self, shape: LayerShape, dtype: torch.dtype, memory_format: torch.memory_format
    ) -> None:
        """Call what ``measure`` calls of PyTorch's, on tensors that nothing was written to."""
        size = [self.batch, shape.channels, shape.height, shape.width]
        x = laid_out(self._unwritten(dtype, math.prod(size)), size, memory_format)
        weights = self._weights(shape, dtype, memory_format, self._unwritten)
        pytorch = self._calls(shape, *weights).pytorch
        pytorch(x)
        with float32_convolutions():
            pytorch(x)

    def _calls(self, shape: LayerShape, weight: Tensor, bias: Tensor | None) -> Calls:
        geometry = (shape.stride, shape.padding, shape.dilation)
        activate = ACTIVATIONS[self.activation].forward

        def plain(x: Tensor) -> Tensor:
            return depthwise_conv2d(x, weight, bias, *geometry)

        def ours(x: Tensor) -> Tensor:
            return depthwise_conv2d(
                x,
                weight,
                bias,
                *geometry,
                input_activation=self.activation,
                activation=self.activation,
            )

        def pytorch(x: Tensor) -> Tensor:
            return activate(F.conv2d(activate(x), weight, bias, *geometry, shape.channels))

        def exact(x: Tensor) -> Tensor:
            x = activate(x.double().contiguous())
            wide = None if bias is None else bias.double()
            return activate(F.conv2d(x, weight.double(), wide, *geometry, shape.channels))

        def family(x: Tensor) -> str:
            return kernel_family(x, weight, bias, *geometry, None, self.activation, self.activation)

        return Calls(ours, plain, pytorch, exact, family)

    def _check(self, calls: Calls, x: Tensor) -> LayerErrors:
        """Some samples, the last among them, against float64; all of them against PyTorch's."""
        with float32_convolutions():
            theirs = calls.pytorch(x)
        # The allocator hands this block to the next output of the same size, so an element that the
        # kernel forgets to write shows up as NaN.
        poison = torch.full_like(theirs, float("nan"))
        del poison
        ours = calls.ours(x)
        part = self._samples(max(x[0].numel(), theirs[0].numel()))
        errors = compare(ours[part], theirs[part], calls.exact(x[part]))
        return checked_elsewhere(errors, ours, theirs, "outside the samples")

    def _samples(self, elements: int) -> slice:
        """Of so many elements each, those that a check compares with float64, which is slow."""
        count = min(max(1, CHECK_ELEMENTS // elements), self.batch)
        step = -(-self.batch // count)
        return slice((self.batch - 1) % step, None, step)

    def _compare(
        self, ours: Callable[[T], Any], pytorch: Callable[[T], Any], inputs: Sequence[T]
    ) -> tuple[float, float, bool]:
        """Our time, PyTorch's, and whether they were so close that each got its best of three."""
        mine, theirs = self._time(ours, inputs), self._time(pytorch, inputs)
        close = self.device.type == "cuda" and theirs < CLOSE * mine
        if close:
            for _ in range(2):
                mine = min(mine, self._time(ours, inputs, 2))
                theirs = min(theirs, self._time(pytorch, inputs, 2))
        return mine, theirs, close

    def _time(self, call: Callable[[T], Any], inputs: Sequence[T], budgets: int = 1) -> float:
        launches = [partial(call, x) for x in inputs]
        if self.cold_code:
            self._other_code = self._other_code or OtherCode(self.device)
        timing = time_launches(
            launches,
            self.device,
            budget=budgets * self.budget,
            memory=self._graph_memory(),
            between=self._other_code,
        )
        return timing.microseconds

    def _copy(self, num_bytes: int) -> float:
        if num_bytes not in self.copies:
            timing = time_copy(
                num_bytes, self.device, budget=self.budget, memory=self._graph_memory()
            )
            self.copies[num_bytes] = timing.microseconds
        return self.copies[num_bytes]

    def _graph_memory(self) -> GraphMemory | None:
        if self.device.type != "cuda":
            return None
        if torch.cuda.memory_reserved(self.device) > GRAPH_BYTES + self._pool.nbytes:
            self._release_graphs()
        self._graphs = self._graphs or GraphMemory(self.device)
        return self._graphs

    def _release_graphs(self) -> None:
        self._graphs = None
        torch.cuda.empty_cache()


def checked_elsewhere(
    errors: LayerErrors, ours: Tensor, theirs: Tensor, where: str, farther: float = 1.0
) -> LayerErrors:
    """``errors`` of some samples, with a problem where all of ours are too far from PyTorch's.

    Both are as far from float64 elsewhere as in the samples, give or take a factor of 2; where
    they are ``farther``, so many times as far.
    """
    if not errors.passed:
        return errors
    apart = float((ours - theirs).abs().max())
    # A comparison with NaN is false, so NaN fails.
    if apart <= 2 * farther * (errors.limit + errors.pytorch):
        return errors
    return dataclasses.replace(errors, problem=f"{apart:.2g} from PyTorch's result {where}")


def available_bytes(device: torch.device) -> int:
    """Free memory of ``device``, with what torch's allocator holds but does not use."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return free + cached
    return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def laid_out(window: Tensor, size: list[int], memory_format: torch.memory_format) -> Tensor:
    """The elements of a one-dimensional ``window`` as a dense image ``(N, C, H, W)``."""
    n, c, h, w = size
    if memory_format == torch.channels_last:
        return window.view(n, h, w, c).permute(0, 3, 1, 2)
    return window.view(n, c, h, w)


def rounded(count: int, itemsize: int) -> int:
    """``count`` elements up to whole 512 bytes, as the allocator aligns: kernels may rely on it."""
    unit = 512 // itemsize
    return -(-count // unit) * unit
