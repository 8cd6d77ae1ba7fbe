"""Random cases of the operator, and the rule by which its numbers are judged.

The rule: against a float64 reference, the error is at most twice PyTorch's own error at the same
dtype on the same input, plus one ulp at the scale of the result. Two largest errors can only be
compared where each is the largest of many, so a random case has at least ``MIN_RESULTS`` outputs;
smaller shapes are for integer-valued tensors, whose results must match exactly.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace

import torch
import torch.nn.functional as F
from cases import Case, Tensors, make_tensors, place
from torch import Tensor

from dwswap import depthwise_conv2d

# Independent of dwswap.activations on purpose.
ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "none": lambda x: x,
    "relu": F.relu,
    "relu6": F.relu6,
    "hardswish": F.hardswish,
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "hardsigmoid": F.hardsigmoid,
    "sigmoid": torch.sigmoid,
}
# aten multiplies by a float32 sixth, in float64 too.
WIDE_ACTIVATIONS = {
    **ACTIVATIONS,
    "hardsigmoid": lambda x: (x + 3).clamp(0, 6) / 6,
    "hardswish": lambda x: x * (x + 3).clamp(0, 6) / 6,
}

# Where the derivative jumps, rounding decides the gradient.
KINKS: dict[str, tuple[float, ...]] = {
    "relu": (0.0,),
    "relu6": (0.0, 6.0),
    "hardswish": (-3.0, 3.0),
    "hardsigmoid": (-3.0, 3.0),
}
# A gradient with fewer elements is drawn several times.
MIN_GRADIENTS = 64


def operator(case: Case, tensors: Tensors) -> Tensor:
    return depthwise_conv2d(
        tensors.input,
        tensors.weight,
        tensors.bias,
        case.stride,
        case.padding,
        case.dilation,
        input_bias=tensors.input_bias,
        input_activation=case.input_activation,
        activation=case.activation,
    )


def composite(case: Case, tensors: Tensors, *, exact: bool = False) -> Tensor:
    """What the operator means, in aten operators, or in forms that are exact in float64."""
    activation = (WIDE_ACTIVATIONS if exact else ACTIVATIONS)[case.activation]
    return activation(convolution(case, tensors, exact=exact))


def convolution(case: Case, tensors: Tensors, *, exact: bool = False) -> Tensor:
    """``composite`` but for the last activation."""
    hidden, weight, bias, input_bias = tensors
    if input_bias is not None:
        hidden = hidden + input_bias[:, None, None]
    hidden = (WIDE_ACTIVATIONS if exact else ACTIVATIONS)[case.input_activation](hidden)
    return F.conv2d(
        hidden, weight, bias, case.stride, case.padding, case.dilation, groups=case.channels
    )


def poison(like: Tensor) -> None:
    """Leave NaN where the allocator will put the next tensor of this size (on CUDA)."""
    if like.is_cuda:
        torch.full((like.numel(),), math.nan, dtype=like.dtype, device=like.device)


# --- judging ----------------------------------------------------------------------------------


def ulp(scale: float, dtype: torch.dtype) -> float:
    """The distance of neighbouring numbers of ``dtype`` at ``scale``."""
    info = torch.finfo(dtype)
    return info.eps * 2.0 ** math.floor(math.log2(max(scale, info.tiny)))


class Judge:
    """Collects errors on the device; ``check`` compares them all after one synchronisation."""

    def __init__(self) -> None:
        self._rows: list[Tensor] = []
        self._labels: list[tuple[str, torch.dtype]] = []

    def add(self, label: str, ours: Tensor, theirs: Tensor, exact: Tensor) -> None:
        """Results of one label are judged together, by their largest errors."""
        kinds = [(tuple(t.shape), t.dtype) for t in (ours, theirs)]
        assert kinds[0] == kinds[1], f"{label}: {kinds[0]} instead of {kinds[1]}"
        exact = exact.detach()
        errors = (result.detach().double() - exact for result in (ours, theirs))
        self._rows.append(torch.stack([t.abs().amax() for t in (*errors, exact)]))
        self._labels.append((label, ours.dtype))

    def check(self) -> None:
        if not self._rows:
            return
        pooled: dict[tuple[str, torch.dtype], list[float]] = {}
        for key, row in zip(self._labels, torch.stack(self._rows).tolist(), strict=True):
            worst = pooled.setdefault(key, [0.0, 0.0, 0.0])
            # max() drops a NaN that comes second.
            pooled[key] = [b if b != b or b > a else a for a, b in zip(worst, row, strict=True)]
        self._rows, self._labels = [], []
        failures = [
            f"{label}: error {own:.3e}, PyTorch's {usual:.3e}, largest result {scale:.3e}"
            for (label, dtype), (own, usual, scale) in pooled.items()
            if not own <= limit(usual, scale, dtype)
        ]
        assert not failures, f"{len(failures)} of {len(pooled)} failed\n" + "\n".join(failures[:10])


def limit(usual: float, scale: float, dtype: torch.dtype) -> float:
    if dtype == torch.float64:
        # Nothing wider to compare with: PyTorch's own result is the reference, and sums in
        # another order differ from it by rounding.
        return 2 * usual + 1024 * ulp(scale, dtype)
    return 2 * usual + ulp(scale, dtype)


@contextmanager
def told(case: Case) -> Iterator[None]:
    """Whatever goes wrong inside names the case."""
    try:
        yield
    except Exception as error:
        raise AssertionError(f"{case}: {type(error).__name__}: {error}") from error


def forward_errors(case: Case, device: str, judge: Judge) -> None:
    """Run ``case`` and give its errors to ``judge``."""
    with told(case), torch.no_grad():
        tensors = make_tensors(case, device)
        exact = composite(case, tensors.wide(), exact=True)
        theirs = composite(case, tensors.aligned())
        poison(theirs)
        ours = operator(case, tensors)
        plain = not case.input_bias and case.input_activation == "none" == case.activation
        if plain:
            assert ours.stride() == theirs.stride(), f"{ours.stride()}, aten: {theirs.stride()}"
        judge.add(repr(case), ours, theirs, exact)


@contextmanager
def without_onednn() -> Iterator[None]:
    """On the CPU, oneDNN is wrong for one channel in channels_last and a stride like (1, 2):
    ``F.conv2d(torch.ones(4).as_strided((1, 1, 4, 1), (4, 1, 1, 1)), torch.ones(1, 1, 5, 5), None,
    (1, 2), 2)`` with torch 2.15."""
    before = torch.backends.mkldnn.set_flags(False, _fp32_precision=None)
    try:
        yield
    finally:
        torch.backends.mkldnn.set_flags(before[0], _fp32_precision=None)


def integer_mismatch(case: Case, device: str) -> Tensor:
    """How many results of integer-valued tensors differ from the exact ones, as a tensor."""
    with told(case), torch.no_grad(), without_onednn():
        tensors = make_tensors(case, device, integers=True)
        exact = composite(case, tensors.wide(), exact=True)
        poison(tensors.input.new_empty(exact.shape))
        ours = operator(case, tensors)
        assert ours.dtype == case.dtype
        assert ours.shape == exact.shape, f"{tuple(ours.shape)}, not {tuple(exact.shape)}"
        return (ours != exact).sum()


def nan_in_other_places(case: Case, device: str) -> int:
    """With a NaN in turn in every pixel: how many outputs are NaN that should not be, or should
    and are not. The batch of ``case`` is ignored."""
    pixels = case.height * case.width
    case = replace(case, batch=pixels)
    with told(case), torch.no_grad():
        input, weight, *vectors = make_tensors(case, device)
        hit = torch.eye(pixels, dtype=torch.bool, device=device).view(pixels, 1, *input.shape[2:])
        ours = operator(case, Tensors(input.masked_fill_(hit, math.nan), weight, *vectors))
        reached = F.conv2d(
            hit.double(),
            weight.new_ones((1, 1, *case.kernel), dtype=torch.float64),
            None,
            case.stride,
            case.padding,
            case.dilation,
        )
        return int((ours.isnan() != (reached > 0)).sum())


def gradient_errors(case: Case, device: str, judge: Judge) -> None:
    """Run forward and backward of ``case`` and give the gradients' errors to ``judge``."""
    smallest = min(
        math.prod(case.weight_shape),
        case.weight_shape[0] if case.bias else MIN_GRADIENTS,
        case.channels if case.input_bias else MIN_GRADIENTS,
    )
    for draw in range(min(8, -(-MIN_GRADIENTS // smallest))):
        drawn = replace(case, seed=(case.seed + draw) % (1 << 31))
        with told(drawn):
            _gradient_errors(repr(case), drawn, device, judge)


def _gradient_errors(label: str, case: Case, device: str, judge: Judge) -> None:
    with without_onednn() if case.channels == 1 else nullcontext():
        _add_gradient_errors(label, case, device, judge)


def _add_gradient_errors(label: str, case: Case, device: str, judge: Judge) -> None:
    tensors = make_tensors(case, device)
    _avoid_kinks(case, tensors)
    exact_leaves = tensors.wide().leaves()
    before = convolution(case, exact_leaves, exact=True)
    generator = torch.Generator(device).manual_seed(case.seed + 1)
    grad = torch.randn(before.shape, generator=generator, device=device)
    grad = grad.masked_fill_(near_kinks(case.activation, before.detach(), case.dtype), 0.0)
    grad = grad.to(case.dtype)
    if case.seed % 4 == 0 and case.layout == "channels_last" and grad.dim() == 4:
        grad = grad.contiguous(memory_format=torch.channels_last)
    elif case.seed % 4 == 1:
        grad = place(grad, "sliced")

    def gradients(output: Tensor, leaves: Tensors) -> list[Tensor]:
        wanted = [leaf for leaf in leaves if leaf is not None]
        return list(torch.autograd.grad(output, wanted, grad.to(output.dtype)))

    exact = gradients(WIDE_ACTIVATIONS[case.activation](before), exact_leaves)
    leaves = tensors.leaves()
    aligned = tensors.aligned().leaves()
    theirs = gradients(composite(case, aligned), aligned)
    ours = gradients(operator(case, leaves), leaves)
    names = [name for name, t in zip(leaves._fields, leaves, strict=True) if t is not None]
    for name, *results in zip(names, ours, theirs, exact, strict=True):
        judge.add(f"grad_{name} of {label}", *results)


def near_kinks(activation: str, x: Tensor, dtype: torch.dtype) -> Tensor:
    """Where rounding decides the derivative."""
    distance = {torch.float16: 0.05, torch.bfloat16: 0.3}.get(dtype, 1e-3)
    near = torch.zeros_like(x, dtype=torch.bool)
    for kink in KINKS.get(activation, ()):
        near |= (x - kink).abs() < distance
    return near


def _avoid_kinks(case: Case, tensors: Tensors) -> None:
    """Move inputs out of the reach of rounding from where the input activation has a kink."""
    if case.input_activation in KINKS:
        before = tensors.input.double()
        if tensors.input_bias is not None:
            before = before + tensors.input_bias.double()[:, None, None]
        near = near_kinks(case.input_activation, before, case.dtype)
        tensors.input.add_(near.to(case.dtype))
