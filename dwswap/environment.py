"""What a report or a benchmark must say about the machine and the software that it ran on."""

from __future__ import annotations

import hashlib
import importlib.metadata
import platform
import re
import subprocess
import sys
from pathlib import Path

import torch

from .compilation import csrc_dir
from .library_cache import CUDA_SUFFIXES, hash_files
from .toolkit import BuildError, find_nvcc

SECONDS = 10.0
DRIVER_FILE = Path("/proc/driver/nvidia/version")


def environment() -> dict[str, str | None]:
    """Versions and devices, for ``dwswap doctor``, saved reports and benchmarks.

    Returns:
        The keys dwswap, sources, commit, python, os, torch, cuda, cudnn, gpu, capability, driver,
        nvcc and nvcc_path, always all of them; None where there is no such thing here. ``gpu``
        and ``capability`` are the current device's. ``sources`` is a hash of the package's Python
        and CUDA sources, with git or without; ``commit`` is for a package in a git checkout.
    """
    nvcc_version, nvcc_path = _nvcc()
    gpu, capability = _gpu()
    return {
        "dwswap": _version(),
        "sources": _sources(),
        "commit": _commit(Path(__file__).resolve().parents[1]),
        "python": platform.python_version(),
        "os": platform.platform(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "cudnn": _cudnn(),
        "gpu": gpu,
        "capability": capability,
        "driver": _driver(),
        "nvcc": nvcc_version,
        "nvcc_path": nvcc_path,
    }


def _version() -> str | None:
    # From the package that is running: an installed one of the same name may be another version.
    version = getattr(sys.modules.get(__package__), "__version__", None)
    if version is not None:
        return str(version)
    try:
        return importlib.metadata.version("dwswap")
    except importlib.metadata.PackageNotFoundError:
        return None


def _sources() -> str | None:
    try:
        csrc = csrc_dir()
    except BuildError:
        return None
    hasher = hashlib.sha256()
    # An installed package has csrc inside it, a checkout beside it: the same hash for both.
    hash_files(hasher, Path(__file__).resolve().parent, (".py",))
    hash_files(hasher, csrc, CUDA_SUFFIXES)
    return hasher.hexdigest()[:12]


def _commit(root: Path) -> str | None:
    """The commit of the checkout at ``root``, and ``-dirty`` where tracked files differ."""
    if not (root / ".git").exists():
        return None
    found = _output(["git", "-C", str(root), "rev-parse", "HEAD"])
    if not found:
        return None
    changed = _output(["git", "-C", str(root), "status", "--porcelain", "--untracked-files=no"])
    return found + ("-dirty" if changed else "")


def _gpu() -> tuple[str | None, str | None]:
    if not torch.cuda.is_available():
        return None, None
    major, minor = torch.cuda.get_device_capability()
    return torch.cuda.get_device_name(), f"{major}.{minor}"


def _cudnn() -> str | None:
    version = torch.backends.cudnn.version()
    if version is None:
        return None
    # cuDNN 8 counted in steps of 1000 for the major version, cuDNN 9 in steps of 10000.
    major = 10000 if version >= 90000 else 1000
    return f"{version // major}.{version % major // 100}.{version % 100}"


def _driver() -> str | None:
    """The version of the kernel module that is loaded, else what nvidia-smi says."""
    if DRIVER_FILE.exists():
        match = re.search(r"\s(\d{3,}(?:\.\d+)+)\s", DRIVER_FILE.read_text())
        if match:
            return match[1]
    answer = _output(["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"])
    return answer.splitlines()[0].strip() if answer else None


def _nvcc() -> tuple[str | None, str | None]:
    """Release and path of the nvcc that a build would use."""
    try:
        nvcc = find_nvcc(torch.version.cuda)
    except BuildError:
        return None, None
    return nvcc.version, str(nvcc.path)


def _output(command: list[str]) -> str | None:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=SECONDS, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()
