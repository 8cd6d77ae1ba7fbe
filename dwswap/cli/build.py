"""``dwswap build``: compile the CUDA kernels ahead of time, for images and clusters."""

from __future__ import annotations

import argparse
import sys
import time
from typing import Any

from dwswap import build
from dwswap.cli.common import console

__all__ = ["add_parser"]


def add_parser(commands: Any) -> None:
    """Add the command to the subparsers ``commands``."""
    parser = commands.add_parser(
        "build",
        help="compile the CUDA kernels ahead of time",
        description="Compile the CUDA kernels into the cache, so that the first use need not. "
        "Needs nvcc and a C++ compiler; needs a GPU only where --arch is not given.",
    )
    parser.add_argument(
        "--arch",
        nargs="+",
        metavar="ARCH",
        help="compute capabilities to compile for, such as 8.0 9.0 12.0 (default: the GPU at hand)",
    )
    parser.add_argument("--force", action="store_true", help="compile even if the cache has it")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Compile unless it is cached, print where the library is; 0, or 1 where the build fails."""
    start = time.perf_counter()
    try:
        library = build.build(args.arch, force=args.force)
    except build.BuildError as error:
        console(sys.stderr).print(f"dwswap: error: {error}", markup=False, soft_wrap=True)
        return 1
    seconds = time.perf_counter() - start
    console().print(f"ready after {seconds:.1f} s: {library}", markup=False, soft_wrap=True)
    return 0
