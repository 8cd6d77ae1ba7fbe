"""What can go wrong on a GPU: memory, streams, graphs, sizes, devices, determinism."""

from __future__ import annotations

import gc
import itertools
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from cases import Case, make_tensors
from numerics import Judge, composite, forward_errors, operator
from torch import Tensor

from dwswap import build, depthwise_conv2d
from dwswap.registration import kernel_family

pytestmark = pytest.mark.gpu

FAST = (torch.float32, torch.float16, torch.bfloat16)
HALF = torch.float16
# One problem per family of kernels.
FAMILIES = {
    "channel_columns": Case(HALF, "channels_last", 64, 72, 29, 31, (3, 3), padding=(1, 1)),
    "channel_direct": Case(HALF, "channels_last", 8, 58, 29, 31, (3, 3), padding=(1, 1)),
    "points": Case(HALF, "channels_last", 1, 58, 19, 21, (3, 3), padding=(1, 1)),
    "channel_tiles": Case(HALF, "channels_last", 4, 72, 29, 31, (5, 5), padding=(2, 2)),
    "plane_strips": Case(HALF, "contiguous", 64, 72, 29, 31, (3, 3), padding=(1, 1)),
    "rolling_rows": Case(HALF, "contiguous", 4, 36, 29, 31, (5, 5), (2, 2), (2, 2), multiplier=2),
    "toeplitz": Case(HALF, "contiguous", 4, 24, 29, 31, (9, 9), padding=(4, 4)),
    "general": Case(HALF, "channels_last", 4, 57, 29, 31, (4, 3), padding=(1, 1)),
    "general, float64": Case(torch.float64, "contiguous", 4, 57, 29, 31, (3, 3), padding=(1, 1)),
}
FAMILIES = {
    name: replace(case, bias=True, input_bias=True, input_activation="relu6", activation="silu")
    for name, case in FAMILIES.items()
}
FAMILIES["plane_bands"] = Case(
    HALF,
    "contiguous",
    64,
    72,
    29,
    31,
    (5, 5),
    padding=(2, 2),
    bias=True,
    input_bias=True,
    input_activation="relu6",
    activation="relu",
)
# Nothing on the way in.
FAMILIES["diagonal"] = Case(
    HALF, "channels_last", 64, 72, 29, 31, (5, 5), padding=(2, 2), bias=True, activation="silu"
)
each_family = pytest.mark.parametrize("case", FAMILIES.values(), ids=FAMILIES.keys())


@pytest.mark.parametrize("name", FAMILIES)
def test_the_problems_are_of_their_families(name):
    case = FAMILIES[name]
    given = make_tensors(case, "cuda")
    geometry = (case.stride, case.padding, case.dilation)
    neighbours = (given.input_bias, case.input_activation, case.activation)
    told = kernel_family(given.input, given.weight, given.bias, *geometry, *neighbours)
    assert told == name.split(",")[0]


def test_our_kernels_are_the_ones_that_run():
    """Else every other test of this folder would compare PyTorch with itself."""
    case = FAMILIES["general"]
    operator(case, make_tensors(case, "cuda"))
    assert build.status().loaded, build.status().reason
    assert torch._C._dispatch_has_kernel_for_dispatch_key("dwswap::depthwise_conv2d", "CUDA")


# --- alignment ----------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [*FAST, torch.float64], ids=str)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_every_offset_in_storage(dtype, layout):
    """Vector loads want 4 to 16 bytes, the copy engine 16: whatever does not have that is right."""
    case = Case(dtype, layout, 2, 24, 13, 15, (3, 3), padding=(1, 1))
    input, weight, *_ = make_tensors(case, "cuda", integers=True)
    exact = F.conv2d(input.double(), weight.double(), padding=1, groups=24)
    memory_format = torch.channels_last if layout == "channels_last" else torch.contiguous_format
    laid_out = input.contiguous(memory_format=memory_format)
    wrong = []
    for offset, weight_offset in itertools.product(range(17), (0, 1, 2)):
        buffer = torch.full((input.numel() + 64,), torch.nan, dtype=dtype, device="cuda")
        view = buffer.as_strided(input.shape, laid_out.stride(), offset).copy_(input)
        taps = torch.empty(weight.numel() + 2, dtype=dtype, device="cuda")[weight_offset:]
        taps = taps[: weight.numel()].view(weight.shape).copy_(weight)
        wrong.append((depthwise_conv2d(view, taps, padding=1) != exact).sum())
    assert torch.stack(wrong).tolist() == [0] * len(wrong)


@pytest.mark.parametrize(("channels", "kernel"), [(9, (3, 1)), (3, (3, 7)), (1, (1, 3))])
def test_planes_shorter_than_a_vector(channels, kernel):
    """Images of 1 x 7 halves: a 16-byte vector holds the end of one and the start of the next."""
    padding = (kernel[0] // 2, kernel[1] // 2)
    case = Case(HALF, "contiguous", 3, channels, 1, 7, kernel, padding=padding, input_bias=True)
    given = make_tensors(case, "cuda", integers=True)
    exact = composite(case, given.wide(), exact=True)
    assert torch.equal(operator(case, given).double(), exact)


def test_sparse_tensors_are_refused():
    """They have no CUDA kernel of ours, and must not come back to the fallback for ever."""
    weight = torch.ones(2, 1, 3, 3, device="cuda")
    with pytest.raises(TypeError, match="input must be a dense strided tensor"):
        depthwise_conv2d(torch.ones(1, 2, 5, 5, device="cuda").to_sparse(), weight)


# --- sizes --------------------------------------------------------------------------------------


def compare_windows(
    input: Tensor, weight: Tensor, output: Tensor, stride: int, padding: int, dilation: int
) -> None:
    """``output`` against float64, in windows of at most 40 x 40 at corners, edges and in between.

    Each window is computed from its own crop of ``input``, in the first and last two images.
    """
    channels, (height, width) = input.shape[1], input.shape[2:]
    kernel = weight.shape[2]
    groups = sorted({0, channels - 1})
    images = sorted({0, 1, input.shape[0] // 2, input.shape[0] - 2, input.shape[0] - 1})
    places = [sorted({0, max(0, size // 2 - 20), max(0, size - 40)}) for size in output.shape[2:]]
    for n, top, left in itertools.product(images, *places):
        if not 0 <= n < input.shape[0]:
            continue
        ours = output[n, groups, top : top + 40, left : left + 40]
        # What the window reads, with zeros for what lies outside the image.
        first = [at * stride - padding for at in (top, left)]
        last = [
            start + (side - 1) * stride + dilation * (kernel - 1) + 1
            for start, side in zip(first, ours.shape[1:], strict=True)
        ]
        crop = input[
            n,
            groups,
            max(first[0], 0) : min(last[0], height),
            max(first[1], 0) : min(last[1], width),
        ].double()
        border = (
            max(-first[1], 0),
            max(last[1] - width, 0),
            max(-first[0], 0),
            max(last[0] - height, 0),
        )
        exact = F.conv2d(
            F.pad(crop[None], border),
            weight[groups].double(),
            None,
            stride,
            0,
            dilation,
            groups=len(groups),
        )[0]
        # Integer values: every result is exact.
        assert torch.equal(ours.double(), exact), f"image {n}, row {top}, column {left}"


def small_integers(*shape: int, memory_format=torch.contiguous_format, device="cuda") -> Tensor:
    values = torch.empty(shape, dtype=HALF, device=device, memory_format=memory_format)
    return values.random_(-3, 4)


FORMATS = pytest.mark.parametrize(
    "memory_format", [torch.contiguous_format, torch.channels_last], ids=["nchw", "nhwc"]
)


@FORMATS
@pytest.mark.parametrize(
    ("kernel", "stride", "dilation"), [(3, 1, 1), (3, 2, 1), (7, 1, 1), (3, 1, 2)]
)
def test_more_than_2_to_the_31_elements_in_an_image(memory_format, kernel, stride, dilation):
    """PyTorch's own case, 2 x 32800 x 32800 in half: offsets of the last rows exceed 32 bits."""
    input = small_integers(1, 2, 32800, 32800, memory_format=memory_format)
    weight = small_integers(2, 1, kernel, kernel)
    padding = dilation * (kernel // 2)
    output = depthwise_conv2d(input, weight, None, stride, padding, dilation)
    assert output.is_contiguous(memory_format=memory_format)
    compare_windows(input, weight, output, stride, padding, dilation)


@FORMATS
@pytest.mark.parametrize(("channels", "kernel"), [(32, 3), (57, 3), (32, 4)])
def test_more_than_2_to_the_31_elements_in_a_batch(memory_format, channels, kernel):
    images = (1 << 31) // (channels * 36) + 1000
    input = small_integers(images, channels, 6, 6, memory_format=memory_format)
    weight = small_integers(channels, 1, kernel, kernel)
    output = depthwise_conv2d(input, weight, None, 1, 1)
    compare_windows(input, weight, output, 1, 1, 1)


def test_offsets_beyond_2_to_the_31_in_a_small_tensor():
    """Strides of a view can span more than 32 bits, between images, channels, rows or columns."""
    buffer = small_integers((1 << 31) + (1 << 20))
    weight = small_integers(2, 1, 3, 3)
    far = (1 << 31) // 7
    for strides in (
        ((1 << 31), 64, 8, 1),
        (200, (1 << 31), 8, 1),
        (200, 64, far, 1),
        (200, 64, 1, far),
    ):
        input = buffer.as_strided((2, 2, 8, 8), strides)
        exact = F.conv2d(input.double().contiguous(), weight.double(), padding=1, groups=2)
        assert torch.equal(depthwise_conv2d(input, weight, padding=1).double(), exact)


# --- streams and graphs -------------------------------------------------------------------------


@each_family
def test_the_current_stream_is_used(case):
    """A kernel on another stream would read the input before it is written."""
    given = make_tensors(case, "cuda")
    expected = operator(case, given)
    late = given._replace(input=torch.zeros_like(given.input))
    stream = torch.cuda.Stream()
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(100_000_000)
        late.input.copy_(given.input)
        output = operator(case, late)
    stream.synchronize()
    assert torch.equal(output, expected)


@each_family
def test_memory_is_reused_across_streams_only_when_it_is_free(case):
    drawn = [make_tensors(replace(case, seed=seed), "cuda") for seed in range(4)]
    expected = [operator(case, given) for given in drawn]
    streams = [torch.cuda.Stream() for _ in range(4)]
    torch.cuda.synchronize()
    wrong = []
    for _ in range(50):
        for given, stream, result in zip(drawn, streams, expected, strict=True):
            with torch.cuda.stream(stream):
                # Temporary inputs and outputs come and go in the pool of this stream.
                output = operator(case, given.map(torch.clone))
                wrong.append((output != result).sum())
                del output
    torch.cuda.synchronize()
    assert int(torch.stack(wrong).sum()) == 0


@each_family
def test_graph_capture_and_replay_after_an_update_in_place(case):
    given = make_tensors(case, "cuda")
    operator(case, given)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        output = operator(case, given)
    for seed in range(3):
        fresh = make_tensors(replace(case, seed=100 + seed), "cuda")
        for target, source in zip(given, fresh, strict=True):
            if target is not None:
                target.copy_(source)
        output.fill_(torch.nan)
        graph.replay()
        assert torch.equal(output, operator(case, fresh))


def test_graph_capture_of_a_training_step():
    case = replace(FAMILIES["plane_strips"], dtype=torch.float32)
    given = make_tensors(case, "cuda").leaves()

    def step() -> list[Tensor]:
        return list(torch.autograd.grad(operator(case, given).square().sum(), list(given)))

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    with torch.no_grad():
        given.weight.mul_(0.5)
    graph.replay()
    torch.testing.assert_close(captured, step())


# --- determinism --------------------------------------------------------------------------------


@each_family
def test_thousands_of_launches_are_bitwise_equal(case):
    given = make_tensors(case, "cuda")
    first = operator(case, given)
    wrong = torch.zeros((), dtype=torch.int64, device="cuda")
    for _ in range(3000):
        wrong += (operator(case, given) != first).sum()
    assert wrong.item() == 0


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("dtype", FAST, ids=str)
def test_deterministic_algorithms(layout, dtype):
    """Bitwise equal gradients, or PyTorch's refusal."""
    case = replace(FAMILIES["plane_strips"], layout=layout, dtype=dtype)
    given = make_tensors(case, "cuda").leaves()
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    try:
        first = torch.autograd.grad(operator(case, given).sum(), list(given))
        for _ in range(50):
            again = torch.autograd.grad(operator(case, given).sum(), list(given))
            assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    except RuntimeError as error:
        if "does not have a deterministic implementation" not in str(error):
            raise
        # Then PyTorch refuses as well.
        with pytest.raises(RuntimeError, match="does not have a deterministic implementation"):
            torch.autograd.grad(composite(case, given).sum(), list(given))
    finally:
        torch.use_deterministic_algorithms(before)


# --- devices ------------------------------------------------------------------------------------

two_devices = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA GPUs")


@two_devices
@each_family
def test_the_device_of_the_tensors_not_the_current_one(case):
    with torch.cuda.device(0):
        judge = Judge()
        forward_errors(case, "cuda:1", judge)
        judge.check()
        assert operator(case, make_tensors(case, "cuda:1")).device.index == 1
        assert torch.cuda.current_device() == 0


@two_devices
@pytest.mark.parametrize("name", ["weight", "bias", "input_bias"])
def test_tensors_on_two_gpus(name):
    case = FAMILIES["plane_strips"]
    given = make_tensors(case, "cuda:0")
    given = given._replace(**{name: getattr(given, name).to("cuda:1")})
    with pytest.raises((ValueError, RuntimeError), match=f"{name} must be on the input's device"):
        operator(case, given)


@pytest.mark.parametrize("dtype", [torch.int64, torch.int8])
def test_integers_have_no_cuda_convolution(dtype):
    """Neither in PyTorch: an error that names the dtype, and nothing else is broken by it."""
    input = torch.ones(1, 4, 5, 5, dtype=dtype, device="cuda")
    weight = torch.ones(4, 1, 3, 3, dtype=dtype, device="cuda")
    with pytest.raises(RuntimeError):
        F.conv2d(input, weight, groups=4)
    with pytest.raises(RuntimeError, match=r"(?i)long|int64|char|int8"):
        depthwise_conv2d(input, weight)
    assert depthwise_conv2d(input.float(), weight.float()).sum().item() == 4 * 9 * 9


# --- memory -------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_out_of_memory_is_an_ordinary_error(layout):
    case = replace(FAMILIES["plane_strips"], layout=layout, bias=False, input_bias=False)
    given = make_tensors(case, "cuda")
    expected = operator(case, given)
    # More than a terabyte of output.
    with pytest.raises(torch.OutOfMemoryError):
        depthwise_conv2d(given.input, given.weight, padding=50_000)
    # As compiled graphs call it.
    with pytest.raises(torch.OutOfMemoryError):
        torch.ops.dwswap.depthwise_conv2d(
            given.input, given.weight, None, [1, 1], [50_000, 50_000], [1, 1]
        )
    assert torch.equal(operator(case, given), expected)


@each_family
def test_no_memory_but_the_output(case):
    """Nothing outside the caching allocator, and no workspace that grows."""
    given = make_tensors(case, "cuda")
    # Contiguous weights need no copy.
    given = given._replace(weight=given.weight.contiguous())
    operator(case, given)
    gc.collect()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    output = operator(case, given)
    size = output.numel() * output.element_size()
    # The allocator rounds to 512 bytes, and from 1 MiB on may hand out 1 MiB more.
    rounding = 512 if size < 1 << 20 else 1 << 20
    assert torch.cuda.max_memory_allocated() - before < size + rounding
    del output

    def taken_from_the_gpu() -> int:
        free = torch.cuda.mem_get_info()[0]
        for _ in range(100):
            operator(case, given)
        torch.cuda.synchronize()
        assert torch.cuda.memory_allocated() == before
        return free - torch.cuda.mem_get_info()[0]

    # Others may use the GPU, too; what the operator takes it takes every time.
    assert min(taken_from_the_gpu() for _ in range(5)) <= 32 << 20
