"""Timing on a GPU: graph replays, rotating buffers, and a copy floor that is believable."""

from __future__ import annotations

from functools import partial

import pytest
import torch

from dwswap.bench.timing import buffers_needed, time_calls, time_copy, time_launches

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
