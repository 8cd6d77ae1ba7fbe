"""Measurements in a process per device. The benches are fakes, and the devices all the CPU."""

from __future__ import annotations

import dataclasses
import json
import multiprocessing
import os
import signal
import time
from contextlib import closing
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from test_bench_layers import CPU, SHAPE, command, row

from dwswap.bench import side_by_side
from dwswap.bench.layer_record import LayerRecord
from dwswap.bench.layer_results import LayerResult, Skipped
from dwswap.bench.layers import LayerBench
from dwswap.bench.side_by_side import WorkerDied, WorkerFailed, measure_side_by_side
from dwswap.cli import bench_layers, main
from dwswap.precision import algorithms, use_algorithms

JOBS = [
    (dataclasses.replace(SHAPE, index=index, channels=c, out_channels=c), dtype, "contiguous")
    for dtype in ("float32", "float16")
    for index, c in enumerate((3, 4, 3, 5, 6, 4))
]
KEYS = [(shape.index, dtype, layout) for shape, dtype, layout in JOBS]


class FakeBench(LayerBench):
    """Answers with the process that it runs in and the switches that it finds there.

    Args:
        bad: what happens at shape 4: "raise", "kill", or nothing.
        real: shape 5 is measured. Not in forked processes: OpenMP may hang there.
    """

    def __init__(self, device: torch.device, *, bad: str = "", real: bool = False) -> None:
        super().__init__(device, batch=1, budget=0.0)
        self.bad = bad
        self.real = real

    def measure(self, shape, dtype, layout) -> LayerResult | Skipped:
        if shape.index == 5 and self.real:
            return super().measure(shape, dtype, layout)
        if shape.index == 4 and self.bad == "raise":
            raise ArithmeticError("shape 4 is bad")
        if shape.index == 4 and self.bad == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        facts = {
            **algorithms(),
            "pid": os.getpid(),
            "switch": os.environ.get("DWSWAP_FAMILY"),
            "ctrl_c": signal.getsignal(signal.SIGINT) != signal.SIG_IGN,
        }
        return Skipped(shape.index, dtype, layout, [], json.dumps(facts))


def no_bench(device: torch.device) -> FakeBench:
    raise ValueError(f"no bench of {device}")


@pytest.fixture
def forked(monkeypatch):
    """Processes that need not import torch again: seconds less. Without CUDA that is allowed."""
    original = multiprocessing.get_context
    monkeypatch.setattr(multiprocessing, "get_context", lambda method: original("fork"))


def no_child_is_left() -> bool:
    return not multiprocessing.active_children()


@pytest.mark.slow
def test_every_job_is_measured_once_with_the_switches_of_the_parent(monkeypatch):
    monkeypatch.setenv("DWSWAP_FAMILY", "general")
    before = algorithms()
    use_algorithms({**before, "float32": ["ieee"] * 3, "deterministic": True, "warn_only": True})
    ctrl_c = signal.getsignal(signal.SIGINT)
    torch.backends.cudnn.benchmark = True
    chosen = algorithms()
    try:
        make = partial(FakeBench, real=True)
        found = list(measure_side_by_side(make, [CPU, CPU], JOBS))
    finally:
        use_algorithms(before)
    assert sorted(entry.key for entry in found) == sorted(KEYS)
    assert all(entry.passed for entry in found if entry.key[0] == 5)
    facts = [json.loads(entry.reason) for entry in found if entry.key[0] != 5]
    assert len({fact.pop("pid") for fact in facts} - {os.getpid()}) == 2
    assert facts == [{**chosen, "switch": "general", "ctrl_c": False}] * 10
    assert signal.getsignal(signal.SIGINT) == ctrl_c
    assert chosen != before
    assert no_child_is_left()


@pytest.mark.parametrize(("devices", "jobs"), [([CPU], JOBS), ([CPU, CPU], JOBS[:1]), ([CPU], [])])
def test_one_device_or_one_job_starts_no_process(devices, jobs):
    found = list(measure_side_by_side(FakeBench, devices, jobs))
    assert [entry.key for entry in found] == KEYS[: len(jobs)]
    assert {json.loads(entry.reason)["pid"] for entry in found} <= {os.getpid()}


def test_no_devices():
    with pytest.raises(ValueError, match="devices must hold at least one device, got none"):
        next(measure_side_by_side(FakeBench, [], JOBS))


def test_an_error_comes_with_its_traceback(forked):
    make = partial(FakeBench, bad="raise")
    with pytest.raises(WorkerFailed, match="a process that measures on cpu failed") as caught:
        list(measure_side_by_side(make, [CPU, CPU], JOBS))
    assert "ArithmeticError: shape 4 is bad" in str(caught.value)
    assert "test_side_by_side.py" in str(caught.value)
    assert no_child_is_left()


def test_a_bench_that_cannot_be_made(forked):
    with pytest.raises(WorkerFailed, match="ValueError: no bench of cpu"):
        list(measure_side_by_side(no_bench, [CPU, CPU], JOBS))


def test_a_killed_process_is_noticed(forked):
    make = partial(FakeBench, bad="kill")
    found = []
    with pytest.raises(WorkerDied, match=r"killed by signal 9 \(Killed\), at shape 4 \(6x9x7 k3"):
        found.extend(measure_side_by_side(make, [CPU, CPU], JOBS))
    assert no_child_is_left()


def test_closing_ends_the_processes(forked):
    with closing(measure_side_by_side(FakeBench, [CPU, CPU], JOBS)) as entries:
        next(entries)
        assert len(multiprocessing.active_children()) == 2
    assert no_child_is_left()


class FakeWorker:
    """Works as fast as it is asked to."""

    def __init__(self, rate: int) -> None:
        self.rate = rate
        self.job: side_by_side.Job | None = None
        self.done: list[side_by_side.Job] = []
        self.pipe = self
        self.turn = 0

    def send(self, job) -> None:
        assert self.job is None
        self.job = job

    def poll(self) -> bool:
        self.turn += 1
        return self.turn % self.rate == 0

    def receive(self):
        self.done.append(self.job)
        self.job = None
        return self.done[-1]


def test_images_of_one_size_stay_with_one_process(monkeypatch):
    """So that copies are measured once; who is done first takes over from the others."""
    monkeypatch.setattr(side_by_side, "wait", lambda pipes: pipes)
    even = [FakeWorker(1), FakeWorker(1)]
    assert len(list(side_by_side._results(even, JOBS))) == len(JOBS)
    sizes = [{shape.channels for shape, _, _ in worker.done} for worker in even]
    assert not sizes[0] & sizes[1]
    dtypes = [[dtype for _, dtype, _ in worker.done] for worker in even]
    assert all(order == sorted(order, reverse=True) for order in dtypes)

    uneven = [FakeWorker(1), FakeWorker(1000)]
    found = list(side_by_side._results(uneven, JOBS))
    assert sorted(found, key=JOBS.index) == JOBS
    assert len(uneven[1].done) == 1


@pytest.mark.parametrize(
    ("gpus", "jobs", "cores", "most", "expected"),
    [
        (1, 1, 16, 5, [0]),
        (1, 15, 16, 5, [0]),
        (1, 16, 16, 5, [0, 0]),
        (1, 368, 16, 5, [0] * 5),
        (1, 368, 16, 3, [0] * 3),
        (1, 368, 16, 0, [0]),
        (1, 368, 2, 5, [0, 0]),
        (2, 1, 32, 5, [0]),
        (2, 4, 32, 5, [0, 1]),
        (2, 368, 32, 5, [0, 1] * 5),
        (2, 368, 6, 5, [0, 1] * 3),
        (4, 368, 2, 5, [0, 1, 2, 3]),
    ],
)
def test_processes_of_gpus(monkeypatch, gpus, jobs, cores, most, expected):
    """As many as there is work and cores for, and none without a job."""
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: set(range(cores)))
    devices = [torch.device("cuda", index) for index in range(gpus)]
    assert side_by_side._places(devices, jobs, most) == [devices[index] for index in expected]


@pytest.mark.parametrize(
    ("free", "needed", "expected"),
    [
        ((16,), 34, 0),
        ((80,), 34, 2),
        ((141,), 34, 4),
        ((141,), 134, 1),
        ((141,), 9, 5),
        ((141, 80), 34, 2),
    ],
)
def test_most_processes_of_gpus(monkeypatch, free, needed, expected):
    """As many as have memory for the largest job, on the GPU with the least of it."""
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (free[device.index] * 10**9, 0))
    sizes = iter([needed * 10**9, *[10**9] * len(JOBS)])
    bench = SimpleNamespace(needed_bytes=lambda shape, dtype: next(sizes))
    devices = [torch.device("cuda", index) for index in range(len(free))]
    assert side_by_side._most_processes(lambda device: bench, devices, JOBS) == expected


def test_a_cpu_has_one_process():
    assert side_by_side._most_processes(FakeBench, [CPU], JOBS) == 1


class TurnBench(FakeBench):
    """Writes when it plans and measures."""

    def plan(self, shape, dtype, layout) -> None:
        self.note("plan", shape, dtype)

    def measure(self, shape, dtype, layout) -> LayerResult | Skipped:
        self.note("begin", shape, dtype)
        time.sleep(0.01)
        self.note("end", shape, dtype)
        return Skipped(shape.index, dtype, layout, [], "")

    @staticmethod
    def note(what: str, shape, dtype: str) -> None:
        with open(os.environ["NOTES"], "a") as file:
            file.write(f"{what} {shape.index} {dtype}\n")


def test_one_measures_at_a_time_what_it_has_planned(forked, monkeypatch, tmp_path):
    monkeypatch.setenv("NOTES", str(tmp_path / "notes"))
    monkeypatch.setattr(side_by_side, "_places", lambda devices, jobs, most: [CPU] * 3)
    assert len(list(measure_side_by_side(TurnBench, [CPU], JOBS))) == len(JOBS)
    notes = (tmp_path / "notes").read_text().splitlines()
    measured = [note for note in notes if not note.startswith("plan")]
    for begin, end in zip(measured[::2], measured[1::2], strict=True):
        assert end == begin.replace("begin", "end")
        assert notes.index(begin.replace("begin", "plan")) < notes.index(begin)
    assert len(notes) == 3 * len(JOBS)
    # Somebody planned while another one measured.
    assert any(
        note.startswith("plan")
        for begin in measured[::2]
        for note in notes[notes.index(begin) : notes.index(begin.replace("begin", "end"))]
    )


# the command


def test_a_finished_record_is_in_order(tmp_path):
    made = LayerRecord(tmp_path / "a.json", device="CPU", settings={"batch": 1})
    for index in (2, 0, 7, 1):
        made.add(row(index=index))
    made.arrange([(index, "float32", "contiguous") for index in (0, 1, 2)])
    assert [entry.index for entry in made.results] == [0, 1, 2, 7]


@pytest.fixture
def several(monkeypatch):
    """``--gpus 2`` means two processes on the CPU."""
    monkeypatch.setattr(bench_layers, "bench_devices", lambda name, gpus: [CPU] * gpus)


class SlowAtFirst(LayerBench):
    def measure(self, shape, dtype, layout) -> LayerResult:
        time.sleep(0.2 if layout == "contiguous" else 0.0)
        return row(index=shape.index, dtype=dtype, layout=layout)


def test_command_on_two(tmp_path, capsys, monkeypatch, several, forked):
    monkeypatch.setattr(bench_layers, "LayerBench", SlowAtFirst)
    assert command(tmp_path, "--gpus", "2") == 0
    assert "2 GPUs side by side" in capsys.readouterr().out
    (path,) = tmp_path.glob("*.json")
    saved = json.loads(path.read_text())
    keys = [(r["layout"], r["index"]) for r in saved["results"]]
    assert keys == sorted(keys, key=lambda key: (key[0] != "contiguous", key[1]))
    assert len(keys) == 6
    assert saved["settings"]["gpus"] == 0  # of CUDA


class KilledBench(LayerBench):
    def measure(self, shape, dtype, layout) -> LayerResult:
        os.kill(os.getpid(), signal.SIGKILL)


def test_command_whose_process_is_killed(tmp_path, monkeypatch, capsys, several, forked):
    monkeypatch.setattr(bench_layers, "LayerBench", KilledBench)
    monkeypatch.setenv("COLUMNS", "300")
    assert command(tmp_path, "--gpus", "2") == 2
    captured = capsys.readouterr()
    assert "error: a process that measures on cpu was killed by signal 9" in captured.err
    assert "of 6 are in" in captured.out
    assert len(list(Path(tmp_path).glob("*.partial.json"))) == 1
    assert no_child_is_left()


@pytest.mark.parametrize(
    ("names", "gpus", "problem"),
    [
        (["NVIDIA A"] * 2, "3", "--gpus must be at most 2, the GPUs that torch sees, got 3"),
        (["NVIDIA A", "NVIDIA B"], "2", "--gpus 2 needs GPUs of one kind, got NVIDIA A, NVIDIA B"),
    ],
)
def test_command_refuses_gpus(capsys, monkeypatch, names, gpus, problem):
    monkeypatch.setenv("COLUMNS", "300")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: len(names))
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: names[device.index])
    monkeypatch.setattr("dwswap.build.load", lambda: True)
    assert main(["bench", "layers", "--gpus", gpus]) == 2
    assert problem in capsys.readouterr().err


def test_command_has_gpus_for_cuda_only(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "300")
    assert command(tmp_path, "--gpus", "2") == 2
    assert "--gpus must be left out with --device cpu, got 2" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_command_refuses_no_gpus(tmp_path, capsys):
    with pytest.raises(SystemExit):
        command(tmp_path, "--gpus", "0")
    assert "--gpus: must be an integer of at least 1, got '0'" in capsys.readouterr().err


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA GPUs")
@pytest.mark.parametrize("backward", [[], ["--backward"]])
def test_two_gpus_measure_what_one_does(tmp_path, backward):
    families = []
    for gpus in (1, 2):
        path = tmp_path / f"{gpus}.json"
        given = ["--select", "0:4", "--dtype", "float16", "--budget", "0.001", "--gpus", str(gpus)]
        assert main(["bench", "layers", *backward, *given, "--output", str(path)]) == 0
        saved = json.loads(path.read_text())
        assert saved["settings"]["gpus"] == gpus
        entries = [entry.get("parts", {"forward": entry}) for entry in saved["results"]]
        parts = [(name, part) for entry in entries for name, part in entry.items()]
        families.append([(part["index"], part["layout"], part["family"]) for _, part in parts])
        assert not any("aten" in part["family"] for name, part in parts if name == "forward")
    assert families[0] == families[1]
