"""What threads of plane_strips compute, without a GPU: csrc's code, compiled for the host."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest
import torch

from dwswap.compilation import csrc_dir
from dwswap.toolkit import BuildError, find_cudart, find_host_compiler, find_nvcc


def test_threads_on_the_host(tmp_path):
    try:
        nvcc = find_nvcc(torch.version.cuda)
        host, cudart = find_host_compiler(), find_cudart(nvcc)
    except BuildError as error:
        pytest.skip(f"needs nvcc: {error}")
    source = Path(__file__).parent / "host" / "plane_strips.cpp"
    program = tmp_path / "plane_strips"
    link = ["-cudart", "none", "-Xlinker", f"{cudart},-rpath={cudart.parent}"]
    command = [nvcc.path, "-ccbin", host, "-x", "c++", "-std=c++20", "-O1", f"-I{csrc_dir()}"]
    command += [source, *link, "-o", program]
    subprocess.run(list(map(str, command)), check=True)
    done = subprocess.run([str(program)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[:2000]
    assert done.stdout.endswith(" problems, 0 wrong\n")
