"""Compile all of csrc, report what every kernel uses, fail where one spills or has a stack frame.

Usage: python scripts/check_kernels.py [--csrc FOLDER] [--sample] [--changed] [--record]
                                       [ARCHITECTURE ...]   (default: 8.0 9.0 12.0)

Needs nvcc, but no GPU. Every file is compiled once, for all the architectures, with the flags of
`dwswap build`; of a .cu file, whose host code only launches its kernels, no object is made.
--sample has a file for one architecture if that of another element type is beside it: ``SAMPLE``.
--record writes down what passed, in scripts/checked_kernels.json: the digest of a file with all
that it includes, of flags and of versions. --changed leaves out what has the same digest there.
"""

from __future__ import annotations

import argparse
import hashlib
import json
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

import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from dwswap.atomic_file import replacing  # noqa: E402
from dwswap.compilation import (  # noqa: E402
    compile_command,
    compile_flags,
    csrc_dir,
    source_files,
)
from dwswap.toolkit import BuildError, Nvcc, Target, find_nvcc  # noqa: E402

RECORD = ROOT / "scripts" / "checked_kernels.json"

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


def included(source: Path, sources: Path) -> list[Path]:
    """``source`` and what it includes of ``sources``, by whatever way, in the order of names."""
    found, new = set[Path](), {source}
    while new:
        found |= new
        names = {name for file in new for name in re.findall(r'#include "(.+?)"', file.read_text())}
        new = {sources / name for name in names} - found
    return sorted(found)


def digest(source: Path, sources: Path, target: Target, nvcc: Nvcc) -> str:
    """Of all that machine code of ``source`` for ``target`` is made of."""
    hasher = hashlib.sha256()
    for text in (*compile_flags(), target.gencode, nvcc.version, torch.__version__):
        hasher.update(text.encode() + b"\0")
    for file in included(source, sources):
        content = file.read_bytes()
        hasher.update(f"{file.relative_to(sources)} {len(content)}\0".encode() + content)
    return hasher.hexdigest()[:16]


def recorded(record: Path) -> dict[str, str]:
    """The digests in ``record`` by file and architecture."""
    return json.loads(record.read_text()) if record.exists() else {}


def save(record: Path, passed: dict[str, str], known: Collection[str]) -> None:
    """Put digests into ``record``, one line each, by file and architecture.

    Args:
        known: the files that there are; others are left out.
    """
    kept = {name: value for name, value in recorded(record).items() if name.split()[0] in known}
    with replacing(record) as path:
        path.write_text(json.dumps(kept | passed, indent=0, sort_keys=True) + "\n")


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


def check(
    sources: Path,
    architectures: list[str],
    *,
    record: Path,
    sample: bool,
    changed: bool,
    recording: bool,
) -> int:
    """Compile what is below ``sources``, print the table; gives the number of faults.

    Args:
        record: a file of digests of what passed.
        sample: see ``sampled``.
        changed: leave out what is in ``record``.
        recording: put what passes into ``record``, if all of it does.
    """
    start = time.monotonic()
    nvcc = find_nvcc()
    targets = [Target.parse(architecture) for architecture in architectures]
    files = source_files(sources)
    digests = {
        (file, target): digest(file, sources, target, nvcc)
        for file in files
        for target in (sampled(file, targets) if sample else targets)
    }
    if changed:
        known = set(recorded(record).values())
        digests = {pair: value for pair, value in digests.items() if value not in known}
        left = len({file for file, _ in digests})
        print(f"check_kernels: {left} of {len(files)} files are not as in {record.name}")
    usages, failed = compile_all(sources, list(digests), nvcc, start)
    if failed:
        return failed
    if not usages and not changed:
        raise BuildError(f"the {len(files)} files below {sources} hold no kernel")
    faults = report(usages, nvcc, time.monotonic() - start, all_pairs=not (sample or changed))
    if recording and not faults:
        names = {file: file.relative_to(sources).as_posix() for file in files}
        passed = {f"{names[file]} {target.tag}": value for (file, target), value in digests.items()}
        save(record, passed, set(names.values()))
    return faults


def compile_all(
    sources: Path, pairs: Collection[tuple[Path, Target]], nvcc: Nvcc, start: float
) -> tuple[list[Usage], int]:
    """Compile each file for its architectures; what its kernels use, and how many do not compile.

    Args:
        start: the time from which what is printed counts.
    """
    chosen: dict[Path, list[Target]] = {}
    for file, target in pairs:
        chosen.setdefault(file, []).append(target)
    commands = [compile_command(nvcc, sources, targets) for targets in chosen.values()]
    usages: list[Usage] = []
    failed = 0
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(JOBS) as pool:
        outputs = [Path(folder, f"{index}.o") for index in range(len(chosen))]
        results = pool.map(compile_file, commands, chosen, outputs)
        for file, (status, text) in zip(chosen, results, strict=True):
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
    if failed:
        seconds = time.monotonic() - start
        print(f"check_kernels: {failed} of {len(chosen)} files do not compile, {seconds:.0f} s")
    return usages, failed


def report(usages: list[Usage], nvcc: Nvcc, seconds: float, *, all_pairs: bool) -> int:
    """Print the table and a summary; gives the number of faults.

    Args:
        all_pairs: every kernel was compiled for every architecture.
    """
    names = short_names(usage.name for usage in usages)
    if usages:
        print_table(usages, names)
    faulty = [usage for usage in usages if usage.faulty]
    for usage in faulty:
        print(
            f"check_kernels: FAULT: {names[usage.name]} on {usage.architecture} spills "
            f"{usage.spill_stores} + {usage.spill_loads} bytes, stack frame {usage.stack} bytes"
        )
    text = f"{len(names)} kernels x {len({usage.architecture for usage in usages})} architectures"
    text += f" with nvcc {nvcc.version}"
    if not all_pairs:
        text += f" ({len(usages)} of these pairs)"
    if usages:
        largest = max(usages, key=lambda usage: usage.registers)
        name = names[largest.name]
        text += f", max {largest.registers} registers ({name} on {largest.architecture})"
    text += f", {len(faulty)} {'spill' if len(faulty) == 1 else 'spills'}, {seconds:.0f} s"
    print(f"check_kernels: {text}")
    return len(faulty)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0] if __doc__ else None)
    parser.add_argument("architectures", nargs="*", metavar="ARCHITECTURE", help="such as 9.0")
    parser.add_argument("--csrc", type=Path, help="the folder of sources (default: the project's)")
    parser.add_argument(
        "--sample", action="store_true", help="each element type on one of the architectures"
    )
    parser.add_argument("--changed", action="store_true", help="leave out what is recorded")
    parser.add_argument("--record", action="store_true", help="record what passes, if all does")
    options = parser.parse_args(arguments)
    try:
        faults = check(
            options.csrc or csrc_dir(),
            options.architectures or list(ARCHITECTURES),
            record=RECORD,
            sample=options.sample,
            changed=options.changed,
            recording=options.record,
        )
    except BuildError as error:
        print(f"check_kernels: {error}", file=sys.stderr)
        return 1
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
