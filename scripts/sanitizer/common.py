"""What all problems have in common: where images lie, and what is wrong with a result."""

from __future__ import annotations

from typing import Protocol

import torch

FORMATS = (torch.contiguous_format, torch.channels_last)
HALVES = (torch.float16, torch.bfloat16)


class Placed(Protocol):
    """A problem that says where its images lie in memory."""

    @property
    def memory_format(self) -> torch.memory_format: ...

    @property
    def offset(self) -> int: ...


def place(values: torch.Tensor, problem: Placed) -> torch.Tensor:
    """A copy on the GPU in the memory format and at the offset of the problem."""
    # Unlike contiguous(), also where both formats are the same order of elements.
    stride = torch.empty_like(values, memory_format=problem.memory_format).stride()
    buffer = torch.zeros(values.numel() + problem.offset, dtype=values.dtype, device="cuda")
    return buffer.as_strided(values.shape, stride, problem.offset).copy_(values)


def difference(result: torch.Tensor, exact: torch.Tensor, dtype: torch.dtype) -> str | None:
    """What is wrong with a result of ``dtype``, both given in float64; None where nothing is."""
    if result.shape != exact.shape:
        return f"shape {tuple(result.shape)} instead of {tuple(exact.shape)}"
    # Errors of the arithmetic are for the tests; here wrong memory must show.
    bound = 16 * torch.finfo(dtype).eps * max(1.0, exact.abs().max().item())
    error = (result - exact).abs().max().item()
    if not error <= bound:  # NaN fails as well
        return f"error {error:.3e} instead of at most {bound:.3e}"
    return None
