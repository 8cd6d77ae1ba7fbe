"""A pretended machine: shell scripts for nvcc and g++ that record their work, and GPUs at will."""

from __future__ import annotations

import tempfile
import warnings
from pathlib import Path

import pytest
import torch

from dwswap import build as build_module
from dwswap import toolkit
from dwswap.build import Status, load, status

FAKE_NVCC = """#!/bin/sh
case "$1" in
  --version) echo "Cuda compilation tools, release {release}, V{release}.1"; exit 0 ;;
  --list-gpu-code) for code in {codes}; do echo "$code"; done; exit 0 ;;
esac
echo "$@" >> "{log}"
while [ $# -gt 1 ]; do
  [ "$1" = "-o" ] && output="$2"
  shift
done
{body}
echo object > "$output"
"""

FAKE_LINKER = """#!/bin/sh
arguments="$*"
while [ $# -gt 1 ]; do
  [ "$1" = "-o" ] && output="$2"
  shift
done
echo "a shared library of $$: $arguments" > "$output"
"""

CODES = ("sm_75", "sm_80", "sm_86", "sm_90", "sm_120")


class FakeToolkit:
    """A CUDA toolkit below ``root`` whose nvcc runs ``body``, a piece of shell script."""

    def __init__(
        self,
        root: Path,
        *,
        release: str = "13.0",
        codes: tuple[str, ...] = CODES,
        body: str = "",
    ) -> None:
        self.root = root
        self.nvcc = root / "bin" / "nvcc"
        self.linker = root / "bin" / "fake-g++"
        self.log = root / "compiled.log"
        self.nvcc.parent.mkdir(parents=True, exist_ok=True)
        (root / "lib").mkdir(exist_ok=True)
        (root / "lib" / "libcudart.so.13").touch()
        script = FAKE_NVCC.format(release=release, codes=" ".join(codes), log=self.log, body=body)
        for path, text in ((self.nvcc, script), (self.linker, FAKE_LINKER)):
            path.write_text(text)
            path.chmod(0o755)

    @property
    def compiled(self) -> list[str]:
        """One line of arguments per file that nvcc was asked to compile."""
        return self.log.read_text().splitlines() if self.log.exists() else []


def write_sources(folder: Path, **sources: str) -> Path:
    """A tree of CUDA sources: ``a="..."`` becomes ``folder/part/a.cu``; by default two."""
    for name, text in (sources or {"first": "// one\n", "second": "// two\n"}).items():
        path = folder / "part" / f"{name}.cu"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return folder


class Machine:
    """A machine of which a test says what it has: sources, compiler, GPUs, cache."""

    def __init__(self, root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.root = root
        self.monkeypatch = monkeypatch
        self.sources = write_sources(root / "csrc")
        self.cache = root / "cache"
        self.loaded: list[Path] = []
        for name in ("CUDA_PATH", "NVCC_CCBIN", "MAX_JOBS", "DWSWAP_NVCC_FLAGS", "DWSWAP_CUDA"):
            monkeypatch.delenv(name, raising=False)
        (root / "tmp").mkdir()
        monkeypatch.setattr(tempfile, "tempdir", str(root / "tmp"))
        monkeypatch.setenv("DWSWAP_CACHE_DIR", str(self.cache))
        monkeypatch.setattr(torch.version, "cuda", "13.0")
        monkeypatch.setattr(build_module, "csrc_dir", lambda: self.sources)
        monkeypatch.setattr(torch.ops, "load_library", lambda path: self.loaded.append(Path(path)))
        self.toolkit = self.install()
        self.gpus((9, 0))
        self.new_process()

    def install(self, **options) -> FakeToolkit:
        self.toolkit = FakeToolkit(self.root / "cuda", **options)
        self.monkeypatch.setenv("CUDA_HOME", str(self.toolkit.root))
        self.monkeypatch.setenv("CXX", str(self.toolkit.linker))
        self.monkeypatch.setattr(toolkit, "nvcc_candidates", lambda: iter([self.toolkit.nvcc]))
        toolkit._ask.cache_clear()
        return self.toolkit

    def remove_compiler(self) -> None:
        self.monkeypatch.setattr(toolkit, "nvcc_candidates", lambda: iter([]))

    def gpus(self, *capabilities: tuple[int, int]) -> None:
        self.monkeypatch.setattr(torch.cuda, "is_available", lambda: bool(capabilities))
        self.monkeypatch.setattr(torch.cuda, "device_count", lambda: len(capabilities))
        self.monkeypatch.setattr(torch.cuda, "get_device_capability", lambda i: capabilities[i])

    def new_process(self) -> None:
        self.monkeypatch.setattr(build_module, "_status", Status())

    def load_with_warning(self) -> str:
        """``load()`` must fail with exactly one warning, however often it is called."""
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            assert [load(), load(), load()] == [False] * 3
        assert [item.category for item in caught] == [RuntimeWarning]
        assert status().attempted
        assert not status().loaded
        assert "\n" not in status().reason
        assert status().reason in str(caught[0].message)
        return str(caught[0].message)

    def load_silently(self) -> bool:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            return load()


def leftovers(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.glob(".*partial*"))
