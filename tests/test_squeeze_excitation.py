"""The operator ``squeeze_excitation``: numbers, gradients, and PyTorch's subsystems."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from cases import ACTIVATION_NAMES, DENSE_LAYOUTS, LAYOUTS
from excitation_cases import (
    ExcitationCase,
    ExcitationTensors,
    composite,
    exact_result,
    operator,
)
from numerics import Judge, poison
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx import symbolic_trace
from torch.library import opcheck

from dwswap.layouts import memory_format
from dwswap.ops import squeeze_excitation

CASE = ExcitationCase()
DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
NAMED = torch.ops.dwswap.squeeze_excitation.default


def arguments(case: ExcitationCase, tensors: ExcitationTensors) -> tuple:
    return (*tensors, case.activation, case.gate)


def judge(case: ExcitationCase, device: str) -> None:
    tensors = case.tensors(device)
    theirs = composite(case, tensors)
    poison(theirs)
    judged = Judge()
    judged.add(repr(case), operator(case, tensors), theirs, exact_result(case, tensors))
    judged.check()


# --- numbers ------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("batch", [3, None])
def test_layouts(device, dtype, layout, batch):
    for channels in (16, 57):
        case = ExcitationCase(dtype, layout, batch, channels, 9, 11, hidden=6, activation="silu")
        judge(case, device)
        judge(replace(case, bias=False, linear=True, offset=1, gate="hardsigmoid"), device)


@pytest.mark.parametrize("activation", ACTIVATION_NAMES)
@pytest.mark.parametrize("gate", ACTIVATION_NAMES)
def test_activations(device, activation, gate):
    case = ExcitationCase(batch=5, channels=24, height=7, activation=activation, gate=gate)
    for layout in DENSE_LAYOUTS:
        judge(replace(case, layout=layout), device)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", [(2, 8, 5, 7), (2, 1, 5, 7), (2, 8, 1, 1), (8, 5, 7)])
def test_result_has_the_layout_of_the_input(device, layout, shape):
    *batch, channels, height, width = shape
    case = ExcitationCase(
        layout=layout,
        batch=batch[0] if batch else None,
        channels=channels,
        height=height,
        width=width,
    )
    tensors = case.tensors(device)
    output = operator(case, tensors)
    images, results = (t if t.dim() == 4 else t[None] for t in (tensors.input, output))
    expected = torch.empty(images.shape, memory_format=memory_format(images))
    assert results.stride() == expected.stride()


def test_empty_batch(device):
    case = replace(CASE, batch=0)
    output = operator(case, case.tensors(device))
    assert output.shape == case.shape


@pytest.mark.parametrize("layout", DENSE_LAYOUTS)
def test_nan_stays_in_its_sample(device, layout):
    case = replace(CASE, layout=layout, batch=3)
    tensors = case.tensors(device)
    tensors.input[1, 2, 3, 4] = math.nan
    output = operator(case, tensors)
    assert output[1].isnan().all()
    assert output[[0, 2]].isfinite().all()


def test_large_values_do_not_overflow_in_the_pool(device):
    case = replace(CASE, dtype=torch.float16, bias=False, activation="none", gate="hardsigmoid")
    tensors = case.tensors(device)
    tensors.input.fill_(60000.0)
    tensors.reduce_weight.fill_(1e-4)
    output = operator(case, tensors)
    torch.testing.assert_close(output, composite(case, tensors))
    assert output.isfinite().all()


# --- wrong arguments ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"input": lambda t: t[0, 0]}, "input must be 4-D"),
        ({"input": lambda t: t[:, :, :0]}, "input must have C, H and W of at least 1"),
        ({"input": lambda t: t[:, :4]}, "reduce_weight.shape.1. must be the input's 4 channels"),
        ({"reduce_weight": lambda t: t[:, :, 0]}, r"reduce_weight must be \(K, C\)"),
        ({"reduce_weight": lambda t: t.repeat(1, 1, 3, 3)}, r"reduce_weight must be \(K, C\)"),
        ({"reduce_weight": lambda t: t[:0]}, r"reduce_weight must be \(K, C\)"),
        ({"expand_weight": lambda t: t[:, :3]}, r"expand_weight must be \(8, 4\), got"),
        ({"reduce_bias": lambda t: t[:3]}, "reduce_bias must be 1-D of length 4, got"),
        ({"expand_bias": lambda t: t[None]}, "expand_bias must be 1-D of length 8, got"),
        ({"expand_weight": lambda t: t.double()}, "expand_weight must have the input's dtype"),
        ({"reduce_bias": lambda t: t.half()}, "reduce_bias must have the input's dtype"),
    ],
)
def test_errors_name_the_argument(device, changes, words):
    tensors = CASE.tensors(device)
    tensors = tensors._replace(**{n: f(getattr(tensors, n)) for n, f in changes.items()})
    with pytest.raises((TypeError, ValueError, RuntimeError), match=words):
        operator(CASE, tensors)


@pytest.mark.parametrize("name", ["activation", "gate"])
def test_unknown_activation(device, name):
    with pytest.raises((ValueError, RuntimeError), match=f"{name} must be one of none, relu.*tanh"):
        operator(replace(CASE, **{name: "tanh"}), CASE.tensors(device))


def test_sparse_input(device):
    tensors = CASE.tensors(device)
    with pytest.raises(TypeError, match="input must be a dense strided tensor"):
        operator(CASE, tensors._replace(input=tensors.input.to_sparse()))


@pytest.mark.gpu
def test_devices_that_differ():
    tensors = CASE.tensors("cuda")
    tensors = tensors._replace(expand_weight=tensors.expand_weight.cpu())
    with pytest.raises((ValueError, RuntimeError), match="expand_weight must be on the input's"):
        operator(CASE, tensors)


# --- PyTorch's subsystems -----------------------------------------------------------------------


@pytest.mark.parametrize("layout", [*DENSE_LAYOUTS, "sliced"])
@pytest.mark.parametrize("batch", [2, None])
@pytest.mark.parametrize("linear", [False, True])
@pytest.mark.parametrize("differentiated", [False, True])
def test_opcheck(device, layout, batch, linear, differentiated):
    case = replace(CASE, layout=layout, batch=batch, linear=linear, bias=not linear)
    tensors = case.tensors(device).map(lambda t: t.requires_grad_(differentiated))
    opcheck(NAMED, arguments(case, tensors))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("batch", [2, None])
def test_fake_tensors_tell_the_truth(device, layout, dtype, batch):
    case = replace(CASE, layout=layout, dtype=dtype, batch=batch)
    tensors = case.tensors(device)
    real = operator(case, tensors)
    with FakeTensorMode(allow_non_fake_inputs=False) as mode:
        fake = operator(case, tensors.map(mode.from_tensor))
    assert (fake.shape, fake.dtype, fake.device) == (real.shape, real.dtype, real.device)
    assert fake.stride() == real.stride()


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("layout", DENSE_LAYOUTS)
def test_gradients(device, bias, layout):
    case = ExcitationCase(torch.float64, layout, 2, 3, 2, 2, 2, "silu", "sigmoid", bias)
    tensors = [t.requires_grad_() for t in case.tensors(device) if t is not None]

    def function(*given: Tensor) -> Tensor:
        x, first, *rest = given
        biases = (rest[0], rest[2]) if bias else (None, None)
        second = rest[1 if bias else 0]
        return operator(case, ExcitationTensors(x, first, biases[0], second, biases[1]))

    assert torch.autograd.gradcheck(function, tensors)
    assert torch.autograd.gradgradcheck(function, tensors)
    tangents = [torch.randn_like(t) for t in tensors]
    _, forward = torch.func.jvp(function, tuple(tensors), tuple(tangents))
    outputs, pullback = torch.func.vjp(function, *tensors)
    cotangent = torch.randn_like(outputs)
    pulled = sum((g * t).sum() for g, t in zip(pullback(cotangent), tangents, strict=True))
    torch.testing.assert_close(pulled, (forward * cotangent).sum())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("given", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_autocast_is_that_of_the_steps(device, dtype, given):
    case = replace(CASE, dtype=given)
    tensors = case.tensors(device)
    judged = Judge()
    for weights in (given, torch.float32):
        mixed = tensors.map(lambda t, to=weights: t.to(to))._replace(input=tensors.input)
        if (given == torch.float64) != (weights == torch.float64):
            continue
        with torch.autocast(device, dtype=dtype):
            ours, theirs = operator(case, mixed), composite(case, mixed)
        assert ours.dtype == theirs.dtype
        judged.add(f"weights {weights}", ours, theirs, exact_result(case, mixed))
    judged.check()


@pytest.mark.parametrize("mapped", [("input",), ("input", "reduce_weight"), ("expand_bias",)])
@pytest.mark.parametrize("batch", [2, None])
def test_vmap(device, mapped, batch):
    case = replace(CASE, batch=batch)
    draws = [replace(case, seed=seed).tensors(device) for seed in range(3)]
    fixed = draws[0]

    def function(*given: Tensor) -> Tensor:
        return operator(case, fixed._replace(**dict(zip(mapped, given, strict=True))))

    values = [torch.stack([getattr(draw, name) for draw in draws], 1) for name in mapped]
    ours = torch.vmap(function, in_dims=1, out_dims=1)(*values)
    for i in range(3):
        expected = function(*(value.select(1, i) for value in values))
        torch.testing.assert_close(ours.select(1, i), expected)


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("differentiated", [False, True])
def test_compile_without_a_graph_break(device, dynamic, differentiated):
    torch._dynamo.reset()
    compiled = torch.compile(
        squeeze_excitation, fullgraph=True, dynamic=dynamic, backend="aot_eager"
    )
    for batch, height in ((2, 8), (3, 9), (5, 12)):
        case = replace(CASE, batch=batch, height=height)
        tensors = case.tensors(device).map(lambda t: t.requires_grad_(differentiated))
        torch.testing.assert_close(compiled(*tensors), squeeze_excitation(*tensors))


def test_export(device):
    class Model(torch.nn.Module):
        def forward(self, *tensors: Tensor) -> Tensor:
            return squeeze_excitation(*tensors, gate="hardsigmoid")

    tensors = CASE.tensors(device)
    program = torch.export.export(Model(), tuple(tensors))
    assert NAMED in [node.target for node in program.graph.nodes]
    torch.testing.assert_close(program.module()(*tensors), Model()(*tensors))


def test_symbolic_trace_makes_one_node():
    tensors = CASE.tensors("cpu")

    def function(x: Tensor) -> Tensor:
        return squeeze_excitation(x, *tensors[1:], activation="silu")

    traced = symbolic_trace(function)
    called = [node.target for node in traced.graph.nodes if node.op == "call_function"]
    assert called == [squeeze_excitation]
    torch.testing.assert_close(traced(tensors.input), function(tensors.input))


def test_inference_mode(device):
    tensors = CASE.tensors(device)
    with torch.inference_mode():
        output = operator(CASE, tensors)
    assert output.is_inference()
    torch.testing.assert_close(output, composite(CASE, tensors))


def test_meta_tensors():
    output = operator(CASE, CASE.tensors("cpu").map(lambda t: t.to("meta")))
    assert output.is_meta
    assert output.shape == CASE.shape
