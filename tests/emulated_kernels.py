"""Kernels for the tensor cores and the copy engine of sm_90, run on the CPU.

Their own source is compiled for the host, next to an emulator of one multiprocessor in
``emulator/``. Every access to memory is checked: bounds, alignment, races between barriers, fences
between threads and the copy engine. Copies arrive as late as they may, at once, or at any time.
"""

from __future__ import annotations

import ctypes
import os
import re
import subprocess
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from cases import ACTIVATION_NAMES, EXACT_ACTIVATIONS
from emulated_source import Defect, transform_files
from numerics import WIDE_ACTIVATIONS

from dwswap.compilation import csrc_dir
from dwswap.toolkit import find_host_compiler

__all__ = [
    "DEVICES",
    "TIMINGS",
    "Emulator",
    "Problem",
    "Result",
    "check",
    "compile_emulator",
    "lacks",
    "make_tensors",
]

DEVICES = range(4)  # of kMultiprocessors: 132, 7, 2, 1
TIMINGS = range(3)  # of enum class Timing: late, at once, at any time
DTYPES = {torch.float16: 1, torch.bfloat16: 2}  # of enum class DataType

FOLDER = Path(__file__).parent / "emulator"
KERNELS = [
    f"depthwise_conv2d/{family}_{dtype}.cu"
    for family in ("plane_bands", "diagonal")
    for dtype in ("float16", "bfloat16")
]
HOST = [
    f"depthwise_conv2d/{family}{part}.cpp"
    for family in ("plane_bands", "diagonal")
    for part in ("", "_cut")
]
FLAGS = ["-std=c++20", "-fPIC", "-fno-strict-aliasing", "-fno-gnu-unique", "-U_FORTIFY_SOURCE"]
FLAGS += ["-DDWSWAP_EXPLORE", f"-I{FOLDER / 'include'}", f"-I{FOLDER}"]
# A call of a function of the emulator at every access. Kernels compile three times as fast without
# optimization, which takes less than what they then lose.
CHECKS = [
    "-O0",
    "-w",
    "-Wno-psabi",
    "-fsanitize=kernel-address",
    "-fsanitize=alignment,bounds,shift",
]
CHECKS += ["--param=asan-instrumentation-with-call-threshold=0"]
CHECKS += ["--param=asan-stack=0", "--param=asan-globals=0"]


def compile_emulator(folder: Path, defect: Defect | None = None, whole: Path | None = None) -> Path:
    """Compile the library in ``folder``.

    Args:
        defect: to be planted in a family, of which the kernels in float16 are compiled.
        whole: the folder of a library without a defect, for everything else.

    Raises:
        dwswap.toolkit.BuildError: no host compiler.
    """
    compiler = find_host_compiler()
    csrc = folder / "csrc"
    transform_files(csrc_dir(), KERNELS + HOST, csrc, defect)
    commands: list[list[str | Path]] = []
    objects = []
    for name in KERNELS:
        if defect is not None and not name.endswith(f"/{_family(defect)}_float16.cu"):
            continue
        objects.append(folder / f"{Path(name).stem}.o")
        commands.append([*CHECKS, "-x", "c++", "-c", csrc / name, "-o", objects[-1]])
    if whole is None:
        for source in [*sorted(FOLDER.glob("*.cpp")), *(csrc / name for name in HOST)]:
            objects.append(folder / f"{source.stem}.o")
            commands.append(["-O2", "-Wall", "-Werror", "-c", source, "-o", objects[-1]])
    else:
        # The first definition of what several objects have is linked: that with the defect.
        compiled = {path.name for path in objects}
        objects += [path for path in sorted(whole.glob("*.o")) if path.name not in compiled]

    def run(arguments: Sequence[str | Path]) -> None:
        command = [compiler, *FLAGS, f"-I{csrc}", *arguments]
        subprocess.run(list(map(str, command)), check=True)

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        list(pool.map(run, commands))
    library = folder / "libemulator.so"
    run(["-shared", *objects, "-o", library])
    return library


def _family(defect: Defect) -> str:
    return "diagonal" if "diagonal" in defect.file else "plane_bands"


def lacks(folder: Path) -> str | None:
    """What the host compiler lacks, or None.

    Raises:
        dwswap.toolkit.BuildError: there is none.
    """
    compiler = find_host_compiler()
    source = folder / "probe.cpp"
    source.write_text("#include <ucontext.h>\nint load(int* at) { return *at; }\n")
    command = [compiler, *FLAGS, *CHECKS, "-S", source, "-o", "-"]
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, check=False)
    if done.returncode != 0:
        return f"{compiler} does not compile for the emulator: {done.stderr.strip()[-300:]}"
    if "__asan_load4_noabort" not in done.stdout:
        return f"{compiler} does not call a function for every access to memory"
    return None


@dataclass(frozen=True)
class Problem:
    """A convolution, and how it is run. Of the input so many elements are not finite, or large."""

    family: str
    dtype: torch.dtype
    batch: int
    channels: int
    height: int
    width: int
    kernel: int
    stride: int
    padding_h: int
    padding_w: int
    activation: str = "none"
    input_activation: str = "none"
    bias: bool = False
    input_bias: bool = False
    reversed_taps: bool = False
    integers: bool = True
    not_finite: int = 0
    large: int = 0
    weight_offset: int = 0
    bias_offset: int = 0
    device: int = 0
    timing: int = 0
    rank: int = 0  # of the cut
    seed: int = 0

    @property
    def out_h(self) -> int:
        return (self.height + 2 * self.padding_h - self.kernel) // self.stride + 1

    @property
    def out_w(self) -> int:
        return (self.width + 2 * self.padding_w - self.kernel) // self.stride + 1


@dataclass(frozen=True)
class Tensors:
    input: torch.Tensor
    weight: torch.Tensor
    bias: torch.Tensor | None
    input_bias: torch.Tensor | None


@dataclass(frozen=True)
class Result:
    kernel: str  # the arguments of its Traits
    images: int  # of a unit
    output: torch.Tensor
    recomputed: int  # blocks
    errors: list[str]


# Of the structs in emulator/program.cpp.
POINTERS = ("input", "weight", "bias", "input_bias", "output")
NUMBERS = """batch channels height width out_h out_w kernel stride padding_h padding_w
input_activation activation reversed_taps dtype is_diagonal weight_offset bias_offset device timing
rank seed executes"""
RESULTS = ("is_covered", "status", "errors", "recomputed", "unwritten", "images")


class _Problem(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_void_p) for name in POINTERS),
        *((name, ctypes.c_int64) for name in NUMBERS.split()),
    ]


class _Result(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_int64) for name in RESULTS),
        ("kernel", ctypes.c_char * 600),
        ("messages", ctypes.c_char * 4000),
    ]


class Emulator:
    def __init__(self, library: Path) -> None:
        self._run = ctypes.CDLL(str(library)).run_problem

    def choose(self, problem: Problem) -> Result | None:
        """Like :meth:`run`, but nothing is executed: for the choice of the kernel and the cut."""
        return self._call(problem, None)

    def run(self, problem: Problem, tensors: Tensors) -> Result | None:
        """None where the family does not cover the problem."""
        return self._call(problem, tensors)

    def _call(self, problem: Problem, tensors: Tensors | None) -> Result | None:
        if problem.out_h < 1 or problem.out_w < 1:
            return None
        executes = tensors is not None
        tensors = tensors or make_tensors(problem)
        layout = torch.channels_last if problem.family == "diagonal" else torch.contiguous_format
        shape = (problem.batch, problem.channels, problem.out_h, problem.out_w)
        output = torch.full(shape, torch.nan, dtype=problem.dtype)
        values = {
            **vars(problem),
            **vars(tensors),
            "out_h": problem.out_h,
            "out_w": problem.out_w,
            "input": tensors.input.contiguous(memory_format=layout),
            "output": output.contiguous(memory_format=layout),
            "input_activation": ACTIVATION_NAMES.index(problem.input_activation),
            "activation": ACTIVATION_NAMES.index(problem.activation),
            "dtype": DTYPES[problem.dtype],
            "is_diagonal": problem.family == "diagonal",
            "executes": executes,
        }
        pointers = [None if values[p] is None else values[p].data_ptr() for p in POINTERS]
        given = _Problem(*pointers, *(values[name] for name in NUMBERS.split()))
        result = _Result()
        self._run(ctypes.byref(given), ctypes.byref(result))
        if not result.is_covered:
            return None
        errors = result.messages.decode().splitlines()
        if result.status:
            errors.append(f"the launch fails with status {result.status}")
        if executes and result.unwritten and not result.recomputed:
            errors.append(f"{result.unwritten} outputs are not written")
        name = re.search(r"Traits<(.*?)>;", result.kernel.decode())
        return Result(
            name[1] if name else "", result.images, values["output"], result.recomputed, errors
        )


def make_tensors(problem: Problem) -> Tensors:
    generator = torch.Generator().manual_seed(problem.seed)

    def make(*shape: int) -> torch.Tensor:
        if problem.integers:
            return torch.randint(-3, 4, shape, generator=generator).to(problem.dtype)
        return torch.randn(shape, generator=generator).to(problem.dtype)

    p = problem
    x = make(p.batch, p.channels, p.height, p.width)
    # 65504 is the largest number of float16.
    large = [65504.0, -60000.0] if p.dtype == torch.float16 else [1e37, -1e30]
    for count, values in ((p.not_finite, [torch.inf, -torch.inf, torch.nan]), (p.large, large)):
        if count:
            at = torch.randint(0, x.numel(), (count,), generator=generator)
            chosen = torch.randint(0, len(values), (count,), generator=generator)
            x.view(-1)[at] = torch.tensor(values, dtype=p.dtype)[chosen]
    weight = make(p.channels, 1, p.kernel, p.kernel)
    bias = make(p.channels) if p.bias else None
    return Tensors(x, weight, bias, make(p.channels) if p.input_bias else None)


def check(problem: Problem, tensors: Tensors, result: Result) -> list[str]:
    """What is wrong, a line each."""
    p, faults = problem, list(result.errors)
    x = tensors.input
    if tensors.input_bias is not None:
        x = (x.float() + tensors.input_bias.float().view(-1, 1, 1)).to(p.dtype)
    x = WIDE_ACTIVATIONS[p.input_activation](x.double())
    weight = tensors.weight.flip(2, 3) if p.reversed_taps else tensors.weight

    def convolve(x: torch.Tensor, w: torch.Tensor, b: torch.Tensor | None) -> torch.Tensor:
        padding = (p.padding_h, p.padding_w)
        bias = None if b is None else b.double()
        return F.conv2d(x, w.double(), bias, p.stride, padding, groups=p.channels)

    sums = convolve(x, weight, tensors.bias)
    wide = WIDE_ACTIVATIONS[p.activation](sums)
    wanted, got = wide.float().to(p.dtype).double(), result.output.double()
    right = (got == wanted) | (got.isnan() & wanted.isnan())
    if not (p.integers and p.activation in EXACT_ACTIVATIONS and not p.large):
        # One rounding of the result, and sums of float32.
        limits = torch.finfo(p.dtype)
        scale = convolve(x.abs(), weight.abs(), None) + 8
        error = limits.eps * wide.abs() + limits.smallest_normal * limits.eps + 2e-6 * scale
        right |= ((got - wide).abs() <= error) & got.isfinite() & wide.isfinite()
        right |= got.isinf() & (got.sign() == wide.sign()) & (wide.abs() > 0.999 * limits.max)
    if not right.all():
        at = tuple((~right).nonzero()[0].tolist())
        faults.append(
            f"{int((~right).sum())} outputs of {right.numel()} are wrong, the first at {at}:"
            f" {got[at].item()} for {wanted[at].item()}"
        )
    if result.recomputed and x.isfinite().all():
        faults.append(f"{result.recomputed} blocks are computed anew for nothing")
    return faults
