"""The tools that a build of the CUDA kernels needs: nvcc, host compiler, ninja, libcudart."""

from __future__ import annotations

import functools
import importlib.util
import os
import re
import shutil
import subprocess
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

# nvcc's parts do not pin one another, so the extra names each of them.
INSTALL_NVCC = (
    'pip install "dwswap[nvcc]" (that is "cuda-toolkit[nvcc,nvvm,crt,cccl]" in the version that '
    "PyTorch pins)"
)
OLDEST_CAPABILITY = (8, 0)


class BuildError(RuntimeError):
    """The CUDA kernels cannot be built or loaded; the first line says why and what to do."""


@dataclass(frozen=True, order=True)
class Target:
    """Machine code (``sm_90``) for one compute capability, or PTX (``compute_90``) for it."""

    capability: tuple[int, int]
    ptx: bool = False

    @classmethod
    def parse(cls, architecture: str) -> Target:
        """Read ``"9.0"``, ``"90"`` or ``"sm_90"``.

        Raises:
            BuildError: another notation, or a GPU older than the kernels support.
        """
        match = re.fullmatch(r"(?:sm_?)?(\d+)\.?(\d)", architecture.strip())
        if match is None:
            raise BuildError(f'architecture must look like "9.0" or "sm_90", got {architecture!r}')
        capability = (int(match[1]), int(match[2]))
        if capability < OLDEST_CAPABILITY:
            raise BuildError(f"architecture must be sm_80 or later, got {architecture!r}")
        return cls(capability)

    @classmethod
    def from_tag(cls, tag: str) -> Target | None:
        """The inverse of ``tag``; None where the text is no tag."""
        match = re.fullmatch(r"(sm|ptx)(\d+)(\d)", tag)
        return cls((int(match[2]), int(match[3])), match[1] == "ptx") if match else None

    @property
    def tag(self) -> str:
        return ("ptx" if self.ptx else "sm") + "{}{}".format(*self.capability)

    @property
    def name(self) -> str:
        return ("compute_" if self.ptx else "sm_") + "{}{}".format(*self.capability)

    @property
    def gencode(self) -> str:
        return "-gencode=arch=compute_{}{},code={}".format(*self.capability, self.name)

    def runs_on(self, capability: tuple[int, int]) -> bool:
        """Machine code runs on later minor revisions of its major one, PTX on everything later."""
        if self.ptx:
            return self.capability <= capability
        return self.capability[0] == capability[0] and self.capability[1] <= capability[1]


@dataclass(frozen=True)
class Nvcc:
    """An nvcc that runs, and its release, such as ``13.0``."""

    path: Path
    version: str

    def targets(self) -> set[Target]:
        """Every target that this nvcc makes machine code for."""
        listed = re.findall(r"^sm_(\d+)(\d)$", _ask(self.path, "--list-gpu-code"), re.MULTILINE)
        return {Target((int(major), int(minor))) for major, minor in listed}


def nvcc_candidates() -> Iterator[Path]:
    """Every nvcc there is: $CUDA_HOME, $CUDA_PATH, site-packages, PATH, /usr/local/cuda."""
    homes = [os.environ[name] for name in ("CUDA_HOME", "CUDA_PATH") if os.environ.get(name)]
    paths = [Path(home, "bin", "nvcc") for home in homes]
    paths += [root / "bin" / "nvcc" for root in _pypi_toolkits()]
    on_path = shutil.which("nvcc")
    if on_path:
        paths.append(Path(on_path))
    paths.append(Path("/usr/local/cuda/bin/nvcc"))
    return (path for path in dict.fromkeys(paths) if os.access(path, os.X_OK) and path.is_file())


def find_nvcc(cuda: str | None = None) -> Nvcc:
    """The first nvcc of the same major version as ``cuda`` (such as ``"13.0"``; None: any version).

    Raises:
        BuildError: there is none, or only of another major version; says what to install.
    """
    rejected = []
    for path in nvcc_candidates():
        try:
            nvcc = Nvcc(path, _release(path))
        except BuildError as error:
            rejected.append(str(error))
            continue
        if cuda is None or nvcc.version.split(".")[0] == cuda.split(".")[0]:
            return nvcc
        rejected.append(f"{path} is of CUDA {nvcc.version}")
    if rejected:
        needed = f"PyTorch is built for CUDA {cuda}" if cuda else "a working nvcc is needed"
        raise BuildError(
            f"{needed}, but {' and '.join(rejected)}. Install the matching one: {INSTALL_NVCC}, "
            "or set CUDA_HOME to a toolkit of that version"
        )
    raise BuildError(
        "no CUDA compiler: nvcc is neither in $CUDA_HOME nor in site-packages, on PATH or in "
        f"/usr/local/cuda. Install it: {INSTALL_NVCC}"
    )


def find_host_compiler() -> Path:
    """The C++ compiler: $NVCC_CCBIN, else $CXX, g++ or c++ on PATH.

    Raises:
        BuildError: there is none.
    """
    wanted = [os.environ.get("NVCC_CCBIN"), os.environ.get("CXX"), "g++", "c++"]
    for name in filter(None, wanted):
        found = shutil.which(name)
        if found:
            return Path(found)
    raise BuildError(
        "no C++ compiler: g++ is not on PATH. Install it (for example: apt-get install g++), "
        "or set CXX to one"
    )


def find_ninja() -> Path:
    """The ninja of the PyPI package, else the one on PATH.

    Raises:
        BuildError: there is none.
    """
    try:
        from ninja import BIN_DIR
    except ImportError:
        packaged = None
    else:
        packaged = shutil.which("ninja", path=BIN_DIR)
    found = packaged or shutil.which("ninja")
    if found is None:
        raise BuildError("ninja was not found. Install it: pip install ninja")
    return Path(found)


def find_cudart(nvcc: Nvcc) -> Path:
    """The libcudart that torch has loaded into this process, so that there is one runtime in it.

    A torch that links the runtime statically has none: then one beside torch or nvcc.

    Raises:
        BuildError: there is none.
    """
    loaded = _loaded_library(r"libcudart[-.\w]*\.so")
    if loaded is not None:
        return loaded
    roots = [*_pypi_toolkits(), nvcc.path.resolve().parents[1], Path("/usr/local/cuda")]
    major = nvcc.version.split(".")[0]
    for root in roots:
        for folder in ("lib", "lib64"):
            for name in (f"libcudart.so.{major}", "libcudart.so"):
                if (root / folder / name).exists():
                    return root / folder / name
    raise BuildError(f"libcudart.so.{major} was not found in {', '.join(map(str, roots))}")


def find_libstdcxx() -> Path | None:
    """The libstdc++ that torch has loaded into this process; None where it cannot be told.

    A compiler that has only a static libstdc++ would put a second one into our library, and an
    exception thrown by the one crashes in the other.
    """
    return _loaded_library(r"libstdc\+\+\.so")


def _loaded_library(name: str) -> Path | None:
    """The shared library of this process whose file name begins with the pattern ``name``."""
    maps = Path("/proc/self/maps")
    for line in (maps.read_text() if maps.exists() else "").splitlines():
        fields = line.split(maxsplit=5)
        if len(fields) == 6 and re.match(name, Path(fields[5]).name):
            return Path(fields[5])
    return None


def _pypi_toolkits() -> list[Path]:
    """``site-packages/nvidia/cu13`` and its like, the one of torch's CUDA version first."""
    spec = importlib.util.find_spec("nvidia")
    folders: Iterable[str] = (spec and spec.submodule_search_locations) or ()
    roots = [root for folder in folders for root in sorted(Path(folder).glob("cu[0-9]*"))]
    own = "cu" + (torch.version.cuda or "").split(".")[0]
    return sorted(roots, key=lambda root: root.name != own)


def _release(path: Path) -> str:
    answer = _ask(path, "--version")
    match = re.search(r"release (\d+\.\d+)", answer)
    if match is None:
        raise BuildError(f"{path} --version names no release: {answer.strip()[:80]!r}")
    return match[1]


@functools.cache
def _ask(path: Path, option: str) -> str:
    try:
        answer = subprocess.run(
            [str(path), option], capture_output=True, text=True, timeout=60, check=True
        )
    except (OSError, subprocess.SubprocessError) as error:
        raise BuildError(f"{path} {option} fails: {error}") from error
    return answer.stdout
