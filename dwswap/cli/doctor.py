"""``dwswap doctor``: is everything here that dwswap needs, and what to do where it is not."""

from __future__ import annotations

import argparse
import importlib.metadata
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from rich.table import Table

import dwswap
from dwswap import build
from dwswap.bench.records import record
from dwswap.cli.common import console, file_path, save_json
from dwswap.compilation import csrc_dir, source_files
from dwswap.environment import environment
from dwswap.toolkit import (
    OLDEST_CAPABILITY,
    BuildError,
    find_host_compiler,
    find_ninja,
    find_nvcc,
)

__all__ = ["Check", "add_parser", "checks"]

OK, WARN, FAIL = "ok", "warn", "fail"
MARKS = {OK: "[green]ok[/]", WARN: "[yellow]warn[/]", FAIL: "[bold red]fail[/]"}
OLDEST_TORCH = (2, 11)
OPTIONAL = {
    "torchvision": "demo and examples: pip install 'dwswap[bench]'",
    "scikit-learn": "photograph and digits: pip install 'dwswap[bench]'",
    "timm": "dwswap explain of timm's models: pip install timm",
}


@dataclass(frozen=True)
class Check:
    """One line: what was looked at, how it is, what was found, what to do about it."""

    name: str
    status: str
    found: str
    advice: str = ""


def add_parser(commands: Any) -> None:
    """Add the command to the subparsers ``commands``."""
    parser = commands.add_parser(
        "doctor",
        help="check the environment: GPU, driver, compilers, cache, kernels",
        description="Check everything that dwswap needs here, and say what to do where something "
        "is missing. On a machine with a GPU this builds the kernels, if that has not been done. "
        "Exit code 1 where something that is needed does not work.",
    )
    parser.add_argument(
        "--json", type=file_path, metavar="FILE", help="also save the checks as JSON"
    )
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Print the checks; 0, or 1 where one failed."""
    if torch.cuda.is_available():
        build.load()  # before the table: a first build shows its own progress
    results = list(checks())
    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("check", no_wrap=True)
    table.add_column("", no_wrap=True)
    table.add_column("found", overflow="fold")
    for check in results:
        lines = [check.found] + ([f"-> {check.advice}"] if check.advice else [])
        table.add_row(check.name, MARKS[check.status], "\n".join(lines).replace("[", r"\["))
    out = console()
    out.print(table)
    failed = [check.name for check in results if check.status == FAIL]
    warned = [check.name for check in results if check.status == WARN]
    out.print()
    if failed:
        out.print(f"dwswap does not work here as it should: {', '.join(failed)}", style="bold red")
    elif warned:
        out.print(f"dwswap works here; worth a look: {', '.join(warned)}")
    else:
        out.print("dwswap works here.")
    if args.json:
        content = record("doctor", checks=[asdict(check) for check in results])
        out.print(f"saved: {save_json(args.json, content)}", markup=False)
    return 1 if failed else 0


def checks() -> Iterator[Check]:
    """Run every check, in the order in which one needs the other."""
    facts = environment()
    gpu = torch.cuda.is_available()
    yield Check("dwswap", OK, f"{dwswap.__version__} in {Path(dwswap.__file__).parent}")
    yield _python()
    yield _torch()
    yield _gpu(facts)
    yield _driver(facts)
    yield _sources()
    needed = gpu and not build.status().loaded
    yield _tool("nvcc", _nvcc, needed)
    yield _tool("host compiler", _host_compiler, needed)
    yield _tool("ninja", lambda: str(find_ninja()), needed)
    yield _cache()
    yield _kernels(gpu)
    yield _operator(torch.device("cpu"))
    if gpu:
        yield _operator(torch.device("cuda"))
    yield from _optional()


def _python() -> Check:
    return Check("python", OK, f"{sys.version.split()[0]} in {sys.prefix}")


def _torch() -> Check:
    cuda = f"CUDA {torch.version.cuda}" if torch.version.cuda else "no CUDA"
    found = f"{torch.__version__} ({cuda})"
    if tuple(int(part) for part in torch.__version__.split(".")[:2]) < OLDEST_TORCH:
        oldest = ".".join(map(str, OLDEST_TORCH))
        return Check("torch", FAIL, found, f"dwswap needs torch {oldest} or later")
    if torch.version.cuda is None:
        return Check("torch", WARN, found, "for GPUs install a CUDA build of torch")
    return Check("torch", OK, found)


def _gpu(facts: dict[str, str | None]) -> Check:
    if not torch.cuda.is_available():
        advice = "fine for trying things out: the operator then runs on PyTorch's own kernels"
        return Check("GPU", WARN, "none that torch sees", advice)
    count = torch.cuda.device_count()
    found = f"{facts['gpu']} (sm_{str(facts['capability']).replace('.', '')})"
    if count > 1:
        found += f" and {count - 1} more"
    if torch.cuda.get_device_capability() < OLDEST_CAPABILITY:
        return Check("GPU", WARN, found, "the CUDA kernels need sm_80 (Ampere) or later")
    return Check("GPU", OK, found)


def _driver(facts: dict[str, str | None]) -> Check:
    if facts["driver"] is None:
        if torch.cuda.is_available():
            return Check("driver", OK, "works, but does not tell its version")
        return Check("driver", OK, "none; with an NVIDIA GPU in this machine, install one")
    if not torch.cuda.is_available():
        advice = "torch cannot use it: is the driver too old for torch's CUDA, or the GPU hidden?"
        return Check("driver", WARN, facts["driver"], advice)
    return Check("driver", OK, facts["driver"])


def _sources() -> Check:
    try:
        folder = csrc_dir()
        count = len(source_files(folder))
    except BuildError as error:
        return Check("sources", FAIL, "missing", str(error))
    return Check("sources", OK, f"{count} source files in {folder}")


def _tool(name: str, find: Callable[[], str], needed: bool) -> Check:
    """A tool of the build: needed only where a GPU waits for its kernels."""
    try:
        return Check(name, OK, find())
    except BuildError as error:
        if needed:
            return Check(name, FAIL, "missing", str(error))
        return Check(name, WARN, "missing, not needed so far", str(error))


def _nvcc() -> str:
    nvcc = find_nvcc(torch.version.cuda)
    return f"{nvcc.version}, {nvcc.path}"


def _host_compiler() -> str:
    path = find_host_compiler()
    try:
        answer = subprocess.run(
            [str(path), "--version"], capture_output=True, text=True, timeout=30, check=True
        )
    except (OSError, subprocess.SubprocessError) as error:
        raise BuildError(f"{path} --version fails: {error}") from error
    return f"{answer.stdout.partition(chr(10))[0]}, {path}"


def _cache() -> Check:
    folder = build.cache_dir()
    existing = next(parent for parent in (folder, *folder.parents) if parent.exists())
    if not existing.is_dir() or not os.access(existing, os.W_OK | os.X_OK):
        advice = "set DWSWAP_CACHE_DIR to a folder that can be written"
        return Check("cache", WARN, f"{folder} cannot be written", advice)
    libraries = list(folder.glob("*/*.so"))
    size = sum(library.stat().st_size for library in libraries) / 1e6
    return Check("cache", OK, f"{folder}, {len(libraries)} libraries, {size:.1f} MB")


def _kernels(gpu: bool) -> Check:
    status = build.status()
    if status.loaded:
        built = "" if status.seconds is None else f", built just now in {status.seconds:.0f} s"
        return Check("kernels", OK, f"{status.library}{built}")
    if not gpu:
        return Check("kernels", OK, "not loaded: no GPU to run them on")
    if not status.attempted:
        return Check("kernels", WARN, f"not loaded: {status.reason}", "unset it to use them")
    return Check(
        "kernels",
        FAIL,
        f"not loaded: {status.reason}",
        "dwswap build --force shows what the compiler says",
    )


def _operator(device: torch.device) -> Check:
    """Whole numbers, which every implementation must get exactly right."""
    name = f"operator, {device.type}"
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        x = torch.randint(-8, 9, (2, 12, 19, 17)).float()
        weight = torch.randint(-8, 9, (24, 1, 3, 5)).float()
    expected = F.conv2d(x.double(), weight.double(), stride=2, padding=1, groups=12)
    try:
        y = dwswap.depthwise_conv2d(x.to(device), weight.to(device), stride=2, padding=1).cpu()
    except RuntimeError as error:
        return Check(name, FAIL, f"raises {type(error).__name__}: {error}")
    wrong = int((y.double() != expected).sum())
    if wrong:
        advice = "please report this, with the output of dwswap doctor"
        return Check(name, FAIL, f"{wrong} of {expected.numel()} values are wrong", advice)
    return Check(name, OK, f"{expected.numel()} values, all exact")


def _optional() -> Iterator[Check]:
    for package, advice in OPTIONAL.items():
        try:
            yield Check(package, OK, importlib.metadata.version(package))
        except importlib.metadata.PackageNotFoundError:
            yield Check(package, WARN, "not installed", advice)
