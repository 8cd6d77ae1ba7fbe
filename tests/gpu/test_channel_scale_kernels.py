"""The CUDA kernels of squeeze-and-excitation in training, and the modules that call them."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable
from typing import NamedTuple

import pytest
import torch
from numerics import ACTIVATIONS, MIN_GRADIENTS, WIDE_ACTIVATIONS, Judge, near_kinks, poison
from torch import Tensor, nn
from training_steps import captured_backward, draw, peak_memory, second_gradients, three_steps

import dwswap
from dwswap.activations import PAIRS
from dwswap.bench.kernel_families import profile
from dwswap.channel_scale import GATES, excite, has_channel_scale, squeeze, takes_gates
from dwswap.schema import channel_scale as operator
from dwswap.schema import channel_scale_backward as backward_operator

pytestmark = pytest.mark.gpu

FAST = (torch.float32, torch.float16, torch.bfloat16)
EACH = pytest.mark.parametrize("dtype", FAST, ids=lambda dtype: str(dtype)[6:])
FORMATS = (torch.contiguous_format, torch.channels_last)
EACH_FORMAT = pytest.mark.parametrize("memory_format", FORMATS, ids=["nchw", "nhwc"])
# Of every width of access; planes in several splits and several in a block; more channels than a
# block has lanes; vectors of two planes, and planes smaller than a vector.
SHAPES = (
    *((8, 32, 112, 112), (16, 96, 28, 28), (8, 144, 14, 14), (32, 160, 7, 7), (16, 1152, 7, 7)),
    *((3, 57, 9, 13), (2, 58, 20, 20), (5, 116, 14, 14), (7, 20, 3, 5), (4, 1, 33, 31)),
    *((300, 24, 1, 1), (2, 2500, 3, 3), (200, 8, 2, 2), (33, 7, 1, 3), (1, 4, 257, 129)),
)


class Tensors(NamedTuple):
    """An image, gates, and the gradient of the output."""

    input: Tensor
    gates: Tensor
    gradient: Tensor


def make(
    shape: tuple[int, ...],
    dtype: torch.dtype,
    memory_format: torch.memory_format,
    seed: int = 0,
    gate_dtype: torch.dtype | None = None,
    gate: str = "sigmoid",
) -> Tensors:
    """Gates are not where rounding decides their gradient."""
    input, gradient = (
        (draw(shape, seed + i) + i).to(dtype).contiguous(memory_format=memory_format)
        for i in (0, 1)
    )
    z = 3 * draw(shape[:2], seed + 2)
    gates = (z + near_kinks(gate, z, dtype)).to(gate_dtype or dtype)
    return Tensors(input, gates[..., None, None], gradient)


def results(tensors: Tensors, gate: str, kind: str) -> dict[str, Tensor]:
    """Of ours, of PyTorch's, or exactly; the layers between are a factor of the means."""
    input, extra = tensors.input.clone().requires_grad_(), tensors.gates.clone().requires_grad_()
    if kind == "ours":
        assert has_channel_scale(input)
        squeezed = squeeze(input, gate)
        means = squeezed.means
        gates = (2 * means).to(extra.dtype) + extra
        assert takes_gates(squeezed, gates)
        output = excite(squeezed, gates, gate)
        assert output.stride() == input.stride()
    else:
        means = input.mean((2, 3), keepdim=True)
        gates = (2 * means).to(extra.dtype) + extra
        output = input * (WIDE_ACTIVATIONS if kind == "exact" else ACTIVATIONS)[gate](gates)
    grads = torch.autograd.grad(output, (input, extra), tensors.gradient)
    return {
        "means": means.detach(),
        "output": output.detach(),
        "grad_input": grads[0],
        "grad_gates": grads[1],
    }


def add(judge: Judge, tensors: Tensors, gate: str) -> None:
    # Of the gates that both get, so that only what is computed from them differs.
    mean = tensors.input.mean((2, 3), keepdim=True)
    tensors = tensors._replace(gates=(tensors.gates - 2 * mean).to(tensors.gates.dtype))
    exact = results(Tensors(*(t.double() for t in tensors)), gate, "exact")
    theirs = results(tensors, gate, "theirs")
    poison(theirs["output"])
    ours = results(tensors, gate, "ours")
    input = tensors.input
    assert ours["grad_input"].stride() == input.stride()
    label = f"{tuple(input.shape)} {input.stride()} {input.dtype} {tensors.gates.dtype} {gate}"
    for name, result in ours.items():
        judge.add(f"{name} of {label}", result, theirs[name], exact[name])


@EACH_FORMAT
@EACH
def test_outputs_and_gradients(dtype: torch.dtype, memory_format: torch.memory_format) -> None:
    judge = Judge()
    names = itertools.cycle(sorted(GATES - {"hardsigmoid"}))
    for seed, shape in enumerate(SHAPES):
        # Of few planes several draws, as two largest errors are compared.
        draws = range(seed, seed + 100 * min(8, -(-MIN_GRADIENTS // (shape[0] * shape[1]))), 100)
        for gate, drawn in itertools.product((next(names), next(names)), draws):
            add(judge, make(shape, dtype, memory_format, drawn), gate)
    judge.check()


def reference(
    activation: Callable[[Tensor], Tensor],
    input: Tensor,
    gates: Tensor,
    grad: Tensor,
    spread: Tensor,
) -> list[Tensor]:
    """What the three calls of the operators are to give."""
    leaf = gates.clone().requires_grad_()
    factors = activation(leaf)
    (slope,) = torch.autograd.grad(input * factors, leaf, grad)
    factors = factors.detach()
    share = spread[..., None, None] / (input.shape[2] * input.shape[3])
    return [input * factors, grad * factors + share, slope]


@EACH_FORMAT
@EACH
@pytest.mark.parametrize("gate", sorted(GATES))
def test_the_operators(dtype: torch.dtype, memory_format: torch.memory_format, gate: str) -> None:
    """Each alone, so that its errors are its own; hardsigmoid away from its kinks."""
    judge, number = Judge(), PAIRS["none", gate]
    for seed, shape in enumerate(SHAPES):
        input, gates, gradient = make(shape, dtype, memory_format, seed, gate=gate)
        spread = draw(shape[:2], seed + 3).to(dtype)

        tensors = (input, gates, gradient, spread)
        exact = reference(WIDE_ACTIVATIONS[gate], *(t.double() for t in tensors))
        theirs = reference(ACTIVATIONS[gate], *tensors)
        poison(theirs[0])
        ours = (
            operator(input, gates, None, number),
            operator(gradient, gates, spread, number),
            backward_operator(gradient, input, gates, number),
        )
        names = ("output", "grad_input", "grad_gates")
        for name, *found in zip(names, ours, theirs, exact, strict=True):
            judge.add(f"{name} of {shape} {gate}", *found)
    judge.check()


@EACH_FORMAT
@pytest.mark.parametrize("gate_dtype", [torch.float16, torch.bfloat16])
def test_narrower_gates(memory_format: torch.memory_format, gate_dtype: torch.dtype) -> None:
    """As autocast has them where the image is float32."""
    judge = Judge()
    for seed, shape in enumerate(SHAPES[1:-1]):
        add(judge, make(shape, torch.float32, memory_format, seed, gate_dtype), "sigmoid")
    judge.check()


@EACH_FORMAT
@EACH
def test_nan_and_infinity_stay_in_their_planes(
    dtype: torch.dtype, memory_format: torch.memory_format
) -> None:
    for shape, gate in itertools.product(((8, 64, 14, 14), (8, 57, 7, 7)), sorted(GATES)):
        tensors = make(shape, dtype, memory_format)
        number = PAIRS["none", gate]
        spread = draw(shape[:2], 7).to(dtype)

        def run(
            t: Tensors = tensors, spread: Tensor = spread, number: int = number
        ) -> list[Tensor]:
            return [
                operator(t.input, t.gates, None, number),
                operator(t.gradient, t.gates, spread, number),
                backward_operator(t.gradient, t.input, t.gates, number),
            ]

        clean = run()
        tensors.input[3, 5, 2, 1], tensors.gates[0, 9] = float("nan"), float("nan")
        tensors.input[7, 40, 6, 6] = -float("inf")
        spread[2, 2] = float("nan")
        found = run()
        hit = torch.zeros(shape[:2], dtype=torch.bool, device="cuda")
        hit[3, 5] = hit[0, 9] = hit[7, 40] = hit[2, 2] = True
        for result, whole in zip(found, clean, strict=True):
            assert torch.equal(result[~hit], whole[~hit])
        assert found[0][3, 5].isnan().sum() == 1
        assert found[0][0, 9].isnan().all()
        assert found[1][2, 2].isnan().all()
        assert found[2][3, 5].isnan().all()


@EACH_FORMAT
@EACH
def test_nothing_beside_the_images_is_read_or_written(
    dtype: torch.dtype, memory_format: torch.memory_format
) -> None:
    """From any element on, which takes another width of access."""
    for shape, offset in itertools.product(((4, 24, 14, 14), (4, 57, 7, 7)), (0, 1, 4, 8)):
        tensors = make(shape, dtype, memory_format)
        count = tensors.input.numel()
        buffer = torch.full((count + 64,), float("nan"), dtype=dtype, device="cuda")
        view = buffer[32 + offset :][:count].as_strided(
            shape, tensors.input.stride(), buffer.storage_offset() + 32 + offset
        )
        view.copy_(tensors.input)
        number = PAIRS["none", "sigmoid"]
        for input in (tensors.input, view):
            first = operator(input, tensors.gates, None, number)
            assert torch.equal(first, operator(tensors.input, tensors.gates, None, number))
        sums = [
            backward_operator(tensors.gradient, of, tensors.gates, number)
            for of in (tensors.input, view)
        ]
        # Another width of access sums in another order.
        bound = 16 * torch.finfo(dtype).eps * float(sums[0].abs().max())
        torch.testing.assert_close(*sums, rtol=0, atol=bound)


@EACH_FORMAT
@EACH
def test_the_same_bits_each_time(dtype: torch.dtype, memory_format: torch.memory_format) -> None:
    for shape in ((16, 116, 14, 14), (8, 32, 112, 112)):
        tensors = make(shape, dtype, memory_format)
        first = results(tensors, "hardsigmoid", "ours")
        for _ in range(20):
            again = results(tensors, "hardsigmoid", "ours")
            assert all(torch.equal(again[name], first[name]) for name in first)


@EACH_FORMAT
def test_gradients_that_are_laid_out_otherwise(memory_format: torch.memory_format) -> None:
    shape = (4, 24, 14, 14)
    tensors = make(shape, torch.float16, memory_format)
    first = results(tensors, "sigmoid", "ours")
    (other,) = (f for f in FORMATS if f is not memory_format)
    for gradient in (
        tensors.gradient.contiguous(memory_format=other),
        torch.cat([tensors.gradient] * 2, 1)[:, :24],
    ):
        again = results(tensors._replace(gradient=gradient), "sigmoid", "ours")
        assert all(torch.equal(again[name], first[name]) for name in first)


@EACH_FORMAT
def test_how_many_kernels_run(memory_format: torch.memory_format) -> None:
    number = PAIRS["none", "sigmoid"]
    one = 1 if memory_format == torch.contiguous_format else 2
    for shape, sums in (((256, 96, 14, 14), one), ((8, 32, 112, 112), 2)):
        input, gates, gradient = make(shape, torch.float16, memory_format)
        for kernels, call in (
            (1, lambda i=input, g=gates: operator(i, g, None, number)),
            (sums, lambda i=input, g=gates, d=gradient: backward_operator(d, i, g, number)),
        ):
            call()
            rows = profile(call, torch.device("cuda"))
            assert sum(row.kernels for row in rows) <= kernels
            assert all("channel_scale" in row.largest for row in rows)


@EACH_FORMAT
@pytest.mark.parametrize("shape", [(1 << 10, 64, 183, 182), (44000, 1000, 7, 7)])
def test_offsets_beyond_32_bits(memory_format: torch.memory_format, shape: tuple[int, ...]) -> None:
    input = torch.empty(shape, dtype=torch.float16, device="cuda", memory_format=memory_format)
    input.normal_()
    assert input.numel() > 1 << 31
    gates, number = draw(shape[:2]).half(), PAIRS["none", "sigmoid"]
    output = operator(input, gates, gates, number)
    sums = backward_operator(input, input, gates, number)
    for part in (slice(0, 3), slice(-3, None)):
        factors = gates[part].double().sigmoid()
        share = gates[part].double() / (shape[2] * shape[3])
        x = input[part].double()
        exact = x * factors[..., None, None] + share[..., None, None]
        torch.testing.assert_close(output[part].double(), exact, rtol=1e-3, atol=1e-3)
        exact = x.square().sum((2, 3)) * factors * (1 - factors)
        torch.testing.assert_close(sums[part].double(), exact, rtol=1e-3, atol=1e-3)


def test_bad_input_is_named() -> None:
    input, gates, gradient = make((2, 8, 6, 6), torch.float16, torch.contiguous_format)

    def refused(
        message: str,
        x: Tensor = input,
        z: Tensor = gates,
        spread: Tensor | None = None,
        activation: int = 0,
    ) -> None:
        with pytest.raises(RuntimeError, match=message):
            operator(x, z, spread, activation)

    refused(r"input must be 4-D \(N, C, H, W\), got shape \[8, 6, 6\]", input[0])
    refused("input must be float32, float16 or bfloat16 .*, got Double", input.double())
    refused("input must be dense, .*, got strides", input[..., ::2])
    refused(r"input must have 1 to 2\^30 planes .*, got shape \[0, 8, 6, 6\]", input[:0])
    refused(r"gates must be \(2, 8\) or .*, got shape \[2, 4", z=gates[:, :4])
    refused("gates must be dense, got strides", z=draw((8, 2)).half().t())
    refused("gates must be on the input's device, cuda:0", z=gates.cpu())
    refused("gates must have the input's dtype, .*, got Float", z=gates.float())
    refused("gates must have the input's dtype, .*, got Double", input.float(), gates.double())
    refused(r"spread must be \(2, 8\) or .*, got shape \[8\]", spread=gates[0, :, 0, 0])
    refused("spread must have the input's dtype Half, got Float", spread=gates.float())
    refused("activation must be none, sigmoid or hardsigmoid, got index 1", activation=1)

    def refused_backward(message: str, gradient: Tensor) -> None:
        with pytest.raises(RuntimeError, match=message):
            backward_operator(gradient, input, gates, 0)

    refused_backward("grad_output must have the input's shape", gradient[:1])
    refused_backward("grad_output must have the input's dtype Half", gradient.float())
    refused_backward(
        "grad_output must be laid out as the input",
        gradient.contiguous(memory_format=torch.channels_last),
    )


# --- models ---------------------------------------------------------------------------------------


def blocks(gate: Callable[..., nn.Module] = nn.Sigmoid, channels: int = 24) -> nn.Sequential:
    misc = pytest.importorskip("torchvision.ops.misc")
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, channels, 1),
        *(block(misc.SqueezeExcitation, channels, gate) for _ in range(2)),
        nn.Conv2d(channels, 8, 1),
    ).cuda()


def block(kind: type[nn.Module], channels: int, gate: Callable[..., nn.Module]) -> nn.Sequential:
    excitation = kind(channels, 8, activation=nn.SiLU, scale_activation=gate)
    return nn.Sequential(nn.Conv2d(channels, channels, 3, groups=channels), excitation)


@EACH_FORMAT
@EACH
@pytest.mark.parametrize("gate", [nn.Sigmoid, nn.Hardsigmoid])
def test_a_model_trains_as_before(
    gate: type[nn.Module], dtype: torch.dtype, memory_format: torch.memory_format
) -> None:
    """Of three steps, against float64; half precision under autocast."""
    model = blocks(gate).to(memory_format=memory_format).train()
    x = draw((16, 3, 28, 28), 3).contiguous(memory_format=memory_format)
    fast = dwswap.optimize(model)
    assert "the scaling of 2 squeeze-and-excitations" in str(dwswap.report(fast))
    wide = three_steps(copy.deepcopy(model).double(), x.double(), torch.float32)
    theirs, ours = three_steps(model, x, dtype), three_steps(fast, x, dtype)
    judge = Judge()
    for name, exact in wide.items():
        judge.add("weights", ours[name], theirs[name], exact)
    judge.check()


def test_the_modules_call_the_kernels() -> None:
    model = blocks().train().to(memory_format=torch.channels_last)
    fast = dwswap.optimize(model)
    x = draw((16, 3, 28, 28), 3).contiguous(memory_format=torch.channels_last)

    def run() -> None:
        with torch.enable_grad(), torch.autocast("cuda", torch.float16):
            fast(x).float().sum().backward()

    run()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as recorded:
        run()
        torch.cuda.synchronize()
    counts = {
        name: sum(e.count for e in recorded.key_averages() if f"::{name}<" in e.key)
        for name in ("scale_kernel", "product_sums_kernel")
    }
    assert counts == {"scale_kernel": 4, "product_sums_kernel": 2}


def test_second_gradients_are_those_of_pytorch() -> None:
    model = blocks().train()
    fast = dwswap.optimize(model)
    x = draw((4, 3, 14, 14), 3)

    both = (second_gradients(of, x, lambda y: y.square().sum()) for of in (fast, model))
    for ours, theirs in zip(*both, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-3)


def test_training_takes_no_more_memory() -> None:
    model = blocks(channels=64).to(memory_format=torch.channels_last)
    x = draw((64, 3, 56, 56)).contiguous(memory_format=torch.channels_last)

    assert peak_memory(dwswap.optimize(model.train()), x) < 1.01 * peak_memory(model, x)


def test_a_captured_step_learns() -> None:
    model = dwswap.optimize(blocks().train())
    x = draw((8, 3, 14, 14), 3)
    model(x).sum().backward()
    expected = [p.grad.clone() for p in model.parameters() if p.grad is not None]
    graph = captured_backward(model, x)
    graph.replay()
    torch.cuda.synchronize()
    found = [p.grad for p in model.parameters() if p.grad is not None]
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
