"""Layer normalization over channels where aten computes it, and PyTorch's subsystems."""

from __future__ import annotations

import itertools

import pytest
import torch
import torch.nn.functional as F
from cases import LAYOUTS, place
from composites import check_forms
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.library import opcheck

from dwswap.norms import channel_norm

CHANNELS = 6
NAMED = torch.ops.dwswap._channel_norm.default
ATEN = torch.ops.dwswap._channel_norm_aten.default
DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
LAST = pytest.mark.parametrize("last", [False, True], ids=["image", "last"])
# Of weight and bias, which are given.
GIVEN = tuple(itertools.product((False, True), repeat=2))


def draw(shape: tuple[int, ...], dtype: torch.dtype = torch.float64, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (3 * torch.randn(shape, generator=generator, dtype=torch.float64) + 1).to(dtype)


def parameters(
    given: tuple[bool, bool], dtype: torch.dtype, channels: int = CHANNELS
) -> list[Tensor | None]:
    return [draw((channels,), dtype, seed) if wanted else None for seed, wanted in enumerate(given)]


def image(dtype: torch.dtype, layout: str, last: bool, batch: int | None = 2) -> Tensor:
    """A view whose channels, the last dimension or that of an image, are laid out as ``layout``."""
    x = place(draw((batch or 1, CHANNELS, 5, 7), dtype), layout)
    x = x[0] if batch is None else x
    return x.movedim(-3, -1) if last else x


def theirs(x: Tensor, weight: Tensor | None, bias: Tensor | None, last: bool) -> Tensor:
    """As models write it."""
    if last:
        return F.layer_norm(x, x.shape[-1:], weight, bias, 1e-3)
    to_last, back = ((1, 2, 0), (2, 0, 1)) if x.dim() == 3 else ((0, 2, 3, 1), (0, 3, 1, 2))
    rows = x.permute(to_last)
    return F.layer_norm(rows, rows.shape[-1:], weight, bias, 1e-3).permute(back)


def ours(x: Tensor, weight: Tensor | None, bias: Tensor | None, last: bool) -> Tensor:
    return channel_norm(x, weight, bias, 1e-3, last=last)


@LAST
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("batch", [2, None])
def test_values_and_strides(dtype: torch.dtype, layout: str, last: bool, batch: int | None) -> None:
    for given in GIVEN:
        x, tensors = image(dtype, layout, last, batch), parameters(given, dtype)
        expected = theirs(x, *tensors, last)
        for result in (ours(x, *tensors, last), NAMED(x, *tensors, 1e-3, last)):
            assert torch.equal(result, expected)
            assert result.stride() == expected.stride()
        if dtype == torch.float64:
            dim = -1 if last else -3
            x = x - x.mean(dim, keepdim=True)
            x = x / (x.square().mean(dim, keepdim=True) + 1e-3).sqrt()
            weight, bias = (
                t if t is None or last else t[:, None, None] for t in parameters(given, dtype)
            )
            x = x if weight is None else x * weight
            torch.testing.assert_close(result, x if bias is None else x + bias)


@pytest.mark.parametrize("shape", [(CHANNELS,), (4, CHANNELS), (2, 3, 1, 2, CHANNELS), (3, 1)])
def test_last_of_any_rank(shape: tuple[int, ...]) -> None:
    x = draw(shape)
    tensors = parameters((True, True), x.dtype, shape[-1])
    assert torch.equal(ours(x, *tensors, True), theirs(x, *tensors, True))


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("shape", [(2, 3, 4, 5), (2, 1, 4, 5), (2, 3, 1, 1), (0, 3, 4, 5)])
def test_an_image_becomes_channels_last(layout: torch.memory_format, shape: tuple) -> None:
    result = ours(torch.ones(shape).to(memory_format=layout), None, None, False)
    assert result.is_contiguous(memory_format=torch.channels_last)
    assert result.movedim(1, -1).stride() == torch.empty(*shape[:1], *shape[2:], shape[1]).stride()


@LAST
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("batch", [2, None])
@pytest.mark.parametrize("operator", [NAMED, ATEN], ids=str)
def test_fake_tensors_tell_the_truth(
    layout: str, last: bool, batch: int | None, operator: torch._ops.OpOverload
) -> None:
    x = image(torch.float32, layout, last, batch)
    cuts = (slice(None), slice(1), slice(0))  # the image, a pixel, nothing
    for given in (x[..., cut, cut, :] if last else x[..., cut, cut] for cut in cuts):
        tensors = parameters((True, True), x.dtype)
        real = operator(given, *tensors, 1e-3, last)
        with FakeTensorMode(allow_non_fake_inputs=False) as mode:
            fake = operator(*(mode.from_tensor(t) for t in (given, *tensors)), 1e-3, last)
        assert (fake.shape, fake.dtype, fake.device) == (real.shape, real.dtype, real.device)
        assert fake.stride() == real.stride()
        meta = operator(*(t.to("meta") for t in (given, *tensors)), 1e-3, last)
        assert meta.stride() == real.stride()


@LAST
@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "sliced"])
@pytest.mark.parametrize("given", GIVEN)
def test_opcheck(layout: str, last: bool, given: tuple[bool, bool]) -> None:
    tensors = (image(torch.float32, layout, last), *parameters(given, torch.float32))
    for operator in (NAMED, ATEN):
        opcheck(operator, (*tensors, 1e-3, last))


@LAST
def test_gradients(last: bool) -> None:
    x = image(torch.float64, "channels_last", last)[:1].requires_grad_()
    tensors = [t.requires_grad_() for t in parameters((True, True), x.dtype) if t is not None]
    call = lambda *given: ours(*given, last)  # noqa: E731
    assert torch.autograd.gradcheck(call, (x, *tensors))
    primals = (x, *tensors)
    tangents = tuple(torch.ones_like(t) for t in primals)
    forward = [
        torch.func.jvp(function, primals, tangents)[1]
        for function in (call, lambda *given: theirs(*given, last))
    ]
    assert torch.equal(*forward)


@LAST
@pytest.mark.parametrize("mapped", [(0,), (0, 1), (2,)])
def test_vmap(last: bool, mapped: tuple[int, ...]) -> None:
    x = image(torch.float64, "contiguous", last)
    fixed = [x, *parameters((True, True), x.dtype)]
    values = [torch.stack([fixed[i], 2 * fixed[i], -fixed[i]], 1) for i in mapped]

    def function(*given: Tensor) -> Tensor:
        tensors = dict(enumerate(fixed)) | dict(zip(mapped, given, strict=True))
        return ours(*tensors.values(), last)

    result = torch.vmap(function, in_dims=1, out_dims=1)(*values)
    for i in range(3):
        expected = function(*(value.select(1, i) for value in values))
        torch.testing.assert_close(result.select(1, i), expected)


class Norm(nn.Module):
    def __init__(self, last: bool) -> None:
        super().__init__()
        self.last = last
        self.weight, self.bias = (nn.Parameter(draw((CHANNELS,), torch.float32)) for _ in "wb")

    def forward(self, x: Tensor) -> Tensor:
        return ours(x, self.weight, self.bias, self.last)


@LAST
@pytest.mark.parametrize("differentiated", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_compiled_exported_and_traced_it_is_that_of_aten(last: bool, differentiated: bool) -> None:
    model = Norm(last).requires_grad_(differentiated)
    layouts = (("contiguous", 2), ("channels_last", 3))
    images = [image(torch.float32, layout, last, batch) for layout, batch in layouts]
    check_forms(
        model,
        images,
        lambda x: theirs(x, model.weight, model.bias, last),
        NAMED,
        {torch.ops.aten.layer_norm.default, F.layer_norm},
        differentiated,
    )


@LAST
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@torch.no_grad()
def test_autocast_is_that_of_aten(last: bool, dtype: torch.dtype) -> None:
    x, tensors = image(dtype, "channels_last", last), parameters((True, True), torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        result, expected = ours(x, *tensors, last), theirs(x, *tensors, last)
    assert result.dtype == expected.dtype
    assert torch.equal(result, expected)


@LAST
def test_inference_mode_and_subclasses(last: bool) -> None:
    x = image(torch.float32, "channels_last", last)
    with torch.inference_mode():
        result = ours(x, None, None, last)
    assert result.is_inference()
    assert torch.equal(ours(nn.Parameter(x), None, None, last), result)
    buffer = nn.Buffer(x)
    assert torch.equal(ours(buffer, None, None, last), result)


@LAST
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_nan_stays_in_its_pixel(last: bool, value: float) -> None:
    x = image(torch.float32, "channels_last", last)
    x[1, 2, 3, 4] = value
    result = ours(x, None, None, last)
    pixels = result.isnan() if last else result.isnan().movedim(1, -1)
    assert pixels[1, 2, 3].all() if last else pixels[1, 3, 4].all()
    assert pixels.sum() == CHANNELS


@LAST
def test_errors_name_the_argument(last: bool) -> None:
    x = image(torch.float32, "contiguous", last)
    weight, bias = parameters((True, True), x.dtype)
    assert weight is not None
    short, square = weight[:3], weight[None]
    with pytest.raises(ValueError, match=r"_channel_norm: weight must be 1-D of length 6, got .*3"):
        ours(x, short, bias, last)
    with pytest.raises(ValueError, match=r"bias must be 1-D of length 6, got shape \[1, 6\]"):
        ours(x, weight, square, last)
    ranks = r"at least 1-D \(..., C\)" if last else r"4-D \(N, C, H, W\) or 3-D \(C, H, W\)"
    for call in (channel_norm, NAMED):
        options = {"last": last} if call is channel_norm else {}
        arguments = (None, None, 1e-3) if call is channel_norm else (None, None, 1e-3, last)
        with pytest.raises(ValueError, match=f"input must be {ranks}, got"):
            call(torch.ones(()) if last else torch.ones(2, 3), *arguments, **options)
