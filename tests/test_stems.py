"""The first layer of a network where aten computes it, and PyTorch's subsystems."""

from __future__ import annotations

import itertools

import pytest
import torch
import torch.nn.functional as F
from cases import LAYOUTS, place
from composites import check_forms
from numerics import ACTIVATIONS
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.library import opcheck

from dwswap.activations import PAIRS
from dwswap.stems import fits, stem_conv2d

CHANNELS = 8
NAMED = torch.ops.dwswap._stem_conv2d.default
ATEN = torch.ops.dwswap._stem_conv2d_aten.default
DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
RELU6 = PAIRS["none", "relu6"]


def draw(shape: tuple[int, ...], dtype: torch.dtype = torch.float64, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)


def image(dtype: torch.dtype, layout: str = "contiguous", batch: int | None = 2) -> Tensor:
    x = place(draw((batch or 1, 3, 7, 10), dtype), layout)
    return x[0] if batch is None else x


def parameters(dtype: torch.dtype, bias: bool = True) -> tuple[Tensor, Tensor | None]:
    return draw((CHANNELS, 3, 3, 3), dtype, 1), draw((CHANNELS,), dtype, 2) if bias else None


def theirs(x: Tensor, weight: Tensor, bias: Tensor | None, activation: str = "none") -> Tensor:
    return ACTIVATIONS[activation](F.conv2d(x, weight, bias, stride=2, padding=1))


def strides(x: Tensor) -> list[int]:
    """Of dimensions of one element, they mean nothing."""
    return [stride for stride, size in zip(x.stride(), x.shape, strict=True) if size > 1]


def test_fits() -> None:
    assert [k for k in range(70) if fits(torch.empty(k, 3, 3, 3))] == list(range(8, 65, 8))
    for shape in ((8, 1, 3, 3), (8, 3, 5, 5), (8, 3, 3, 1), (8, 3, 3), (8, 3, 3, 3, 3)):
        assert not fits(torch.empty(shape))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("batch", [2, None, 0])
def test_values_and_strides(dtype: torch.dtype, layout: str, batch: int | None) -> None:
    x = image(dtype, layout, 2 if batch == 0 else batch)
    x = x[:0] if batch == 0 else x
    for bias, activation in itertools.product((False, True), ACTIVATIONS):
        tensors = parameters(dtype, bias)
        expected = theirs(x, *tensors, activation)
        results = (
            stem_conv2d(x, *tensors, activation=activation),
            NAMED(x, *tensors, PAIRS["none", activation]),
        )
        for result in results:
            assert torch.equal(result, expected)
            assert result.movedim(-3, -1).is_contiguous()


@pytest.mark.parametrize("size", [(1, 1), (1, 6), (2, 2), (5, 1)])
def test_small_images(size: tuple[int, int]) -> None:
    x, tensors = draw((2, 3, *size)), parameters(torch.float64)
    result = stem_conv2d(x, *tensors)
    assert torch.equal(result, theirs(x, *tensors))
    assert result.shape[2:] == tuple((n + 1) // 2 for n in size)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("batch", [2, None])
@pytest.mark.parametrize("operator", [NAMED, ATEN], ids=str)
def test_fake_tensors_tell_the_truth(
    layout: str, batch: int | None, operator: torch._ops.OpOverload
) -> None:
    x, tensors = image(torch.float32, layout, batch), parameters(torch.float32)
    for given in (x, x[..., :1, :1], x[..., :2]):
        real = operator(given, *tensors, RELU6)
        with FakeTensorMode(allow_non_fake_inputs=False) as mode:
            fake = operator(*(mode.from_tensor(t) for t in (given, *tensors)), RELU6)
        assert (fake.shape, fake.dtype, fake.device) == (real.shape, real.dtype, real.device)
        meta = operator(*(t.to("meta") for t in (given, *tensors)), RELU6)
        assert strides(fake) == strides(meta) == strides(real)


@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "sliced"])
@pytest.mark.parametrize("bias", [False, True])
def test_opcheck(layout: str, bias: bool) -> None:
    tensors = (image(torch.float32, layout), *parameters(torch.float32, bias))
    for operator in (NAMED, ATEN):
        opcheck(operator, (*tensors, PAIRS["none", "silu"]))


@pytest.mark.parametrize("activation", ["none", "silu"])
def test_gradients(activation: str) -> None:
    x = image(torch.float64, "channels_last")[:1].requires_grad_()
    tensors = [t.requires_grad_() for t in parameters(x.dtype) if t is not None]
    call = lambda *given: stem_conv2d(*given, activation=activation)  # noqa: E731
    assert torch.autograd.gradcheck(call, (x, *tensors))
    primals = (x, *tensors)
    tangents = tuple(torch.ones_like(t) for t in primals)
    forward = [
        torch.func.jvp(function, primals, tangents)[1]
        for function in (call, lambda *given: theirs(*given, activation))
    ]
    torch.testing.assert_close(*forward)


def test_vmap() -> None:
    images = torch.stack([image(torch.float64), 2 * image(torch.float64)])
    tensors = parameters(torch.float64)
    call = lambda x: stem_conv2d(x, *tensors, activation="relu")  # noqa: E731
    expected = torch.stack([call(x) for x in images])
    torch.testing.assert_close(torch.vmap(call)(images), expected)


class Stem(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight, self.bias = map(nn.Parameter, parameters(torch.float32))

    def forward(self, x: Tensor) -> Tensor:
        return stem_conv2d(x, self.weight, self.bias, activation="relu6")


@pytest.mark.parametrize("differentiated", [False, True])
def test_compiled_exported_and_traced_it_is_that_of_aten(differentiated: bool) -> None:
    model = Stem().requires_grad_(differentiated)
    layouts = (("contiguous", 2), ("channels_last", 3))
    images = [image(torch.float32, layout, batch) for layout, batch in layouts]
    check_forms(
        model,
        images,
        lambda x: theirs(x, model.weight, model.bias, "relu6"),
        NAMED,
        {torch.ops.aten.conv2d.default, torch.conv2d},
        differentiated,
    )


@torch.no_grad()
def test_autocast_is_that_of_aten() -> None:
    x, tensors = image(torch.float32), parameters(torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        result, expected = stem_conv2d(x, *tensors), theirs(x, *tensors)
    assert result.dtype == expected.dtype == torch.bfloat16
    assert torch.equal(result, expected)


def test_inference_mode_and_subclasses() -> None:
    x, tensors = image(torch.float32), parameters(torch.float32)
    with torch.inference_mode():
        result = stem_conv2d(x, *tensors)
    assert result.is_inference()
    assert torch.equal(stem_conv2d(nn.Parameter(x), *tensors), result)


def test_errors_name_the_argument() -> None:
    x, (weight, bias) = image(torch.float32), parameters(torch.float32)
    assert bias is not None
    with pytest.raises(
        ValueError, match=r"weight must be \(K, 3, 3, 3\), got shape \[8, 3, 3, 1\]"
    ):
        stem_conv2d(x, weight[..., :1], bias)
    with pytest.raises(ValueError, match=r"bias must be 1-D of length 8, got shape \[5\]"):
        stem_conv2d(x, weight, bias[:5])
    with pytest.raises(ValueError, match=r"input must have 3 channels, got shape \[2, 2, 7, 10\]"):
        NAMED(x[:, :2], weight, bias, 0)
    with pytest.raises(ValueError, match=r"input must be 4-D \(N, C, H, W\) or 3-D"):
        stem_conv2d(x[0, 0], weight, bias)
