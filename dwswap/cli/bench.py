"""``dwswap bench layers``: torchvision's depthwise convolutions, next to PyTorch and a copy."""

from __future__ import annotations

import argparse
import re
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
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
from dwswap.activations import ACTIVATIONS
from dwswap.bench.layer_plot import plot
from dwswap.bench.layer_record import LayerRecord, switches
from dwswap.bench.layer_results import LayerResult, Skipped
from dwswap.bench.layer_summary import copy_rows, speedup_rows
from dwswap.bench.layers import DTYPES, LAYOUTS, LayerBench
from dwswap.bench.shapes import FIELDS, LayerShape, select, torchvision_shapes
from dwswap.cli import bench_overhead
from dwswap.cli.common import CliError, console, output_folder

__all__ = ["add_parser"]

FOLDER = "benchmarks/results"


def add_parser(commands: Any) -> None:
    """Add the command to the subparsers ``commands``."""
    bench = commands.add_parser("bench", help="measure the kernels on this machine")
    targets = bench.add_subparsers(title="what to measure", metavar="WHAT", required=True)
    bench_overhead.add_parser(targets, _device)
    parser = targets.add_parser(
        "layers",
        help="the depthwise convolutions of torchvision's models, layer by layer",
        description="Time the 368 different depthwise convolutions of torchvision's models: ours, "
        "PyTorch's own in the same layout, and a copy of the same bytes. Each is checked against "
        "float64. Saves a record (JSON) and a picture (PNG). Exit code 1 where a check fails.",
    )
    parser.add_argument(
        "--dtype", nargs="+", choices=DTYPES, help="default: all on a GPU, float32 on the CPU"
    )
    parser.add_argument("--layout", nargs="+", choices=LAYOUTS, help="default: both")
    parser.add_argument(
        "--batch", type=_positive, metavar="N", help="default: 64 on a GPU, 1 on the CPU"
    )
    parser.add_argument(
        "--select",
        metavar="EXPR",
        help="only the shapes that meet all conditions, separated by commas: 'kernel=7,stride=1', "
        f"'channels>=96', model=mobilenet_v2, 0:20; fields: {', '.join(FIELDS)}, model",
    )
    parser.add_argument(
        "--activation",
        choices=ACTIVATIONS,
        default="none",
        help="on the input and on the output; its cost over the plain operator is measured too",
    )
    parser.add_argument(
        "--output",
        metavar="DIR/FILE",
        default=FOLDER,
        help="a folder, or a file that ends in .json (default: %(default)s)",
    )
    parser.add_argument(
        "--budget",
        type=_seconds,
        metavar="SECONDS",
        default=0.015,
        help="of samples per measurement (default: %(default)s); a whole run has 5000 of them",
    )
    parser.add_argument(
        "--each",
        action="store_true",
        help="print a line per measurement: the kernels that ran, their time, how fast that is",
    )
    parser.add_argument(
        "--resume", action="store_true", help="keep what the file of a run that was ended holds"
    )
    parser.add_argument("--device", help="default: cuda; cpu tries the path out, reduced")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Measure, save, print the summary; 0, or 1 where a check failed or nothing was measured."""
    out = console()
    device = _device(args.device)
    cuda = device.type == "cuda"
    shapes = _shapes(args.select)
    dtypes = list(dict.fromkeys(args.dtype or (DTYPES if cuda else ["float32"])))
    layouts = list(dict.fromkeys(args.layout or LAYOUTS))
    batch = args.batch or (64 if cuda else 1)
    asked_for_all = args.select is None and args.activation == "none"
    whole = cuda and asked_for_all and not switches()
    whole = whole and (set(dtypes), set(layouts)) == (set(DTYPES), set(LAYOUTS))
    name = torch.cuda.get_device_name(device) if cuda else "CPU"

    record = LayerRecord(
        _file(args.output, name, batch, whole),
        device=name,
        settings={
            "dtypes": dtypes,
            "layouts": layouts,
            "batch": batch,
            "select": args.select,
            "activation": args.activation,
            "budget": args.budget,
            "reduced": not cuda,
        },
        whole=whole,
        targets=cuda and batch == 64 and args.activation == "none",
    )
    if not args.resume and record.partial.exists():
        raise CliError(
            f"{record.partial} is of a run that was ended: --resume goes on with it, or remove it"
        )
    if args.resume:
        try:
            record.resume()
        except (OSError, ValueError) as error:
            raise CliError(f"--resume: {error}") from error
    _say(out, f"{len(shapes)} shapes, N = {batch}, {', '.join(dtypes)}, {', '.join(layouts)}")
    _say(out, f"on {name}" + "".join(f", {k}={v}" for k, v in switches().items()))
    if not cuda:
        _say(out, "On the CPU the times say nothing about the kernels: this only tries the path.")

    bench = LayerBench(
        device,
        batch=batch,
        activation=args.activation,
        budget=args.budget,
        copies=record.copies,
    )
    try:
        _measure(out, bench, record, shapes, dtypes, layouts, each=args.each)
        saved = [record.path]
        if record.results:
            title = f"Depthwise convolutions of torchvision, N = {batch}, on {name}"
            if args.activation != "none":
                title += f", {args.activation} on both sides"
            picture = record.path.with_suffix(".png")
            saved.append(plot(record.results, picture, title, targets=record.targets))
    except OSError as error:
        raise CliError(f"cannot write the results: {error}") from error
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] != "matplotlib":
            raise
        _say(out, "no picture: matplotlib is not installed (pip install 'dwswap[bench]')")
    _print(out, record)
    _say(out, f"saved: {', '.join(map(str, saved))}")
    return _verdict(out, record)


def _measure(
    out: Console,
    bench: LayerBench,
    record: LayerRecord,
    shapes: list[LayerShape],
    dtypes: list[str],
    layouts: list[str],
    *,
    each: bool,
) -> None:
    """Fill ``record``, with a progress bar; what is done is saved however this ends."""
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("left:"),
        TimeRemainingColumn(),
    )
    done = record.done
    total = len(shapes) * len(dtypes) * len(layouts)
    record.save()
    try:
        with Progress(*columns, console=out, transient=True) as progress:
            task = progress.add_task("measuring", total=total, completed=len(done))
            for entry in bench.run(shapes, dtypes, layouts, done):
                record.add(entry)
                what = f"{entry.dtype} {entry.layout} {'x'.join(map(str, entry.shape))}"
                progress.update(task, advance=1, description=f"{what:<44}")
                if isinstance(entry, Skipped):
                    progress.console.print(f"skipped {what}: {entry.reason}", markup=False)
                elif not entry.passed:
                    why = entry.problem or f"error {entry.error:.2g} > {entry.error_limit:.2g}"
                    progress.console.print(f"FAILED {what}: {why}", style="red", markup=False)
                if each and not isinstance(entry, Skipped):
                    progress.console.print(_line(entry), markup=False, soft_wrap=True)
    except BaseException:
        record.save()
        _say(out, f"{len(record.done)} of {total} are in {record.partial}: --resume goes on")
        raise
    record.finish()


def _line(entry: LayerResult) -> str:
    sizes = (entry.shape, entry.kernel, entry.stride, entry.dilation)
    shape, kernel, stride, dilation = ("x".join(map(str, size)) for size in sizes)
    return (
        f"{entry.dtype} {entry.layout} {shape} kernel {kernel} stride {stride} "
        f"dilation {dilation}: {entry.family} {entry.ours_us:.1f} us, {entry.speedup:.2f} times "
        f"PyTorch, {entry.percent_of_copy:.0f} % of the copy"
    )


def _print(out: Console, record: LayerRecord) -> None:
    summary = record.summary()
    for title, (heads, rows) in (
        ("Speedup over PyTorch's own convolution in the same layout", speedup_rows(summary)),
        ("Copy time / our time in percent, median", copy_rows(summary)),
    ):
        table = Table(title=title)
        for head in heads:
            texts = ("dtype", "layout", "shape of the worst", "kernel", "input + output")
            table.add_column(head, justify="left" if head in texts else "right")
        for row in rows:
            table.add_row(*(f"[red]{text}[/]" if missed else text for text, missed in row))
        if rows:
            out.print(table)


def _verdict(out: Console, record: LayerRecord) -> int:
    if record.skipped:
        _say(out, f"skipped: {len(record.skipped)}, each with its reason in the record")
    if not record.results:
        out.print("FAILED: nothing could be measured", style="bold red")
        return 1
    failed = [result for result in record.results if not result.passed]
    if failed:
        indices = sorted({result.index for result in failed})
        text = f"FAILED: {len(failed)} checks, shapes {', '.join(map(str, indices))}"
        out.print(text, style="bold red", soft_wrap=True)
        return 1
    return 0


def _device(name: str | None) -> torch.device:
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


def _shapes(expression: str | None) -> list[LayerShape]:
    shapes = torchvision_shapes()
    if expression is None:
        return shapes
    try:
        return select(shapes, expression)
    except ValueError as error:
        raise CliError(f"--select: {error}") from error


def _file(output: str, device: str, batch: int, whole: bool) -> Path:
    """Where to save; a part never takes the name of a whole run."""
    if output.endswith(".json"):
        path = Path(output)
        return output_folder(str(path.parent)) / path.name
    slug = re.sub(r"[^a-z0-9]+", "-", device.lower()).strip("-")
    return output_folder(output) / f"layers-{slug}-n{batch}{'' if whole else '-part'}.json"


def _say(out: Console, text: str) -> None:
    out.print(text, markup=False, soft_wrap=True)


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be an integer of at least 1, got {text!r}")
    return int(text)


def _seconds(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value <= 60:
        raise argparse.ArgumentTypeError(f"must be between 0 and 60 seconds, got {text!r}")
    return value
