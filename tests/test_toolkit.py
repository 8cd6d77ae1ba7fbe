"""Finding nvcc, the host compiler, ninja and libcudart."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest
import torch
from fake_toolkit import FakeToolkit

from dwswap import toolkit
from dwswap.toolkit import BuildError, Nvcc, Target


@pytest.fixture
def alone(monkeypatch, tmp_path):
    """No toolkit but the ones that a test names."""
    for name in ("CUDA_HOME", "CUDA_PATH", "CXX", "NVCC_CCBIN"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(toolkit, "_pypi_toolkits", lambda: [])
    (tmp_path / "empty").mkdir()
    monkeypatch.setenv("PATH", str(tmp_path / "empty"))
    return monkeypatch


@pytest.mark.parametrize("text", ["9.0", "90", "sm_90", "sm90", " 9.0 "])
def test_architecture_notations(text):
    assert Target.parse(text) == Target((9, 0))


def test_architecture_of_two_digits():
    assert Target.parse("12.0").gencode == "-gencode=arch=compute_120,code=sm_120"
    assert Target((9, 0), ptx=True).gencode == "-gencode=arch=compute_90,code=compute_90"


@pytest.mark.parametrize("text", ["", "hopper", "9.0a", "9.0+PTX", "-9.0"])
def test_architecture_must_be_readable(text):
    with pytest.raises(BuildError, match="must look like"):
        Target.parse(text)


def test_architecture_must_be_supported():
    with pytest.raises(BuildError, match=r"sm_80 or later, got '7\.5'"):
        Target.parse("7.5")


@pytest.mark.parametrize("target", [Target((8, 0)), Target((12, 1)), Target((9, 0), ptx=True)])
def test_tags_can_be_read_back(target):
    assert Target.from_tag(target.tag) == target


def test_machine_code_runs_on_later_minor_revisions_only():
    assert Target((8, 0)).runs_on((8, 6))
    assert not Target((8, 6)).runs_on((8, 0))
    assert not Target((9, 0)).runs_on((10, 0))
    assert Target((9, 0), ptx=True).runs_on((12, 0))
    assert not Target((9, 0), ptx=True).runs_on((8, 9))


def test_cuda_home_comes_before_the_others(alone, tmp_path):
    home, path = FakeToolkit(tmp_path / "home"), FakeToolkit(tmp_path / "path")
    alone.setenv("CUDA_HOME", str(home.root))
    alone.setenv("PATH", f"{path.root / 'bin'}:{os.defpath}")
    assert list(toolkit.nvcc_candidates())[:2] == [home.nvcc, path.nvcc]


def test_nvcc_of_site_packages_comes_before_the_path(alone, tmp_path):
    packaged, path = FakeToolkit(tmp_path / "cu13"), FakeToolkit(tmp_path / "path")
    alone.setattr(toolkit, "_pypi_toolkits", lambda: [packaged.root])
    alone.setenv("PATH", f"{path.root / 'bin'}:{os.defpath}")
    assert list(toolkit.nvcc_candidates())[:2] == [packaged.nvcc, path.nvcc]


def test_site_packages_are_searched_for_the_toolkit_of_torch_first(monkeypatch, tmp_path):
    for name in ("cu12", "cu13", "cudnn"):
        (tmp_path / "nvidia" / name).mkdir(parents=True)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    found = [root for root in toolkit._pypi_toolkits() if tmp_path in root.parents]
    assert [root.name for root in found] == ["cu13", "cu12"]


def test_an_nvcc_of_another_major_version_is_passed_over(alone, tmp_path):
    old = FakeToolkit(tmp_path / "old", release="12.4")
    new = FakeToolkit(tmp_path / "new", release="13.2")
    alone.setattr(toolkit, "nvcc_candidates", lambda: iter([old.nvcc, new.nvcc]))
    assert toolkit.find_nvcc("13.0") == Nvcc(new.nvcc, "13.2")
    assert toolkit.find_nvcc() == Nvcc(old.nvcc, "12.4")


def test_only_an_nvcc_of_another_major_version(alone, tmp_path):
    old = FakeToolkit(tmp_path / "old", release="12.4")
    alone.setattr(toolkit, "nvcc_candidates", lambda: iter([old.nvcc]))
    with pytest.raises(BuildError) as caught:
        toolkit.find_nvcc("13.0")
    assert "PyTorch is built for CUDA 13.0" in str(caught.value)
    assert f"{old.nvcc} is of CUDA 12.4" in str(caught.value)
    assert 'pip install "dwswap[nvcc]"' in str(caught.value)


def test_an_nvcc_that_does_not_run_is_named(alone, tmp_path):
    broken = tmp_path / "nvcc"
    broken.write_text("#!/bin/sh\nexit 3\n")
    broken.chmod(0o755)
    alone.setattr(toolkit, "nvcc_candidates", lambda: iter([broken]))
    with pytest.raises(BuildError, match=f"{broken} --version fails"):
        toolkit.find_nvcc("13.0")


def test_an_nvcc_without_a_version_is_named(alone, tmp_path):
    strange = tmp_path / "nvcc"
    strange.write_text("#!/bin/sh\necho hello\n")
    strange.chmod(0o755)
    alone.setattr(toolkit, "nvcc_candidates", lambda: iter([strange]))
    with pytest.raises(BuildError, match="names no release: 'hello'"):
        toolkit.find_nvcc("13.0")


def test_no_nvcc_says_what_to_install(alone):
    alone.setattr(toolkit, "nvcc_candidates", lambda: iter([]))
    with pytest.raises(BuildError, match=r'Install it: pip install "dwswap\[nvcc\]"'):
        toolkit.find_nvcc("13.0")


def test_targets_are_those_that_nvcc_lists(tmp_path):
    fake = FakeToolkit(tmp_path, codes=("sm_90", "sm_120"))
    assert Nvcc(fake.nvcc, "13.0").targets() == {Target((9, 0)), Target((12, 0))}


def test_host_compiler(alone, tmp_path):
    with pytest.raises(BuildError, match="no C\\+\\+ compiler"):
        toolkit.find_host_compiler()
    fake = FakeToolkit(tmp_path / "cuda")
    alone.setenv("CXX", str(fake.linker))
    assert toolkit.find_host_compiler() == fake.linker


def test_ninja_of_the_package_is_used(alone):
    ninja = pytest.importorskip("ninja")
    assert toolkit.find_ninja() == Path(ninja.BIN_DIR, "ninja")


def test_no_ninja_says_what_to_install(alone, tmp_path):
    alone.setitem(sys.modules, "ninja", None)
    with pytest.raises(BuildError, match="pip install ninja"):
        toolkit.find_ninja()
    program = tmp_path / "empty" / "ninja"
    program.write_text("#!/bin/sh\n")
    program.chmod(0o755)
    assert toolkit.find_ninja() == program


def test_cudart_is_the_one_in_this_process(tmp_path):
    loaded = [line for line in Path("/proc/self/maps").read_text().splitlines() if "cudart" in line]
    fake = FakeToolkit(tmp_path)
    found = toolkit.find_cudart(Nvcc(fake.nvcc, "13.0"))
    if loaded:
        assert loaded[0].endswith(str(found))
    else:  # a PyTorch for the CPU
        assert found.name.startswith("libcudart.so")
