"""The measurements of ``dwswap bench layers`` in processes, on one GPU or several of one kind.

Most of the time of a new shape goes to cuDNN, which plans its kernels on the CPU. So a GPU has
several processes: one measures, alone on the GPU, and the others plan meanwhile. Each has a bench
of its own, and all times of one result are of one GPU. The parent hands the jobs out over a pipe
per process; one that is killed ends its pipe, and the parent ends the others, which may be waiting
for their turn on the GPU.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
import traceback
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import contextmanager
from multiprocessing.connection import Connection, wait
from multiprocessing.context import SpawnContext
from multiprocessing.synchronize import Lock
from typing import Any, Protocol

import torch

from dwswap import build
from dwswap.bench.gradient_results import Measured
from dwswap.bench.shapes import LayerShape
from dwswap.precision import algorithms, use_algorithms

__all__ = ["Job", "WorkerDied", "WorkerFailed", "measure_side_by_side"]

Job = tuple[LayerShape, str, str]
"""A shape, and the names of a dtype and of a layout."""

PROCESSES = 5
"""Of a GPU, at most: a plan takes three to five times as long as its measurement."""

LEAST_JOBS = 8
"""Of a process: it takes some seconds to start."""


class Bench(Protocol):
    """Such as ``dwswap.bench.layers.LayerBench``."""

    def needed_bytes(self, shape: LayerShape, dtype: str) -> int: ...

    def plan(self, shape: LayerShape, dtype: str, layout: str) -> None: ...

    def measure(self, shape: LayerShape, dtype: str, layout: str) -> Measured: ...


class WorkerFailed(RuntimeError):
    """A process raised an exception; the message has its traceback."""


class WorkerDied(RuntimeError):
    """A process ended without a word: it was killed, or crashed."""


def measure_side_by_side(
    make: Callable[[torch.device], Bench], devices: Sequence[torch.device], jobs: Sequence[Job]
) -> Generator[Any, None, None]:
    """Measure ``jobs``, each on one of ``devices``; yield what the benches return as it comes.

    What needs one process only is measured in this one, in order. Close the iterator where its end
    is not reached: that ends the processes.

    Args:
        make: makes the bench of a device; it must be picklable for what needs several processes.
        devices: different ones whose times can be compared.
        jobs: in an order in which those of one dtype are neighbours: a bench keeps its inputs.

    Raises:
        WorkerFailed: a measurement raised an exception in its process, or no bench could be made.
        WorkerDied: a process was killed, or crashed.
    """
    if not devices:
        raise ValueError("devices must hold at least one device, got none")
    places = _places(devices, len(jobs), _most_processes(make, devices, jobs))
    if len(places) <= 1:
        bench = make(devices[0])
        for job in jobs:
            yield bench.measure(*job)
        return
    workers: list[_Worker] = []
    try:
        with _interrupts_ignored():
            # A forked process could not use CUDA.
            context = multiprocessing.get_context("spawn")
            turns = {device: context.Lock() for device in devices}
            for device in places:
                workers.append(_Worker(context, make, device, turns[device]))
        yield from _results(workers, jobs)
    finally:
        for worker in workers:
            worker.process.terminate()
        for worker in workers:
            worker.process.join()
            worker.pipe.close()


def _most_processes(
    make: Callable[[torch.device], Bench], devices: Sequence[torch.device], jobs: Sequence[Job]
) -> int:
    """Of each device: so many that each has memory for the largest job.

    One measures at a time, but the others keep what they have. A CPU plans nothing.
    """
    if not jobs or any(device.type != "cuda" for device in devices):
        return 1
    bench = make(devices[0])
    needed = max(bench.needed_bytes(shape, dtype) for shape, dtype, _ in jobs)
    free = min(torch.cuda.mem_get_info(device)[0] for device in devices)
    return min(PROCESSES, free // needed)


def _places(devices: Sequence[torch.device], jobs: int, most: int) -> list[torch.device]:
    """The device of each process: ``most`` of each where there is work and cores for them."""
    possible = min(jobs // LEAST_JOBS, len(os.sched_getaffinity(0))) // len(devices)
    return (list(devices) * max(1, min(most, possible)))[:jobs]


class _Worker:
    """A process that measures on one device, and the job that it holds."""

    def __init__(
        self,
        context: SpawnContext,
        make: Callable[[torch.device], Bench],
        device: torch.device,
        turn: Lock,
    ) -> None:
        self.device = device
        self.job: Job | None = None
        self.pipe, theirs = context.Pipe()
        self.process = context.Process(
            target=_serve, args=(make, device, algorithms(), turn, theirs), daemon=True
        )
        self.process.start()
        # Else the pipe would stay open when the process ends.
        theirs.close()

    def send(self, job: Job) -> None:
        self.job = job
        try:
            self.pipe.send(job)
        except ConnectionError:
            # The process has ended. ``receive`` tells why: its last message may still be there.
            return

    def receive(self) -> Measured:
        try:
            result, problem = self.pipe.recv()
        except (EOFError, OSError) as error:
            raise WorkerDied(self._death()) from error
        if problem is not None:
            raise WorkerFailed(f"a process that measures on {self.device} failed:\n{problem}")
        self.job = None
        return result

    def _death(self) -> str:
        self.process.join()
        code = self.process.exitcode or 0
        how = f"ended with exit code {code}"
        if code < 0:
            how = f"was killed by signal {-code} ({signal.strsignal(-code)})"
        assert self.job is not None
        shape, dtype, layout = self.job
        return (
            f"a process that measures on {self.device} {how}, at shape {shape.index} ({shape}), "
            f"{dtype} {layout}"
        )


def _results(workers: Sequence[_Worker], jobs: Sequence[Job]) -> Iterator[Measured]:
    waiting = list(jobs)
    owners: dict[int, _Worker] = {}

    def hand_out(worker: _Worker) -> None:
        if not waiting:
            return
        # A bench measures a copy once per number of bytes, so images of one size go to the process
        # that had the first of them; those of others only when nothing else is left.
        place = min(
            range(len(waiting)), key=lambda i: owners.get(_size(waiting[i]), worker) is not worker
        )
        job = waiting.pop(place)
        owners.setdefault(_size(job), worker)
        worker.send(job)

    for worker in workers:
        hand_out(worker)
    while busy := [worker for worker in workers if worker.job]:
        wait([worker.pipe for worker in busy])
        for worker in busy:
            if worker.pipe.poll():
                result = worker.receive()
                hand_out(worker)
                yield result


def _size(job: Job) -> int:
    """Elements of input and output, per sample."""
    return job[0].input_elements + job[0].output_elements


def _serve(
    make: Callable[[torch.device], Bench],
    device: torch.device,
    chosen: dict[str, Any],
    turn: Lock,
    pipe: Connection,
) -> None:
    """What a process does: it answers each job with a result, or with a traceback and its end."""
    try:
        if device.type == "cuda":
            torch.cuda.set_device(device)
            if not build.load():
                # Else PyTorch would be measured against itself.
                raise RuntimeError(f"the CUDA kernels are not loaded: {build.status().reason}")
        use_algorithms(chosen)
        bench = make(device)
        while True:
            job = pipe.recv()
            bench.plan(*job)
            with turn:
                result = bench.measure(*job)
            pipe.send((result, None))
    except Exception:
        # Where the parent was killed there is nobody to tell: this raises too, and that is the end.
        pipe.send((None, traceback.format_exc()))


@contextmanager
def _interrupts_ignored() -> Iterator[None]:
    """For the time of starting processes, which inherit it.

    A terminal sends Ctrl-C to them as well. It is the parent that ends them, without a traceback
    from each. Only the main thread can say what happens to signals.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
