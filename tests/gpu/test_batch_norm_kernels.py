"""The CUDA kernels of BatchNorm in training, and the modules that call them."""

from __future__ import annotations

import copy
import itertools
from typing import NamedTuple

import pytest
import torch
import torch.nn.functional as F
from numerics import ACTIVATIONS, MIN_GRADIENTS, WIDE_ACTIVATIONS, Judge, near_kinks, poison
from torch import Tensor, nn
from training_steps import captured_backward, draw, peak_memory, second_gradients, three_steps

import dwswap
from dwswap.batch_norm import NORM_ACTIVATIONS, batch_norm, has_batch_norm
from dwswap.bench.kernel_families import profile
from dwswap.schema import batch_norm as operator
from dwswap.schema import batch_norm_backward as backward_operator

pytestmark = pytest.mark.gpu

FAST = (torch.float32, torch.float16, torch.bfloat16)
EACH = pytest.mark.parametrize("dtype", FAST, ids=lambda dtype: str(dtype)[6:])
FORMATS = (torch.contiguous_format, torch.channels_last)
EACH_FORMAT = pytest.mark.parametrize("memory_format", FORMATS, ids=["nchw", "nhwc"])
# Of every width of access and both ways to go over planes; more channels than a block has lanes.
SHAPES = (
    *((2, 32, 56, 56), (16, 96, 28, 28), (8, 144, 14, 14), (32, 160, 7, 7), (16, 960, 7, 7)),
    *((3, 57, 9, 13), (2, 58, 20, 20), (5, 116, 14, 14), (7, 20, 3, 5), (4, 1, 33, 31)),
    *((300, 24, 1, 1), (2, 2500, 3, 3), (2, 8, 1, 1), (1, 7, 3, 5), (1, 4, 257, 129)),
)
EPS, MOMENTUM = 1e-5, 0.1


class Tensors(NamedTuple):
    input: Tensor
    weight: Tensor | None
    bias: Tensor | None
    running_mean: Tensor | None
    running_var: Tensor | None

    def cast(self, dtype: torch.dtype | None = None) -> Tensors:
        """New leaves."""
        return Tensors(*(None if t is None else t.to(dtype or t.dtype, copy=True) for t in self))


def make(
    shape: tuple[int, ...],
    dtype: torch.dtype,
    memory_format: torch.memory_format,
    parameters: torch.dtype | None = torch.float32,
    statistics: torch.dtype | None = torch.float32,
    seed: int = 0,
) -> Tensors:
    input = (2 * draw(shape, seed) + 1).to(dtype).contiguous(memory_format=memory_format)
    channels = shape[1:2]
    scale, shift, mean = (draw(channels, seed + i) for i in (1, 2, 3))
    return Tensors(
        input,
        *(
            (None, None)
            if parameters is None
            else ((scale + 3).to(parameters), shift.to(parameters))
        ),
        *((None, None) if statistics is None else (mean.to(statistics), mean.abs().to(statistics))),
    )


def results(tensors: Tensors, gradient: Tensor, activation: str, kind: str) -> dict[str, Tensor]:
    """Outputs, running statistics and gradients: of ours, of PyTorch's, or exactly."""
    leaves = [t for t in tensors[:3] if t is not None]
    for leaf in leaves:
        leaf.requires_grad_()
    if kind == "ours":
        assert has_batch_norm(*tensors)
        batches = torch.full((), 6, device="cuda")
        version = batches._version
        output = batch_norm(*tensors, batches, MOMENTUM, EPS, activation)
        assert int(batches) == 7
        assert batches._version == version + 1
    else:
        input, weight, bias, *running = tensors
        normalized = F.batch_norm(input, *running, weight, bias, True, MOMENTUM, EPS)
        output = (WIDE_ACTIVATIONS if kind == "exact" else ACTIVATIONS)[activation](normalized)
    gradients = torch.autograd.grad(output, leaves, gradient.to(output.dtype))
    named = {"output": output.detach()}
    named |= {
        name: t for name, t in tensors._asdict().items() if "running" in name if t is not None
    }
    return named | dict(zip(("grad_input", "grad_weight", "grad_bias"), gradients, strict=False))


def add(judge: Judge, tensors: Tensors, activation: str, seed: int = 5) -> None:
    input = tensors.input
    wide = tensors.cast(torch.float64)
    z = F.batch_norm(wide.input, None, None, wide.weight, wide.bias, True, 0.0, EPS)
    near = near_kinks(activation, z, input.dtype)
    gradient = draw(input.shape, seed + 50).masked_fill_(near, 0.0).to(input.dtype)
    if seed % 2:  # laid out as the input, or as it comes
        gradient = torch.empty_like(input).copy_(gradient)
    exact = results(tensors.cast(torch.float64), gradient, activation, "exact")
    theirs = results(tensors.cast(), gradient, activation, "theirs")
    poison(theirs["output"])
    ours = results(tensors.cast(), gradient, activation, "ours")
    for name in ("output", "grad_input"):
        assert ours[name].stride() == input.stride()
    label = f"{tuple(input.shape)} {input.stride()} {input.dtype} {activation}"
    for name, result in ours.items():
        judge.add(f"{name} of {label}", result, theirs[name], exact[name])


@EACH_FORMAT
@EACH
def test_outputs_gradients_and_statistics(
    dtype: torch.dtype, memory_format: torch.memory_format
) -> None:
    judge = Judge()
    names = itertools.cycle(sorted(NORM_ACTIVATIONS))
    for seed, shape in enumerate(SHAPES):
        # Of few channels several draws, as two largest errors are compared.
        draws = range(seed, seed + 100 * min(8, -(-MIN_GRADIENTS // shape[1])), 100)
        for activation, drawn in itertools.product((next(names), next(names)), draws):
            add(judge, make(shape, dtype, memory_format, seed=drawn), activation, drawn)
    judge.check()


@EACH_FORMAT
@EACH
def test_parameters_and_statistics_of_either_type_and_none(
    dtype: torch.dtype, memory_format: torch.memory_format
) -> None:
    judge = Judge()
    kinds = ((None, None), (None, torch.float32), (torch.float32,) * 2, (dtype,) * 2)
    for seed, (parameters, statistics) in enumerate((*kinds, (torch.float32, None), (dtype, None))):
        tensors = make((8, 72, 14, 14), dtype, memory_format, parameters, statistics, seed)
        add(judge, tensors, ("none", "relu6")[seed % 2], seed)
    judge.check()


@EACH_FORMAT
@EACH
@pytest.mark.parametrize("mean", [100.0, -3e3, 3e4])
def test_small_deviations_from_a_large_mean(
    dtype: torch.dtype, memory_format: torch.memory_format, mean: float
) -> None:
    judge = Judge()
    spread = 4 * torch.finfo(dtype).eps * abs(mean)
    for shape in ((16, 96, 14, 14), (16, 58, 7, 7)):
        tensors = make(shape, dtype, memory_format)
        wide = spread * tensors.input.double() + mean
        add(judge, tensors._replace(input=wide.to(dtype)), "none")
    judge.check()


@EACH_FORMAT
@EACH
def test_a_channel_of_one_value_has_no_variance(
    dtype: torch.dtype, memory_format: torch.memory_format
) -> None:
    values = (100 * draw((1, 40, 1, 1))).to(dtype)
    input = values.expand(64, 40, 14, 14).contiguous(memory_format=memory_format)
    bias = draw((40,))
    output = batch_norm(input, torch.ones_like(bias), bias, None, None, None, MOMENTUM, EPS)
    assert torch.equal(output, bias.to(dtype)[:, None, None].expand_as(output))


@EACH_FORMAT
@EACH
def test_nan_and_infinity_stay_in_their_channels(
    dtype: torch.dtype, memory_format: torch.memory_format
) -> None:
    for shape in ((8, 64, 14, 14), (8, 57, 7, 7)):
        tensors = make(shape, dtype, memory_format, statistics=None)
        gradient = torch.empty_like(tensors.input).copy_(draw(shape, 4))
        clean = results(tensors.cast(), gradient, "relu6", "ours")
        tensors.input[3, 5, 2, 1], tensors.input[0, 9, 0, 0] = float("nan"), float("inf")
        tensors.input[7, 40, 6, 6] = -float("inf")
        found = results(tensors.cast(), gradient, "relu6", "ours")
        hit = torch.zeros(shape[1], dtype=torch.bool, device="cuda")
        hit[[5, 9, 40]] = True
        for name, result in found.items():
            by_channel = result.movedim(1, 0) if result.dim() == 4 else result
            whole = clean[name].movedim(1, 0) if result.dim() == 4 else clean[name]
            assert torch.equal(by_channel[~hit], whole[~hit])
        assert found["output"][:, hit].isnan().all()
        # Of dz alone: no NaN comes in where the derivative is 0, as with aten's.
        assert found["grad_weight"][hit].isnan().all()


@EACH_FORMAT
@EACH
def test_nothing_beside_the_images_is_read_or_written(
    dtype: torch.dtype, memory_format: torch.memory_format
) -> None:
    """From any element on, which takes another width of access."""
    for shape, offset in itertools.product(((4, 24, 14, 14), (4, 57, 7, 7)), (0, 1, 4, 8)):
        tensors = make(shape, dtype, memory_format, statistics=None)
        count = tensors.input.numel()
        buffer = torch.full((count + 64,), float("nan"), dtype=dtype, device="cuda")
        view = buffer[32 + offset :][:count].as_strided(
            shape, tensors.input.stride(), buffer.storage_offset() + 32 + offset
        )
        view.copy_(tensors.input)
        gradient = torch.empty_like(tensors.input).copy_(draw(shape, 4))
        aligned = results(tensors.cast(), gradient, "silu", "ours")
        leaves = Tensors(view, *tensors.cast()[1:])
        for name, result in results(leaves, gradient, "silu", "ours").items():
            # Another width of access sums in another order.
            bound = 16 * torch.finfo(result.dtype).eps * float(aligned[name].abs().max())
            torch.testing.assert_close(result, aligned[name], rtol=0, atol=bound)


@EACH_FORMAT
@EACH
def test_the_same_bits_each_time(dtype: torch.dtype, memory_format: torch.memory_format) -> None:
    tensors = make((16, 116, 14, 14), dtype, memory_format)
    gradient = torch.empty_like(tensors.input).copy_(draw(tensors.input.shape, 4))
    first = results(tensors.cast(), gradient, "hardswish", "ours")
    for _ in range(30):
        again = results(tensors.cast(), gradient, "hardswish", "ours")
        assert all(torch.equal(again[name], first[name]) for name in first)


@EACH_FORMAT
def test_only_what_is_wanted(memory_format: torch.memory_format) -> None:
    tensors = make((4, 40, 14, 14), torch.float16, memory_format)
    gradient = torch.empty_like(tensors.input).copy_(draw(tensors.input.shape, 4))
    number = 2  # relu6
    _, stats = operator(*tensors, None, MOMENTUM, EPS, number)
    arguments = (gradient, tensors.input, stats, tensors.weight, number)
    whole = backward_operator(*arguments, (True, True, True))
    for mask in itertools.product((False, True), repeat=3):
        for wanted, grad, full in zip(
            mask, backward_operator(*arguments, mask), whole, strict=True
        ):
            assert (grad is not None) == wanted
            assert grad is None or torch.equal(grad, full)


@EACH_FORMAT
def test_three_kernels_each_way(memory_format: torch.memory_format) -> None:
    tensors = make((8, 96, 14, 14), torch.float16, memory_format)
    call = lambda: operator(*tensors, None, MOMENTUM, EPS, 2)  # noqa: E731
    _, stats = call()
    back = lambda: backward_operator(  # noqa: E731
        tensors.input, tensors.input, stats, tensors.weight, 2, (True, True, True)
    )
    for what in (call, back):
        what()
        rows = profile(what, torch.device("cuda"))
        assert sum(row.kernels for row in rows) == 3
        assert all("batch_norm" in row.largest for row in rows)


@EACH_FORMAT
def test_graph_capture_on_a_stream(memory_format: torch.memory_format) -> None:
    tensors = make((4, 24, 14, 14), torch.float16, memory_format)
    batches = torch.zeros((), dtype=torch.int64, device="cuda")
    call = lambda: batch_norm(*tensors, batches, MOMENTUM, EPS, "relu6")  # noqa: E731
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        output = call()
    for seed in range(3):
        tensors.input.copy_(draw(tensors.input.shape, seed))
        graph.replay()
        fresh = batch_norm(*tensors[:3], None, None, None, MOMENTUM, EPS, "relu6")
        assert torch.equal(output, fresh)
    torch.cuda.synchronize()
    assert int(batches) == 4


@EACH_FORMAT
@pytest.mark.parametrize("shape", [(1 << 10, 64, 183, 182), (44000, 1000, 7, 7)])
def test_offsets_beyond_32_bits(memory_format: torch.memory_format, shape: tuple[int, ...]) -> None:
    input = torch.empty(shape, dtype=torch.float16, device="cuda", memory_format=memory_format)
    input.normal_()
    assert input.numel() > 1 << 31
    output, stats = operator(input, None, None, None, None, None, MOMENTUM, EPS, 0)
    mean, factor = stats[:2]
    for part in (slice(0, 3), slice(-3, None)):
        exact = (input[part].double() - mean[:, None, None]) * factor.double()[:, None, None]
        torch.testing.assert_close(output[part].double(), exact, rtol=1e-3, atol=1e-3)
    # Of a sample of the channels, over all images.
    some = input[:, :: shape[1] // 4].double()
    torch.testing.assert_close(
        mean[:: shape[1] // 4].double(), some.mean((0, 2, 3)), rtol=1e-4, atol=1e-6
    )


def test_bad_input_is_named() -> None:
    good = make((2, 8, 6, 6), torch.float16, torch.contiguous_format)

    def refused(message: str, activation: int = 0, **other: Tensor) -> None:
        with pytest.raises(RuntimeError, match=message):
            operator(*good._replace(**other), None, MOMENTUM, EPS, activation)

    refused(r"input must be 4-D \(N, C, H, W\), got shape \[8, 6, 6\]", input=good.input[0])
    refused("input must be float32, float16 or bfloat16 .*, got Double", input=good.input.double())
    refused(r"input must be dense, .*, got strides", input=good.input[..., ::2])
    refused(r"2 to 2\^30 values for each channel, got shape \[1, 8, 1, 1\]",
            input=good.input[:1, :, :1, :1].contiguous())  # fmt: skip
    refused(r"weight must be 1-D of length 8, got shape \[4\]", weight=draw((4,)))
    refused("weight must be contiguous, got stride 2", weight=draw((16,))[::2])
    refused("weight must be on the input's device, cuda:0", weight=torch.ones(8))
    refused("weight must be float32 or have the input's dtype Half, got Double",
            weight=draw((8,)).double())  # fmt: skip
    refused("bias must have the dtype of weight, got Half", bias=draw((8,)).half())
    refused("activation must be none, relu, relu6, hardswish or silu, got index 5", activation=5)
    _, stats = operator(*good, None, MOMENTUM, EPS, 0)

    def refused_backward(message: str, gradient: Tensor, stats: Tensor) -> None:
        with pytest.raises(RuntimeError, match=message):
            backward_operator(gradient, good.input, stats, good.weight, 0, (True, True, True))

    refused_backward("grad_output must have the input's shape", good.input[:1], stats)
    refused_backward("grad_output must have the input's dtype Half", good.input.float(), stats)
    refused_backward(
        "grad_output must be laid out as the input",
        good.input.contiguous(memory_format=torch.channels_last),
        stats,
    )
    refused_backward("stats must be those of the forward", good.input, stats[:3])


# --- models ---------------------------------------------------------------------------------------


def blocks(kind: type[nn.Module], affine: bool = True) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        block(kind, nn.Conv2d(3, 24, 1, bias=False), affine),
        block(kind, nn.Conv2d(24, 24, 3, padding=1, groups=24, bias=False), affine),
        nn.Conv2d(24, 8, 1),
    ).cuda()


def block(kind: type[nn.Module], conv: nn.Conv2d, affine: bool = True) -> nn.Sequential:
    norm = nn.BatchNorm2d(conv.out_channels, affine=affine)
    return nn.Sequential(conv, norm, kind(inplace=True))  # type: ignore[call-arg]


@EACH_FORMAT
@EACH
@pytest.mark.parametrize("kind", [nn.ReLU, nn.ReLU6, nn.Hardswish, nn.SiLU])
def test_a_model_trains_as_before(
    kind: type[nn.Module], dtype: torch.dtype, memory_format: torch.memory_format
) -> None:
    """Of three steps, against float64; half precision under autocast."""
    model = blocks(kind).to(memory_format=memory_format).train()
    x = draw((16, 3, 28, 28), 3).contiguous(memory_format=memory_format)
    fast = dwswap.optimize(model)
    assert "runs 2 BatchNorm, and 2 activations with them" in str(dwswap.report(fast))
    wide = three_steps(copy.deepcopy(model).double(), x.double(), torch.float32)
    theirs, ours = three_steps(model, x, dtype), three_steps(fast, x, dtype)
    judge = Judge()
    for name, exact in wide.items():
        if exact.is_floating_point():
            judge.add("weights, statistics", ours[name], theirs[name], exact)
        else:
            assert int(ours[name]) == int(theirs[name]) == 3
    judge.check()


def test_second_gradients_are_those_of_pytorch() -> None:
    model = blocks(nn.SiLU).train()
    fast = dwswap.optimize(model)
    x = draw((4, 3, 14, 14), 3)

    both = (second_gradients(of, x, Tensor.sum) for of in (fast, model))
    for ours, theirs in zip(*both, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-4)


def test_what_lies_between_the_two_layers_is_not_kept() -> None:
    """A third of what training keeps of such a model is the input of its activations."""
    torch.manual_seed(0)
    model = nn.Sequential(
        *(
            block(nn.ReLU6, nn.Conv2d(64, 64, 3, padding=1, groups=64, bias=False))
            for _ in range(6)
        )
    ).cuda()  # fmt: skip
    x = torch.randn(32, 64, 56, 56, device="cuda").to(memory_format=torch.channels_last)

    assert peak_memory(dwswap.optimize(model.train()), x) < 0.75 * peak_memory(model, x)


def test_a_checkpointed_model_trains_as_before() -> None:
    from torch.utils.checkpoint import checkpoint

    model = blocks(nn.ReLU6).train()
    fast = dwswap.optimize(model)
    x = draw((4, 3, 14, 14), 3)
    grads = []
    for of in (model, fast):
        leaf = x.clone().requires_grad_()
        checkpoint(of, leaf, use_reentrant=False).square().sum().backward()
        grads.append([leaf.grad, *(p.grad for p in of.parameters())])
    for theirs, ours in zip(*grads, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-3)
    for theirs, ours in zip(model.buffers(), fast.buffers(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


def test_a_captured_step_counts_and_learns() -> None:
    model = dwswap.optimize(blocks(nn.ReLU6).train())
    x = draw((8, 3, 14, 14), 3)
    graph = captured_backward(model, x)
    norm = model[0][1]  # type: ignore[index]
    assert isinstance(norm, nn.BatchNorm2d)
    before = norm.running_mean.clone()  # type: ignore[union-attr]
    graph.replay()
    torch.cuda.synchronize()
    assert int(norm.num_batches_tracked) == 4  # type: ignore[arg-type]
    assert not torch.equal(before, norm.running_mean)  # type: ignore[arg-type]


def test_torch_compile_of_the_result_is_that_of_the_original() -> None:
    model = blocks(nn.ReLU6).train()
    compiled = torch.compile(dwswap.optimize(model), backend="aot_eager", fullgraph=True)
    x = draw((4, 3, 14, 14), 3)
    torch.testing.assert_close(compiled(x), model(x), rtol=1e-4, atol=1e-4)
