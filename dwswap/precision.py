"""What PyTorch computes convolutions with, and what a check of numbers must switch off."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

__all__ = [
    "algorithms",
    "exact_float64",
    "float32_convolutions",
    "precision",
    "rounds_to_tf32",
    "use_algorithms",
]

aten = torch.ops.aten


@contextmanager
def float32_convolutions() -> Iterator[None]:
    """Let cuDNN and cuBLAS compute convolutions and products of float32 in float32.

    By default cuDNN rounds their inputs to TF32, with 10 bits of mantissa. PyTorch's own error is
    the measure of ours, and with that rounding in it the measure would let nearly everything pass.
    """
    before = _float32()
    try:
        _use_float32(["ieee"] * len(before))
        yield
    finally:
        _use_float32(before)


@contextmanager
def exact_float64() -> Iterator[None]:
    """Where float64 is what others are compared with: hardswish and hardsigmoid without error.

    On CUDA aten multiplies by a sixth that is rounded to float32, in float64 too: an error of 3e-8,
    the same in every element, that adds up over the layers of a MobileNetV3 to as much as all
    rounding of float32 does. PyTorch's own results share it: it would count as an error of ours.
    """
    # torch.compile leaves out what runs in a mode, and fails for that with fullgraph=True.
    with torch.compiler.set_stance("force_eager"), _DivideBySix():
        yield


class _DivideBySix(TorchDispatchMode):
    supports_higher_order_operators = True  # torch.cond, say, whose branches stay as they are

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if func not in _SIXTHS or args[0].dtype != torch.float64:
            return func(*args, **(kwargs or {}))
        result = _SIXTHS[func](args[0])
        return args[0].copy_(result) if func in _IN_PLACE else result


def _hardsigmoid(x: Tensor) -> Tensor:
    return (x + 3).clamp(0, 6) / 6


_IN_PLACE = (aten.hardswish_.default, aten.hardsigmoid_.default)
_SIXTHS: dict[Any, Callable[[Tensor], Tensor]] = {
    aten.hardsigmoid.default: _hardsigmoid,
    aten.hardsigmoid_.default: _hardsigmoid,
    aten.hardswish.default: lambda x: x * _hardsigmoid(x),
    aten.hardswish_.default: lambda x: x * _hardsigmoid(x),
}


def precision() -> dict[str, str]:
    """For a record: what float32 is computed with now, such as ``ieee`` or ``tf32``."""
    cudnn: Any = torch.backends.cudnn
    matmul: Any = torch.backends.cuda.matmul
    return {"convolutions": cudnn.conv.fp32_precision, "products": matmul.fp32_precision}


def rounds_to_tf32(device: torch.device) -> bool:
    """Whether cuDNN may round what it convolves in float32, for the tensor cores of this GPU."""
    allowed = precision()["convolutions"] == "tf32" and torch.cuda.is_available()
    return allowed and torch.cuda.get_device_capability(device) >= (8, 0)


def algorithms() -> dict[str, Any]:
    """The switches of PyTorch that choose among its kernels: picklable, for ``use_algorithms``."""
    cudnn: Any = torch.backends.cudnn
    return {
        "cudnn": {name: getattr(cudnn, name) for name in ("enabled", "benchmark", "deterministic")},
        "float32": _float32(),
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "warn_only": torch.is_deterministic_algorithms_warn_only_enabled(),
    }


def use_algorithms(chosen: dict[str, Any]) -> None:
    """Set what ``algorithms`` returned in another process: they are not in the environment."""
    for name, value in chosen["cudnn"].items():
        setattr(torch.backends.cudnn, name, value)
    _use_float32(chosen["float32"])
    torch.use_deterministic_algorithms(chosen["deterministic"], warn_only=chosen["warn_only"])


def _float32() -> list[str]:
    return [backend.fp32_precision for backend in _float32_backends()]


def _use_float32(precisions: Sequence[str]) -> None:
    for backend, precision in zip(_float32_backends(), precisions, strict=True):
        backend.fp32_precision = precision


def _float32_backends() -> tuple[Any, ...]:
    cudnn: Any = torch.backends.cudnn
    return cudnn.conv, cudnn.rnn, torch.backends.cuda.matmul
