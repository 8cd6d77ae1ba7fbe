"""``dwswap bench layers``: torchvision's depthwise convolutions, next to PyTorch and a copy."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from contextlib import closing
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from dwswap.activations import ACTIVATIONS
from dwswap.bench.gradient_record import GradientRecord
from dwswap.bench.gradient_results import PARTS, GradientResult
from dwswap.bench.gradients import GradientBench
from dwswap.bench.layer_plot import plot
from dwswap.bench.layer_record import LayerRecord
from dwswap.bench.layer_results import LayerResult, Skipped
from dwswap.bench.layer_summary import copy_rows, speedup_rows
from dwswap.bench.layers import DTYPES, LAYOUTS, LayerBench
from dwswap.bench.other_code import OtherCode
from dwswap.bench.run_record import switches
from dwswap.bench.shapes import FIELDS, LayerShape, select, torchvision_shapes
from dwswap.bench.side_by_side import Job, WorkerDied, measure_side_by_side
from dwswap.cli.bench_common import (
    add_run_options,
    bench_devices,
    device_name,
    introduce,
    print_table,
    record_file,
    run_saved,
    save_picture,
    say,
    start_or_resume,
)
from dwswap.cli.common import CliError, batch_size, console, positive

__all__ = ["add_parser"]

TEXTS = ("dtype", "layout", "shape of the worst", "kernel", "input + output")


def add_parser(targets: Any) -> None:
    """Add the command to the subparsers ``targets``."""
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
        "--batch", type=batch_size, metavar="N", help="default: 64 on a GPU, 1 on the CPU"
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
        "--each",
        action="store_true",
        help="print a line per measurement: the kernels that ran, their time, how fast that is",
    )
    parser.add_argument(
        "--backward",
        action="store_true",
        help="time the gradient of the input, that of the weight, and forward with both",
    )
    parser.add_argument(
        "--cold-code",
        action="store_true",
        help="run another kernel before every launch, so that instructions are fetched anew, as "
        "in a network; its time is taken off",
    )
    parser.add_argument(
        "--gpus",
        type=positive,
        metavar="N",
        default=1,
        help="measure on N GPUs of one kind side by side, each shape on one (default: 1)",
    )
    add_run_options(parser, budget=0.015, measurements="a whole run has 5000 of them")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Measure, save, print the summary; 0, or 1 where a check failed or nothing was measured."""
    out = console()
    devices = bench_devices(args.device, args.gpus)
    cuda = devices[0].type == "cuda"
    shapes = _shapes(args.select)
    dtypes = list(dict.fromkeys(args.dtype or (DTYPES if cuda else ["float32"])))
    layouts = list(dict.fromkeys(args.layout or LAYOUTS))
    batch = args.batch or (64 if cuda else 1)
    if args.backward and args.activation != "none":
        raise CliError("--backward measures the plain operator: leave out --activation")
    if args.cold_code:
        if not cuda:
            raise CliError("--cold-code needs a GPU, got --device cpu")
        try:
            OtherCode(devices[0])
        except RuntimeError as error:
            raise CliError(f"--cold-code: {error}") from error
    plain = args.activation == "none" and not args.cold_code
    asked_for_all = args.select is None and plain
    every_shape = cuda and asked_for_all and not switches()
    whole = every_shape and (set(dtypes), set(layouts)) == (set(DTYPES), set(LAYOUTS))
    name = device_name(devices[0])

    kind = "gradients" if args.backward else "layers"
    # All shapes of a dtype and a layout are a record of their own.
    chosen = "" if whole or not every_shape else "".join(f"-{key}" for key in (*layouts, *dtypes))
    path = record_file(args.output, kind, name, f"-n{batch}{chosen}", whole=every_shape)
    settings = {
        "dtypes": dtypes,
        "layouts": layouts,
        "batch": batch,
        "select": args.select,
        "activation": args.activation,
        "budget": args.budget,
        "cold_code": args.cold_code,
        "gpus": len(devices) if cuda else 0,
        "reduced": not cuda,
    }
    record: LayerRecord | GradientRecord
    if args.backward:
        record = GradientRecord(path, device=name, settings=settings, whole=whole)
    else:
        targets = cuda and batch == 64 and plain
        record = LayerRecord(path, device=name, settings=settings, whole=whole, targets=targets)
    start_or_resume(record, args.resume)
    what = f"{len(shapes)} shapes, N = {batch}, {', '.join(dtypes)}, {', '.join(layouts)}"
    if len(devices) > 1:
        what += f", {len(devices)} GPUs side by side"
    introduce(out, what, name)

    make = partial(
        GradientBench if args.backward else LayerBench,
        batch=batch,
        activation=args.activation,
        budget=args.budget,
        cold_code=args.cold_code,
        # The record does not say which of several GPUs measured a row.
        copies=record.copies if len(devices) == 1 else None,
    )
    jobs = [(s, dtype, layout) for dtype in dtypes for layout in layouts for s in shapes]
    try:
        _measure(out, make, devices, record, jobs, each=args.each)
        saved = [record.path]
        if record.results:
            title = f"Depthwise convolutions of torchvision, N = {batch}, on {name}"
            if args.activation != "none":
                title += f", {args.activation} on both sides"
            if args.cold_code:
                title += ", code fetched anew"
            saved += _pictures(out, record, title)
    except OSError as error:
        raise CliError(f"cannot write the results: {error}") from error
    except WorkerDied as error:
        raise CliError(str(error)) from error
    _print(out, record)
    say(out, f"saved: {', '.join(map(str, saved))}")
    return _verdict(out, record)


def _pictures(out: Console, record: LayerRecord | GradientRecord, title: str) -> list[Path]:
    if isinstance(record, LayerRecord):
        picture = record.path.with_suffix(".png")
        return save_picture(
            out, lambda: plot(record.results, picture, title, targets=record.targets)
        )
    saved = []
    for part, head in PARTS.items():
        picture = record.path.with_name(f"{record.path.stem}-{part}.png")
        draw = partial(plot, record.part(part), picture, f"{head}: {title}", targets=False)
        saved += save_picture(out, draw)
    return saved


def _measure(
    out: Console,
    make: Callable[[torch.device], LayerBench],
    devices: list[torch.device],
    record: LayerRecord | GradientRecord,
    jobs: list[Job],
    *,
    each: bool,
) -> None:
    """Fill ``record``, with a progress bar; what is done is saved however this ends."""
    done = record.done
    by_key = {(shape.index, dtype, layout): (shape, dtype, layout) for shape, dtype, layout in jobs}
    left = [job for key, job in by_key.items() if key not in done]
    with (
        run_saved(out, record, list(by_key)) as progress,
        closing(measure_side_by_side(make, devices, left)) as entries,
    ):
        task = progress.add_task("measuring", total=len(jobs), completed=len(done))
        for entry in entries:
            record.add(entry)
            what = f"{entry.dtype} {entry.layout} {'x'.join(map(str, entry.shape))}"
            progress.update(task, advance=1, description=f"{what:<44}")
            if isinstance(entry, Skipped):
                progress.console.print(f"skipped {what}: {entry.reason}", markup=False)
                continue
            for head, row in _rows(entry):
                if not row.passed:
                    why = row.problem or f"error {row.error:.2g} > {row.error_limit:.2g}"
                    text = f"FAILED {head}{what}: {why}"
                    progress.console.print(text, style="red", markup=False)
                if each:
                    progress.console.print(head + _line(row), markup=False, soft_wrap=True)


def _rows(entry: LayerResult | GradientResult) -> list[tuple[str, LayerResult]]:
    """The measurements of an entry, each with what a line on it begins with."""
    if isinstance(entry, LayerResult):
        return [("", entry)]
    return [(f"{name}: ", entry.part(name)) for name in PARTS]


def _line(entry: LayerResult) -> str:
    sizes = (entry.shape, entry.kernel, entry.stride, entry.dilation)
    shape, kernel, stride, dilation = ("x".join(map(str, size)) for size in sizes)
    return (
        f"{entry.dtype} {entry.layout} {shape} kernel {kernel} stride {stride} "
        f"dilation {dilation}: {entry.family} {entry.ours_us:.1f} us, {entry.speedup:.2f} times "
        f"PyTorch, {entry.percent_of_copy:.0f} % of the copy"
    )


def _print(out: Console, record: LayerRecord | GradientRecord) -> None:
    if isinstance(record, GradientRecord):
        for part, summary in record.summaries().items():
            title = f"{PARTS[part]}: speedup over PyTorch's in the same layout"
            print_table(out, title, speedup_rows(summary), TEXTS)
        return
    summary = record.summary()
    title = "Speedup over PyTorch's own convolution in the same layout"
    print_table(out, title, speedup_rows(summary), TEXTS)
    print_table(out, "Copy time / our time in percent, median", copy_rows(summary), TEXTS)


def _verdict(out: Console, record: LayerRecord | GradientRecord) -> int:
    if record.skipped:
        say(out, f"skipped: {len(record.skipped)}, each with its reason in the record")
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


def _shapes(expression: str | None) -> list[LayerShape]:
    shapes = torchvision_shapes()
    if expression is None:
        return shapes
    try:
        return select(shapes, expression)
    except ValueError as error:
        raise CliError(f"--select: {error}") from error
