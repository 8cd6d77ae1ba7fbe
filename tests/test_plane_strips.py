"""What threads of plane_strips compute, without a GPU: csrc's code, compiled for the host."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest
from cuts_program import compile_for_host

from dwswap.toolkit import BuildError


@pytest.mark.slow
def test_threads_on_the_host(tmp_path):
    program = tmp_path / "plane_strips"
    try:
        compile_for_host(program, [Path(__file__).parent / "host" / "plane_strips.cpp"])
    except BuildError as error:
        pytest.skip(f"needs nvcc: {error}")
    done = subprocess.run([str(program)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[:2000]
    assert done.stdout.endswith(" problems, 0 wrong\n")
