"""A depthwise and a pointwise convolution as one call where no kernel of ours runs, and how the
kernel would cut them."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from numerics import ACTIVATIONS
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.library import opcheck

from dwswap.activations import PAIRS
from dwswap.separable import choose_cut, fits, separable_conv2d

NAMED = torch.ops.dwswap._separable_conv2d.default
APART = torch.ops.dwswap._separable_conv2d_apart.default
H200 = (132, 232448)
"""Multiprocessors, and bytes of shared memory of a block."""


@dataclasses.dataclass(frozen=True)
class Given:
    """Operands of the function, but for its options."""

    input: Tensor
    weight: Tensor
    bias: Tensor | None
    input_bias: Tensor | None
    point_weight: Tensor
    point_bias: Tensor | None
    residual: Tensor | None

    def each(self) -> list[Tensor | None]:
        return [getattr(self, field.name) for field in dataclasses.fields(self)]

    def map(self, function: Callable[[Tensor], Tensor]) -> Given:
        return Given(*(None if t is None else function(t) for t in self.each()))


def draw(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64)


def tensors(
    kernel: int = 3, stride: int = 1, added: str = "residual", biases: bool = True
) -> Given:
    height, width = ((side - 1) // stride + 1 for side in (6, 7))
    return Given(
        draw(2, 8, 6, 7),
        draw(8, 1, kernel, kernel, seed=1),
        draw(8, seed=2) if biases else None,
        draw(8, seed=3) if biases else None,
        draw(16, 8, 1, 1, seed=4),
        draw(16, seed=5) if added == "bias" else None,
        draw(2, 16, height, width, seed=6) if added == "residual" else None,
    )


def theirs(
    given: Given,
    stride: int = 1,
    before: str = "none",
    behind: str = "none",
    table: Any = ACTIVATIONS,
    padding: int | None = None,
) -> Tensor:
    bias = given.input_bias
    x = given.input if bias is None else given.input + bias[:, None, None]
    padding = given.weight.shape[-1] // 2 if padding is None else padding
    hidden = F.conv2d(table[before](x), given.weight, given.bias, stride, padding, 1, x.shape[1])
    output = F.conv2d(table[behind](hidden), given.point_weight, given.point_bias)
    return output if given.residual is None else given.residual + output


def ours(given: Given, stride: int = 1, before: str = "none", behind: str = "none") -> Tensor:
    return separable_conv2d(
        given.input,
        given.weight,
        given.bias,
        given.point_weight,
        given.point_bias,
        given.residual,
        stride=stride,
        padding=given.weight.shape[-1] // 2,
        input_bias=given.input_bias,
        input_activation=before,
        activation=behind,
    )


def arguments(given: Given, stride: int, before: str, behind: str, *cut: int) -> tuple[Any, ...]:
    """Of the operator."""
    return (
        *(given.input, given.weight, given.bias, given.input_bias),
        *(stride, given.weight.shape[-1] // 2, PAIRS[before, behind]),
        *(given.point_weight, given.point_bias, given.residual, *(cut or (8, 1))),
    )


def test_fits() -> None:
    shapes = [((96, 1, 3, 3), (24, 96, 1, 1)), ((8, 1, 5, 5), (8, 8, 1, 1))]
    assert all(fits(*map(torch.empty, both)) for both in shapes)
    for both in (
        ((96, 1, 3, 3), (24, 48, 1, 1)),
        ((12, 1, 3, 3), (24, 12, 1, 1)),
        ((96, 1, 3, 3), (20, 96, 1, 1)),
        ((96, 1, 3, 5), (24, 96, 1, 1)),
        ((96, 1, 7, 7), (24, 96, 1, 1)),
        ((96, 2, 3, 3), (24, 96, 1, 1)),
    ):
        assert not fits(*map(torch.empty, both))


@pytest.mark.parametrize(
    ("shape", "outputs", "kernel", "stride", "cut"),
    [
        ((1, 96, 112, 112), 24, 3, 2, (32, 1)),
        ((1, 144, 56, 56), 24, 3, 1, None),  # 32 pixels of 144 channels are too many for a block
        ((1, 144, 56, 56), 32, 3, 2, (16, 2)),
        ((1, 192, 28, 28), 32, 3, 1, (16, 2)),
        ((1, 384, 14, 14), 64, 3, 1, (8, 4)),
        ((1, 576, 14, 14), 160, 3, 2, (8, 6)),
        ((1, 960, 7, 7), 320, 3, 1, (8, 8)),
        ((1, 120, 28, 28), 40, 5, 1, (16, 2)),
        ((2, 960, 7, 7), 160, 3, 1, (8, 8)),
        ((4, 384, 14, 14), 64, 3, 1, (16, 2)),
        ((4, 960, 7, 7), 320, 3, 1, None),  # too many weights for each of the blocks
        ((1, 32, 112, 112), 16, 3, 1, None),  # more tiles than multiprocessors
        ((256, 384, 14, 14), 64, 3, 1, None),
        ((0, 384, 14, 14), 64, 3, 1, None),
    ],
)
def test_cut(
    shape: tuple[int, ...], outputs: int, kernel: int, stride: int, cut: tuple[int, int] | None
) -> None:
    assert choose_cut(shape, outputs, kernel, stride, kernel // 2, *H200) == cut


def test_no_cut_without_clusters() -> None:
    assert choose_cut((1, 384, 14, 14), 64, 3, 1, 1, 0, 0) is None


def test_cuts_are_of_one_wave() -> None:
    found = 0
    for batch, channels, side, outputs, kernel, stride, device in itertools.product(
        (1, 2, 8, 64),
        (8, 24, 40, 136, 960, 2048, 8192),
        (1, 2, 5, 7, 13, 28, 57, 112),
        (8, 24, 160, 1280),
        (3, 5),
        (1, 2),
        (H200, (170, 101376), (1, 101376)),
    ):
        shape = (batch, channels, side, side)
        cut = choose_cut(shape, outputs, kernel, stride, kernel // 2, *device)
        if cut is None:
            continue
        found += 1
        across = (side - 1) // stride + 1
        pairs = batch * across * ((across + 1) // 2)
        assert cut.pixels in (8, 16, 32)
        assert 1 <= cut.slices <= 8
        assert -(-2 * pairs // cut.pixels) * cut.slices <= device[0]
    assert found > 1000


@pytest.mark.parametrize("added", ["residual", "bias", "nothing"])
def test_values(added: str) -> None:
    for kernel, stride, biases in itertools.product((3, 5), (1, 2), (False, True)):
        for before, behind in itertools.product(ACTIVATIONS, ACTIVATIONS):
            given = tensors(kernel, stride, added, biases)
            expected = theirs(given, stride, before, behind)
            torch.testing.assert_close(ours(given, stride, before, behind), expected)
            named = NAMED(*arguments(given, stride, before, behind))
            torch.testing.assert_close(named, expected)
    empty = tensors(added=added)
    residual = None if empty.residual is None else empty.residual[:0]
    empty = dataclasses.replace(empty, input=empty.input[:0], residual=residual)
    assert ours(empty).shape == (0, 16, 6, 7)


@pytest.mark.parametrize("operator", [NAMED, APART], ids=str)
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_pytorch_can_work_with_it(
    operator: torch._ops.OpOverload, layout: torch.memory_format
) -> None:
    given = tensors(3, 2).map(lambda t: t if t.dim() != 4 else t.to(memory_format=layout))
    whole = arguments(given, 2, "relu6", "relu")
    real = operator(*whole)
    with FakeTensorMode(allow_non_fake_inputs=False) as mode:
        fake = operator(*arguments(given.map(mode.from_tensor), 2, "relu6", "relu"))
    meta = operator(*arguments(given.map(lambda t: t.to("meta")), 2, "relu6", "relu"))
    for other in (fake, meta):
        assert (other.shape, other.stride(), other.dtype) == (real.shape, real.stride(), real.dtype)
    opcheck(operator, whole)


def test_gradients_and_vmap() -> None:
    given = tensors()
    names = [
        field.name for field in dataclasses.fields(given) if getattr(given, field.name) is not None
    ]
    primals = tuple(getattr(given, name).clone().requires_grad_() for name in names)

    def call(*values: Tensor) -> Tensor:
        return ours(dataclasses.replace(given, **dict(zip(names, values, strict=True))), 1, "silu")

    assert torch.autograd.gradcheck(call, primals)
    residual = given.residual
    assert residual is not None
    before = residual.clone()
    call(*primals)
    assert torch.equal(residual, before)
    images = torch.stack([given.input, 2 * given.input])
    batched = torch.vmap(lambda x: ours(dataclasses.replace(given, input=x), 1, "relu"))(images)
    single = [ours(dataclasses.replace(given, input=x), 1, "relu") for x in images]
    torch.testing.assert_close(batched, torch.stack(single))


@torch.no_grad()
def test_autocast_is_that_of_aten() -> None:
    for added in ("bias", "nothing"):
        given = tensors(added=added).map(Tensor.float)
        with torch.autocast("cpu", torch.bfloat16):
            result, expected = ours(given), theirs(given)
        assert result.dtype == expected.dtype == torch.bfloat16
        exact = theirs(tensors(added=added))
        error, usual = ((each.double() - exact).norm() for each in (result, expected))
        assert error <= 1.5 * usual


def test_a_bias_and_a_residual_are_refused() -> None:
    given = dataclasses.replace(tensors(), point_bias=draw(16, seed=5))
    with pytest.raises(ValueError, match="point_bias must be None where there is a residual"):
        ours(given)
