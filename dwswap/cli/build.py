"""``dwswap build``: compile the CUDA kernels ahead of time, for images and clusters."""

from __future__ import annotations

import argparse
import shutil
import time
from pathlib import Path
from typing import Any

from dwswap import build
from dwswap.atomic_file import replacing
from dwswap.cli.common import CliError, console, failed

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
    parser.add_argument(
        "--standalone",
        action="store_true",
        help="the library for processes without Python, which run exported models: it has the same "
        "kernels and defines the operator itself",
    )
    parser.add_argument(
        "-o", "--output", metavar="FILE", help="with --standalone: copy the library to FILE"
    )
    parser.add_argument("--force", action="store_true", help="compile even if the cache has it")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Compile unless it is cached, print where the library is; 0, or 1 where the build fails."""
    if args.output is not None and not args.standalone:
        raise CliError("--output needs --standalone: the other library is used from the cache")
    start = time.perf_counter()
    try:
        library = build.build(args.arch, force=args.force, standalone=args.standalone)
    except build.BuildError as error:
        return failed(error)
    if args.output is not None:
        library = _copy(library, Path(args.output))
    seconds = time.perf_counter() - start
    console().print(f"ready after {seconds:.1f} s: {library}", markup=False, soft_wrap=True)
    return 0


def _copy(library: Path, target: Path) -> Path:
    try:
        with replacing(target) as partial:
            shutil.copyfile(library, partial)
    except OSError as error:
        raise CliError(f"cannot write {target}: {error.strerror}") from error
    return target
