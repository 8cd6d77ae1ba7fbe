"""The record of the machine and the software."""

from __future__ import annotations

import json
import subprocess

import pytest
import torch

from dwswap import environment as environment_module
from dwswap import toolkit
from dwswap.environment import environment

KEYS = {
    "dwswap",
    "sources",
    "commit",
    "python",
    "os",
    "torch",
    "cuda",
    "cudnn",
    "gpu",
    "capability",
    "driver",
    "nvcc",
    "nvcc_path",
}


def git(folder, *arguments):
    identity = ["-c", "user.name=A", "-c", "user.email=a@example.org", "-c", "commit.gpgsign=false"]
    command = ["git", "-C", str(folder), *identity, *arguments]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()


def test_every_key_is_there_and_serializable():
    record = environment()
    assert set(record) == KEYS
    assert all(value is None or (isinstance(value, str) and value) for value in record.values())
    assert json.loads(json.dumps(record)) == record
    assert record["torch"] == torch.__version__
    assert record["python"].count(".") == 2


def test_a_machine_with_nothing(monkeypatch, tmp_path):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(toolkit, "nvcc_candidates", lambda: iter([]))
    monkeypatch.setattr(environment_module, "DRIVER_FILE", tmp_path / "none")
    monkeypatch.setenv("PATH", str(tmp_path))
    record = environment()
    assert set(record) == KEYS
    for key in ("gpu", "capability", "driver", "nvcc", "nvcc_path", "commit"):
        assert record[key] is None


def test_the_sources_decide_the_hash(monkeypatch, tmp_path):
    (tmp_path / "a.cu").write_text("int a;")
    monkeypatch.setattr(environment_module, "csrc_dir", lambda: tmp_path)
    first = environment_module._sources()
    assert environment_module._sources() == first
    (tmp_path / "a.log").write_text("no source")
    assert environment_module._sources() == first
    (tmp_path / "a.cu").write_text("int b;")
    assert environment_module._sources() != first


def test_sources_that_are_missing(monkeypatch):
    def missing():
        raise toolkit.BuildError("the CUDA sources are missing")

    monkeypatch.setattr(environment_module, "csrc_dir", missing)
    assert environment()["sources"] is None


def test_the_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "NVIDIA H200")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    record = environment()
    assert (record["gpu"], record["capability"]) == ("NVIDIA H200", "9.0")


@pytest.mark.parametrize(
    "line",
    [
        "NVRM version: NVIDIA UNIX x86_64 Kernel Module  580.65.06  Sun Jul 27 07:12:50 UTC 2025\n",
        "NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  580.65.06  Release Build  (b)\n",
    ],
)
def test_the_driver_of_the_kernel_module(monkeypatch, tmp_path, line):
    file = tmp_path / "version"
    file.write_text(line + "GCC version:  gcc version 12.2.0 (Debian 12.2.0-14)\n")
    monkeypatch.setattr(environment_module, "DRIVER_FILE", file)
    assert environment()["driver"] == "580.65.06"


@pytest.mark.parametrize(
    ("script", "version"),
    [("echo 580.65.06; echo 580.65.06", "580.65.06"), ("exit 9", None), ("sleep 60", None)],
)
def test_the_driver_of_nvidia_smi(monkeypatch, tmp_path, script, version):
    program = tmp_path / "nvidia-smi"
    program.write_text(f"#!/bin/sh\n{script}\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    monkeypatch.setattr(environment_module, "DRIVER_FILE", tmp_path / "none")
    monkeypatch.setattr(environment_module, "SECONDS", 1.0)
    assert environment_module._driver() == version


@pytest.mark.parametrize(
    ("number", "text"), [(91900, "9.19.0"), (8902, "8.9.2"), (92601, "9.26.1"), (None, None)]
)
def test_cudnn_versions(monkeypatch, number, text):
    monkeypatch.setattr(torch.backends.cudnn, "version", lambda: number)
    assert environment()["cudnn"] == text


def test_the_commit_of_a_checkout(tmp_path):
    assert environment_module._commit(tmp_path) is None
    git(tmp_path, "init")
    assert environment_module._commit(tmp_path) is None
    (tmp_path / "file").write_text("one")
    git(tmp_path, "add", "file")
    git(tmp_path, "commit", "-m", "one")
    commit = git(tmp_path, "rev-parse", "HEAD")
    (tmp_path / "untracked").write_text("")
    assert environment_module._commit(tmp_path) == commit
    (tmp_path / "file").write_text("two")
    assert environment_module._commit(tmp_path) == commit + "-dirty"


def test_a_checkout_above_an_installed_package_is_not_ours(tmp_path):
    git(tmp_path, "init")
    (tmp_path / "site-packages").mkdir()
    assert environment_module._commit(tmp_path / "site-packages") is None
