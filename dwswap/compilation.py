"""Compile ``csrc`` into a shared library with nvcc and ninja, with a progress line on stderr."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
import threading
import time
from collections.abc import Collection, Iterable
from pathlib import Path
from typing import TextIO

import torch

from .toolkit import (
    BuildError,
    Nvcc,
    Target,
    find_cudart,
    find_host_compiler,
    find_libstdcxx,
    find_ninja,
    find_nvcc,
)

NINJA_FILE = "build.ninja"
NINJA_STATUS = "@dwswap %f %t@ "
TAIL_LINES = 30
# The file that makes a library serve processes without Python, where it is linked in.
STANDALONE_SOURCE = "standalone.cpp"
# What records graphs of autograd, for Python alone.
AUTOGRAD_FOLDER = "autograd"
TORCH_LIBRARIES = ("-ltorch", "-ltorch_cpu", "-ltorch_cuda", "-lc10")


def csrc_dir() -> Path:
    """The CUDA sources: inside the installed package, or beside it in a checkout.

    Raises:
        BuildError: they are in neither place.
    """
    package = Path(__file__).resolve().parent
    for folder in (package / "csrc", package.parent / "csrc"):
        if folder.is_dir():
            return folder
    raise BuildError(f"the CUDA sources (csrc) are missing beside {package}: reinstall dwswap")


def source_files(sources: Path) -> list[Path]:
    """What is compiled below ``sources``: kernels (.cu), and host code (.cpp), which nvcc leaves to
    the host's compiler: every architecture that it compiled that for would take as long again.

    In the order in which to start them: kernels take longest, and of these those whose names are
    towards the end.

    Raises:
        BuildError: there is nothing.
    """
    files = sorted(sources.rglob("*.cu"), reverse=True) + sorted(sources.rglob("*.cpp"))
    if not files:
        raise BuildError(f"there are no .cu or .cpp files below {sources}: reinstall dwswap")
    return files


def compile_flags() -> tuple[str, ...]:
    """nvcc's flags, but for include directories and architectures: they make part of the cache key.

    ``DWSWAP_NVCC_FLAGS`` is appended, for example ``-lineinfo`` for a profiler.
    """
    return (
        "-std=c++20",
        "-O3",
        "--expt-relaxed-constexpr",
        # gcc 12 takes the value of an empty std::optional for one that is used.
        "-Xcompiler=-fPIC,-fvisibility=hidden,-Wall,-Wno-maybe-uninitialized",
        # The oldest libtorch whose stable ABI the sources may use: 2.10. csrc/autograd undefines
        # the macro.
        "-DTORCH_TARGET_VERSION=0x020a000000000000",
        "-DUSE_CUDA",
        *shlex.split(os.environ.get("DWSWAP_NVCC_FLAGS", "")),
    )


def include_flags(sources: Path) -> list[str]:
    """Where the headers are; nvcc adds those of CUDA itself."""
    root = Path(torch.__file__).parent / "include"
    api = root / "torch" / "csrc" / "api" / "include"
    return ["-I", str(sources), "-isystem", str(root), "-isystem", str(api)]


def compile_command(nvcc: Nvcc, sources: Path, targets: Iterable[Target]) -> list[str]:
    """The nvcc call that compiles one source file, to be completed with
    ``-c SOURCE -o OBJECT``."""
    return [
        str(nvcc.path),
        "-ccbin",
        str(find_host_compiler()),
        *compile_flags(),
        *(target.gencode for target in sorted(set(targets))),
        *include_flags(sources),
    ]


def link_command() -> list[str]:
    """The call that links the objects, to be completed with ``OBJECTS -o LIBRARY LIBRARIES``."""
    # Undefined symbols become an error here, where the log shows them, and not when it is loaded.
    return [str(find_host_compiler()), "-shared", "-Wl,-z,defs,--exclude-libs,ALL"]


def link_libraries(nvcc: Nvcc) -> list[str]:
    """torch's own libraries and CUDA runtime: loaded before ours, so no rpath is needed."""
    folder = Path(torch.__file__).parent / "lib"
    libstdcxx = find_libstdcxx()
    return [
        f"-L{folder}",
        "-Wl,--no-as-needed",
        *TORCH_LIBRARIES,
        str(find_cudart(nvcc)),
        *([str(libstdcxx)] if libstdcxx is not None else []),
        "-lstdc++",
    ]


def jobs() -> int:
    """Compilers to run at once: $MAX_JOBS, else the processors that this process may use."""
    wanted = os.environ.get("MAX_JOBS", "")
    return max(1, int(wanted)) if wanted.isdigit() else len(os.sched_getaffinity(0))


def compile_library(
    sources: Path,
    targets: Collection[Target],
    workdir: Path,
    log: Path,
    library: Path,
    standalone: Path,
) -> None:
    """Compile every source file below ``sources`` and link them as ``library`` and ``standalone``.

    Args:
        sources: the root of the CUDA sources.
        targets: what to make code for.
        workdir: an empty folder for everything in between.
        log: receives the compiler's whole output.
        library: the shared library to write for processes that import dwswap; its folder exists.
        standalone: that for processes without Python.

    Raises:
        BuildError: a tool is missing, or the compiler fails (with the end of its output).
    """
    nvcc = find_nvcc(torch.version.cuda)
    unknown = sorted(set(targets) - nvcc.targets() - {t for t in targets if t.ptx})
    if unknown:
        names = ", ".join(target.name for target in unknown)
        raise BuildError(f"{nvcc.path} of CUDA {nvcc.version} does not know {names}")
    files = source_files(sources)
    text = _ninja_file(nvcc, sources, files, targets, library, standalone)
    (workdir / NINJA_FILE).write_text(text)
    command = [str(find_ninja()), "-C", str(workdir), "-f", NINJA_FILE, f"-j{jobs()}"]
    _run(command, ", ".join(target.name for target in sorted(set(targets))), log)


class Progress:
    """One line on a terminal, updated in place; a first and a last line anywhere else."""

    def __init__(self, names: str, stream: TextIO | None = None) -> None:
        self.names = names
        self.stream = stream or sys.stderr
        self.live = bool(self.stream) and self.stream.isatty()
        self.start = time.monotonic()
        self.done = self.total = 0
        if self.live:
            self.update()
        else:
            self._write(f"dwswap: building CUDA kernels for {names} (once)\n")

    @property
    def seconds(self) -> float:
        return time.monotonic() - self.start

    def update(self) -> None:
        """Redraw the line; nothing where it cannot be redrawn."""
        if self.live:
            count = f" [{self.done}/{self.total}]" if self.total else ""
            line = f"building CUDA kernels for {self.names} (once){count} {self.seconds:.0f} s"
            self._write(f"\r\x1b[Kdwswap: {line}")

    def close(self, failed: bool) -> None:
        """Write the last line."""
        verb = "could not build" if failed else "built"
        line = f"dwswap: {verb} CUDA kernels for {self.names} after {self.seconds:.0f} s\n"
        self._write(("\r\x1b[K" if self.live else "") + line)

    def _write(self, text: str) -> None:
        if self.stream is not None:  # None in a process without a console
            self.stream.write(text)
            self.stream.flush()


def _run(command: list[str], names: str, log: Path) -> None:
    """Run ninja, follow its status and keep its output."""
    progress = Progress(names)
    output: list[str] = []
    failed = True
    with subprocess.Popen(
        command,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        env={**os.environ, "NINJA_STATUS": NINJA_STATUS, "TERM": "dumb"},
    ) as process:
        assert process.stdout is not None
        reader = threading.Thread(target=_follow, args=(process.stdout, output, progress))
        reader.start()
        try:
            while process.poll() is None:
                reader.join(timeout=0.5)
                progress.update()
            failed = process.returncode != 0
        finally:
            # After Ctrl-C, do not leave compilers at work in a folder that is about to be removed.
            if process.poll() is None:
                process.terminate()
            reader.join()
            log.write_text("".join(output))
            progress.close(failed)
    if failed:
        raise BuildError(_failure("".join(output), log))


def _follow(pipe: Iterable[str], output: list[str], progress: Progress) -> None:
    for line in pipe:
        status = re.match(r"@dwswap (\d+) (\d+)@ (.*)", line)
        if status:
            progress.done, progress.total = int(status[1]), int(status[2])
            line = f"[{status[1]}/{status[2]}] {status[3]}\n"
        output.append(line)


def _failure(output: str, log: Path) -> str:
    failed = re.search(r"^FAILED: (?:\[code=\d+\] )?(.*)$", output, re.MULTILINE)
    what = failed[1].strip() if failed else "the CUDA kernels"
    tail = output[failed.start() :] if failed else output
    hint = ""
    if "Unsupported .version" in output:
        hint = "nvcc's own parts are of different versions, reinstall them together; "
    lines = "\n".join(tail.splitlines()[-TAIL_LINES:])
    return f"building {what} failed ({hint}full log: {log})\n{lines}"


def _ninja_file(
    nvcc: Nvcc,
    sources: Path,
    files: list[Path],
    targets: Iterable[Target],
    library: Path,
    standalone: Path,
) -> str:
    """One edge per source file and one per link."""
    lines = [
        "rule nvcc",
        f"  command = {_command(compile_command(nvcc, sources, targets))} -c $in -o $out",
        "  description = $label",
        "rule link",
        f"  command = {_command(link_command())} $in -o $out {_command(link_libraries(nvcc))}",
        "  description = $label",
    ]
    objects: list[str] = []
    schema: list[str] = []
    autograd: list[str] = []
    for file in files:
        name = file.relative_to(sources).as_posix()
        target = _path(f"{name}.o")
        lines += [f"build {target}: nvcc {_path(str(file))}", f"  label = {_text(name)}"]
        if file.name == STANDALONE_SOURCE:
            schema.append(target)
        elif file.parent.name == AUTOGRAD_FOLDER:
            autograd.append(target)
        else:
            objects.append(target)
    for output, inputs in ((library, objects + autograd), (standalone, objects + schema)):
        lines += [f"build {_path(str(output))}: link {' '.join(inputs)}", "  label = link"]
    return "\n".join(lines) + "\n"


def _text(text: str) -> str:
    return text.replace("$", "$$")


def _path(path: str) -> str:
    return re.sub(r"([$ :])", r"$\1", path)


def _command(command: list[str]) -> str:
    return _text(shlex.join(command))
