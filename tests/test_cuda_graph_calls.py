"""Calls of a model with CUDA graphs that are not replayed, and captures that fail."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from fake_cuda_graphs import Subclass, calls, counts, graphed, no_grad, same
from tiny_models import depthwise, image
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

import dwswap

__all__ = ["no_grad"]
pytestmark = pytest.mark.usefixtures("no_grad")

# --- calls that are not replayed ----------------------------------------------------------------


class Ignorant(TorchFunctionMode):
    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return func(*args, **(kwargs or {}))


class Seen(TorchDispatchMode):
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return func(*args, **(kwargs or {}))


def test_modes_and_transforms_run_as_ever() -> None:
    fast, recorder = graphed()
    x = image()
    expected = fast(x)
    for mode in (Ignorant, Seen, torch.autograd.forward_ad.dual_level):
        with mode():
            same(fast(x), expected)
    torch.testing.assert_close(torch.func.vmap(fast)(x[:, None])[:, 0], expected)
    fast(x.as_subclass(Subclass))
    fast(image().to_sparse().to_dense())
    assert counts(recorder) == (1, 1)
    with torch.device("cpu"):
        for _ in range(2):
            same(fast(x), expected)
    assert counts(recorder) == (2, 2)


def test_inside_a_capture_nothing_is_captured_or_replayed() -> None:
    fast, recorder = graphed()
    x = image()
    recorder.capturing = True
    expected = fast(x)
    recorder.capturing = False
    for _ in range(2):
        fast(x)
    recorder.capturing = True
    same(fast(x), expected)
    assert counts(recorder) == (1, 1)


def test_other_devices_run_as_ever() -> None:
    fast, recorder = graphed()
    recorder.device_type = "cuda"
    fast(image())
    fast(image())
    assert recorder.records == 0


@torch.enable_grad()
def test_gradients_run_as_ever() -> None:
    fast, recorder = graphed()
    x = image()
    with pytest.warns(RuntimeWarning, match=r"no effect while gradients .*inference_mode") as seen:
        results = calls(fast, x, x, x)
    assert len(seen) == 1
    assert all(result.requires_grad for result in results)
    with torch.no_grad():
        for _ in range(2):
            fast(x)
    assert fast(x).requires_grad
    assert counts(recorder) == (1, 1)
    fast.requires_grad_(False)
    assert not fast(x).requires_grad
    x.requires_grad_()
    assert fast(x).requires_grad
    assert counts(recorder) == (1, 2)


def test_results_in_every_mode_are_what_they_are_without_graphs() -> None:
    for first, second in ((torch.no_grad, torch.inference_mode), (torch.inference_mode,) * 2):
        fast, recorder = graphed()
        with first():
            x = image()
            expected = fast(x)
            result = fast(x)
            assert result.is_inference() == expected.is_inference() == (first != torch.no_grad)
        with second():
            assert fast(image()).is_inference()
        result = fast(image())
        assert not result.is_inference()
        same(result, expected)
        assert counts(recorder) == (1, 3)


def test_what_changes_numbers_has_a_graph_of_its_own() -> None:
    fast, recorder = graphed()
    x = image()
    fast(x)
    with torch.autocast("cpu", torch.bfloat16):
        for _ in range(2):
            assert fast(x).dtype == torch.bfloat16
    assert counts(recorder) == (2, 1)
    before = torch.backends.cudnn.conv.fp32_precision
    try:
        torch.backends.cudnn.conv.fp32_precision = "tf32" if before != "tf32" else "ieee"
        fast(x)
    finally:
        torch.backends.cudnn.conv.fp32_precision = before
    torch.use_deterministic_algorithms(True)
    try:
        fast(x)
    finally:
        torch.use_deterministic_algorithms(False)
    assert counts(recorder) == (4, 1)


def test_a_failed_capture_is_one_warning() -> None:
    fast, recorder = graphed()
    plain = dwswap.optimize(fast)
    recorder.fails = RuntimeError("operation not permitted when stream is capturing\nand more")
    x = image()
    with pytest.warns(RuntimeWarning) as seen:
        *results, _ = calls(fast, x, x, x, image(batch=1))
    same(results, [plain(x)] * 3)
    assert len(seen) == 1
    assert str(seen[0].message) == (
        "dwswap: calls like this one run without a CUDA graph: RuntimeError: "
        "operation not permitted when stream is capturing"
    )
    assert recorder.records == 2
    recorder.fails = None
    for _ in range(2):
        fast(image(batch=3))
    assert recorder.replays == 1
    # After a change of the weights another attempt is made.
    fast.float()
    for _ in range(2):
        fast(x)
    assert recorder.replays == 2


def test_the_first_of_two_errors_is_the_cause() -> None:
    fast, recorder = graphed()

    def record(*_: Any) -> Any:
        try:
            raise ValueError("the cause")
        finally:
            raise RuntimeError("the end of the capture failed, too")

    recorder.record = record  # type: ignore[method-assign]
    try:
        raise KeyError("the caller's own")
    except KeyError:
        with pytest.warns(RuntimeWarning, match="ValueError: the cause"):
            fast(image())


def test_an_error_of_the_model_is_the_callers() -> None:
    fast, recorder = graphed()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(2):
            with pytest.raises(RuntimeError, match="channels"):
                fast(image(5))
        with pytest.raises(TypeError):
            fast(image(), image())
        fast(image())
        fast(image())
    assert counts(recorder) == (1, 1)


class Counting(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = depthwise(3)
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        self.calls.add_(1)
        return self.conv(x) + self.calls


def test_a_model_that_changes_its_buffers_is_not_captured() -> None:
    fast, recorder = graphed(Counting().eval())
    with pytest.warns(RuntimeWarning, match="it changes a buffer in place"):
        calls(fast, image(), image(), image())
    assert fast.calls == 3
    assert recorder.records == 0


class Opaque(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = depthwise(3)

    def forward(self, x: Tensor) -> Any:
        return {"a": self.conv(x), "b": slice(0, 1)}


def test_an_output_that_may_hide_a_tensor_is_not_captured() -> None:
    fast, recorder = graphed(Opaque().eval())
    with pytest.warns(RuntimeWarning, match="it returns a slice"):
        fast(image())
    assert fast(image())["b"] == slice(0, 1)
    assert recorder.records == 0
