"""What a check of numbers must switch off while it runs."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

__all__ = ["float32_convolutions"]


@contextmanager
def float32_convolutions() -> Iterator[None]:
    """Let cuDNN compute float32 convolutions in float32.

    By default it rounds their inputs to TF32, with 10 bits of mantissa. PyTorch's own error is the
    measure of ours, and with that rounding in it the measure would let nearly everything pass.
    """
    before = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = False
    try:
        yield
    finally:
        torch.backends.cudnn.allow_tf32 = before
