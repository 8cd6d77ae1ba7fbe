"""Compile all of csrc, report what every kernel uses, fail where one spills or has a stack frame.

Usage: python scripts/check_kernels.py [--csrc FOLDER] [--sample] [ARCHITECTURE ...]
(default: 8.0 9.0 12.0)

Needs nvcc, but no GPU. Every file is compiled once, for all the architectures, with the flags of
`dwswap build`; of a .cu file, whose host code only launches its kernels, no object is made.
--sample has a file for one architecture if that of another element type is beside it: ``SAMPLE``.
"""

from __future__ import annotations

import argparse
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Collection, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from dwswap.compilation import compile_command, csrc_dir, source_files  # noqa: E402
from dwswap.toolkit import BuildError, Target, find_nvcc  # noqa: E402

ARCHITECTURES = ("8.0", "9.0", "12.0")
JOBS = 2
# The files of the element types instantiate the same templates, so a sample has each of them on one
# architecture: float16 where many kernels have code of their own.
SAMPLE = {"float32": "8.0", "float16": "9.0", "bfloat16": "12.0"}


@dataclass(frozen=True)
class Usage:
    """What ptxas says about one kernel on one architecture."""

    name: str
    architecture: str
    registers: int
    shared: int
    stack: int
    spill_stores: int
    spill_loads: int

    @property
    def faulty(self) -> bool:
        return bool(self.stack or self.spill_stores or self.spill_loads)


def parse_ptxas(text: str) -> list[Usage]:
    """Read the report of ``-Xptxas -v``; the names stay mangled."""
    usages = []
    blocks = re.split(r"Compiling entry function '(\S+)' for '(\w+)'", text)
    for name, architecture, body in zip(blocks[1::3], blocks[2::3], blocks[3::3], strict=True):
        # Functions that are not inlined have a block of properties each, after the kernel's own.
        frames = re.findall(
            r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", body
        )
        registers = re.search(r"Used (\d+) registers", body)
        if registers is None or not frames:
            raise ValueError(f"ptxas reports no resources for {name} on {architecture}:\n{body}")
        stack, stores, loads = (max(int(frame[i]) for frame in frames) for i in range(3))
        shared = re.search(r"(\d+) bytes smem", body)
        usages.append(
            Usage(
                name,
                architecture,
                int(registers[1]),
                int(shared[1]) if shared else 0,
                stack,
                stores,
                loads,
            )
        )
    return usages


def short_names(mangled: Iterable[str]) -> dict[str, str]:
    """Kernel name with its innermost namespace and template arguments, and nothing else."""
    names = sorted(set(mangled))
    tool = shutil.which("cu++filt") or shutil.which("c++filt")
    if tool is None or not names:
        return {name: name for name in names}
    answer = subprocess.run(
        [tool], input="\n".join(names), capture_output=True, text=True, check=True
    )
    demangled = answer.stdout.splitlines()
    return {name: shorten(full) for name, full in zip(names, demangled, strict=True)}


def shorten(demangled: str) -> str:
    """``void a::rows::kernel<a::T<float>, (int)3>(a::P)`` -> ``rows::kernel<T<float>, 3>``."""
    text = demangled.replace("(anonymous namespace)::", "")
    head = re.split(r"[<(]", text, maxsplit=1)[0]
    tail = re.sub(r"\b(\w+::)+", "", text[len(head) :])
    tail = re.sub(r"\([\w ]+\)(?=-?\d)", "", tail)
    depth = 0
    for position, letter in enumerate(tail):
        depth += (letter == "<") - (letter == ">")
        if letter == "(" and depth == 0:
            tail = tail[:position]
            break
    return "::".join(head.split()[-1].split("::")[-2:]) + tail


def sampled(source: Path, targets: Collection[Target]) -> list[Target]:
    """What to compile ``source`` for where a sample is enough, perhaps nothing.

    All of ``targets``, unless the file of another element type is beside it.
    """
    words = source.stem.split("_")
    for name, architecture in SAMPLE.items():
        others = (
            "_".join(other if word == name else word for word in words)
            for other in SAMPLE.keys() - {name}
        )
        if name in words and any(source.with_stem(other).exists() for other in others):
            return [target for target in targets if target == Target.parse(architecture)]
    return list(targets)


def compile_file(command: list[str], source: Path, output: Path) -> tuple[int, str]:
    """Compile one file; gives the exit status and everything that nvcc prints."""
    kind = ["-fatbin", "-Xptxas", "-v"] if source.suffix == ".cu" else ["-c"]
    done = subprocess.run(
        [*command, *kind, str(source), "-o", str(output)],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
    )
    return done.returncode, done.stdout


def print_table(usages: list[Usage], names: dict[str, str]) -> None:
    titles = ("kernel", "arch", "registers", "shared", "stack", "spill stores", "spill loads")
    rows = [
        (
            names[usage.name],
            usage.architecture,
            str(usage.registers),
            str(usage.shared),
            str(usage.stack),
            str(usage.spill_stores),
            str(usage.spill_loads),
            "  <-- FAULT" if usage.faulty else "",
        )
        for usage in sorted(usages, key=lambda usage: names[usage.name])
    ]
    width = max(len(row[0]) for row in rows)
    for row in [(*titles, ""), *rows]:
        cells = "".join(f"  {cell:>12}" for cell in row[2:-1])
        print(f"{row[0]:<{width}}  {row[1]:<7}{cells}{row[-1]}")


def check(sources: Path, architectures: list[str], sample: bool = False) -> int:
    """Compile everything below ``sources``, print the table; gives the number of faults."""
    start = time.monotonic()
    targets = [Target.parse(architecture) for architecture in architectures]
    chosen = {file: sampled(file, targets) if sample else targets for file in source_files(sources)}
    files = [file for file, wanted in chosen.items() if wanted]
    nvcc = find_nvcc()
    commands = [compile_command(nvcc, sources, chosen[file]) for file in files]
    usages: list[Usage] = []
    failed = 0
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(JOBS) as pool:
        outputs = [Path(folder, f"{index}.o") for index in range(len(files))]
        results = pool.map(compile_file, commands, files, outputs)
        for file, (status, text) in zip(files, results, strict=True):
            name = file.relative_to(sources)
            print(f"{time.monotonic() - start:5.0f} s  {name}", file=sys.stderr, flush=True)
            if status:
                failed += 1
                print(f"check_kernels: {name} does not compile:\n{text}", flush=True)
            else:
                usages += parse_ptxas(text)
                for line in text.splitlines():
                    if "warning" in line:
                        print(f"check_kernels: {line}", flush=True)
    seconds = time.monotonic() - start
    if failed:
        print(f"check_kernels: {failed} of {len(files)} files do not compile, {seconds:.0f} s")
        return failed
    if not usages:
        raise BuildError(f"the {len(files)} files below {sources} hold no kernel")
    names = short_names(usage.name for usage in usages)
    print_table(usages, names)
    faulty = [usage for usage in usages if usage.faulty]
    for usage in faulty:
        print(
            f"check_kernels: FAULT: {names[usage.name]} on {usage.architecture} spills "
            f"{usage.spill_stores} + {usage.spill_loads} bytes, stack frame {usage.stack} bytes"
        )
    pairs = f" ({len(usages)} of these pairs)" if sample else ""
    largest = max(usages, key=lambda usage: usage.registers)
    print(
        f"check_kernels: {len(names)} kernels x {len(set(targets))} architectures with nvcc "
        f"{nvcc.version}{pairs}, max {largest.registers} registers ({names[largest.name]} on "
        f"{largest.architecture}), {len(faulty)} {'spill' if len(faulty) == 1 else 'spills'}, "
        f"{seconds:.0f} s"
    )
    return len(faulty)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0] if __doc__ else None)
    parser.add_argument("architectures", nargs="*", metavar="ARCHITECTURE", help="such as 9.0")
    parser.add_argument("--csrc", type=Path, help="the folder of sources (default: the project's)")
    parser.add_argument(
        "--sample", action="store_true", help="each element type on one of the architectures"
    )
    options = parser.parse_args(arguments)
    try:
        sources = options.csrc or csrc_dir()
        faults = check(sources, options.architectures or list(ARCHITECTURES), options.sample)
    except BuildError as error:
        print(f"check_kernels: {error}", file=sys.stderr)
        return 1
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
