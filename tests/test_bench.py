"""Timing and records. The GPU half is in tests/gpu."""

from __future__ import annotations

import json
import time
from contextlib import nullcontext
from functools import partial

import pytest
import torch

from dwswap.bench.other_code import OtherCode
from dwswap.bench.records import record, write_json
from dwswap.bench.timing import (
    MOST_BUFFERS,
    ROTATION_BYTES,
    Timing,
    buffers_needed,
    time_calls,
    time_copy,
    time_launches,
    time_side_by_side,
)


@pytest.mark.parametrize(
    ("size", "count"),
    [
        (1, MOST_BUFFERS),
        (ROTATION_BYTES // MOST_BUFFERS, MOST_BUFFERS),
        (ROTATION_BYTES // 2, 2),
        (ROTATION_BYTES // 2 - 1, 3),
        (ROTATION_BYTES, 1),
        (10 * ROTATION_BYTES, 1),
    ],
)
def test_buffers_needed(size, count):
    assert buffers_needed(size) == count


def test_buffers_needed_refuses_nothing():
    with pytest.raises(ValueError, match="bytes_per_launch must be at least 1, got 0"):
        buffers_needed(0)


@pytest.mark.parametrize(
    "measure", [time_calls, lambda call, *a, **k: time_launches([call], *a, **k)]
)
def test_cpu_time_is_the_time_of_one_call(measure):
    timing = measure(partial(time.sleep, 0.002), "cpu", budget=0.02)
    assert 2_000 <= timing.fastest <= timing.microseconds <= timing.slowest
    assert timing.microseconds < 20_000
    assert timing.samples >= 5
    assert timing.to_dict()["method"] == "perf_counter"


def test_launches_take_turns():
    calls = []
    time_launches([partial(calls.append, name) for name in "abc"], "cpu", budget=0.0)
    assert calls[1:] == list("abcab")


def test_what_ran_between_launches_is_taken_off():
    timing = Timing(9.0, 8.0, 12.0, 5, "cuda graph of rotating buffers")
    assert timing.without(6.0) == Timing(3.0, 2.0, 6.0, 5, "cuda graph of rotating buffers")


def test_other_code_needs_a_compiler(monkeypatch):
    monkeypatch.delattr(torch.cuda, "_compile_kernel", raising=False)
    with pytest.raises(RuntimeError, match=r"torch.cuda._compile_kernel, got \d"):
        OtherCode(torch.device("cuda", 0))


def test_other_code_needs_nvrtc(monkeypatch):
    def compile_kernel(source, name):
        raise OSError("Could not find any NVRTC library")

    monkeypatch.setattr(torch.cuda, "_compile_kernel", compile_kernel, raising=False)
    monkeypatch.setattr(torch.cuda, "device", lambda device: nullcontext())
    with pytest.raises(RuntimeError, match="needs NVRTC: Could not find"):
        OtherCode(torch.device("cuda", 0))


def test_launches_must_exist():
    with pytest.raises(ValueError, match="launches must hold at least one"):
        time_launches([], "cpu")


def test_timing_records_no_graph():
    x = torch.ones(3, requires_grad=True)
    results = []
    time_calls(lambda: results.append(x * 2), "cpu", budget=0.0)
    assert not any(result.requires_grad for result in results)


def test_side_by_side_takes_the_best_round():
    """A pause in one round of one call leaves no trace."""
    turns = []

    def first():
        turns.append("first")
        if turns.count("first") <= 6:  # the trial call and the five samples of the first round
            time.sleep(0.02)

    one, two = time_side_by_side([first, partial(turns.append, "second")], "cpu", budget=0.0)
    assert turns[:12] == ["first"] * 6 + ["second"] * 6
    assert one.microseconds < 20_000
    assert two.microseconds < 20_000


def test_copy_floor_grows_with_the_bytes():
    small = time_copy(2_000_000, "cpu", budget=0.02)
    large = time_copy(400_000_000, "cpu", budget=0.02)
    assert large.fastest > small.fastest


def test_write_json_is_all_or_nothing(tmp_path):
    path = tmp_path / "new" / "record.json"
    write_json(path, record("test", value=[1, 2]))
    assert json.loads(path.read_text())["value"] == [1, 2]
    with pytest.raises(TypeError):
        write_json(path, {"value": object()})
    assert json.loads(path.read_text())["value"] == [1, 2]
    assert [p.name for p in path.parent.iterdir()] == ["record.json"]


def test_write_json_leaves_nothing_behind_on_failure(tmp_path):
    (tmp_path / "record.json").mkdir()
    with pytest.raises(OSError, match="record"):
        write_json(tmp_path / "record.json", {})
    assert [p.name for p in tmp_path.iterdir()] == ["record.json"]


def test_record_says_where_it_was_made():
    made = record("test")
    assert made["kind"] == "test"
    assert made["environment"]["torch"] == torch.__version__
    assert made["recorded"].endswith("+00:00")
