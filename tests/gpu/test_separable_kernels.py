"""The CUDA kernel of a depthwise convolution and the pointwise one behind it."""

from __future__ import annotations

import copy
import dataclasses
import itertools
import os
import random
from collections.abc import Iterator

import pytest
import torch
from cases import place
from export_models import build_model
from numerics import ACTIVATIONS, WIDE_ACTIVATIONS, Judge, poison
from test_interleave_kernels import draw
from test_separable import Given, arguments, ours, theirs
from torch import Tensor, nn

import dwswap
from dwswap import separable
from dwswap.bench.kernel_families import DEPTHWISE, profile
from dwswap.separable import CLAMPS, choose_cut, separable_conv2d

DEVICE = os.environ.get("DWSWAP_FUZZ_DEVICE", "cuda")
pytestmark = [] if DEVICE == "cpu" else [pytest.mark.gpu]

NAMED = torch.ops.dwswap._separable_conv2d.default
HALVES = (torch.float16, torch.bfloat16)
EACH = pytest.mark.parametrize("dtype", HALVES, ids=str)
ADDED = ("residual", "bias", "nothing")
# Of networks: channels, side, kernel, stride, outputs.
LAYERS = (
    (96, 112, 3, 2, 24),
    (144, 56, 3, 2, 32),
    (192, 28, 3, 1, 32),
    (384, 14, 3, 1, 64),
    (576, 14, 3, 2, 160),
    (960, 7, 3, 1, 320),
    (120, 28, 5, 1, 40),
    (240, 28, 5, 2, 80),
    (1152, 7, 5, 1, 192),
)


@dataclasses.dataclass(frozen=True)
class Problem:
    """Every way to cut it is one that the kernel has."""

    batch: int
    channels: int
    size: tuple[int, int]
    kernel: int
    stride: int
    padding: int
    outputs: int
    pixels: int
    slices: int
    before: str = "none"
    behind: str = "none"
    added: str = "residual"  # or "bias", or "nothing"
    biases: tuple[bool, bool] = (True, True)  # of the depthwise convolution: behind, before

    def draw(self, dtype: torch.dtype, case: int) -> Given:
        height, width = (
            (side + 2 * self.padding - self.kernel) // self.stride + 1 for side in self.size
        )
        scale = 1 / (3 * self.channels**0.5)
        image = draw((self.batch, self.channels, *self.size), dtype, case)
        residual = draw((self.batch, self.outputs, height, width), dtype, case + 6)
        return Given(
            place(image, "channels_last"),
            draw((self.channels, 1, self.kernel, self.kernel), dtype, case + 1),
            draw((self.channels,), dtype, case + 2) if self.biases[0] else None,
            draw((self.channels,), dtype, case + 3) if self.biases[1] else None,
            draw((self.outputs, self.channels, 1, 1), dtype, case + 4) * scale,
            draw((self.outputs,), dtype, case + 5) if self.added == "bias" else None,
            place(residual, "channels_last") if self.added == "residual" else None,
        )

    def run(self, given: Given) -> Tensor:
        if DEVICE == "cpu":
            return self.expected(given)
        options = arguments(given, self.stride, self.before, self.behind, self.pixels, self.slices)
        return NAMED(*options[:5], self.padding, *options[6:])

    def expected(self, given: Given) -> Tensor:
        """Without cuDNN, which takes seconds to choose and build kernels for so many shapes."""
        table = WIDE_ACTIVATIONS if given.input.dtype == torch.float64 else ACTIVATIONS
        with torch.backends.cudnn.flags(enabled=False):
            return theirs(given, self.stride, self.before, self.behind, table, self.padding)


def problems(count: int, seed: int = 0) -> Iterator[Problem]:
    """Ragged ones; each way to cut with each kernel and stride."""
    dice = random.Random(seed)
    cuts = itertools.product((8, 16, 32), (1, 2, 3, 5, 8), (3, 5), (1, 2))
    for pixels, slices, kernel, stride in itertools.islice(itertools.cycle(cuts), count):
        yield Problem(
            dice.choice((1, 1, 1, 2, 3)),
            dice.choice((8, 16, 24, 40, 64, 72, 96, 136, 200, 384, 520)),
            (dice.randint(kernel, 19), dice.randint(kernel, 19)),
            kernel,
            stride,
            dice.choice((kernel // 2, kernel // 2, 0, kernel - 1)),
            dice.choice((8, 16, 24, 32, 56, 64, 96, 136, 160)),
            pixels,
            slices,
            dice.choice(CLAMPS),
            dice.choice(CLAMPS),
            dice.choice(ADDED),
            (dice.random() < 0.7, dice.random() < 0.7),
        )


def of_networks() -> Iterator[Problem]:
    for case, (channels, side, kernel, stride, outputs) in enumerate(LAYERS):
        shape = (1, channels, side, side)
        cut = choose_cut(shape, outputs, kernel, stride, kernel // 2, 132, 232448)
        assert cut is not None
        yield Problem(
            *(1, channels, (side, side), kernel, stride, kernel // 2, outputs),
            *cut,
            CLAMPS[case % 3],
            CLAMPS[case // 3 % 3],
            ADDED[case % 3],
        )


@EACH
@torch.no_grad()
def test_values(dtype: torch.dtype) -> None:
    judge = Judge()
    for case, problem in enumerate([*problems(180), *of_networks()]):
        given = problem.draw(dtype, case)
        usual = problem.expected(given)
        poison(usual)
        result = problem.run(given)
        assert result.is_contiguous(memory_format=torch.channels_last)
        exact = problem.expected(given.map(Tensor.double))
        if usual.numel() >= 64:  # two largest errors of fewer say nothing
            judge.add(f"{problem}, case {case}", result, usual, exact)
    judge.check()


@EACH
@torch.no_grad()
def test_integers_are_exact(dtype: torch.dtype) -> None:
    for case, problem in enumerate(problems(120, seed=1)):
        given = problem.draw(dtype, case).map(lambda t: (2 * t).round().clamp(-1, 1))
        # Few that are not 0, so that sums fit the dtype.
        point = given.point_weight
        few = torch.arange(problem.channels, device=DEVICE) % 11 == case % 7
        point = torch.where(few[:, None, None], (point + 0.5).ceil(), 0).to(dtype)
        given = dataclasses.replace(given, point_weight=point)
        exact = problem.expected(given.map(Tensor.double))
        assert exact.abs().max() <= 256
        assert torch.equal(problem.run(given).double(), exact), (case, problem)


@EACH
@torch.no_grad()
def test_not_a_number(dtype: torch.dtype) -> None:
    problem = Problem(1, 72, (9, 7), 3, 1, 1, 40, 16, 3, "relu", "relu6")
    for value, channel, row, column in itertools.product(
        (float("nan"), float("inf")), (0, 35, 71), (0, 4), (0, 6)
    ):
        given = problem.draw(dtype, 5)
        given.input[0, channel, row, column] = value
        result, usual = problem.run(given), problem.expected(given)
        assert torch.equal(result.isnan(), usual.isnan())
        assert result.isnan().any() == (value != value)
    clean = problem.draw(dtype, 1)
    again = [problem.run(clean) for _ in range(20)]
    assert again[0].isfinite().all()
    assert all(torch.equal(result, again[0]) for result in again)


@EACH
@torch.no_grad()
def test_nothing_beside_the_tensors_is_read(dtype: torch.dtype) -> None:
    for case, problem in enumerate(problems(60, seed=2)):
        given = problem.draw(dtype, case)

        def surrounded(t: Tensor) -> Tensor:
            buffer = torch.full((t.numel() + 256,), float("nan"), dtype=t.dtype, device=t.device)
            return buffer.as_strided(t.shape, t.stride(), 128).copy_(t)

        padded = given.map(surrounded)
        assert torch.equal(problem.run(padded), problem.run(given)), problem


@EACH
@torch.no_grad()
def test_what_has_no_kernel_runs_apart(dtype: torch.dtype) -> None:
    problem = Problem(2, 40, (9, 7), 3, 1, 1, 24, 8, 2, "relu", "relu6")
    given = problem.draw(dtype, 7)
    residual = given.residual
    assert residual is not None
    exact = problem.expected(given.map(Tensor.double))
    offset = given.map(lambda t: place(t, "offset_channels_last") if t.dim() == 4 else t)
    forms = (
        dataclasses.replace(given, input=given.input.contiguous()),
        dataclasses.replace(given, input=offset.input),
        dataclasses.replace(given, residual=residual.contiguous()),
        dataclasses.replace(given, point_weight=offset.point_weight),
        given.map(Tensor.float),
    )
    for form in forms:
        result = problem.run(form)
        error = (result.double() - exact).abs().max() / exact.abs().max()
        assert error < 8 * torch.finfo(dtype).eps
    # More channels than a slice may have.
    wide = Problem(1, 2056, (3, 4), 3, 1, 1, 24, 8, 1)
    inputs = wide.draw(dtype, 1)
    usual = wide.expected(inputs.map(Tensor.double))
    error = (wide.run(inputs).double() - usual).abs().max() / usual.abs().max()
    assert error < 8 * torch.finfo(dtype).eps
    silu = dataclasses.replace(problem, before="silu")
    error = silu.run(given).double() - silu.expected(given.map(Tensor.double))
    assert error.abs().max() < 8 * torch.finfo(dtype).eps * exact.abs().max()
    leaf = given.input.clone().requires_grad_()
    with torch.enable_grad():
        total = ours(dataclasses.replace(given, input=leaf)).sum()
        (gradient,) = torch.autograd.grad(total, leaf)
    assert gradient.shape == leaf.shape


@pytest.mark.gpu
@torch.no_grad()
def test_bad_input_is_named() -> None:
    problem = Problem(1, 16, (7, 7), 3, 1, 1, 24, 8, 1)
    given = problem.draw(torch.float16, 5)
    assert given.bias is not None
    for form, message in (
        ({"bias": given.bias[:5]}, r"bias must be 1-D of length 16, got shape \[5\]"),
        ({"point_bias": given.bias[:5]}, r"point_bias must be 1-D of length 24, got shape"),
        ({"point_weight": given.point_weight[:, :8]}, r"point_weight must be \(K, 16, 1, 1\)"),
        ({"point_weight": given.point_weight.float()}, "point_weight must have the input's dtype"),
        ({"point_weight": given.point_weight.cpu()}, "point_weight must be on the input's device"),
        ({"weight": given.weight[:5]}, r"weight.shape\[0\] must be a multiple of the input's 16"),
    ):
        with pytest.raises(RuntimeError, match=message):
            problem.run(dataclasses.replace(given, **form))
    for pixels, slices, message in (
        (24, 1, "pixels must be 8, 16 or 32, got 24"),
        (8, 9, "slices must be 1 to 8, got 9"),
    ):
        with pytest.raises(RuntimeError, match=message):
            dataclasses.replace(problem, pixels=pixels, slices=slices).run(given)
    with pytest.raises(RuntimeError, match="failed for shapes"):
        problem.run(dataclasses.replace(given, residual=given.input[..., :5]))


@pytest.mark.gpu
@torch.no_grad()
def test_one_kernel_where_pixels_are_few() -> None:
    for batch, count in ((1, 1), (64, 2)):
        problem = Problem(batch, 384, (14, 14), 3, 1, 1, 64, 8, 4)
        given = problem.draw(torch.float16, 3)
        ours(given, 1, "relu6", "relu6")
        rows = profile(lambda given=given: ours(given, 1, "relu6", "relu6"), torch.device("cuda"))
        assert sum(row.kernels for row in rows) == count
        if count == 1:
            assert rows[0].family == DEPTHWISE
            assert "separable_conv2d" in rows[0].largest


class Block(nn.Module):
    """``x`` plus a depthwise and a pointwise convolution of it, several times."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.act = nn.Conv2d(3, 32, 3, 2, 1), nn.ReLU6()
        self.depths = nn.ModuleList(nn.Conv2d(32, 32, 3, padding=1, groups=32) for _ in range(2))
        self.points = nn.ModuleList(nn.Conv2d(32, 32, 1, bias=False) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        for depth, point in zip(self.depths, self.points, strict=True):
            x = x + point(self.act(depth(x)))
        return x


@pytest.mark.gpu
@torch.no_grad()
def test_a_graph_whatever_it_is_given() -> None:
    """One image, many, one without a batch; verified, optimized again, under autocast."""
    torch.manual_seed(0)
    half = Block().eval().cuda().half()
    exact = copy.deepcopy(half).double()
    images = [draw((n, 3, 40, 40), torch.float16, n) for n in (1, 64)]
    for x in images:
        fast = dwswap.optimize(half, example_inputs=x, verify=True)
        assert all(layer.reason != "verify_failed" for layer in dwswap.report(fast).layers)
        assert len(fast.graph.find_nodes(op="call_function", target=separable_conv2d)) == 2
    judge = Judge()
    for each in (fast, dwswap.optimize(fast), copy.deepcopy(fast)):
        for x in (*images, images[0][0]):
            judge.add("graph", each(x), half(x), exact(x.double()))
    judge.check()
    with torch.autocast("cuda", torch.float16):
        for x in images:
            torch.testing.assert_close(fast(x), half(x), rtol=2e-2, atol=2e-2)


@pytest.mark.gpu
@torch.no_grad()
def test_the_residual_is_left_or_is_the_result() -> None:
    for batch in (1, 64):
        problem = Problem(batch, 192, (28, 28), 3, 1, 1, 32, 16, 2)
        given = problem.draw(torch.float16, 7)
        residual = given.residual
        assert residual is not None
        before = residual.clone()
        result = ours(given, 1, "relu6", "relu6")
        assert torch.equal(residual, before if batch == 1 else result)


@pytest.mark.gpu
@EACH
@torch.no_grad()
def test_graph_capture_on_a_stream(dtype: torch.dtype) -> None:
    problem = Problem(1, 960, (7, 7), 3, 1, 1, 160, 8, 8, "relu6", "relu6")
    given = problem.draw(dtype, 7)
    stream = torch.cuda.Stream()
    ours(given)  # builds the library
    stream.wait_stream(torch.cuda.current_stream())
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        output = problem.run(given)
    for seed in range(3):
        for tensor in given.each():
            if tensor is not None:
                tensor.copy_(draw(tuple(tensor.shape), dtype, seed))
        graph.replay()
        torch.cuda.synchronize()
        assert torch.equal(output, problem.run(given))


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["mobilenet_v2", "mnasnet1_0", "shufflenet_v2_x1_0"])
@torch.no_grad()
def test_models_run_it(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = build_model(name, DEVICE, torch.float16)
    x = draw((2, 3, 96, 96), torch.float16)
    fast = dwswap.optimize(model, example_inputs=x, verify=True)
    verification = dwswap.report(fast).verification
    assert verification is not None
    assert verification.passed
    assert fast.graph.find_nodes(op="call_function", target=separable_conv2d)
    judge = Judge()
    for batch in (1, 2):
        exact = copy.deepcopy(model).double()(x[:batch].double())
        judge.add(f"{name} {batch}", fast(x[:batch]), model(x[:batch]), exact)
    judge.check()
    kernels = []
    for cut in (choose_cut, lambda *problem: None):
        monkeypatch.setattr(separable, "choose_cut", cut)
        rows = profile(lambda: fast(x[:1]), torch.device("cuda"))
        kernels.append(sum(row.kernels for row in rows))
    assert kernels[0] < kernels[1]
