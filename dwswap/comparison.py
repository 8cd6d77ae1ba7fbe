"""The rule by which numbers are judged: ours and PyTorch's against float64."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from dwswap.report import LayerErrors

__all__ = ["compare", "largest"]

# Of float64 there is no exact result: PyTorch's own is the reference, and sums in another order
# differ from it by rounding.
_ULPS_OF_WIDEST = 1024


def compare(ours: Tensor, theirs: Tensor, exact: Tensor, usual: float = 0.0) -> LayerErrors:
    """Judge ``ours`` by the rule, given PyTorch's own result and the float64 one.

    Args:
        usual: PyTorch's error in other runs; the largest of all counts.
    """
    problem = _difference_in_kind(ours, theirs)
    if problem is not None:
        return LayerErrors(math.inf, 0.0, 0.0, problem)
    if not (theirs.is_floating_point() or theirs.is_complex()):
        wrong, differing = (float((t != exact).sum()) for t in (ours, theirs))
        return LayerErrors(wrong, differing, 2 * differing)
    wide = torch.complex128 if theirs.is_complex() else torch.float64
    ours, theirs, exact, dtype = ours.to(wide), theirs.to(wide), exact.to(wide), theirs.dtype
    if not torch.equal(exact.isnan() & theirs.isnan(), exact.isnan() & ours.isnan()):
        problem = "NaN in other places"
    elif not bool((ours.isfinite() | ~theirs.isfinite()).all()):
        problem = "not finite where PyTorch's result is"
    finite = exact.isfinite() & theirs.isfinite() & ours.isfinite()
    ours, theirs, exact = ours[finite], theirs[finite], exact[finite]
    own = largest(ours - exact)
    usual = max(usual, largest(theirs - exact))
    ulps = _ULPS_OF_WIDEST if dtype in (torch.float64, torch.complex128) else 1
    return LayerErrors(own, usual, 2 * usual + ulps * _ulp(largest(exact), dtype), problem)


def _difference_in_kind(ours: Tensor, theirs: Tensor) -> str | None:
    if ours.shape != theirs.shape:
        return f"shape {tuple(ours.shape)}, not {tuple(theirs.shape)}"
    if ours.dtype != theirs.dtype:
        return f"dtype {ours.dtype}, not {theirs.dtype}"
    strides = [
        [stride for stride, size in zip(t.stride(), t.shape, strict=True) if size > 1]
        for t in (ours, theirs)
    ]
    if ours.layout == torch.strided and ours.numel() > 0 and strides[0] != strides[1]:
        return f"strides {ours.stride()}, not {theirs.stride()}"
    return None


def largest(values: Tensor) -> float:
    return float(values.abs().max()) if values.numel() else 0.0


def _ulp(scale: float, dtype: torch.dtype) -> float:
    """Distance of neighbouring numbers of ``dtype`` at ``scale``."""
    _, exponent = math.frexp(scale)
    return torch.finfo(dtype).eps * math.ldexp(1.0, exponent - 1) if scale else 0.0
