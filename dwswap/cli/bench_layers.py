"""``dwswap bench layers``: torchvision's depthwise convolutions, next to PyTorch and a copy."""

from __future__ import annotations

import argparse
from typing import Any

from rich.console import Console

from dwswap.activations import ACTIVATIONS
from dwswap.bench.layer_plot import plot
from dwswap.bench.layer_record import LayerRecord
from dwswap.bench.layer_results import LayerResult, Skipped
from dwswap.bench.layer_summary import copy_rows, speedup_rows
from dwswap.bench.layers import DTYPES, LAYOUTS, LayerBench
from dwswap.bench.run_record import switches
from dwswap.bench.shapes import FIELDS, LayerShape, select, torchvision_shapes
from dwswap.cli.bench_common import (
    add_run_options,
    bench_device,
    device_name,
    introduce,
    print_table,
    record_file,
    run_saved,
    save_picture,
    say,
    start_or_resume,
)
from dwswap.cli.common import CliError, console, positive

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
        "--batch", type=positive, metavar="N", help="default: 64 on a GPU, 1 on the CPU"
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
    add_run_options(parser, budget=0.015, measurements="a whole run has 5000 of them")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Measure, save, print the summary; 0, or 1 where a check failed or nothing was measured."""
    out = console()
    device = bench_device(args.device)
    cuda = device.type == "cuda"
    shapes = _shapes(args.select)
    dtypes = list(dict.fromkeys(args.dtype or (DTYPES if cuda else ["float32"])))
    layouts = list(dict.fromkeys(args.layout or LAYOUTS))
    batch = args.batch or (64 if cuda else 1)
    asked_for_all = args.select is None and args.activation == "none"
    whole = cuda and asked_for_all and not switches()
    whole = whole and (set(dtypes), set(layouts)) == (set(DTYPES), set(LAYOUTS))
    name = device_name(device)

    record = LayerRecord(
        record_file(args.output, "layers", name, f"-n{batch}", whole=whole),
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
    start_or_resume(record, args.resume)
    what = f"{len(shapes)} shapes, N = {batch}, {', '.join(dtypes)}, {', '.join(layouts)}"
    introduce(out, what, name)

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
            saved += save_picture(
                out, lambda: plot(record.results, picture, title, targets=record.targets)
            )
    except OSError as error:
        raise CliError(f"cannot write the results: {error}") from error
    _print(out, record)
    say(out, f"saved: {', '.join(map(str, saved))}")
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
    done = record.done
    keys = {(s.index, dtype, layout) for s in shapes for dtype in dtypes for layout in layouts}
    with run_saved(out, record, keys) as progress:
        task = progress.add_task("measuring", total=len(keys), completed=len(done))
        for entry in bench.run(shapes, dtypes, layouts, done):
            record.add(entry)
            what = f"{entry.dtype} {entry.layout} {'x'.join(map(str, entry.shape))}"
            progress.update(task, advance=1, description=f"{what:<44}")
            if isinstance(entry, Skipped):
                progress.console.print(f"skipped {what}: {entry.reason}", markup=False)
                continue
            if not entry.passed:
                why = entry.problem or f"error {entry.error:.2g} > {entry.error_limit:.2g}"
                progress.console.print(f"FAILED {what}: {why}", style="red", markup=False)
            if each:
                progress.console.print(_line(entry), markup=False, soft_wrap=True)


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
    title = "Speedup over PyTorch's own convolution in the same layout"
    print_table(out, title, speedup_rows(summary), TEXTS)
    print_table(out, "Copy time / our time in percent, median", copy_rows(summary), TEXTS)


def _verdict(out: Console, record: LayerRecord) -> int:
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
