"""What a check of numbers must switch off while it runs."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

__all__ = ["float32_convolutions", "precision"]


@contextmanager
def float32_convolutions() -> Iterator[None]:
    """Let cuDNN and cuBLAS compute convolutions and products of float32 in float32.

    By default cuDNN rounds their inputs to TF32, with 10 bits of mantissa. PyTorch's own error is
    the measure of ours, and with that rounding in it the measure would let nearly everything pass.
    """
    cudnn: Any = torch.backends.cudnn
    matmul: Any = torch.backends.cuda.matmul
    backends = (cudnn.conv, cudnn.rnn, matmul)
    before = [backend.fp32_precision for backend in backends]
    try:
        for backend in backends:
            backend.fp32_precision = "ieee"
        yield
    finally:
        for backend, precision in zip(backends, before, strict=True):
            backend.fp32_precision = precision


def precision() -> dict[str, str]:
    """For a record: what float32 is computed with now, such as ``ieee`` or ``tf32``."""
    cudnn: Any = torch.backends.cudnn
    matmul: Any = torch.backends.cuda.matmul
    return {"convolutions": cudnn.conv.fp32_precision, "products": matmul.fp32_precision}
