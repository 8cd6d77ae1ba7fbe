"""``dwswap demo``: the whole path on a real photograph."""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from torch import Tensor, nn

import dwswap
from dwswap import build, demo
from dwswap.bench.records import record
from dwswap.cli.common import (
    CliError,
    batch_size,
    chosen_device,
    console,
    device_text,
    missing_extra,
    output_folder,
    save_json,
    say,
)
from dwswap.cli.models import find, load_checkpoint
from dwswap.report import Report

__all__ = ["add_parser"]

SEED = 0
BUDGET = 1.0


def add_parser(commands: Any) -> None:
    """Add the command to the subparsers ``commands``."""
    parser = commands.add_parser(
        "demo",
        help="optimize a model on a real photograph: report, errors, timings",
        description="Optimize a torchvision model, check it against float64 on a real photograph, "
        "time it, and save a report. Nothing is downloaded: weights are random unless given.",
    )
    parser.add_argument(
        "--model", default="mobilenet_v2", help="a torchvision classification model"
    )
    parser.add_argument("--weights", metavar="FILE", help="checkpoint (a state_dict) for the model")
    parser.add_argument(
        "--image", metavar="FILE", help="photograph (default: a sample that scikit-learn brings)"
    )
    parser.add_argument(
        "--output",
        metavar="DIR",
        default="dwswap-demo",
        help="folder for the saved report (default: %(default)s)",
    )
    parser.add_argument(
        "--batch",
        type=batch_size,
        nargs="+",
        metavar="N",
        help="batch sizes to time (default: 1 and 32 on a GPU, 1 and 4 on the CPU)",
    )
    parser.add_argument("--device", help="default: cuda where there is a GPU, else cpu")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Run the demo; 0, or 1 where the optimized model is outside the tolerance."""
    out = console()
    device = chosen_device(args.device)
    folder = output_folder(args.output)
    image, picture, classes = _image(args)

    say(out, "device", device_text(device))
    say(out, "image", picture)
    model, weights = _model(args, image)
    say(out, "model", f"{args.model}, {weights}")
    if device.type == "cuda":
        # Before any other progress display: a first build shows its own.
        build.load()

    model.to(device)
    batch = demo.views(image, 2).to(device)
    doing = "optimizing, and checking every layer against float64"
    with out.status(doing):
        start = time.perf_counter()
        fast = dwswap.optimize(model, batch, verify=True)
        seconds = time.perf_counter() - start
    report = dwswap.report(fast)
    say(out, "kernels", report.kernels)
    out.print(_layers(report))
    out.print(report.summary(), markup=False, soft_wrap=True)
    out.print(
        f"Optimized and checked in {seconds:.1f} s. The layers that were kept, and why: "
        f"dwswap explain {args.model}",
        markup=False,
        soft_wrap=True,
    )

    if args.weights is not None:
        with torch.no_grad():
            top = [m(batch[:1]).argmax().item() for m in (model, fast)]
        say(out, "class", f"{classes[top[0]]} (optimized: {classes[top[1]]})")

    comparisons = _compare(out, model, image, demo.variants(device, args.batch), device)
    out.print(_table(comparisons, f"{args.model} on {device_text(device)}"))
    if device.type != "cuda":
        out.print(
            "On the CPU the operator is a composite of PyTorch's own: this shows that the outputs "
            "agree. The speed-up needs an NVIDIA GPU."
        )
    failed = [c for c in comparisons if not c.errors.passed]
    path = save_json(
        folder / "report.json",
        record(
            "demo",
            model=args.model,
            weights=weights,
            image=picture,
            device=device_text(device),
            seconds_to_optimize=seconds,
            report=report.to_dict(),
            timings=[c.to_dict() for c in comparisons],
        ),
    )
    say(out, "saved", str(path))
    if failed:
        out.print(f"FAILED: {len(failed)} outputs are outside the tolerance", style="bold red")
        return 1
    return 0


def _image(args: argparse.Namespace) -> tuple[Tensor, str, list[str]]:
    try:
        transform, classes = demo.preprocessing(args.model)
    except ModuleNotFoundError:
        missing_extra("torchvision", "bench", "the demo")
    except ValueError as error:
        find(args.model)  # an unknown name is reported with close matches
        raise CliError(str(error)) from error
    try:
        photograph, origin = demo.photograph(args.image)
    except OSError as error:
        raise CliError(f"cannot read the photograph: {error}") from error
    image = transform(photograph)
    picture = (
        f"{origin}, {photograph.width} x {photograph.height}, "
        f"resized and cropped to {image.shape[-1]} x {image.shape[-2]}"
    )
    return image, picture, classes


def _model(args: argparse.Namespace, image: Tensor) -> tuple[nn.Module, str]:
    torch.manual_seed(SEED)
    model = find(args.model)().eval()
    if args.weights is None:
        demo.randomize(model, demo.views(image, 4), SEED)
        return model, f"random weights (seed {SEED}; --weights FILE loads a checkpoint)"
    load_checkpoint(model, args.weights)
    return model, f"weights of {Path(args.weights).name}"


def _compare(
    out: Console,
    model: nn.Module,
    image: Tensor,
    wanted: list[demo.Variant],
    device: torch.device,
) -> list[demo.Comparison]:
    columns = (TextColumn("timing {task.fields[step]}"), BarColumn(), TimeElapsedColumn())
    comparisons = []
    with Progress(*columns, console=out, transient=True) as progress:
        task = progress.add_task("", total=len(wanted), step="")
        for comparison in demo.compare(model, image, wanted, device, BUDGET):
            comparisons.append(comparison)
            v = comparison.variant
            progress.update(task, advance=1, step=f"{v.to_dict()['dtype']} {v.layout} {v.batch}")
    return comparisons


def _layers(report: Report) -> Table:
    table = Table(title="Swapped layers, checked one by one")
    table.add_column("layer", overflow="fold")
    for name in ("input", "weight", "stride", "error\nto float64", "eager's\nerror", "check"):
        table.add_column(name, justify="right", overflow="fold")
    for layer in report.swapped:
        sizes = (layer.input_shape, layer.weight_shape, layer.stride)
        cells = [layer.path, *("x".join(map(str, size or ())) for size in sizes)]
        if layer.errors is not None:
            cells += [f"{layer.errors.ours:.1e}", f"{layer.errors.pytorch:.1e}"]
            cells.append("ok" if layer.errors.passed else "FAILED")
        table.add_row(*cells)
    return table


def _table(comparisons: list[demo.Comparison], title: str) -> Table:
    table = Table(title=title)
    table.add_column("dtype", overflow="fold")
    table.add_column("layout", overflow="fold")
    for name in ("batch", "eager\nms", "optimized\nms", "speed-up", "images/s"):
        table.add_column(name, justify="right", overflow="fold")
    for name in ("error\nto float64", "eager's\nerror", "outputs"):
        table.add_column(name, justify="right", overflow="fold")
    for c in comparisons:
        table.add_row(
            c.variant.to_dict()["dtype"],
            c.variant.layout,
            str(c.variant.batch),
            f"{c.eager.microseconds / 1e3:.2f}",
            f"{c.optimized.microseconds / 1e3:.2f}",
            f"{c.speedup:.2f}",
            f"{c.variant.batch / c.optimized.microseconds * 1e6:,.0f}",
            f"{c.errors.ours:.1e}",
            f"{c.errors.pytorch:.1e}",
            "[green]ok" if c.errors.passed else "[bold red]FAILED",
        )
    return table
