"""Find, build and load the library of CUDA kernels.

``load()`` is for the process at hand: it finds a cached library or builds one, once, with one
warning where that fails. ``build()`` is for images and clusters: it builds ahead, without a GPU.
A library is kept per source, flags, torch, CUDA and platform, and serves every later process.
"""

from __future__ import annotations

import functools
import logging
import os
import shutil
import sys
import threading
import time
import warnings
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from . import library_cache
from .compilation import compile_flags, compile_library, csrc_dir
from .library_cache import Fingerprint, cache_dir
from .toolkit import OLDEST_CAPABILITY, BuildError, Target, find_nvcc

__all__ = ["BuildError", "Status", "build", "cache_dir", "load", "load_for", "status"]

logger = logging.getLogger("dwswap")

LOCK_SECONDS = 1800.0


@dataclass(frozen=True)
class Status:
    """The state of the CUDA kernels in this process.

    Attributes:
        loaded: our kernels are registered.
        attempted: ``load()`` found a GPU and tried.
        reason: why they are not loaded, in one line; None where they are.
        library: the library that is loaded.
        seconds: what the build took, where this process made it.
    """

    loaded: bool = False
    attempted: bool = False
    reason: str | None = "the CUDA kernels have not been needed yet"
    library: Path | None = None
    seconds: float | None = None


_status = Status()
_lock = threading.RLock()


def status() -> Status:
    """What ``load()`` has come to so far; does nothing itself."""
    return _status


def load() -> bool:
    """Register the CUDA kernels in this process; builds their library where the cache has none.

    Idempotent and safe to call from several threads. Never raises.

    Returns:
        True once the kernels are registered. False, silently, where there is no CUDA GPU or
        ``DWSWAP_CUDA=0`` is set; False, with one warning per process that says what to do about it,
        where building or loading failed. ``status().reason`` says which.
    """
    global _status
    if _status.loaded:
        return True
    with _lock:
        if _status.attempted:
            return _status.loaded
        reason = _not_wanted()
        if reason:
            _status = Status(reason=reason)
            return False
        try:
            library, seconds = _load()
        except Exception as error:  # whatever it is, PyTorch's own kernels still work
            reason = str(error) if isinstance(error, BuildError) else f"{error!r}"
            _status = Status(attempted=True, reason=reason.partition("\n")[0])
            logger.debug("the CUDA kernels could not be loaded", exc_info=True)
            warnings.warn(
                "dwswap runs without its CUDA kernels, on PyTorch's own slower ones: " + reason,
                RuntimeWarning,
                stacklevel=2,
            )
            return False
        _status = Status(True, True, None, library, seconds)
        logger.info("CUDA kernels loaded from %s", library)
        return True


def load_for(device: torch.device) -> bool:
    """:func:`load`, where ``device`` is a GPU that there are kernels for."""
    return _is_supported(device) and load()


@functools.lru_cache
def _is_supported(device: torch.device) -> bool:
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= OLDEST_CAPABILITY


def build(
    architectures: Sequence[str] | None = None, *, force: bool = False, standalone: bool = False
) -> Path:
    """Build the library ahead of time; needs nvcc, but no GPU where architectures are given.

    Args:
        architectures: such as ``["8.0", "9.0", "12.0"]``; default: those of the visible GPUs.
        force: build even if the cache has the library.
        standalone: return the library for processes without Python, which has the same kernels and
            defines the operator itself. A process loads it with ``dlopen``; importing dwswap in
            such a process is an error.

    Returns:
        The library, in the cache, where ``load()`` finds it on a machine with any of these GPUs.

    Raises:
        BuildError: a tool is missing, an architecture is not supported, the compiler fails, or
            nothing can be written; says what to do about it.
    """
    if torch.version.cuda is None:
        raise BuildError("this PyTorch is built without CUDA: install a CUDA build of PyTorch")
    if architectures is not None:
        if isinstance(architectures, str) or not architectures:
            raise BuildError(f'architectures must look like ["9.0"], got {architectures!r}')
        targets = {Target.parse(architecture) for architecture in architectures}
    elif torch.cuda.is_available():
        targets = _targets(_capabilities())
    else:
        raise BuildError(
            "there is no GPU to build for: name the architectures, for example "
            "dwswap build --arch 9.0"
        )
    _require_linux()
    try:
        found = None if force else library_cache.find(_fingerprint(), holds=targets)
        library = found or _build(targets, force=force)[0]
        if not standalone:
            return library
        name = library_cache.STANDALONE
        return library_cache.intact(library.parent, name) or (
            _build(targets, force=True)[0].with_name(name)
        )
    except OSError as error:
        raise BuildError(f"the build could not use its files: {error}") from error


def _not_wanted() -> str | None:
    """Why there is nothing to load, where that is no failure."""
    if os.environ.get("DWSWAP_CUDA") == "0":
        return "switched off by DWSWAP_CUDA=0"
    if torch.version.cuda is None:
        return "this PyTorch is built without CUDA"
    if not torch.cuda.is_available():
        return "PyTorch sees no CUDA GPU"
    return None


def _load() -> tuple[Path, float | None]:
    """Load a cached library, or a new one where none is cached or the cached one does not load."""
    _require_linux()
    capabilities = _capabilities()
    library = library_cache.find(_fingerprint(), serves=capabilities)
    if library is not None:
        try:
            torch.ops.load_library(str(library))
            return library, None
        except OSError as error:
            logger.info("building again, %s does not load: %s", library, _cause(error))
    library, seconds = _build(_targets(capabilities), force=library is not None)
    try:
        torch.ops.load_library(str(library))
    except OSError as error:
        raise BuildError(f"{library} was built but does not load: {_cause(error)}") from error
    return library, seconds


def _build(targets: Collection[Target], *, force: bool = False) -> tuple[Path, float | None]:
    """Build under the key's lock; no seconds where another process built it in the meantime."""
    from filelock import FileLock, Timeout  # here, because only a build needs it

    sources, fingerprint = csrc_dir(), _fingerprint()
    key = fingerprint.key(targets)
    folder = library_cache.writable_dir()
    previous = library_cache.built_at(folder / key)
    # The kernel frees this lock when its holder dies, however it dies.
    lock = FileLock(folder / f"{key}.lock")
    try:
        lock.acquire(timeout=0)
    except Timeout:
        _say(f"dwswap: waiting for another process that builds the CUDA kernels ({lock.lock_file})")
        try:
            lock.acquire(timeout=LOCK_SECONDS, poll_interval=0.1)
        except Timeout:
            raise BuildError(
                f"another process has held {lock.lock_file} for {LOCK_SECONDS:.0f} s: "
                "end that process, then try again"
            ) from None
    try:
        if not force or library_cache.built_at(folder / key) != previous:
            found = library_cache.intact(folder / key)
            if found:
                return found, None
        start = time.monotonic()
        staging = library_cache.new_staging_dir(folder, key)
        try:
            names = (library_cache.LIBRARY, library_cache.STANDALONE)
            library, standalone = (staging / name for name in names)
            log = folder / f"{key}.log"
            compile_library(sources, targets, staging, log, library, standalone)
            if _fingerprint() != fingerprint:
                raise BuildError(f"the sources in {sources} changed during the build: try again")
            published = library_cache.publish(staging, folder / key)
        finally:
            shutil.rmtree(staging, ignore_errors=True)
        return published, time.monotonic() - start
    finally:
        lock.release()


def _fingerprint() -> Fingerprint:
    return Fingerprint.of(csrc_dir(), compile_flags())


def _capabilities() -> list[tuple[int, int]]:
    """Of the visible GPUs that the kernels support, each once.

    Raises:
        BuildError: they support none of them.
    """
    devices = range(torch.cuda.device_count())
    visible = sorted({torch.cuda.get_device_capability(device) for device in devices})
    supported = [capability for capability in visible if capability >= OLDEST_CAPABILITY]
    if not supported:
        names = ", ".join("sm_{}{}".format(*capability) for capability in visible)
        raise BuildError(f"the GPU is too old for the CUDA kernels: {names}, they need sm_80")
    return supported


def _targets(capabilities: Collection[tuple[int, int]]) -> set[Target]:
    """Machine code for each GPU; for one that nvcc does not know, PTX of the newest it knows."""
    nvcc = find_nvcc(torch.version.cuda)
    known = nvcc.targets()
    targets = set()
    for capability in capabilities:
        target = Target(capability)
        if target not in known:
            older = [candidate for candidate in known if candidate.capability < capability]
            if not older:
                raise BuildError(f"nvcc {nvcc.version} makes no code that runs on {target.name}")
            newest = max(older)
            logger.info("nvcc %s does not know %s: %s", nvcc.version, target.name, newest.name)
            target = Target(newest.capability, ptx=True)
        targets.add(target)
    return targets


def _require_linux() -> None:
    if not sys.platform.startswith("linux"):
        raise BuildError(f"the CUDA kernels can be built on Linux only, this is {sys.platform}")


def _cause(error: BaseException) -> BaseException:
    return error.__cause__ or error


def _say(line: str) -> None:
    if sys.stderr is not None:
        print(line, file=sys.stderr, flush=True)
