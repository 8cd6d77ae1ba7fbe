"""Values of ``dwswap.depthwise_conv2d``: against float64, against ``F.conv2d``, and exactly."""

from __future__ import annotations

import itertools
import random
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from cases import (
    ACTIVATION_NAMES,
    DENSE_LAYOUTS,
    EXACT_ACTIVATIONS,
    LAYOUTS,
    Case,
    make_tensors,
    place,
    random_case,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from numerics import (
    ACTIVATIONS,
    Judge,
    composite,
    forward_errors,
    integer_mismatch,
    nan_in_other_places,
    operator,
)

import dwswap.activations
from dwswap import depthwise_conv2d

DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_random_cases(device, dtype, layout):
    rng, judge = random.Random(f"{dtype} {layout}"), Judge()
    for _ in range(3):
        forward_errors(random_case(rng, dtype, layout, largest=9), device, judge)
    judge.check()


@pytest.mark.parametrize("layout", DENSE_LAYOUTS)
def test_every_pair_of_activations(device, layout):
    judge = Judge()
    case = Case(torch.float32, layout, 2, 12, 9, 11, (3, 3), padding=(1, 1), bias=True)
    for i, pair in enumerate(itertools.product(ACTIVATION_NAMES, repeat=2)):
        absorbed = dict(zip(("input_activation", "activation"), pair, strict=True))
        forward_errors(replace(case, input_bias=i % 2 == 0, seed=i, **absorbed), device, judge)
    judge.check()


@pytest.mark.parametrize("input_bias", [False, True])
def test_arguments_stay_as_they_are(device, input_bias):
    case = Case(torch.float32, "contiguous", 2, 12, 9, 11, (3, 3), padding=(1, 1), bias=True)
    for i, pair in enumerate(itertools.product(ACTIVATION_NAMES, repeat=2)):
        absorbed = dict(zip(("input_activation", "activation"), pair, strict=True))
        tensors = make_tensors(replace(case, input_bias=input_bias, seed=i, **absorbed), device)
        given = [tensor for tensor in tensors if tensor is not None]
        before = [tensor.clone() for tensor in given]
        operator(replace(case, **absorbed), tensors)
        assert all(map(torch.equal, given, before)), pair


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_integers_match_exactly(device, dtype, layout):
    rng = random.Random(f"integers {dtype} {layout}")
    for _ in range(10):
        case = random_case(rng, dtype, layout, largest=9, enough=False)
        case = replace(case, input_activation=rng.choice(EXACT_ACTIVATIONS), activation="none")
        assert integer_mismatch(case, device) == 0, case


sizes = st.integers(1, 5)


@settings(max_examples=100, deadline=None, derandomize=True)
@given(
    batch=st.none() | st.integers(1, 3),
    channels=st.integers(1, 9),
    multiplier=st.integers(1, 3),
    beyond=st.tuples(st.integers(0, 9), st.integers(0, 9)),
    kernel=st.tuples(sizes, sizes),
    stride=st.tuples(sizes, sizes),
    padding=st.tuples(st.integers(0, 6), st.integers(0, 6)),
    dilation=st.tuples(st.integers(1, 3), st.integers(1, 3)),
    layout=st.sampled_from(tuple(LAYOUTS)),
    vectors=st.tuples(st.booleans(), st.booleans()),
    activations=st.tuples(st.sampled_from(EXACT_ACTIVATIONS), st.sampled_from(EXACT_ACTIVATIONS)),
    seed=st.integers(0, 1 << 16),
)
def test_any_arguments(
    batch,
    channels,
    multiplier,
    beyond,
    kernel,
    stride,
    padding,
    dilation,
    layout,
    vectors,
    activations,
    seed,
):
    """Integer-valued float32 must match exactly; Hypothesis shrinks what does not."""
    extents = (dilation[i] * (kernel[i] - 1) + 1 for i in range(2))
    height, width = (
        max(1, extent - 2 * padding[i]) + beyond[i] for i, extent in enumerate(extents)
    )
    case = Case(
        torch.float32,
        layout,
        batch,
        channels,
        height,
        width,
        kernel,
        stride,
        padding,
        dilation,
        multiplier,
        *vectors,
        *activations,
        seed,
    )
    for device in ("cpu", "cuda")[: 1 + torch.cuda.is_available()]:
        assert integer_mismatch(case, device) == 0


def test_output_channel_k_reads_input_channel_k_over_m(device):
    input = torch.tensor([1.0, 10.0, 100.0], device=device).view(1, 3, 1, 1)
    weight = torch.tensor([1.0, 2, 3, 4, 5, 6], device=device).view(6, 1, 1, 1)
    output = depthwise_conv2d(input, weight)
    assert output.flatten().tolist() == [1, 2, 30, 40, 500, 600]


def test_padding_is_zero_after_the_input_activation(device):
    """Neither sigmoid(0) nor sigmoid(input_bias), but nothing at all."""
    input = torch.zeros(1, 1, 1, 1, device=device)
    weight, bias = torch.ones(1, 1, 3, 3, device=device), torch.full((1,), 100.0, device=device)
    output = depthwise_conv2d(input, weight, padding=1, input_bias=bias, input_activation="sigmoid")
    assert output.item() == 1.0


# aten's own, for the kernels of even size.
@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel")
@pytest.mark.parametrize("padding", ["same", "valid"])
@pytest.mark.parametrize("kernel", [(3, 3), (4, 4), (2, 5), (1, 6)])
@pytest.mark.parametrize("dilation", [1, (2, 1), 3])
def test_named_padding(device, padding, kernel, dilation):
    generator = torch.Generator().manual_seed(0)
    input = torch.randint(-2, 3, (2, 3, 17, 19), generator=generator).float().to(device)
    weight = torch.randint(-2, 3, (6, 1, *kernel), generator=generator).float().to(device)
    ours = depthwise_conv2d(input, weight, None, 1, padding, dilation)
    torch.testing.assert_close(ours, F.conv2d(input, weight, None, 1, padding, dilation, 3))


def test_named_padding_of_the_valid_kind_takes_a_stride(device):
    input, weight = torch.ones(1, 2, 9, 9, device=device), torch.ones(2, 1, 3, 3, device=device)
    ours = depthwise_conv2d(input, weight, None, 2, "valid")
    assert torch.equal(ours, F.conv2d(input, weight, None, 2, "valid", 1, 2))


def test_sequences_of_one_are_broadcast(device):
    input, weight = torch.ones(1, 2, 9, 9, device=device), torch.ones(2, 1, 3, 3, device=device)
    ours = depthwise_conv2d(input, weight, None, [2], (1,), [2], groups=2)
    assert torch.equal(ours, F.conv2d(input, weight, None, [2], (1,), [2], 2))
    raw = torch.ops.dwswap.depthwise_conv2d(input, weight, None, [2], [1], [2])
    assert torch.equal(raw, ours)


# --- layout of the output ---------------------------------------------------------------------


SHAPES = [
    (2, 4, 5, 6),
    (1, 4, 5, 6),
    (2, 1, 5, 6),
    (2, 4, 1, 1),
    (2, 4, 1, 6),
    (2, 4, 5, 1),
    (1, 1, 1, 1),
    (1, 1, 5, 6),
    (4, 5, 6),
    (1, 5, 6),
    (4, 1, 1),
]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("weight_layout", DENSE_LAYOUTS)
def test_strides_of_the_output_are_those_of_aten(device, layout, weight_layout):
    """Ambiguous layouts included: one channel, one pixel, kernels of one tap, no batch."""
    different = []
    for shape, kernel, multiplier in itertools.product(SHAPES, (1, 3), (1, 2)):
        input = place(torch.ones(shape, device=device), layout)
        weight = torch.ones(shape[-3] * multiplier, 1, kernel, kernel, device=device)
        weight = place(weight, weight_layout)
        ours = depthwise_conv2d(input, weight, padding=kernel // 2)
        theirs = F.conv2d(input, weight, padding=kernel // 2, groups=shape[-3])
        assert ours.shape == theirs.shape
        if ours.stride() != theirs.stride():
            different.append((shape, kernel, multiplier, ours.stride(), theirs.stride()))
    assert not different


@pytest.mark.parametrize("layout", DENSE_LAYOUTS)
def test_absorbed_activations_leave_the_layout_alone(device, layout):
    case = Case(torch.float32, layout, 2, 4, 5, 6, (3, 3))
    tensors = make_tensors(case, device)
    plain = operator(case, tensors)
    absorbed = replace(case, input_activation="sigmoid", activation="gelu", bias=True)
    assert operator(absorbed, make_tensors(absorbed, device)).stride() == plain.stride()


# --- empty batches, special values ------------------------------------------------------------


@pytest.mark.parametrize("layout", DENSE_LAYOUTS)
def test_empty_batch(device, layout):
    """An empty output, and gradients of the right shapes that are zero."""
    input = torch.empty(0, 4, 5, 6, device=device).requires_grad_()
    weight, bias = (torch.ones(s, device=device).requires_grad_() for s in ((8, 1, 3, 3), (8,)))
    view = input.contiguous(memory_format=torch.channels_last) if "last" in layout else input
    output = depthwise_conv2d(view, weight, bias, padding=1, activation="relu")
    assert output.shape == (0, 8, 5, 6)
    output.sum().backward()
    assert input.grad is not None
    assert input.grad.shape == input.shape
    for tensor in (weight, bias):
        assert tensor.grad is not None
        assert torch.equal(tensor.grad, torch.zeros_like(tensor))


@pytest.mark.parametrize("layout", DENSE_LAYOUTS)
@pytest.mark.parametrize("kernel", [(3, 3), (2, 5)])
@pytest.mark.parametrize("stride", [1, 2])
def test_nan_reaches_exactly_the_outputs_whose_window_holds_it(device, layout, kernel, stride):
    case = Case(torch.float32, layout, None, 4, 6, 7, kernel, (stride, stride), (1, 2))
    assert nan_in_other_places(case, device) == 0


@pytest.mark.parametrize("layout", DENSE_LAYOUTS)
def test_infinity_times_zero_is_nan(device, layout):
    input = torch.zeros(1, 4, 5, 5, device=device)
    input[:, :, 2, 2] = torch.inf
    input = place(input, layout)
    weight = torch.zeros(4, 1, 3, 3, device=device)
    output = depthwise_conv2d(input, weight, padding=1)
    expected = torch.zeros(5, 5, dtype=torch.bool, device=device)
    expected[1:4, 1:4] = True
    assert torch.equal(output.isnan(), expected.expand(1, 4, 5, 5))


def expected_of(name: str, input: torch.Tensor) -> torch.Tensor:
    """aten's activation, but for those that divide by 6 on CUDA: they multiply by a 1 / 6 of single
    precision in float64 as well, and hardswish overflows on the way to a result that is finite."""
    if name not in ("hardswish", "hardsigmoid") or input.device.type == "cpu":
        return ACTIVATIONS[name](input)
    return ACTIVATIONS[name](input.double().cpu()).to(input)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("side", ["input_activation", "activation"])
def test_activations_treat_special_values_as_aten(device, dtype, side):
    """Images of one pixel: a kernel with padding sees the value itself and zeros."""
    largest = torch.finfo(dtype).max
    values = [0.0, -0.0, 3, -3, 6, -6, 1e-3, 50, -50, 100, -100, largest, -largest]
    special = [*values, torch.inf, -torch.inf, torch.nan]
    pixels = torch.tensor(special, device=device, dtype=dtype)[:, None, None, None]
    tolerance = 16 * torch.finfo(dtype).eps
    for name, layout, kernel in itertools.product(ACTIVATION_NAMES, DENSE_LAYOUTS, (1, 3)):
        input = place(pixels.expand(-1, 4, 1, 1), layout)
        weight = torch.ones(4, 1, kernel, kernel, device=device, dtype=dtype)
        torch.testing.assert_close(
            depthwise_conv2d(input, weight, padding=kernel // 2, **{side: name}),
            expected_of(name, input),
            rtol=tolerance,
            atol=tolerance,
            equal_nan=True,
            check_stride=False,
            msg=lambda text, what=f"{name} {layout} {kernel}": f"{what}: {text}",
        )


# --- other kinds of tensors -------------------------------------------------------------------


def test_complex_numbers_fall_back_to_aten(device):
    generator = torch.Generator(device).manual_seed(0)
    input, weight = (
        torch.randn(shape, dtype=torch.complex64, generator=generator, device=device)
        for shape in ((2, 3, 6, 7), (6, 1, 3, 3))
    )
    ours = depthwise_conv2d(input, weight, padding=1)
    torch.testing.assert_close(ours, F.conv2d(input, weight, padding=1, groups=3))
    ours = depthwise_conv2d(input.conj(), weight.conj(), padding=1)
    torch.testing.assert_close(ours, F.conv2d(input, weight, padding=1, groups=3).conj())


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.uint8])
def test_integers_fall_back_to_aten(dtype):
    input = torch.arange(48).view(1, 3, 4, 4).to(dtype)
    weight = torch.ones(3, 1, 3, 3, dtype=dtype)
    assert torch.equal(depthwise_conv2d(input, weight), F.conv2d(input, weight, groups=3))


def test_conjugate_and_negative_bits(device):
    numbers = torch.view_as_complex(torch.arange(-30.0, 30, device=device).view(1, 2, 3, 5, 2))
    negative = numbers.conj().imag
    assert negative.is_neg()
    weight = torch.ones(2, 1, 3, 3, device=device)
    ours = depthwise_conv2d(negative, weight, padding=1)
    assert torch.equal(ours, F.conv2d(negative.resolve_neg(), weight, padding=1, groups=2))


def test_expanded_and_overlapping_tensors(device):
    generator = torch.Generator().manual_seed(0)
    line = torch.randint(-3, 4, (40,), generator=generator).float().to(device)
    overlapping = line.as_strided((2, 3, 5, 5), (2, 3, 4, 1))
    one = torch.tensor(2.0, device=device)
    for input in (overlapping, line[:5].expand(2, 3, 5, 5), one.expand(2, 3, 5, 5)):
        for weight in (one.expand(3, 1, 3, 3), line.as_strided((3, 1, 3, 3), (1, 1, 2, 1))):
            bias = one.expand(3)
            ours = depthwise_conv2d(input, weight, bias, padding=1, input_bias=bias)
            theirs = F.conv2d(input.clone() + 2, weight.clone(), bias.clone(), 1, 1, 1, 3)
            torch.testing.assert_close(ours, theirs)


def test_the_output_shares_no_memory_with_the_input(device):
    """Not even where the convolution is the identity: an operator must not return an alias."""
    input, weight = torch.ones(1, 2, 3, 3, device=device), torch.ones(2, 1, 1, 1, device=device)
    output = depthwise_conv2d(input, weight)
    assert output.data_ptr() != input.data_ptr()


def test_the_tables_of_activations_agree():
    """The one of the tests is written out again on purpose; this only compares names and values."""
    assert tuple(dwswap.activations.ACTIVATIONS) == ACTIVATION_NAMES == tuple(ACTIVATIONS)
    x = torch.linspace(-8, 8, 1001, dtype=torch.float64)
    for name, activation in dwswap.activations.ACTIVATIONS.items():
        assert torch.equal(activation.forward(x), ACTIVATIONS[name](x))


def test_seeds_replay_a_case(device):
    """What a failure prints must be all that is needed to see it again."""
    case = random_case(random.Random(1), torch.float32, "contiguous")
    again = eval(repr(case), {"Case": Case, "torch": torch})
    first, second = (make_tensors(c, device) for c in (case, again))
    assert torch.equal(composite(case, first), composite(again, second))
