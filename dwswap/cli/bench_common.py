"""What the ``dwswap bench`` commands share: device, files, resuming, progress, tables."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.markup import escape
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Table

from dwswap import build
from dwswap.bench.records import slug
from dwswap.bench.run_record import RunRecord, switches
from dwswap.bench.tables import Cells
from dwswap.cli.common import CliError, output_folder

__all__ = [
    "add_run_options",
    "bench_device",
    "bench_devices",
    "device_name",
    "introduce",
    "print_table",
    "record_file",
    "run_saved",
    "save_picture",
    "say",
    "start_or_resume",
]

FOLDER = "benchmarks/results"


def add_run_options(
    parser: argparse.ArgumentParser, *, budget: float | None, measurements: str
) -> None:
    """Options of every long run: where to save, how long to measure, going on, the device.

    Args:
        budget: the default, in seconds; None where ``measurements`` says what it is.
        measurements: what ``budget`` is for, and how often it is spent.
    """
    parser.add_argument(
        "--output",
        metavar="DIR/FILE",
        default=FOLDER,
        help="a folder, where a run of some cases replaces the last such run, or a file that ends "
        "in .json (default: %(default)s)",
    )
    parser.add_argument(
        "--budget",
        type=_seconds,
        metavar="SECONDS",
        default=budget,
        help=f"of samples per measurement{'' if budget is None else ' (default: %(default)s)'}; "
        f"{measurements}",
    )
    parser.add_argument(
        "--resume", action="store_true", help="keep what the file of a run that was ended holds"
    )
    parser.add_argument("--device", help="default: cuda; cpu tries the path out, reduced")


def bench_device(name: str | None) -> torch.device:
    """The device that ``--device`` asks for; on CUDA with the kernels loaded."""
    if name not in (None, "cpu", "cuda"):
        raise CliError(f"--device must be cpu or cuda, got {name!r}")
    if name == "cpu":
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise CliError(
            "bench needs a CUDA GPU and torch sees none (try dwswap doctor); --device cpu tries "
            "the path out, but measures no kernel"
        )
    if not build.load():
        # Else PyTorch would be measured against itself.
        raise CliError(f"the CUDA kernels are not loaded: {build.status().reason}")
    return torch.device("cuda", torch.cuda.current_device())


def bench_devices(name: str | None, gpus: int) -> list[torch.device]:
    """The device that ``--device`` asks for, or the first of several GPUs of one kind.

    Args:
        name: see ``bench_device``.
        gpus: how many to measure on, at least 1.

    Raises:
        CliError: there are not that many, or they are of different kinds.
    """
    device = bench_device(name)
    if gpus == 1:
        return [device]
    if device.type != "cuda":
        raise CliError(f"--gpus must be left out with --device {device}, got {gpus}")
    visible = torch.cuda.device_count()
    if gpus > visible:
        raise CliError(f"--gpus must be at most {visible}, the GPUs that torch sees, got {gpus}")
    devices = [torch.device("cuda", index) for index in range(gpus)]
    names = list(map(device_name, devices))
    if len(set(names)) > 1:
        raise CliError(
            f"--gpus {gpus} needs GPUs of one kind, got {', '.join(names)}: choose some with "
            "CUDA_VISIBLE_DEVICES"
        )
    return devices


def device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"


def record_file(output: str, what: str, device: str, details: str, *, whole: bool) -> Path:
    """Where to save; a part never takes the name of a whole run."""
    if output.endswith(".json"):
        path = Path(output)
        return output_folder(str(path.parent)) / path.name
    part = "" if whole else "-part"
    return output_folder(output) / f"{what}-{slug(device)}{details}{part}.json"


def start_or_resume(record: RunRecord, resume: bool) -> None:
    """Take over what an ended run has saved, where that was asked for.

    Raises:
        CliError: there is such a run and ``resume`` is false, or it was of another kind.
    """
    if not resume and record.partial.exists():
        raise CliError(
            f"{record.partial} is of a run that was ended: --resume goes on with it, or remove it"
        )
    if resume:
        try:
            record.resume()
        except (OSError, ValueError) as error:
            raise CliError(f"--resume: {error}") from error


def introduce(out: Console, what: str, device: str) -> None:
    """Say what is measured, where, and with which switches."""
    say(out, what)
    say(out, f"on {device}" + "".join(f", {k}={v}" for k, v in switches().items()))
    if device == "CPU":
        say(out, "On the CPU the times say nothing about the kernels: this only tries the path.")


@contextmanager
def run_saved(out: Console, record: RunRecord, keys: Sequence[Any]) -> Iterator[Progress]:
    """A progress bar for the time of measuring; what is done is saved however that ends.

    Args:
        keys: of the rows that the whole run will have, in the order of the finished record. With
            all of them it is finished.
    """
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("left:"),
        TimeRemainingColumn(),
    )
    record.save()
    complete = False
    try:
        with Progress(*columns, console=out, transient=True) as progress:
            yield progress
        complete = record.done.issuperset(keys)
    finally:
        if not complete:
            record.save()
            done = len(record.done)
            say(out, f"{done} of {len(keys)} are in {record.partial}: --resume goes on")
    if complete:
        record.arrange(keys)
        record.finish()


def save_picture(out: Console, draw: Callable[[], Path]) -> list[Path]:
    """The picture that ``draw`` saves; none, with a hint, without matplotlib."""
    try:
        return [draw()]
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] != "matplotlib":
            raise
        say(out, "no picture: matplotlib is not installed (pip install 'dwswap[bench]')")
        return []


def print_table(out: Console, title: str, cells: Cells, left: Iterable[str]) -> None:
    """Print a table; nothing where it has no rows.

    Args:
        left: heads of the columns of text, which go to the left.
    """
    heads, rows = cells
    table = Table(title=escape(title))
    for head in heads:
        table.add_column(head, justify="left" if head in left else "right", overflow="fold")
    for row in rows:
        table.add_row(
            *(f"[red]{escape(text)}[/]" if missed else escape(text) for text, missed in row)
        )
    if rows:
        out.print(table)


def say(out: Console, text: str) -> None:
    out.print(text, markup=False, soft_wrap=True)


def _seconds(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value <= 60:
        raise argparse.ArgumentTypeError(f"must be between 0 and 60 seconds, got {text!r}")
    return value
