"""``dwswap bench``: what is measured is a command of its own each."""

from __future__ import annotations

from typing import Any

from dwswap.cli import bench_layers, bench_models, bench_overhead

__all__ = ["add_parser"]


def add_parser(commands: Any) -> None:
    """Add the command to the subparsers ``commands``."""
    bench = commands.add_parser("bench", help="measure kernels and models on this machine")
    targets = bench.add_subparsers(title="what to measure", metavar="WHAT", required=True)
    for target in (bench_layers, bench_models, bench_overhead):
        target.add_parser(targets)
