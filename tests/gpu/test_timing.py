"""Timing on a GPU: graph replays, rotating buffers, and a copy floor that is believable."""

from __future__ import annotations

import time
from functools import partial

import pytest
import torch

from dwswap.bench.gradients import GradientBench
from dwswap.bench.layers import LayerBench
from dwswap.bench.other_code import OtherCode
from dwswap.bench.shapes import select, torchvision_shapes
from dwswap.bench.timing import GraphMemory, buffers_needed, time_calls, time_copy, time_launches

pytestmark = pytest.mark.gpu


def test_a_launch_costs_the_same_however_many_share_a_graph():
    x = torch.rand(1 << 24, device="cuda")
    copies = [x.clone() for _ in range(4)]
    one = time_launches([partial(torch.relu, x)], "cuda")
    four = time_launches([partial(torch.relu, copy) for copy in copies], "cuda")
    assert one.method == "cuda graph of rotating buffers"
    assert 0.5 < one.microseconds / four.microseconds < 2


def test_copy_floor_is_proportional_to_large_sizes():
    small, large = time_copy(1 << 28, "cuda"), time_copy(1 << 30, "cuda")
    assert 3 < large.microseconds / small.microseconds < 5


def test_copy_floor_is_no_faster_than_memory():
    """Faster than 20 TB/s would mean that caches were measured, or nothing at all."""
    size = 8_000_000
    assert buffers_needed(size) > 1
    assert time_copy(size, "cuda").microseconds > size / 20e12 * 1e6


def test_calls_include_the_launch():
    x = torch.rand(16, device="cuda")
    call = time_calls(lambda: torch.relu(x), "cuda")
    launch = time_launches([lambda: torch.relu(x)] * 24, "cuda")
    assert call.microseconds > launch.microseconds


def test_launches_leave_the_current_stream_alone():
    before = torch.cuda.current_stream()
    time_launches([lambda: torch.ones(4, device="cuda")], "cuda")
    assert torch.cuda.current_stream() == before


def test_other_code_takes_the_time_of_others_only_where_it_is_missed():
    """A launch of little code takes as long as without it."""
    sources = [torch.rand(1 << 22, device="cuda") for _ in range(12)]
    launches = [partial(torch.relu, source) for source in sources]
    other = OtherCode(torch.device("cuda", torch.cuda.current_device()))
    assert 2 < other.microseconds < 50
    warm = time_launches(launches, "cuda").microseconds
    cold = time_launches(launches, "cuda", between=other).microseconds
    assert -0.5 < cold - warm < 3


@pytest.mark.parametrize("family", ["plane_strips", "channel_columns"])
def test_code_of_the_usual_layers_is_fetched_in_time(family):
    """In a network every kernel's code is fetched anew. Far from the kernel's beginning that takes
    5 to 10 us, as it did in plane_strips while one kernel had the code of all activations."""
    device = torch.device("cuda", torch.cuda.current_device())
    layout = "contiguous" if family.startswith("plane") else "channels_last"
    (shape,) = select(torchvision_shapes(), "channels=384,height=14,kernel=3,stride=1")
    bench = LayerBench(device, batch=64, activation="relu6", budget=0.003)
    found, launches = bench.launches(shape, "float16", layout)
    assert found == family
    other = OtherCode(device)
    warm = time_launches(launches, device).microseconds
    cold = time_launches(launches, device, between=other).microseconds
    assert cold - warm < 2


def test_memory_of_graphs_is_used_again_and_given_back():
    sources = [torch.rand(1 << 22, device="cuda") for _ in range(4)]
    launches = [partial(torch.relu, source) for source in sources]
    torch.cuda.empty_cache()
    before = torch.cuda.memory_reserved()
    memory = GraphMemory(torch.device("cuda", torch.cuda.current_device()))
    with_it = time_launches(launches, "cuda", memory=memory)
    grown = torch.cuda.memory_reserved()
    for _ in range(3):
        time_launches(launches, "cuda", budget=0.001, memory=memory)
    assert torch.cuda.memory_reserved() == grown > before
    del memory
    torch.cuda.empty_cache()
    assert torch.cuda.memory_reserved() == before
    without = time_launches(launches, "cuda")
    assert 0.7 < with_it.microseconds / without.microseconds < 1.4


@pytest.mark.parametrize("make", [LayerBench, GradientBench])
def test_planned_kernels_run_at_once(make):
    """What is planned takes no plan later, and nothing has run until then."""
    (shape,) = (s for s in torchvision_shapes() if s.index == 40)
    bench = make(torch.device("cuda", torch.cuda.current_device()), batch=61, budget=0.001)
    bench.plan(shape, "float16", "channels_last")  # with what the first call of all does
    bench.batch = 67
    torch.cuda.synchronize()
    seconds = []
    for _ in range(2):
        start = time.perf_counter()
        bench.plan(shape, "float16", "channels_last")
        seconds.append(time.perf_counter() - start)
    assert seconds[1] < seconds[0] / 4, seconds
    assert bench.measure(shape, "float16", "channels_last").passed
