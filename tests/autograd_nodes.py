"""The library of ``csrc/autograd`` alone: what it needs is a C++ compiler, and no GPU."""

from __future__ import annotations

import subprocess
from pathlib import Path

import torch

from dwswap.compilation import AUTOGRAD_FOLDER, csrc_dir, include_flags
from dwswap.toolkit import find_host_compiler

__all__ = ["compile_nodes"]

FLAGS = ("-std=c++20", "-O1", "-fPIC", "-fvisibility=hidden", "-Wall", "-Werror")
LIBRARIES = ("-ltorch", "-ltorch_cpu", "-lc10")


def compile_nodes(folder: Path) -> Path:
    """Compile it in ``folder``.

    Raises:
        dwswap.toolkit.BuildError: no host compiler.
    """
    compiler = find_host_compiler()
    sources = sorted((csrc_dir() / AUTOGRAD_FOLDER).glob("*.cpp"))
    objects = [folder / f"{source.stem}.o" for source in sources]
    commands = [
        [compiler, *FLAGS, *include_flags(csrc_dir()), "-c", source, "-o", output]
        for source, output in zip(sources, objects, strict=True)
    ]
    running = [subprocess.Popen(list(map(str, command))) for command in commands]
    assert [process.wait() for process in running] == [0] * len(running)
    library = folder / "libnodes.so"
    torch_folder = Path(torch.__file__).parent / "lib"
    link = [compiler, "-shared", "-Wl,-z,defs", *objects, "-o", library, f"-L{torch_folder}"]
    subprocess.run(list(map(str, [*link, *LIBRARIES])), check=True)
    return library
