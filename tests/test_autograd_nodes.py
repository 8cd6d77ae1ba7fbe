"""The nodes of autograd in C++, on the CPU: plain calls on a GPU are recorded by them."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Sequence
from types import FrameType

import pytest
import torch
import torch.nn.functional as F
from numerics import ACTIVATIONS
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import forward_ad
from torch.utils.checkpoint import checkpoint

from dwswap.batch_norm import NORM_ACTIVATIONS, batch_norm
from dwswap.channel_scale import GATES, excite, squeeze
from dwswap.schema import (
    depthwise_conv2d,
    depthwise_conv2d_backward,
    depthwise_conv2d_recorded,
    squeeze_excitation,
)

Function = Callable[..., Tensor]

pytestmark = pytest.mark.usefixtures("autograd_nodes")


def draw(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def leaves(*shapes: Sequence[int]) -> list[Tensor]:
    return [draw(*shape, seed=i).requires_grad_() for i, shape in enumerate(shapes)]


def norm(activation: str) -> Function:
    def ours(x: Tensor, weight: Tensor | None = None, bias: Tensor | None = None) -> Tensor:
        return batch_norm(x, weight, bias, None, None, None, 0.1, 1e-5, activation)

    return ours


def norm_of_aten(activation: str) -> Function:
    def theirs(x: Tensor, weight: Tensor | None = None, bias: Tensor | None = None) -> Tensor:
        return ACTIVATIONS[activation](F.batch_norm(x, None, None, weight, bias, True))

    return theirs


def convolution(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    return depthwise_conv2d_recorded(x, weight, bias, 2, 1, 1, 0, 1, 2)


def convolution_of_aten(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    return torch.conv2d(x, weight, bias, (2, 1), (1, 0), (1, 2), x.shape[-3])


def excitation(gate: str, both: bool = False) -> Function:
    """``both``: the means are used by more than the gates."""

    def ours(x: Tensor, weight: Tensor) -> Tensor:
        squeezed = squeeze(x, gate)
        output = excite(squeezed, torch.conv2d(squeezed.means, weight), gate)
        return output + squeezed.means if both else output

    return ours


def excitation_of_aten(gate: str, both: bool = False) -> Function:
    def theirs(x: Tensor, weight: Tensor) -> Tensor:
        means = x.mean((2, 3), keepdim=True)
        output = x * ACTIVATIONS[gate](torch.conv2d(means, weight))
        return output + means if both else output

    return theirs


IMAGE, VECTOR = (3, 4, 7, 5), (4,)
CASES: dict[str, tuple[Function, Function, tuple[Sequence[int], ...]]] = {
    "depthwise": (convolution, convolution_of_aten, (IMAGE, (4, 1, 3, 2))),
    "depthwise, bias": (convolution, convolution_of_aten, (IMAGE, (8, 1, 3, 2), (8,))),
    "depthwise, no batch": (convolution, convolution_of_aten, (IMAGE[1:], (4, 1, 3, 2))),
    "batch norm, no weight": (norm("silu"), norm_of_aten("silu"), (IMAGE,)),
    "excitation, means": (
        excitation("sigmoid", both=True),
        excitation_of_aten("sigmoid", both=True),
        (IMAGE, (4, 4, 1, 1)),
    ),
}
for _name in sorted(NORM_ACTIVATIONS):
    _shapes: tuple[Sequence[int], ...] = (IMAGE, VECTOR, VECTOR)
    CASES[f"batch norm, {_name}"] = (norm(_name), norm_of_aten(_name), _shapes)
for _name in sorted(GATES):
    CASES[f"excitation, {_name}"] = (
        excitation(_name),
        excitation_of_aten(_name),
        (IMAGE, (4, 4, 1, 1)),
    )
# aten has no derivative of that of hardsigmoid.
FIRST_ORDER = {"excitation, hardsigmoid"}
EACH = pytest.mark.parametrize("name", CASES)


def some(count: int) -> list[list[int]]:
    """All of ``count`` arguments, and each alone."""
    alone = [[i] for i in range(count)]
    return alone if count == 1 else [list(range(count)), *alone]


@EACH
def test_gradients_and_theirs(name: str) -> None:
    ours, theirs, shapes = CASES[name]
    for wanted in some(len(shapes)):
        inputs = [draw(*shape, seed=i) for i, shape in enumerate(shapes)]
        for i in wanted:
            inputs[i].requires_grad_()
        outputs = [function(*inputs) for function in (ours, theirs)]
        torch.testing.assert_close(*outputs)
        gradient = draw(*outputs[0].shape, seed=9)
        of = [inputs[i] for i in wanted]
        expected = torch.autograd.grad(outputs[1], of, gradient, retain_graph=True)
        found = torch.autograd.grad(outputs[0], of, gradient, retain_graph=True)
        torch.testing.assert_close(found, expected)
        assert not any(grad.requires_grad for grad in found)
        if name not in FIRST_ORDER:
            torch.testing.assert_close(*(second(output, of, gradient) for output in outputs))


def second(output: Tensor, inputs: list[Tensor], gradient: Tensor) -> list[Tensor]:
    """Gradients of gradients, and the latter."""
    first = torch.autograd.grad(output, inputs, gradient, create_graph=True)
    total = sum((x * grad.pow(2)).sum() for x, grad in zip(inputs, first, strict=True))
    return [*first, *torch.autograd.grad(total, inputs)]


@EACH
def test_gradients_mapped_over_vectors(name: str) -> None:
    ours, theirs, shapes = CASES[name]
    inputs = leaves(*shapes)
    outputs = [function(*inputs) for function in (ours, theirs)]
    vectors = draw(5, *outputs[0].shape, seed=9)
    found = [torch.autograd.grad(o, inputs, vectors, is_grads_batched=True) for o in outputs]
    torch.testing.assert_close(*found)


@EACH
def test_nothing_is_recorded_without_gradients(name: str) -> None:
    ours, theirs, shapes = CASES[name]
    inputs = leaves(*shapes)
    with torch.no_grad():
        output = ours(*inputs)
    assert output.grad_fn is None
    assert not output.requires_grad
    frozen = [tensor.detach() for tensor in inputs]
    assert not ours(*frozen).requires_grad
    torch.testing.assert_close(output, theirs(*frozen))


@EACH
@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpoints_and_saved_tensors_elsewhere(name: str, reentrant: bool) -> None:
    ours, theirs, shapes = CASES[name]
    inputs = leaves(*shapes)
    expected = torch.autograd.grad(theirs(*inputs).pow(2).sum(), inputs)
    checkpoint(ours, *inputs, use_reentrant=reentrant).pow(2).sum().backward()
    torch.testing.assert_close([tensor.grad for tensor in inputs], list(expected))
    packed: list[Tensor] = []

    def pack(tensor: Tensor) -> Tensor:
        packed.append(tensor)
        return tensor.clone()

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        output = ours(*inputs)
    assert packed
    torch.testing.assert_close(torch.autograd.grad(output.pow(2).sum(), inputs), expected)


@EACH
def test_a_backward_under_autocast_keeps_the_dtypes_of_the_forward(name: str) -> None:
    ours, theirs, shapes = CASES[name]
    inputs = [tensor.detach().float().requires_grad_() for tensor in leaves(*shapes)]
    expected = torch.autograd.grad(theirs(*inputs).sum(), inputs)
    output = ours(*inputs).sum()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = torch.autograd.grad(output, inputs)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("name", ["depthwise", "depthwise, bias"])
def test_autocast_casts_as_aten_does(name: str) -> None:
    ours, theirs, shapes = CASES[name]
    inputs = [tensor.detach().float().requires_grad_() for tensor in leaves(*shapes)]
    results = []
    for function in (theirs, ours):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            outputs = [function(*inputs), function(*inputs)]
            again = function(outputs[0], *inputs[1:]) if name == "depthwise" else outputs[1]
        assert {output.dtype for output in (*outputs, again)} == {torch.bfloat16}
        gradients = torch.autograd.grad(again.float().pow(2).sum() + outputs[0].sum(), inputs)
        assert {gradient.dtype for gradient in gradients} == {torch.float32}
        results.append((again, *gradients))
    for expected, found in zip(*results, strict=True):
        torch.testing.assert_close(
            found, expected, atol=0.02 * float(expected.detach().abs().max()), rtol=0
        )
    wide = [tensor.detach().double() for tensor in inputs]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert ours(*wide).dtype is torch.float64


def test_autocast_in_autocast_and_weights_that_change_in_a_region() -> None:
    """aten's cache of cast weights gets both wrong."""
    x, weight = leaves(IMAGE, (4, 1, 3, 2))
    x, weight = x.detach().float(), weight.detach().float().requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        outer = convolution(x, weight)
        with torch.autocast("cpu", dtype=torch.float16):
            inner = convolution(x, weight)
        with torch.no_grad():
            weight.mul_(2)
        doubled = convolution(x, weight)
    assert (outer.dtype, inner.dtype) == (torch.bfloat16, torch.float16)
    torch.testing.assert_close(doubled, 2 * outer)
    for output in (inner, doubled):
        (gradient,) = torch.autograd.grad(output.float().sum(), weight)
        assert gradient.dtype is torch.float32


def scaled(x: Tensor, gates: Tensor) -> Tensor:
    return excite(squeeze(x, "sigmoid"), gates, "sigmoid")


@pytest.mark.parametrize(
    ("ours", "shapes"),
    [
        (convolution, (IMAGE, (4, 1, 3, 2))),
        (norm("relu"), (IMAGE, VECTOR, VECTOR)),
        (scaled, (IMAGE, (3, 4, 1, 1))),
    ],
)
@pytest.mark.parametrize("changed", [0, 1])
def test_what_a_backward_needs_must_not_change(
    ours: Function, shapes: tuple[Sequence[int], ...], changed: int
) -> None:
    inputs = [leaf * 1 for leaf in leaves(*shapes)]  # leaves could not be changed
    output = ours(*inputs)
    inputs[changed].detach().mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        output.sum().backward()


def test_a_gradient_of_forward_ad_is_not_lost() -> None:
    for name in ("depthwise, bias", "batch norm, none", "excitation, sigmoid"):
        ours, theirs, shapes = CASES[name]
        inputs = leaves(*shapes)
        tangents = []
        for function in (ours, theirs):
            output = function(*inputs)
            gradient, tangent = (draw(*output.shape, seed=seed) for seed in (8, 9))
            with forward_ad.dual_level():
                (found,) = torch.autograd.grad(
                    output, inputs[:1], forward_ad.make_dual(gradient, tangent)
                )
                tangents.append(forward_ad.unpack_dual(found).tangent)
        torch.testing.assert_close(*tangents)


def test_running_out_of_memory_has_its_type(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*args: object) -> None:
        raise RuntimeError("dwswap: CUDA out of memory. The gradient could not be allocated")

    def fails_otherwise(*args: object) -> None:
        raise RuntimeError("dwswap: something else")

    output = convolution(*leaves(IMAGE, (4, 1, 3, 2))).sum()
    monkeypatch.setattr("dwswap.backward._backward", fails)
    with pytest.raises(torch.OutOfMemoryError, match="The gradient could not be allocated"):
        output.backward(retain_graph=True)
    monkeypatch.setattr("dwswap.backward._backward", fails_otherwise)
    with pytest.raises(RuntimeError, match="something else") as caught:
        output.backward()
    assert caught.type is RuntimeError


def test_tensors_of_inference_mode() -> None:
    with torch.inference_mode():
        x, weight, bias = draw(*IMAGE), draw(4), draw(4)
        batches = torch.tensor(6)
    ours = batch_norm(x, weight, bias, None, None, None, 0.1, 1e-5, "relu")
    torch.testing.assert_close(ours, norm_of_aten("relu")(x, weight, bias))
    leaf = draw(*IMAGE).requires_grad_()
    frozen = [function(leaf, draw(4), bias) for function in (norm("none"), norm_of_aten("none"))]
    found = [torch.autograd.grad(o.pow(2).sum(), leaf, create_graph=True) for o in frozen]
    torch.testing.assert_close(*found)
    with torch.inference_mode():
        again = batch_norm(x, weight, bias, None, None, batches, 0.1, 1e-5, "relu")
    torch.testing.assert_close(again, ours)
    assert int(batches) == 7


def test_the_bias_of_a_batch_norm_may_change_before_the_backward() -> None:
    x, weight, bias = leaves(IMAGE, VECTOR, VECTOR)
    output = norm("none")(x, weight, bias)
    expected = torch.autograd.grad(norm_of_aten("none")(x, weight, bias).pow(2).sum(), x)
    total = output.pow(2).sum()
    with torch.no_grad():
        bias.add_(1)
    torch.testing.assert_close(torch.autograd.grad(total, x, retain_graph=True), expected)
    with pytest.raises(RuntimeError, match="one that was changed 1 times"):
        torch.autograd.grad(total, x, create_graph=True)


def test_running_statistics_and_the_count_of_batches() -> None:
    x, weight, bias = leaves(IMAGE, VECTOR, VECTOR)
    mean, var, batches = draw(4), draw(4).abs(), torch.tensor(6)
    expected = mean.clone(), var.clone()
    F.batch_norm(x, *expected, weight, bias, True, 0.25)
    batch_norm(x, weight, bias, mean, var, batches, 0.25, 1e-5, "relu")
    torch.testing.assert_close((mean, var), expected)
    assert int(batches) == 7


def test_a_graph_is_freed_by_its_backward() -> None:
    for ours, _, shapes in CASES.values():
        output = ours(*leaves(*shapes)).sum()
        output.backward()
        with pytest.raises(RuntimeError, match="backward through the graph a second time"):
            output.backward()


def test_errors_of_the_operator_reach_the_caller() -> None:
    x, weight = leaves(IMAGE, (5, 1, 3, 2))
    with pytest.raises((RuntimeError, ValueError), match=r"must be a multiple of .*4.*, got 5"):
        convolution(x, weight)


# --- dispatch -----------------------------------------------------------------------------------


def python_calls(function: Callable[[], object]) -> list[str]:
    """The kernels of Autograd in Python that run in ``function``."""
    found = []

    def watch(frame: FrameType, event: str, _: object) -> None:
        if event == "call" and frame.f_code.co_name in ("_forward_autograd", "backward_autograd"):
            found.append(frame.f_code.co_name)

    sys.setprofile(watch)
    try:
        function()
    finally:
        sys.setprofile(None)
    return found


def fake_calls() -> dict[str, tuple[Callable[..., Tensor], list[Tensor]]]:
    """Calls with fake tensors of a GPU, by operator; each with the tensors that it is given."""
    x, grad = (torch.empty(2, 8, 5, 5, device="cuda") for _ in range(2))
    weight = torch.empty(8, 1, 3, 3, device="cuda")
    matrices = [torch.empty(4, 8, device="cuda"), torch.empty(8, 4, device="cuda")]
    pairs = ([1, 1], [1, 1], [1, 1])

    def forward(x: Tensor, weight: Tensor) -> Tensor:
        return depthwise_conv2d(x, weight, None, *pairs)

    def backward(grad: Tensor, x: Tensor, weight: Tensor) -> Tensor:
        of_input, of_weight, _ = depthwise_conv2d_backward(
            grad, x, weight, *pairs, [True, True, False]
        )
        return of_input + of_weight.sum()

    def excited(x: Tensor, reduce: Tensor, expand: Tensor) -> Tensor:
        return squeeze_excitation(x, reduce, None, expand, None, "relu", "sigmoid")

    return {
        "forward": (forward, [x, weight]),
        "backward": (backward, [grad, x, weight]),
        "excitation": (excited, [x, *matrices]),
    }


@pytest.mark.parametrize("name", ["forward", "backward", "excitation"])
def test_calls_that_nothing_records_do_without_python(name: str) -> None:
    with FakeTensorMode():
        function, tensors = fake_calls()[name]
        call = functools.partial(function, *tensors)
        assert python_calls(call) == []
        assert call().shape == (2, 8, 5, 5)
        for tensor in tensors:
            tensor.requires_grad_()
            assert len(python_calls(call)) == 1
            assert call().grad_fn is not None
            with torch.no_grad():
                assert python_calls(call) == []
                assert call().grad_fn is None
            tensor.requires_grad_(False)


@pytest.mark.parametrize("name", ["forward", "backward", "excitation"])
def test_calls_that_are_differentiated_go_to_python(name: str) -> None:
    with FakeTensorMode():
        function, tensors = fake_calls()[name]
        for i, tensor in enumerate(tensors):

            def of_one(one: Tensor, i: int = i) -> Tensor:
                return function(*tensors[:i], one, *tensors[i + 1 :])

            def dual(
                tensor: Tensor = tensor, of_one: Callable[[Tensor], Tensor] = of_one
            ) -> tuple[Tensor, Tensor]:
                return torch.func.jvp(of_one, (tensor,), (tensor,))

            assert len(python_calls(dual)) == 1
            assert [found.shape for found in dual()] == [(2, 8, 5, 5)] * 2
            with forward_ad.dual_level():
                made = forward_ad.make_dual(tensor, tensor)
                assert len(python_calls(functools.partial(of_one, made))) == 1
                assert forward_ad.unpack_dual(of_one(made)).tangent is not None


@pytest.mark.parametrize("name", ["forward", "excitation"])
def test_mapped_calls_do_without_python(name: str) -> None:
    with FakeTensorMode():
        function, (x, *others) = fake_calls()[name]
        mapped = torch.func.vmap(lambda one: function(one, *others))
        assert mapped(x[None]).shape == (1, 2, 8, 5, 5)
        assert python_calls(lambda: mapped(x[None])) == []


def test_complex_calls_go_to_python() -> None:
    with FakeTensorMode():
        function, tensors = fake_calls()["forward"]
        call = functools.partial(function, *(tensor.cfloat() for tensor in tensors))
        assert len(python_calls(call)) == 1
        assert call().dtype is torch.complex64
