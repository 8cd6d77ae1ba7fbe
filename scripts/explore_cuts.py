"""Time what a family of kernels could do, cut by cut, on the GPU at hand: how good is its choice?

    python scripts/explore_cuts.py plane_strips --dtype float32 --layout contiguous -o cuts.csv
    python scripts/explore_cuts.py diagonal_sums --dtype float16 --layout channels_last

A family's search (csrc, *_cut.cpp) takes the cut of the least estimate. This builds a library whose
searches take the one of any rank, times some ranks for every shape of torchvision's, and prints how
much longer than the best of these the chosen one takes. The file has a line per shape and cut, to
fit the constants of the estimate to; the fields of a cut are those that tests/host/cuts.cpp prints.

Needs a CUDA GPU of sm_90 and nvcc. Families of weight gradients are timed as such.
"""

from __future__ import annotations

import argparse
import contextlib
import csv
import os
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from statistics import geometric_mean
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
os.environ["DWSWAP_NVCC_FLAGS"] = f"{os.environ.get('DWSWAP_NVCC_FLAGS', '')} -DDWSWAP_EXPLORE"

import torch  # noqa: E402
from cuts_program import compile_cuts, run_cuts  # noqa: E402
from rich.console import Console  # noqa: E402
from rich.progress import track  # noqa: E402
from rich.table import Table  # noqa: E402

from dwswap import build  # noqa: E402
from dwswap.bench.gradients import GradientBench  # noqa: E402
from dwswap.bench.layers import DTYPES, LAYOUTS, LayerBench  # noqa: E402
from dwswap.bench.shapes import LayerShape, select, torchvision_shapes  # noqa: E402
from dwswap.bench.timing import GraphMemory, time_copy, time_launches  # noqa: E402

FORWARD = ("plane_strips", "plane_bands", "channel_columns", "channel_tiles", "diagonal")
GRADIENTS = ("column_sums", "diagonal_sums")
RANKS = (0, 1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128)
BUDGET = 0.003  # seconds of samples per cut
COLUMNS = (
    *("shape", "channels", "height", "width", "kernel", "stride"),
    *("rank", "cut", "us", "copy_us"),
)


def explore(
    arguments: argparse.Namespace, chosen: list[LayerShape], program: Path
) -> Iterator[dict[str, Any]]:
    """A row per shape and cut, the chosen one of a shape first."""
    bench_of = GradientBench if arguments.family in GRADIENTS else LayerBench
    device = torch.device("cuda", torch.cuda.current_device())
    bench = bench_of(device, batch=arguments.batch, budget=BUDGET)
    timed: dict[str, Any] = {"budget": BUDGET, "memory": GraphMemory(device)}

    def runs(shape: LayerShape) -> bool:
        family, _ = bench.launches(shape, arguments.dtype, arguments.layout)
        return family == arguments.family

    shapes = [shape for shape in chosen if shape.dilation == (1, 1) and runs(shape)]
    found = [run_cuts(program, problems(arguments, shapes), rank) for rank in arguments.ranks]
    for shape, *cuts in track(list(zip(shapes, *found, strict=True)), "shapes"):
        _, launches = bench.launches(shape, arguments.dtype, arguments.layout)
        moved = bench.moved_bytes(shape, arguments.dtype)
        copy = time_copy(moved, device, **timed).microseconds
        seen = set()
        for rank, (*fields, _) in zip(arguments.ranks, cuts, strict=True):
            cut = " ".join(map(str, fields))
            if cut in seen:
                continue
            seen.add(cut)
            os.environ["DWSWAP_CUT_RANK"] = str(rank)
            us = time_launches(launches, device, **timed).microseconds
            size = (shape.channels, shape.height, shape.width, shape.kernel[0], shape.stride[0])
            row = (shape.index, *size, rank, cut, round(us, 3), round(copy, 3))
            yield dict(zip(COLUMNS, row, strict=True))


def problems(arguments: argparse.Namespace, shapes: list[LayerShape]) -> list[tuple[object, ...]]:
    """What the program of cuts reads."""
    device: Any = torch.cuda.get_device_properties(0)
    shared = (device.shared_memory_per_multiprocessor, device.shared_memory_per_block_optin)
    return [
        (
            *(arguments.family, arguments.batch, shape.channels, shape.height, shape.width),
            *(*shape.kernel, shape.stride[0], DTYPES[arguments.dtype].itemsize),
            *(device.multi_processor_count, *shared),
        )
        for shape in shapes
    ]


def summary(rows: list[dict[str, Any]]) -> Table:
    shapes: dict[int, list[dict[str, Any]]] = {}
    for row in rows:
        shapes.setdefault(row["shape"], []).append(row)
    groups: dict[tuple[int, int], list[list[dict[str, Any]]]] = {}
    for cuts in shapes.values():
        groups.setdefault((cuts[0]["kernel"], cuts[0]["stride"]), []).append(cuts)
    columns = ("kernel", "stride", "shapes", "chosen / best", "worst", "% of copy", "of the best")
    table = Table(*columns, title="the chosen cut, next to the best of those timed")
    for (kernel, stride), group in sorted(groups.items()):
        best = [min(cut["us"] for cut in cuts) for cuts in group]
        ratios = [cuts[0]["us"] / least for cuts, least in zip(group, best, strict=True)]
        chosen = geometric_mean(100 * cuts[0]["copy_us"] / cuts[0]["us"] for cuts in group)
        mean = geometric_mean(ratios)
        cells = (f"{mean:.3f}", f"{max(ratios):.2f}", f"{chosen:.1f}", f"{chosen * mean:.1f}")
        table.add_row(str(kernel), str(stride), str(len(group)), *cells)
    return table


def ranks(text: str) -> tuple[int, ...]:
    found = tuple(sorted({int(word) for word in text.split(",")}))
    if found[0] != 0:
        raise argparse.ArgumentTypeError(f"ranks must begin with 0, the chosen cut, got {text!r}")
    return found


def count(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"a number of images must be at least 1, got {text!r}")
    return int(text)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("family", choices=(*FORWARD, *GRADIENTS))
    parser.add_argument("--dtype", choices=tuple(DTYPES), default="float16")
    parser.add_argument("--layout", choices=tuple(LAYOUTS), required=True)
    parser.add_argument("--batch", type=count, default=64)
    parser.add_argument("--select", default="0:", help="as that of `dwswap bench layers`")
    parser.add_argument("--ranks", type=ranks, default=RANKS, help="such as 0,1,2,4,8")
    parser.add_argument("-o", "--output", type=Path, help="CSV; has what was timed when it ends")
    arguments = parser.parse_args()
    try:
        chosen = select(torchvision_shapes(), arguments.select)
    except ValueError as error:
        parser.error(str(error))
    if not torch.cuda.is_available():
        print("explore_cuts: PyTorch sees no CUDA GPU", file=sys.stderr)
        return 1
    os.environ["DWSWAP_FAMILY"] = arguments.family if arguments.family in FORWARD else ""
    os.environ["DWSWAP_BACKWARD_FAMILY"] = arguments.family if arguments.family in GRADIENTS else ""
    with contextlib.ExitStack() as stack:
        program = Path(stack.enter_context(tempfile.TemporaryDirectory())) / "cuts"
        writer = None
        if arguments.output is not None:
            # Each line is there when its cut has been timed, whatever ends the run.
            file = stack.enter_context(
                arguments.output.open("w", newline="", encoding="utf-8", buffering=1)
            )
            writer = csv.DictWriter(file, COLUMNS)
            writer.writeheader()
        if not build.load():
            print(f"explore_cuts: no kernels of ours: {build.status().reason}", file=sys.stderr)
            return 1
        compile_cuts(program, "-DDWSWAP_EXPLORE")
        rows = []
        for row in explore(arguments, chosen, program):
            rows.append(row)
            if writer is not None:
                writer.writerow(row)
    if not rows:
        print(f"explore_cuts: {arguments.family} runs none of these shapes", file=sys.stderr)
        return 1
    Console().print(summary(rows))
    return 0


if __name__ == "__main__":
    sys.exit(main())
