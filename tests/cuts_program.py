"""The program of ``host/cuts.cpp``: it prints the cuts that the searches in csrc choose."""

from __future__ import annotations

import os
import random
import subprocess
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import torch

from dwswap.compilation import csrc_dir
from dwswap.toolkit import find_cudart, find_host_compiler, find_nvcc

__all__ = ["DEVICES", "Cuts", "Problem", "compile_cuts", "compile_for_host", "ragged", "run_cuts"]

# Multiprocessors, bytes of shared memory of each and of a block: H200, A100, RTX 4090, a small GPU.
DEVICES = ((132, 233472, 232448), (108, 167936, 166912), (128, 102400, 101376), (6, 102400, 101376))


class Problem(NamedTuple):
    batch: int
    channels: int
    height: int
    width: int
    kernel_h: int
    kernel_w: int
    stride: int
    element_bytes: int

    @property
    def out_h(self) -> int:
        return (self.height + self.kernel_h // 2 * 2 - self.kernel_h) // self.stride + 1

    @property
    def out_w(self) -> int:
        return (self.width + self.kernel_w // 2 * 2 - self.kernel_w) // self.stride + 1


Cuts = Callable[[str, list[tuple[Problem, tuple[int, int, int]]]], list[list[int]]]
"""Runs a family's search on problems and GPUs."""

FOLDER = csrc_dir() / "depthwise_conv2d"
SOURCES = (
    Path(__file__).parent / "host" / "cuts.cpp",
    FOLDER / "backward" / "column_sums_cut.cpp",
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
    """Compile it; ``flags`` are nvcc's. Raises as :func:`compile_for_host` does."""
    compile_for_host(program, SOURCES, *flags)


def compile_for_host(program: Path, sources: Sequence[Path], *flags: str) -> None:
    """Compile a program of csrc's code that runs without a GPU; ``flags`` are nvcc's.

    Raises:
        dwswap.toolkit.BuildError: no nvcc, or no host compiler.
    """
    nvcc = find_nvcc(torch.version.cuda)
    host, cudart = find_host_compiler(), find_cudart(nvcc)
    # The runtime library that the build of the kernels links: a compiler from PyPI has no other.
    link = ["-cudart", "none", "-Xlinker", f"{cudart},-rpath={cudart.parent}"]
    command = [nvcc.path, "-ccbin", host, "-std=c++20", "-O2", "-arch=sm_80", f"-I{csrc_dir()}"]
    command += [*flags, *sources, *link, "-o", program]
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


def ragged(count: int) -> Iterator[Problem]:
    rng = random.Random(0)
    sizes = (1, 2, 3, 5, 7, 8, 9, 14, 15, 19, 28, 33, 56, 57, 112, 213, 600, 1003, 2000, 16000)
    kernels = ((3, 3), (5, 5), (7, 7), (3, 1), (1, 3), (3, 7), (7, 3))
    for _ in range(count):
        kernel = rng.choice(kernels)
        stride = rng.choice((1, 2)) if kernel[0] == kernel[1] else 1
        yield Problem(
            rng.choice((1, 2, 3, 64, 256)),
            rng.choice((1, 2, 3, 16, 57, 58, 144, 960, 4000)),
            rng.choice(sizes),
            rng.choice(sizes),
            *kernel,
            stride,
            rng.choice((2, 4)),
        )
