"""The wheel and the source distribution hold everything, and the version has one home."""

from __future__ import annotations

import importlib.util
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

import dwswap

ROOT = Path(__file__).resolve().parents[1]
BUILD = """
import sys
from setuptools import build_meta
print(getattr(build_meta, sys.argv[1])(sys.argv[2]))
"""


def package_files() -> set[str]:
    """What a wheel must hold: every module, and every CUDA source below ``dwswap/csrc``."""
    modules = {p.relative_to(ROOT).as_posix() for p in (ROOT / "dwswap").rglob("*.py")}
    sources = {
        f"dwswap/{p.relative_to(ROOT).as_posix()}"
        for suffix in ("cu", "cuh", "h", "cpp")
        for p in (ROOT / "csrc").rglob(f"*.{suffix}")
    }
    assert "dwswap/__init__.py" in modules
    assert any(name.endswith(".cu") for name in sources)
    assert any(name.endswith(".cuh") for name in sources)
    data = {p.relative_to(ROOT).as_posix() for p in (ROOT / "dwswap").rglob("*.json")}
    assert "dwswap/bench/data/torchvision_depthwise.json" in data
    return modules | sources | data | {"dwswap/py.typed"}


def build(kind: str, tree: Path, folder: Path) -> Path:
    """Build ``build_wheel`` or ``build_sdist`` of ``tree`` in this environment, offline."""
    done = subprocess.run(
        [sys.executable, "-c", BUILD, kind, str(folder)],
        cwd=tree,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return folder / done.stdout.splitlines()[-1]


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the checkout, without what a fresh clone lacks: a build must not touch this one."""
    if importlib.util.find_spec("setuptools") is None:
        pytest.skip("setuptools is not installed")
    copy = tmp_path_factory.mktemp("checkout") / "dwswap"
    ignored = shutil.ignore_patterns("__pycache__", "*.egg-info")
    copy.mkdir()
    for name in ("dwswap", "csrc"):
        shutil.copytree(ROOT / name, copy / name, ignore=ignored)
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, copy / name)
    return copy


@pytest.fixture(scope="module")
def wheel(tree: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build("build_wheel", tree, tmp_path_factory.mktemp("wheel"))


def test_wheel_is_pure_python(wheel):
    assert wheel.name == f"dwswap-{dwswap.__version__}-py3-none-any.whl"


def test_wheel_holds_every_module_and_source(wheel):
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
    expected = package_files()
    assert expected - names == set()
    assert {name for name in names if ".dist-info/" not in name} - expected == set()


def test_wheel_metadata(wheel):
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        metadata = archive.read(next(n for n in names if n.endswith("METADATA"))).decode()
        scripts = archive.read(next(n for n in names if n.endswith("entry_points.txt"))).decode()
    assert "dwswap = dwswap.cli:main" in scripts
    for extra in ("nvcc", "bench", "onnx", "test", "dev"):
        assert f"Provides-Extra: {extra}\n" in metadata
    assert "Requires-Python: >=3.10\n" in metadata
    assert "License-Expression: Apache-2.0\n" in metadata
    needed = set(re.findall(r"^Requires-Dist: ([\w-]+)(?!.*extra ==)", metadata, re.MULTILINE))
    assert needed == {"torch", "ninja", "filelock", "rich"}


def test_installed_wheel_finds_its_sources(wheel, tmp_path):
    """Unpacked elsewhere, the package takes the sources that came with it."""
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path)
    done = subprocess.run(
        [
            sys.executable,
            "-c",
            "import dwswap; from dwswap.compilation import csrc_dir; print(csrc_dir())",
        ],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert Path(done.stdout.strip()) == (tmp_path / "dwswap" / "csrc").resolve()


def test_sdist_holds_what_the_wheel_is_made_of(tree, tmp_path):
    sdist = build("build_sdist", tree, tmp_path)
    with tarfile.open(sdist) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    expected = {name.replace("dwswap/csrc/", "csrc/") for name in package_files()}
    assert expected - names == set()
    assert {"pyproject.toml", "README.md", "LICENSE"} <= names


def test_version_is_in_the_changelog():
    assert f"## [{dwswap.__version__}]" in (ROOT / "CHANGELOG.md").read_text()
