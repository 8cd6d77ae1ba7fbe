"""Round the weights of a layer so that the mean of its output stays what it was.

Reason:
    An output is off by ``sum_k error_k x_k + bias_error``, with the same errors for all pixels and
    samples. What the means of ``x`` contribute to it does not average out, as the rest does.
Method:
    Starting from the nearest values, weights take their other neighbour in the dtype, first those
    next to the middle of both, as long as that makes the expected square of it smaller,
    ``(sum_k error_k mean_k + bias_error)^2 + sum_k error_k^2 deviation_k^2``, inputs taken for
    independent. The aim is that of bias correction (Nagel et al., "Data-Free Quantization through
    Weight Equalization and Bias Correction", 2019), whose corrected biases would be rounded again.
    To flip roundings until errors add up to nothing is the way of SQuant (Guo et al., 2022).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["HALF", "Moments", "rounded"]

HALF = (torch.float16, torch.bfloat16)
"""The dtypes whose rounding errors are worth the choice."""


@dataclass(frozen=True)
class Moments:
    """What is expected of the channels of a value, in float64.

    Attributes:
        mean: ``(channels,)``, or ``()`` of all.
        deviation: the standard deviation, of the same shape.
    """

    mean: Tensor
    deviation: Tensor


@torch.no_grad()
def rounded(
    exact: Sequence[Tensor],
    dtype: torch.dtype,
    input: Moments | None = None,
    groups: int = 1,
    transposed: bool = False,
) -> list[Tensor]:
    """``exact`` in ``dtype``. Biases, and weights of other dtypes than ``HALF``, go to the nearest
    value, weights of these to one of their two neighbours.

    Args:
        exact: weight and, where there is one, bias in float64. The weight is ``(out, in / groups,
            *taps)`` or, of a transposed convolution, ``(in, out / groups, *taps)``.
        input: what the layer reads, over all taps alike. Where it is not known, the errors of the
            weights of an output add up to about 0: right for channels that are alike, and for
            images, whose neighbouring pixels are.
    """
    nearest = [tensor.to(dtype) for tensor in exact]
    weight = nearest[0]
    if dtype not in HALF or weight.is_meta or not weight.numel():
        return nearest
    rows = _rows(exact[0], groups, transposed)
    errors = _rows(weight, groups, transposed).double() - rows
    mean = deviation = rows.new_ones(())
    off = rows.new_zeros(())
    if input is not None:
        mean, deviation = (_columns(t, rows, exact[0]) for t in (input.mean, input.deviation))
        if len(exact) > 1:
            off = (nearest[1].double() - exact[1]).view(*rows.shape[:2], 1)
    index, flips = _flips(rows, errors, mean, deviation, off, dtype)
    chosen = errors.add_(rows).scatter_add_(2, index, flips)
    if transposed:
        chosen = chosen.unflatten(2, (-1, *weight.shape[2:])).transpose(1, 2)
    weight.copy_(chosen.reshape(weight.shape))  # which keeps the strides
    return nearest


def _rows(weight: Tensor, groups: int, transposed: bool) -> Tensor:
    """What each output is made of: ``(groups, out / groups, in / groups * taps)``."""
    split = weight.unflatten(0, (groups, -1))
    return (split.transpose(1, 2) if transposed else split).flatten(2)


def _columns(channels: Tensor, rows: Tensor, weight: Tensor) -> Tensor:
    """``channels``, ``(in,)`` or ``()``, for every column of ``rows``."""
    taps = weight[0, 0].numel()
    finite = channels.to(rows).nan_to_num(0.0, 0.0, 0.0)
    each = finite.expand(rows.shape[0] * rows.shape[2] // taps).view(rows.shape[0], 1, -1)
    return each.repeat_interleave(taps, 2)


def _flips(
    rows: Tensor,
    errors: Tensor,
    mean: Tensor,
    deviation: Tensor,
    off: Tensor,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    """What to add to the nearest values, and where in each row: changes of it (0 for most) and
    their columns, ``(groups, out / groups, candidates)``.

    Args:
        mean, deviation: of what the columns are multiplied with; they broadcast to ``rows``.
        off: what each output is off by without the errors of the weights.
    """
    products = errors * mean
    off = off + products.sum(2, keepdim=True)
    # A flip reverses the sign of an error: it helps where the error has that of the sum. That is
    # the sum of K errors, of the order of sqrt(K) of them, and the largest make few flips enough.
    products *= off.sign()
    columns = rows.shape[2]
    shares, index = products.topk(min(columns, 2 * int(columns**0.5) + 8), 2, sorted=False)
    values, errors = rows.gather(2, index), errors.gather(2, index)
    mean, deviation = (t.expand(rows.shape).gather(2, index) for t in (mean, deviation))
    step = _spacing(values, dtype)
    change = -errors.sign() * step
    off, gain = off.abs(), (change * mean).abs()
    helps = (shares > 0) & (gain <= 2 * off)
    helps &= (values + errors + change).abs() <= torch.finfo(dtype).max
    gain = torch.where(helps, gain, 0.0)
    # (step - |error|)^2 - error^2
    cost = torch.where(helps, step * (step - 2 * errors.abs()) * deviation.square(), 0.0)
    order = torch.where(helps, cost / gain, torch.inf).argsort(dim=2, stable=True)
    gain, cost, change = (t.gather(2, order) for t in (gain, cost, change))
    squares = (off - gain.cumsum(2)).square() + cost.cumsum(2)
    best = torch.cat([off.square(), squares], 2).argmin(2, keepdim=True)
    taken = torch.arange(index.shape[2], device=best.device) < best
    taken &= helps.gather(2, order)
    return index.gather(2, order), torch.where(taken, change, 0.0)


def _spacing(exact: Tensor, dtype: torch.dtype) -> Tensor:
    """The distance of the two values of ``dtype`` around each of ``exact``."""
    info = torch.finfo(dtype)
    binade = torch.ldexp(torch.ones_like(exact), torch.frexp(exact).exponent - 1)
    return binade.clamp_min(info.smallest_normal) * info.eps
