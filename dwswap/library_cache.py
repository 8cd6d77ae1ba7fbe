"""Where compiled CUDA libraries are kept.

A library lies in ``<cache>/<key>/``, beside the one for processes without Python and a manifest
with the digests of both. That folder is renamed into place when it is complete, so whatever has a
key for a name is a finished build. The digest is checked before a library is loaded, because to
load a truncated one kills the process.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import platform
import shutil
import stat
import sys
import tempfile
import time
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from pathlib import Path

import torch

from .toolkit import BuildError, Target

logger = logging.getLogger("dwswap")

LIBRARY = "libdwswap.so"
STANDALONE = "libdwswap_standalone.so"
MANIFEST = "manifest.json"
STALE_SECONDS = 24 * 3600
CUDA_SUFFIXES = (".cu", ".cuh", ".cpp", ".h")


def hash_files(hasher: hashlib._Hash, root: Path, suffixes: Collection[str]) -> None:
    """Add the places below ``root`` and the contents of the files with these suffixes."""
    for path in sorted(root.rglob("*")):
        if path.suffix in suffixes:
            hasher.update(path.relative_to(root).as_posix().encode() + b"\0")
            hasher.update(hashlib.sha256(path.read_bytes()).digest())


@dataclass(frozen=True)
class Fingerprint:
    """What a library depends on besides its architectures: sources, flags, versions, platform."""

    prefix: str
    digest: str

    @classmethod
    def of(cls, sources: Path, flags: Iterable[str]) -> Fingerprint:
        """Hash the C++ and CUDA files below ``sources``, flags, versions and platform."""
        cuda = torch.version.cuda or "none"
        hasher = hashlib.sha256()
        parts = [torch.__version__, cuda, sys.platform, platform.machine(), *flags]
        for part in parts:
            hasher.update(part.encode() + b"\0")
        hash_files(hasher, sources, CUDA_SUFFIXES)
        release = torch.__version__.split("+")[0]
        return cls(f"torch{release}-cu{cuda.replace('.', '')}", hasher.hexdigest()[:12])

    def key(self, targets: Iterable[Target]) -> str:
        """The folder's name, such as ``torch2.11.0-cu130-sm80_sm90-1a2b3c4d5e6f``."""
        tags = "_".join(target.tag for target in sorted(set(targets)))
        return f"{self.prefix}-{tags}-{self.digest}"

    def targets(self, key: str) -> set[Target]:
        """The targets in a key of this fingerprint; empty for every other name."""
        head, tail = f"{self.prefix}-", f"-{self.digest}"
        if not (key.startswith(head) and key.endswith(tail)):
            return set()
        found = [Target.from_tag(tag) for tag in key[len(head) : -len(tail)].split("_")]
        return set() if None in found else {target for target in found if target}


def cache_dir() -> Path:
    """``$DWSWAP_CACHE_DIR``, else ``~/.cache/dwswap``, else (no home) a folder of the temp dir."""
    chosen = os.environ.get("DWSWAP_CACHE_DIR")
    if chosen:
        return Path(chosen).expanduser().absolute()
    home = Path(os.path.expanduser("~"))
    return home / ".cache" / "dwswap" if home.is_absolute() else _fallback_dir()


def find(
    fingerprint: Fingerprint,
    *,
    serves: Collection[tuple[int, int]] = (),
    holds: Collection[Target] = (),
) -> Path | None:
    """The best intact library that fits; needs no compiler and no write access.

    Args:
        fingerprint: what the library must have been built from.
        serves: compute capabilities of GPUs that it must run on.
        holds: targets that it must have been built for.
    """
    best: tuple[int, int, Path] | None = None
    for entry in (entry for folder in readable_dirs() for entry in _entries(folder)):
        targets = fingerprint.targets(entry.name)
        fits = all(any(target.runs_on(gpu) for target in targets) for gpu in serves)
        if not targets or not fits or not targets.issuperset(holds):
            continue
        precise = sum(Target(gpu) in targets for gpu in serves)
        rank = (-precise, len(targets), entry / LIBRARY)
        if (best is None or rank < best) and intact(entry):
            best = rank
    return best[2] if best else None


def intact(folder: Path, name: str = LIBRARY) -> Path | None:
    """The library ``name`` in ``folder`` if it is complete and undamaged."""
    try:
        expected = json.loads((folder / MANIFEST).read_text())["sha256"][name]
        actual = _digest(folder / name)
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError) as error:
        logger.info("ignoring the unreadable library in %s: %s", folder, error)
        return None
    if actual != expected:
        logger.info("ignoring the damaged library in %s", folder)
        return None
    return folder / name


def built_at(folder: Path) -> int | None:
    """When the library in ``folder`` was built, in nanoseconds; None where there is none."""
    try:
        return (folder / MANIFEST).stat().st_mtime_ns
    except FileNotFoundError:
        return None


def readable_dirs() -> list[Path]:
    """Where to look for what an earlier process has kept, best first."""
    fallback = _fallback_dir()
    folders = [cache_dir()] if cache_dir() != fallback else []
    if os.path.lexists(fallback) and _is_private(fallback):
        folders.append(fallback)
    return folders


def writable_dir() -> Path:
    """``cache_dir()``, or with one log line a private folder of the temp dir where that fails.

    Raises:
        BuildError: neither can be written.
    """
    primary = cache_dir()
    try:
        if primary != _fallback_dir():
            _try_to_write(primary)
            return primary
        reason = "there is no home directory"
    except OSError as error:
        reason = str(error)
    fallback = _fallback_dir()
    try:
        fallback.mkdir(mode=0o700, exist_ok=True)
        if not _is_private(fallback):
            raise PermissionError(f"{fallback} is not a folder that only this user can write")
        _try_to_write(fallback)
    except OSError as error:
        raise BuildError(
            f"no place to build in: the cache {primary} cannot be written ({reason}) and neither "
            f"can {fallback} ({error}). Set DWSWAP_CACHE_DIR to a folder that can be written"
        ) from error
    if primary != fallback:
        logger.warning(
            "the cache %s cannot be written (%s): using %s instead; DWSWAP_CACHE_DIR names another",
            primary,
            reason,
            fallback,
        )
    return fallback


def new_staging_dir(folder: Path, key: str) -> Path:
    """A fresh folder to build ``key`` in, under its lock; removes what killed builds left."""
    oldest = time.time() - STALE_SECONDS
    for leftover in folder.glob(".*.partial-*"):
        # The key's own leftovers are dead, since we hold its lock; the others may be at work.
        if leftover.name.startswith(f".{key}.") or _modified(leftover) < oldest:
            shutil.rmtree(leftover, ignore_errors=True)
    return Path(tempfile.mkdtemp(prefix=f".{key}.partial-", dir=folder))


def publish(staging: Path, destination: Path) -> Path:
    """Make the two libraries in ``staging`` and their manifest appear as ``destination``."""
    finished = staging / "finished"
    finished.mkdir()
    for name in (LIBRARY, STANDALONE):
        os.replace(staging / name, finished / name)
    digests = {name: _digest(finished / name) for name in (LIBRARY, STANDALONE)}
    (finished / MANIFEST).write_text(json.dumps({"sha256": digests, "python": sys.version}) + "\n")
    if destination.exists():
        os.rename(destination, staging / "replaced")
    os.rename(finished, destination)
    return destination / LIBRARY


def _digest(path: Path) -> str:
    hasher = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(1 << 20):
            hasher.update(chunk)
    return hasher.hexdigest()


def _fallback_dir() -> Path:
    return Path(tempfile.gettempdir()) / f"dwswap-{os.getuid()}"


def _is_private(folder: Path) -> bool:
    """Nobody else can have put a library there: a real folder, ours, closed to others."""
    info = folder.lstat()
    return stat.S_ISDIR(info.st_mode) and info.st_uid == os.getuid() and not info.st_mode & 0o077


def _entries(folder: Path) -> list[Path]:
    try:
        return list(folder.iterdir())
    except (FileNotFoundError, NotADirectoryError):
        return []
    except OSError as error:
        logger.info("the cache %s cannot be read: %s", folder, error)
        return []


def _modified(folder: Path) -> float:
    try:
        return folder.stat().st_mtime
    except FileNotFoundError:  # another process has just removed it
        return float("inf")


def _try_to_write(folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryFile(dir=folder):
        return
