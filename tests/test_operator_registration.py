"""The operator as PyTorch's subsystems see it: schema, fake tensors, compile, export, autocast."""

from __future__ import annotations

import re
import sysconfig
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from cases import DENSE_LAYOUTS, LAYOUTS, Case, make_tensors
from numerics import composite, operator
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx import symbolic_trace
from torch.library import opcheck

import dwswap.activations
from dwswap import DepthwiseConv2d, depthwise_conv2d
from dwswap.compilation import csrc_dir

CASE = Case(torch.float32, "contiguous", 2, 4, 6, 7, (3, 3), padding=(1, 1), bias=True)
ABSORBING = {"input_bias": True, "input_activation": "relu6", "activation": "silu"}


def operator_arguments(case: Case, tensors) -> tuple:
    geometry = (list(case.stride), list(case.padding), list(case.dilation))
    absorbed = (tensors.input_bias, case.input_activation, case.activation)
    return (tensors.input, tensors.weight, tensors.bias, *geometry, *absorbed)


# --- names and numbers --------------------------------------------------------------------------


def test_schema():
    schema = str(torch.ops.dwswap.depthwise_conv2d.default._schema)
    assert schema == (
        "dwswap::depthwise_conv2d(Tensor input, Tensor weight, Tensor? bias, SymInt[2] stride, "
        "SymInt[2] padding, SymInt[2] dilation, Tensor? input_bias=None, "
        'str input_activation="none", str activation="none") -> Tensor'
    )
    tags = torch.ops.dwswap.depthwise_conv2d.default.tags
    assert torch.Tag.pt2_compliant_tag in tags


def test_numbering_of_the_enum():
    source = (csrc_dir() / "common" / "activation.h").read_text()
    body = re.search(r"enum class Activation : int \{(.*?)\}", source, re.DOTALL)
    assert body is not None
    names = re.findall(r"\bk([A-Z]\w*)", body[1])
    snake = [re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", name).lower() for name in names]
    assert snake == list(dwswap.activations.ACTIVATIONS)
    # No value but the first is given: they count from 0.
    assert re.findall(r"= *(\d+)", body[1]) == ["0"]


def test_names_in_the_cuda_sources():
    source = (csrc_dir() / "common" / "tensor.h").read_text()
    table = re.search(r"kActivationNames = \{(.*?)\}", source, re.DOTALL)
    assert table is not None
    assert re.findall(r'"(\w+)"', table[1]) == list(dwswap.activations.ACTIVATIONS)


# --- opcheck and fake tensors -------------------------------------------------------------------


@pytest.mark.parametrize("layout", [*DENSE_LAYOUTS, "sliced"])
@pytest.mark.parametrize("absorbing", [False, True])
@pytest.mark.parametrize("batch", [2, None])
def test_opcheck(device, layout, absorbing, batch):
    case = replace(CASE, layout=layout, batch=batch, **(ABSORBING if absorbing else {}))
    tensors = make_tensors(case, device).leaves()
    opcheck(torch.ops.dwswap.depthwise_conv2d.default, operator_arguments(case, tensors))


@pytest.mark.parametrize("layout", DENSE_LAYOUTS)
def test_opcheck_of_the_backward(device, layout):
    case = replace(CASE, layout=layout)
    tensors = make_tensors(case, device).leaves()
    grad_output = torch.randn(case.output_shape, device=device, requires_grad=True)
    geometry = operator_arguments(case, tensors)[3:6]
    for mask in ([True, True, True], [True, False, False], [False, True, False]):
        opcheck(
            torch.ops.dwswap._depthwise_conv2d_backward.default,
            (grad_output, tensors.input, tensors.weight, *geometry, mask),
        )


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_fake_tensors_tell_the_truth(device, layout, dtype):
    for changes in ({}, {"multiplier": 2, "stride": (2, 1)}, {"batch": None}, {"channels": 1}):
        case = replace(CASE, dtype=dtype, layout=layout, **changes)
        tensors = make_tensors(case, device)
        real = operator(case, tensors)
        with FakeTensorMode(allow_non_fake_inputs=False) as mode:
            fake = operator(case, tensors.map(mode.from_tensor))
        assert (fake.shape, fake.dtype, fake.device) == (real.shape, real.dtype, real.device)
        assert fake.stride() == real.stride()


def test_meta_tensors():
    tensors = make_tensors(CASE, "cpu").map(lambda t: t.to("meta"))
    output = operator(CASE, tensors)
    assert output.is_meta
    assert output.shape == CASE.output_shape


# --- autocast -----------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("given", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_autocast_follows_the_user(device, dtype, given):
    """To the dtype of the user's autocast, whichever the parameters have; float64 stays."""
    case = replace(CASE, dtype=given)
    tensors = make_tensors(case, device)
    with torch.autocast(device, dtype=dtype):
        ours = operator(case, tensors)
        theirs = composite(case, tensors)
    assert ours.dtype == theirs.dtype == (given if given == torch.float64 else dtype)
    torch.testing.assert_close(ours, theirs)


def test_autocast_of_mixed_dtypes(device):
    """What autocast is for: a half input that meets float32 parameters."""
    tensors = make_tensors(CASE, device)
    tensors = tensors._replace(input=tensors.input.bfloat16())
    with torch.autocast(device, dtype=torch.bfloat16):
        ours = operator(CASE, tensors)
        theirs = composite(CASE, tensors)
        with pytest.raises((TypeError, RuntimeError), match="dtype"):
            operator(CASE, tensors._replace(input=tensors.input.double()))
        with (
            torch.autocast(device, enabled=False),
            pytest.raises((TypeError, RuntimeError), match="weight must have the input's dtype"),
        ):
            operator(CASE, tensors)
    assert ours.dtype == torch.bfloat16
    torch.testing.assert_close(ours, theirs)


def test_gradients_under_autocast_have_the_dtype_of_the_parameters(device):
    ours, theirs = (make_tensors(CASE, device).leaves() for _ in range(2))
    with torch.autocast(device, dtype=torch.bfloat16):
        operator(CASE, ours).float().square().sum().backward()
        composite(CASE, theirs).float().square().sum().backward()
    for tensor, expected in ((ours.weight, theirs.weight), (ours.input, theirs.input)):
        assert tensor.grad is not None
        assert tensor.grad.dtype == torch.float32
        torch.testing.assert_close(tensor.grad, expected.grad, rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize("activation", ["silu", "hardswish"])
def test_backward_in_an_autocast_region_keeps_the_dtypes_of_the_forward(device, activation):
    """aten's backwards are not autocast; ours recomputes, and must not be either."""
    case = replace(CASE, input_activation=activation, activation=activation)
    ours, theirs = (make_tensors(case, device).leaves() for _ in range(2))
    with torch.autocast(device, dtype=torch.bfloat16):
        with torch.autocast(device, enabled=False):
            outputs = operator(case, ours), composite(case, theirs)
        for output in outputs:
            output.square().sum().backward()
    for tensor, expected in zip(ours, theirs, strict=True):
        if tensor is not None:
            torch.testing.assert_close(tensor.grad, expected.grad)


# --- compile and export -------------------------------------------------------------------------


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.depthwise = DepthwiseConv2d(4, 8, 3, padding=1)
        self.pointwise = nn.Conv2d(8, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = depthwise_conv2d(
            self.pointwise(self.depthwise(x)),
            self.depthwise.weight[::2],
            self.depthwise.bias[::2],
            padding="same",
            input_activation="relu",
            activation="silu",
        )
        return x.mean((2, 3))


def gradients_of(model: nn.Module, parameters: list[Tensor], x: Tensor) -> list[Tensor]:
    output = model(x)
    return [output, *torch.autograd.grad(output.square().sum(), parameters)]


@pytest.mark.parametrize("dynamic", [False, True])
def test_compile_without_a_graph_break(device, dynamic):
    """Forward and backward, through everything but the code generator."""
    torch._dynamo.reset()
    torch.manual_seed(0)
    model = Block().to(device)
    compiled = torch.compile(model, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    for batch, height in ((2, 8), (3, 9), (5, 12)):
        x = torch.randn(batch, 4, height, 11, device=device)
        parameters = list(model.parameters())
        ours, expected = (gradients_of(m, parameters, x) for m in (compiled, model))
        torch.testing.assert_close(ours, expected)
    with torch.no_grad():
        torch.testing.assert_close(compiled(x), model(x))


@pytest.mark.skipif(
    not Path(sysconfig.get_path("include"), "Python.h").exists(),
    reason="inductor compiles C++ that needs Python's headers",
)
@pytest.mark.parametrize("layout", DENSE_LAYOUTS)
def test_inductor(device, layout):
    """Strides that the fake kernel gets wrong would show here."""
    torch._dynamo.reset()
    torch.manual_seed(0)
    model = Block().to(device)
    x = torch.randn(2, 4, 8, 11, device=device)
    if layout == "channels_last":
        model, x = (t.to(memory_format=torch.channels_last) for t in (model, x))
    compiled = torch.compile(model, fullgraph=True)
    parameters = list(model.parameters())
    ours, expected = (gradients_of(m, parameters, x) for m in (compiled, model))
    torch.testing.assert_close(ours, expected)


@pytest.mark.parametrize("strict", [False, True])
def test_export_with_a_dynamic_batch(device, strict):
    torch._dynamo.reset()
    model = Block().to(device).eval()
    x = torch.randn(3, 4, 8, 11, device=device)
    shapes = {"x": {0: torch.export.Dim("batch", min=1, max=64)}}
    program = torch.export.export(model, (x,), dynamic_shapes=shapes, strict=strict)
    targets = [str(node.target) for node in program.graph.nodes]
    assert targets.count("dwswap.depthwise_conv2d.default") == 2
    decomposed = program.run_decompositions()
    for batch in (1, 3, 17):
        x = torch.randn(batch, 4, 8, 11, device=device)
        for exported in (program, decomposed):
            torch.testing.assert_close(exported.module()(x), model(x))


@pytest.mark.parametrize("padding", [1, "same", "valid"])
@pytest.mark.parametrize("groups", [None, 4])
def test_symbolic_trace(padding, groups):
    """What reads shapes must wait for the run, as it does for ``F.conv2d``."""
    weight = torch.randn(4, 1, 3, 3)

    def function(x: Tensor) -> Tensor:
        return depthwise_conv2d(x, weight, None, 1, padding, groups=groups, activation="silu")

    traced = symbolic_trace(function)
    called = [node for node in traced.graph.nodes if node.op == "call_function"]
    assert called
    x = torch.randn(2, 4, 8, 11)
    torch.testing.assert_close(traced(x), function(x))


def test_symbolic_trace_of_a_module():
    model = nn.Sequential(DepthwiseConv2d(4, 4, 3, padding="same"), nn.ReLU())
    traced = symbolic_trace(model)
    called = [node.target for node in traced.graph.nodes if node.op == "call_function"]
    assert called == [depthwise_conv2d]
    x = torch.randn(2, 4, 8, 11)
    torch.testing.assert_close(traced(x), model(x))


def test_functional_call_and_per_sample_gradients_of_a_module(device):
    model = Block().to(device)
    parameters = {name: p.detach() for name, p in model.named_parameters()}
    x = torch.randn(3, 4, 8, 11, device=device)

    def loss(values: dict[str, Tensor], sample: Tensor) -> Tensor:
        return torch.func.functional_call(model, values, sample[None]).square().sum()

    ours = torch.func.vmap(torch.func.grad(loss), (None, 0))(parameters, x)
    for i, sample in enumerate(x):
        output = model(sample[None]).square().sum()
        expected = torch.autograd.grad(output, list(model.parameters()))
        for name, gradient in zip(parameters, expected, strict=True):
            torch.testing.assert_close(ours[name][i], gradient)


def test_inference_mode(device):
    case = replace(CASE, **ABSORBING)
    tensors = make_tensors(case, device)
    with torch.inference_mode():
        output = operator(case, tensors)
    assert output.is_inference()
    torch.testing.assert_close(output, composite(case, tensors))
