"""``dwswap bench overhead``: what a layer costs the host, next to ``nn.Conv2d``."""

from __future__ import annotations

import argparse
from typing import Any

import torch
from rich.table import Table

from dwswap.bench.overhead import overheads
from dwswap.cli.bench_common import bench_device
from dwswap.cli.common import console, positive

__all__ = ["add_parser"]


def add_parser(targets: Any) -> None:
    """Add the command to the subparsers ``targets``."""
    parser = targets.add_parser(
        "overhead",
        help="the time that a layer takes of the host, next to nn.Conv2d",
        description="Time calls of one small layer without waiting for the GPU, with nn.Conv2d and "
        "with DepthwiseConv2d: forward in no_grad, in inference_mode and with gradients, then "
        "training, which is forward and backward under autocast.",
    )
    parser.add_argument("--device", help="default: cuda; on the CPU aten computes on both sides")
    parser.add_argument(
        "--rounds", type=positive, metavar="N", default=20, help="default: %(default)s"
    )
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    where = bench_device(args.device)
    dtypes = [torch.float32] if where.type == "cpu" else [torch.float32, torch.float16]
    table = Table("dtype", "layout", "mode", title="host microseconds per call")
    for name in ("nn.Conv2d", "ours", "more"):
        table.add_column(name, justify="right")
    for row in overheads(where, dtypes, rounds=args.rounds):
        times = (f"{row.theirs:.2f}", f"{row.ours:.2f}", f"{row.ours - row.theirs:+.2f}")
        table.add_row(str(row.dtype).removeprefix("torch."), row.layout, row.mode, *times)
    console().print(table)
    return 0
