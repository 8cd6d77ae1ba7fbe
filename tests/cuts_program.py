"""The program of ``host/cuts.cpp``: it prints the cuts that the searches in csrc choose."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Sequence
from pathlib import Path

import torch

from dwswap.compilation import csrc_dir
from dwswap.toolkit import find_cudart, find_host_compiler, find_nvcc

__all__ = ["compile_cuts", "run_cuts"]

FOLDER = csrc_dir() / "depthwise_conv2d"
SOURCES = (
    Path(__file__).parent / "host" / "cuts.cpp",
    FOLDER / "backward" / "diagonal_sums_cut.cpp",
    FOLDER / "backward" / "gram_sums_cut.cpp",
    FOLDER / "backward" / "split.cpp",
    FOLDER / "plane_bands_cut.cpp",
    FOLDER / "plane_strips_cut.cpp",
    FOLDER / "channel_columns_cut.cpp",
    FOLDER / "channel_direct_cut.cpp",
    FOLDER / "channel_tiles_cut.cpp",
    FOLDER / "diagonal_cut.cpp",
    FOLDER / "toeplitz_cut.cpp",
    csrc_dir() / "squeeze_excitation" / "cut.cpp",
)


def compile_cuts(program: Path, *flags: str) -> None:
    """Compile it; ``flags`` are nvcc's.

    Raises:
        dwswap.toolkit.BuildError: no nvcc, or no host compiler.
    """
    nvcc = find_nvcc(torch.version.cuda)
    host, cudart = find_host_compiler(), find_cudart(nvcc)
    # The runtime library that the build of the kernels links: a compiler from PyPI has no other.
    link = ["-cudart", "none", "-Xlinker", f"{cudart},-rpath={cudart.parent}"]
    command = [nvcc.path, "-ccbin", host, "-std=c++20", "-O2", "-arch=sm_80", f"-I{csrc_dir()}"]
    command += [*flags, *SOURCES, *link, "-o", program]
    subprocess.run(list(map(str, command)), check=True)


def run_cuts(program: Path, problems: Sequence[Sequence[object]], rank: int = 0) -> list[list[int]]:
    """The cut of each problem, as numbers in an order of its family, and microseconds at the end.

    Args:
        problems: family, batch, channels, height, width, kernel height and width, stride, bytes of
            an element; multiprocessors, shared memory of one and of a block.
        rank: of the cut, where the program was compiled with ``-DDWSWAP_EXPLORE``; 0 is the best.
    """
    done = subprocess.run(
        [str(program)],
        input="\n".join(" ".join(map(str, problem)) for problem in problems),
        env={**os.environ, "DWSWAP_CUT_RANK": str(rank)},
        capture_output=True,
        text=True,
        check=True,
    )
    found = [[int(word) for word in line.split()] for line in done.stdout.splitlines()]
    assert len(found) == len(problems)
    return found
