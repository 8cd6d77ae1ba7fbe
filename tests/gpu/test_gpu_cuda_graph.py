"""optimize(cuda_graph=True) on a GPU: numbers, streams, threads, memory, faults, time."""

from __future__ import annotations

import gc
import threading
import warnings
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import torchvision
from tiny_models import Unfusable, depthwise
from torch import Tensor, fx, nn

import dwswap
from dwswap import CudaGraphOptions
from dwswap.bench.timing import time_side_by_side
from dwswap.cuda_graph_module import CudaGraphModule

pytestmark = pytest.mark.gpu

FORMATS = pytest.mark.parametrize(
    "memory_format", [torch.contiguous_format, torch.channels_last], ids=["nchw", "nhwc"]
)
MIB = 1 << 20
FOLDED = "features.18.0_folded"
"""Where the last convolution of mobilenet() has its weights, with BatchNorm folded into them."""


@pytest.fixture(autouse=True)
def _modes() -> Iterator[None]:
    with torch.no_grad(), warnings.catch_warnings():
        warnings.filterwarnings("error", message="dwswap")
        yield
    gc.collect()
    torch.cuda.empty_cache()


def mobilenet(dtype: torch.dtype = torch.float16) -> nn.Module:
    """With statistics of BatchNorm as if trained: with the initial ones float16 gives zeros."""
    torch.manual_seed(0)
    model = torchvision.models.mobilenet_v2(weights=None)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = None  # the average of all batches
            nn.init.uniform_(module.bias, -0.5, 0.5)
    model.train()(torch.randn(8, 3, 96, 96))
    return model.eval().cuda().to(dtype)


def both(model: nn.Module, **options: Any) -> tuple[nn.Module, Any]:
    """The optimized model without and with CUDA graphs; they share their weights."""
    plain = dwswap.optimize(model)
    fast = dwswap.optimize(plain, inplace=True, cuda_graph=CudaGraphOptions(**options))
    assert isinstance(fast, CudaGraphModule)
    return plain, fast


def images(batch: int, size: int = 96, dtype: torch.dtype = torch.float16, seed: int = 0) -> Tensor:
    generator = torch.Generator("cuda").manual_seed(seed)
    shape = (batch, 3, size, size)
    return torch.randn(shape, device="cuda", generator=generator).to(dtype)


def captured(fast: Any) -> int:
    return len(fast.cuda_graphs)


# --- numbers ------------------------------------------------------------------------------------


@FORMATS
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_equal_to_the_graph_without_capture(dtype, memory_format):
    plain, fast = both(mobilenet(dtype).to(memory_format=memory_format))
    for turn in range(3):
        for batch in (1, 2, 5, 32):
            x = images(batch, dtype=dtype, seed=turn).to(memory_format=memory_format)
            assert torch.equal(fast(x), plain(x)), (turn, batch)
    assert captured(fast) == 4


def test_views_and_other_strides():
    plain, fast = both(mobilenet())
    buffer = images(4, 128)
    for x in (buffer[1:3], buffer[:, :, 5:101, 3:99], buffer.transpose(2, 3), buffer[::2]):
        for _ in range(2):
            torch.testing.assert_close(fast(x), plain(x), rtol=1e-2, atol=1e-3)
    assert captured(fast) == 4


@pytest.mark.parametrize("outer", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("inner", [torch.no_grad, torch.inference_mode])
def test_every_mode_without_gradients(outer, inner):
    plain, fast = both(mobilenet())
    with outer():
        x = images(2)
        for _ in range(2):
            assert torch.equal(fast(x), plain(x))
    with inner():
        x = images(2, seed=1)
        result = fast(x)
        assert torch.equal(result, plain(x))
        assert result.is_inference() == (inner is torch.inference_mode)
    assert captured(fast) == 1


def test_gradients_run_as_ever():
    _, fast = both(mobilenet(torch.float32))
    with torch.enable_grad(), pytest.warns(RuntimeWarning, match="while gradients are recorded"):
        result = fast(images(2, dtype=torch.float32))
    assert result.requires_grad
    assert captured(fast) == 0


def test_autocast():
    plain, fast = both(mobilenet(torch.float32))
    x = images(2, dtype=torch.float32)
    for _ in range(3):
        assert torch.equal(fast(x), plain(x))
        with torch.autocast("cuda", torch.float16):
            result = fast(x)
            assert result.dtype == torch.float16
            assert torch.equal(result, plain(x))
    assert captured(fast) == 2
    for p in fast.parameters():
        p.mul_(0.5)
    with torch.autocast("cuda", torch.float16):
        assert torch.equal(fast(x), plain(x))


class Dropping(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = depthwise(3)

    def forward(self, x: Tensor, y: Tensor) -> dict[str, Any]:
        z = F.dropout(self.conv(x) + y, 0.5, training=True)
        return {"z": z, "pair": (z, z.mean())}


def test_random_numbers_are_those_of_a_call_without_capture():
    plain, fast = both(Dropping().eval().cuda())
    x = images(2, dtype=torch.float32)
    for turn in range(3):
        torch.manual_seed(turn)
        expected = [plain(x, x + 1) for _ in range(2)]
        torch.manual_seed(turn)
        for result, other in zip([fast(x, x + 1) for _ in range(2)], expected, strict=True):
            assert torch.equal(result["z"], other["z"])
            assert torch.equal(result["pair"][1], other["pair"][1])
            assert result["pair"][0] is result["z"]
    assert captured(fast) == 1


# --- outputs and weights ------------------------------------------------------------------------


def test_outputs_outlive_the_next_call():
    plain, fast = both(mobilenet())
    inputs = [images(2, seed=seed) for seed in range(6)]
    results = [fast(x) for x in inputs]
    assert all(torch.equal(fast(x), y) for x, y in zip(inputs, results, strict=True))
    assert all(torch.equal(plain(x), y) for x, y in zip(inputs, results, strict=True))


def test_buffers_for_those_who_want_no_copy():
    plain, fast = both(mobilenet(), clone_outputs=False)
    x, y = images(2), images(2, seed=1)
    fast(x)
    first = fast(x)
    assert torch.equal(first, plain(x))
    assert fast(y) is first
    assert torch.equal(first, plain(y))


def test_weights_that_change_in_place():
    plain, fast = both(mobilenet())
    x = images(2)
    for _ in range(3):
        before = fast(x)
        for p in fast.parameters():
            p.mul_(0.9)
        assert torch.equal(fast(x), plain(x))
        assert not torch.equal(fast(x), before)
    # What was folded is a weight like any other.
    names = [name for name, _ in fast.named_parameters() if name.startswith("features.18.0_")]
    assert len(names) == 2
    for name in names:
        before = fast(x)
        fast.get_parameter(name).add_(0.25)
        assert torch.equal(fast(x), plain(x))
        assert not torch.equal(fast(x), before)
    assert captured(fast) == 1


def _new_folded(fast: Any) -> None:
    holder = fast.get_submodule(FOLDED)
    holder.weight = nn.Parameter(holder.weight * 2)


def _new(fast: Any) -> None:
    linear = fast.get_submodule("classifier.1")
    linear.weight = nn.Parameter(linear.weight * 2)


def _data(fast: Any) -> None:
    for p in fast.parameters():
        p.data = p.data * 0.9
    gc.collect()
    torch.cuda.empty_cache()


def _assign(fast: Any) -> None:
    fast.load_state_dict({k: v * 0.9 for k, v in fast.state_dict().items()}, assign=True)


def _away_and_back(fast: Any) -> None:
    fast.get_submodule("classifier.1").cpu()
    torch.cuda.empty_cache()
    fast.get_submodule("classifier.1").weight.mul_(2)
    fast.get_submodule("classifier.1").cuda()


@pytest.mark.parametrize(
    "change",
    [
        *(_new, _new_folded, _data, _assign, _away_and_back),
        lambda fast: fast.float().mul_weights(0.5).half(),
    ],
    ids=["new", "new folded", "data", "assign", "away and back", "to"],
)
def test_weights_that_are_replaced(change, monkeypatch):
    def mul_weights(self: Any, factor: float) -> Any:
        for p in self.parameters():
            p.mul_(factor)
        return self

    monkeypatch.setattr(CudaGraphModule, "mul_weights", mul_weights, raising=False)
    _, fast = both(mobilenet())
    x = images(2)
    fast(x)
    before = fast(x)
    change(fast)
    expected = dwswap.optimize(fast)(x)
    assert not torch.equal(before, expected)
    for _ in range(3):
        assert torch.equal(fast(x), expected)
    assert captured(fast) == 1


def test_a_call_inside_the_callers_own_capture():
    plain, fast = both(mobilenet())
    x = images(2)
    for _ in range(2):
        fast(x)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = fast(x)
    x.copy_(images(2, seed=1))
    graph.replay()
    assert torch.equal(result, plain(x))
    assert torch.equal(fast(x), result)


# --- streams and threads ------------------------------------------------------------------------


def test_streams():
    plain, fast = both(mobilenet())
    inputs = [images(1 + seed % 2, seed=seed) for seed in range(8)]
    expected = [plain(x) for x in inputs]
    streams = [torch.cuda.Stream() for _ in range(4)]
    torch.cuda.synchronize()
    wrong = []
    for turn in range(60):
        stream = streams[turn % 4]
        with torch.cuda.stream(stream):
            if turn % 7 == 0:
                torch.cuda._sleep(1_000_000)
            for x, y in zip(inputs, expected, strict=True):
                # A temporary input, whose memory is used again at once.
                wrong.append((fast(x.clone()) != y).sum())
    torch.cuda.synchronize()
    assert int(torch.stack(wrong).sum()) == 0


def test_the_current_stream_is_used():
    plain, fast = both(mobilenet())
    x = images(2)
    for _ in range(2):
        fast(x)
    late = torch.zeros_like(x)
    stream = torch.cuda.Stream()
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(100_000_000)
        late.copy_(x)
        result = fast(late)
    stream.synchronize()
    assert torch.equal(result, plain(x))


def test_eight_threads_and_two_models():
    models = [both(mobilenet(), max_signatures=2) for _ in range(2)]
    inputs = [images(1 + n % 3, seed=n) for n in range(8)]
    expected = [models[n % 2][0](x) for n, x in enumerate(inputs)]
    torch.cuda.synchronize()
    wrong: list[Any] = []

    def work(n: int) -> None:
        try:
            fast = models[n % 2][1]
            with torch.inference_mode(), torch.cuda.stream(torch.cuda.Stream()):
                for _ in range(12):
                    if not torch.equal(fast(inputs[n].clone()), expected[n]):
                        wrong.append(n)
        except Exception as error:
            wrong.append(error)

    threads = [threading.Thread(target=work, args=(n,)) for n in range(8)]
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert not wrong
    # More signatures than are kept; but no capture failed.
    assert not [w for w in seen if "run without a CUDA graph" in str(w.message)]


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA GPUs")
def test_the_device_of_the_tensors_not_the_current_one():
    plain, fast = both(mobilenet().to("cuda:1"))
    x = images(2).to("cuda:1")
    for _ in range(3):
        assert torch.equal(fast(x), plain(x))
    assert captured(fast) == 1
    assert torch.cuda.current_device() == 0


# --- memory -------------------------------------------------------------------------------------


def memory() -> tuple[int, int]:
    """MiB that are allocated and reserved, with nothing cached."""
    gc.collect()
    torch.cuda.synchronize()
    torch._C._cuda_clearCublasWorkspaces()
    torch.cuda.empty_cache()
    return torch.cuda.memory_allocated() // MIB, torch.cuda.memory_reserved() // MIB


def test_signatures_are_bounded_and_memory_is_given_back():
    plain, fast = both(mobilenet(), max_signatures=2)
    plain(images(8, 224))
    before = memory()
    reserved = []
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="dwswap: 8 CUDA graphs were captured")
        for _ in range(3):
            for batch in (2, 4, 6, 8):
                fast(images(batch, 224))
                assert captured(fast) <= 2
            reserved.append(memory()[1])
    assert reserved[2] <= reserved[0] + 64
    fast.release_cuda_graphs()
    after = memory()
    assert after[0] <= before[0] + 1
    assert after[1] <= before[1] + 4
    assert torch.equal(fast(images(2)), plain(images(2)))


def test_a_model_that_is_gone_leaves_nothing():
    plain, fast = both(mobilenet())
    plain(images(8, 224))
    before = memory()
    for batch in (2, 8):
        for _ in range(2):
            fast(images(batch, 224))
    assert memory()[1] > before[1]
    fast.__dict__["_dwswap_cuda_graphs"] = None
    after = memory()
    assert after[0] <= before[0] + 1
    assert after[1] <= before[1] + 4


def test_peak_memory():
    """Of the first call, which captures, as well as of replays."""
    plain, fast = both(mobilenet())
    x = images(64, 224)

    def peak(subject: nn.Module) -> int:
        memory()
        torch.cuda.reset_peak_memory_stats()
        subject(x)
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated()

    plain(x)
    eager = peak(plain)
    extra = x.nbytes + 3 * 64 * 1000 * 2
    # cuBLAS has its workspace on two streams: 32 MiB each on Hopper.
    assert peak(fast) <= eager + extra + 80 * MIB
    assert peak(fast) <= eager + extra


# --- faults -------------------------------------------------------------------------------------


@fx.wrap
def waits_unseen(x: Tensor) -> Tensor:
    torch.cuda.synchronize()
    return x


class Waiting(nn.Module):
    def __init__(self, how: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.conv = depthwise(3)
        self.how = how

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x) * self.how(x)


@pytest.mark.parametrize(
    ("how", "cause"),
    [
        (lambda x: x.sum().item(), "_local_scalar_dense.default waits for the GPU"),
        (lambda x: x.sum().cpu().cuda(), "has a result on cpu"),
        (lambda x: waits_unseen(x), "Error: CUDA error"),
    ],
    ids=["item", "cpu", "synchronize"],
)
def test_what_cannot_be_captured_runs_as_ever(how, cause):
    plain, fast = both(Waiting(how).eval().cuda())
    other_plain, other = both(mobilenet())
    before = memory()
    stream = torch.cuda.current_stream()
    x = images(2, dtype=torch.float32)
    with pytest.warns(RuntimeWarning, match=cause) as seen:
        results = [fast(x) for _ in range(3)]
    assert len(seen) == 1
    assert all(torch.equal(result, plain(x)) for result in results)
    assert captured(fast) == 0
    # Nothing is lost: the stream, the random generator, the allocator, other captures.
    assert torch.cuda.current_stream() == stream
    assert torch.randn(100, device="cuda").std() > 0
    del results
    after = memory()
    assert after[0] <= before[0] + 1
    assert after[1] <= before[1] + 4
    for _ in range(2):
        assert torch.equal(other(images(2)), other_plain(images(2)))
    assert captured(other) == 1


def test_a_model_that_changes_its_input():
    plain, fast = both(nn.Sequential(nn.ReLU(inplace=True), depthwise(3)).eval().cuda())
    with pytest.warns(RuntimeWarning, match="it changes its input in place"):
        fast(images(2, dtype=torch.float32))
    x, y = (images(2, dtype=torch.float32) for _ in range(2))
    assert torch.equal(fast(x), plain(y))
    assert torch.equal(x, y)
    assert (x >= 0).all()


def test_out_of_memory_in_the_capture():
    plain, fast = both(nn.Sequential(depthwise(8)).eval().cuda())
    x = torch.randn(1, 8, 4096, 4096, device="cuda")
    expected = plain(x)
    total = torch.cuda.get_device_properties(0).total_memory
    memory()
    # Room for one more output, but not for a copy of the input as well.
    limit = torch.cuda.memory_reserved() + x.nbytes * 3 // 2
    torch.cuda.set_per_process_memory_fraction(limit / total)
    try:
        with pytest.warns(RuntimeWarning, match="OutOfMemoryError"):
            result = fast(x)
        assert torch.equal(result[..., 0], expected[..., 0])
        del result
        assert torch.equal(fast(x)[..., 0], expected[..., 0])
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)


# --- time ---------------------------------------------------------------------------------------


def test_batch_1_is_faster():
    plain, fast = both(mobilenet())
    x = images(1, 224)
    eager, replayed = time_side_by_side([partial(plain, x), partial(fast, x)], "cuda", budget=1)
    assert replayed.microseconds < eager.microseconds / 2, (replayed, eager)


def test_the_smallest_model_is_hardly_slower():
    """With four kernels nothing but the host's time is left, of both."""
    plain, fast = both(Unfusable().eval().cuda())
    x = images(1, 8, torch.float32)
    eager, replayed = time_side_by_side([partial(plain, x), partial(fast, x)], "cuda", budget=0.5)
    assert replayed.microseconds < 1.2 * eager.microseconds, (replayed, eager)
