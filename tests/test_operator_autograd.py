"""Derivatives: backward, double backward, forward mode, torch.func and vmap."""

from __future__ import annotations

import itertools
import random
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from cases import ACTIVATION_NAMES, DENSE_LAYOUTS, LAYOUTS, Case, make_tensors, random_case
from numerics import Judge, composite, gradient_errors, operator
from torch import Tensor
from torch.autograd import forward_ad, gradcheck, gradgradcheck
from torch.func import grad, hessian, jacfwd, jacrev, jvp, vjp, vmap

from dwswap import depthwise_conv2d

DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
SIDES = ("input_activation", "activation")
# Small enough for numerical derivatives, general enough for every argument to matter.
SMALL = Case(
    torch.float64,
    "contiguous",
    2,
    2,
    4,
    3,
    (3, 2),
    (2, 1),
    (1, 1),
    (1, 2),
    multiplier=2,
    bias=True,
    input_bias=True,
)


def small(**changes) -> Case:
    return Case(**{**SMALL.__dict__, **changes})


def tiny(**changes) -> Case:
    return small(batch=1, channels=1, height=3, kernel=(2, 2), stride=(2, 1), **changes)


def function_of(case: Case):
    """The operator as a function of its tensors, and those tensors."""
    tensors = make_tensors(case, "cpu").leaves()
    present = [name for name, t in zip(tensors._fields, tensors, strict=True) if t is not None]

    def function(*values: Tensor) -> Tensor:
        return operator(case, tensors._replace(**dict(zip(present, values, strict=True))))

    return function, tuple(t for t in tensors if t is not None)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_gradients_of_random_cases(device, dtype, layout):
    rng, judge = random.Random(f"gradients {dtype} {layout}"), Judge()
    for _ in range(2):
        gradient_errors(random_case(rng, dtype, layout, largest=9), device, judge)
    judge.check()


@pytest.mark.parametrize("name", ACTIVATION_NAMES)
@pytest.mark.parametrize("side", SIDES)
def test_gradcheck(name, side):
    """Reverse and forward mode."""
    function, tensors = function_of(tiny(**{side: name}))
    assert gradcheck(function, tensors, check_forward_ad=True)


@pytest.mark.parametrize("name", ACTIVATION_NAMES)
@pytest.mark.parametrize("side", SIDES)
def test_gradgradcheck(name, side):
    function, tensors = function_of(tiny(**{side: name}))
    assert gradgradcheck(function, tensors)


@pytest.mark.parametrize(
    "changes",
    [
        {"layout": "channels_last"},
        {"batch": None},
        {"bias": False, "input_bias": False},
        {"input_activation": "silu", "activation": "silu"},
        {"input_activation": "relu6", "activation": "hardswish", "layout": "sliced"},
        {"kernel": (1, 1), "padding": (0, 0), "multiplier": 1},
    ],
    ids=str,
)
def test_gradcheck_of_other_problems(changes):
    """In random directions: with vmap over the directions, and forward over reverse."""
    torch.manual_seed(0)
    function, tensors = function_of(small(**changes))
    assert gradcheck(
        function, tensors, check_forward_ad=True, check_batched_grad=True, fast_mode=True
    )
    assert gradgradcheck(function, tensors, check_fwd_over_rev=True, fast_mode=True)


@pytest.mark.parametrize("needed", list(itertools.product((False, True), repeat=4)), ids=str)
def test_only_the_gradients_that_are_asked_for(device, needed):
    case = small(dtype=torch.float32, input_activation="silu", activation="relu6")
    tensors = make_tensors(case, device)
    for tensor, wanted in zip(tensors, needed, strict=True):
        tensor.requires_grad_(wanted)
    output = operator(case, tensors)
    assert output.requires_grad == any(needed)
    if any(needed):
        output.sum().backward()
        theirs = make_tensors(case, device).leaves()
        composite(case, theirs).sum().backward()
        for ours, expected, wanted in zip(tensors, theirs, needed, strict=True):
            assert (ours.grad is not None) == wanted
            if wanted:
                torch.testing.assert_close(ours.grad, expected.grad)


@pytest.mark.parametrize("layout", DENSE_LAYOUTS)
@pytest.mark.parametrize("kind", ["transposed", "expanded", "sliced", "one", "channels_last"])
def test_grad_output_of_any_strides(device, layout, kind):
    case = Case(torch.float32, layout, 2, 6, 5, 5, (3, 3), padding=(1, 1), activation="silu")
    shape = case.output_shape
    values = torch.randn(shape, device=device)
    grad_output = {
        "transposed": values.transpose(2, 3),
        "expanded": torch.randn((1, 6, 1, 5), device=device).expand(shape),
        "sliced": torch.randn((2, 9, 6, 7), device=device)[:, 2:8, 1:, 1:6],
        "one": torch.ones((), device=device).expand(shape),
        "channels_last": values.contiguous(memory_format=torch.channels_last),
    }[kind]
    ours, theirs = (make_tensors(case, device).leaves() for _ in range(2))
    operator(case, ours).backward(grad_output)
    composite(case, theirs).backward(grad_output)
    torch.testing.assert_close(ours.input.grad, theirs.input.grad)
    torch.testing.assert_close(ours.weight.grad, theirs.weight.grad)


def test_gradients_survive_an_inplace_change_only_with_an_error(device):
    """Autograd's version counters must see what the operator has saved."""
    input = torch.randn(1, 2, 5, 5, device=device)
    weight = torch.randn(2, 1, 3, 3, device=device, requires_grad=True)
    output = depthwise_conv2d(input, weight)
    input.zero_()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        output.sum().backward()


# --- forward mode -------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ACTIVATION_NAMES)
def test_forward_mode(device, name):
    """Silent zeros would be the worst outcome, so the tangent is compared."""
    case = small(input_activation=name, activation=name)
    tensors = make_tensors(case, device)
    tangents = make_tensors(small(seed=1), device)
    results = []
    for function in (operator, composite):
        with forward_ad.dual_level():
            duals = (forward_ad.make_dual(t, d) for t, d in zip(tensors, tangents, strict=True))
            results.append(forward_ad.unpack_dual(function(case, type(tensors)(*duals))))
    (ours, our_tangent), (theirs, their_tangent) = results
    assert our_tangent is not None
    assert our_tangent.abs().sum() > 0
    torch.testing.assert_close(ours, theirs)
    torch.testing.assert_close(our_tangent, their_tangent)


@pytest.mark.parametrize("which", ["input", "weight", "bias", "input_bias"])
def test_forward_mode_in_one_argument(device, which):
    case = small(activation="silu")
    tensors = make_tensors(case, device)
    direction = getattr(make_tensors(small(seed=1), device), which)

    def along(call):
        return jvp(
            lambda value: call(case, tensors._replace(**{which: value})),
            (getattr(tensors, which),),
            (direction,),
        )

    ours, theirs = along(operator), along(composite)
    torch.testing.assert_close(ours, theirs)
    assert ours[1].abs().sum() > 0


# --- torch.func ---------------------------------------------------------------------------------


def both(case: Case, device: str):
    tensors = make_tensors(case, device)

    def ours(weight: Tensor) -> Tensor:
        return operator(case, tensors._replace(weight=weight)).square().sum()

    def theirs(weight: Tensor) -> Tensor:
        return composite(case, tensors._replace(weight=weight)).square().sum()

    return ours, theirs, tensors.weight


@pytest.mark.parametrize("transform", [grad, jacrev, jacfwd, hessian])
def test_transforms_of_torch_func(device, transform):
    ours, theirs, weight = both(small(input_activation="gelu", activation="silu"), device)
    torch.testing.assert_close(transform(ours)(weight), transform(theirs)(weight))


def test_vjp(device):
    case = small(activation="gelu_tanh")
    tensors = make_tensors(case, device)
    output, pull = vjp(lambda *t: operator(case, type(tensors)(*t)), *tensors)
    expected, expected_pull = vjp(lambda *t: composite(case, type(tensors)(*t)), *tensors)
    torch.testing.assert_close(output, expected)
    torch.testing.assert_close(pull(output), expected_pull(expected))


# --- vmap ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("batch", [2, None])
@pytest.mark.parametrize("mapped", list(itertools.product((None, 0, -1), repeat=2)), ids=str)
def test_vmap_in_all_combinations(device, batch, mapped):
    """Input and weight mapped as ``mapped``, bias and input_bias at every place or nowhere."""
    generator = torch.Generator().manual_seed(0)
    case = small(dtype=torch.float32, batch=batch, activation="relu6")
    shapes = (case.input_shape, case.weight_shape, case.weight_shape[:1], (case.channels,))
    for in_dims in itertools.product(*((dim,) for dim in mapped), (None, 0, 1), (None, 0, 1)):
        if in_dims == (None,) * 4:
            continue
        values = []
        for shape, dim in zip(shapes, in_dims, strict=True):
            value = torch.randint(-2, 3, (3, *shape), generator=generator).float().to(device)
            values.append(value[0] if dim is None else value.movedim(0, dim))

        def ours(input, weight, bias, input_bias):
            return depthwise_conv2d(
                input,
                weight,
                bias,
                case.stride,
                case.padding,
                case.dilation,
                input_bias=input_bias,
                activation="relu6",
            )

        def theirs(input, weight, bias, input_bias):
            hidden = input + input_bias[:, None, None]
            return F.relu6(
                F.conv2d(hidden, weight, bias, case.stride, case.padding, case.dilation, 2)
            )

        result, expected = (vmap(f, in_dims)(*values) for f in (ours, theirs))
        torch.testing.assert_close(result, expected, msg=lambda text, at=in_dims: f"{at}: {text}")


def test_vmap_without_optional_tensors(device):
    input = torch.randn(3, 2, 4, 5, 6, device=device)
    weight = torch.randn(3, 4, 1, 3, 3, device=device)
    for in_dims in ((0, None), (None, 0), (0, 0)):
        values = [t if dim == 0 else t[0] for t, dim in zip((input, weight), in_dims, strict=True)]
        result = vmap(depthwise_conv2d, in_dims)(*values)
        expected = vmap(partial(F.conv2d, groups=4), in_dims)(*values)
        torch.testing.assert_close(result, expected)


def test_vmap_of_vmap(device):
    input, weight = (
        torch.randn(2, 3, 1, 4, 5, 5, device=device),
        torch.randn(3, 4, 1, 3, 3, device=device),
    )
    ours = vmap(vmap(depthwise_conv2d), in_dims=(0, None))(input, weight)
    theirs = vmap(vmap(partial(F.conv2d, groups=4)), in_dims=(0, None))(input, weight)
    torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("batch", [2, None])
def test_per_sample_gradients(device, batch):
    """vmap over grad."""
    case = small(batch=batch, input_activation="hardswish", activation="silu")
    drawn = [make_tensors(small(batch=batch, seed=seed), device) for seed in range(3)]
    inputs = torch.stack([tensors.input for tensors in drawn])
    _, *parameters = drawn[0]

    def loss(call, weight, bias, input_bias, input):
        tensors = type(drawn[0])(input, weight, bias, input_bias)
        return call(case, tensors).square().sum()

    in_dims = (None, None, None, 0)
    ours, theirs = (
        vmap(grad(partial(loss, call), argnums=(0, 1, 2, 3)), in_dims)(*parameters, inputs)
        for call in (operator, composite)
    )
    torch.testing.assert_close(ours, theirs)


def test_gradients_through_vmap(device):
    """grad over vmap, with autograd outside of functorch."""
    input = torch.randn(3, 2, 4, 5, 5, device=device, dtype=torch.float64)
    weight = torch.randn(3, 4, 1, 3, 3, device=device, dtype=torch.float64)
    gradients = []
    for function in (depthwise_conv2d, partial(F.conv2d, groups=4)):
        leaves = [t.clone().requires_grad_() for t in (input, weight)]
        gradients.append(torch.autograd.grad(vmap(function)(*leaves).square().sum(), leaves))
    torch.testing.assert_close(*gradients)


def test_complex_gradients(device):
    """aten differentiates a complex convolution as real ones."""
    input = torch.randn(2, 3, 6, 5, dtype=torch.complex64, device=device)
    weight = torch.randn(6, 1, 3, 3, dtype=torch.complex64, device=device)
    gradients = []
    for function in (depthwise_conv2d, partial(F.conv2d, groups=3)):
        leaves = [t.clone().requires_grad_() for t in (input, weight)]
        output = function(*leaves, padding=1)
        gradients.append(torch.autograd.grad(output.abs().square().sum(), leaves))
    for ours, theirs in zip(*gradients, strict=True):
        torch.testing.assert_close(ours, theirs)
