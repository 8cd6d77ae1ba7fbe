"""Building, caching and loading the CUDA library. Fake compilers, but for the test at the end."""

from __future__ import annotations

import io
import os
import re
import subprocess
import sys
import textwrap
import threading
from pathlib import Path

import pytest
import torch
from fake_toolkit import Machine, leftovers, write_sources

from dwswap import build as build_module
from dwswap import compilation, library_cache, toolkit
from dwswap.build import BuildError, Status, build, load, status
from dwswap.library_cache import Fingerprint
from dwswap.toolkit import Target

ROOT = Path(build_module.__file__).resolve().parents[1]
SECONDS = 60.0


@pytest.fixture
def machine(tmp_path, monkeypatch):
    return Machine(tmp_path, monkeypatch)


# Loading


def test_load_builds_once_and_finds_it_from_then_on(machine):
    assert machine.load_silently()
    library = status().library
    assert status() == Status(True, True, None, library, status().seconds)
    assert status().seconds > 0
    assert library.parent.parent == machine.cache
    assert re.fullmatch(r"torch[\d.]+\w*-cu130-sm90-[0-9a-f]{12}", library.parent.name)
    assert len(machine.toolkit.compiled) == 2
    assert load()
    assert machine.loaded == [library]

    machine.new_process()
    machine.remove_compiler()
    assert machine.load_silently()
    assert status().library == library
    assert status().seconds is None
    assert leftovers(machine.cache) == []


def test_status_before_anything_was_needed(machine):
    assert not status().attempted
    assert "not been needed" in status().reason


def test_no_gpu_is_no_failure(machine):
    machine.gpus()
    assert not machine.load_silently()
    assert status().reason == "PyTorch sees no CUDA GPU"
    assert not status().attempted
    assert machine.toolkit.compiled == []


def test_a_pytorch_without_cuda_is_no_failure(machine):
    machine.monkeypatch.setattr(torch.version, "cuda", None)
    assert not machine.load_silently()
    assert status().reason == "this PyTorch is built without CUDA"
    with pytest.raises(BuildError, match="built without CUDA"):
        build(["9.0"])


def test_switched_off(machine):
    machine.monkeypatch.setenv("DWSWAP_CUDA", "0")
    assert not machine.load_silently()
    assert status().reason == "switched off by DWSWAP_CUDA=0"
    machine.monkeypatch.setenv("DWSWAP_CUDA", "1")
    assert machine.load_silently()


def test_no_compiler(machine):
    machine.remove_compiler()
    assert 'pip install "dwswap[nvcc]"' in machine.load_with_warning()
    assert machine.loaded == []


def test_a_compiler_of_another_cuda(machine):
    machine.install(release="12.8")
    assert "PyTorch is built for CUDA 13.0" in machine.load_with_warning()


def test_a_gpu_that_is_too_old(machine):
    machine.gpus((7, 5))
    assert "too old for the CUDA kernels: sm_75, they need sm_80" in machine.load_with_warning()


def test_an_old_gpu_beside_a_new_one_is_left_out(machine):
    machine.gpus((7, 5), (9, 0))
    assert machine.load_silently()
    assert "-sm90-" in str(status().library)


def test_all_visible_gpus_are_built_for(machine):
    machine.gpus((9, 0), (8, 0), (9, 0))
    assert machine.load_silently()
    assert "-sm80_sm90-" in str(status().library)
    assert all("code=sm_80" in line and "code=sm_90" in line for line in machine.toolkit.compiled)


def test_a_gpu_newer_than_nvcc_runs_ptx(machine):
    machine.install(codes=("sm_80", "sm_90"))
    machine.gpus((12, 0))
    build(["9.0"])  # machine code for another GPU: must not be taken for a match
    assert machine.load_silently()
    assert "-ptx90-" in str(status().library)
    assert "-gencode=arch=compute_90,code=compute_90" in machine.toolkit.compiled[-1]
    machine.new_process()
    machine.remove_compiler()
    assert machine.load_silently()
    assert "-ptx90-" in str(status().library)


def test_any_failure_is_one_warning(machine):
    def broken(index):
        raise RuntimeError("CUDA error: unknown error")

    machine.monkeypatch.setattr(torch.cuda, "get_device_capability", broken)
    assert "CUDA error: unknown error" in machine.load_with_warning()


def test_threads_share_one_build(machine):
    machine.install(body="sleep 0.3")
    results: list[bool] = []
    threads = [threading.Thread(target=lambda: results.append(load())) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(SECONDS)
    assert results == [True] * 8
    assert len(machine.toolkit.compiled) == 2
    assert len(machine.loaded) == 1


# What a library is kept for


def test_a_library_for_several_architectures_serves_each(machine):
    library = build(["8.0", "9.0"])
    machine.remove_compiler()
    for capability in [(8, 0), (8, 6), (9, 0)]:
        machine.new_process()
        machine.gpus(capability)
        assert machine.load_silently()
        assert status().library == library
    machine.new_process()
    machine.gpus((10, 0))
    machine.load_with_warning()


def test_the_library_that_fits_most_exactly_is_taken(machine):
    build(["8.0"])
    build(["8.0", "8.6", "9.0"])
    machine.gpus((8, 6))
    assert machine.load_silently()
    assert "-sm80_sm86_sm90-" in str(status().library)


def test_build_finds_what_it_built(machine):
    library = build(["9.0", "8.0"])
    assert build(["8.0", "9.0"]) == build(["9.0"]) == build(["sm_80"]) == library
    assert len(machine.toolkit.compiled) == 2
    assert build(["8.0", "9.0"], force=True) == library
    assert len(machine.toolkit.compiled) == 4


def test_the_library_for_processes_without_python(machine):
    """From the same objects, in the same folder; built again where it is damaged."""
    library = build(["9.0"])
    standalone = build(["9.0"], standalone=True)
    assert standalone == library.with_name(library_cache.STANDALONE)
    assert len(machine.toolkit.compiled) == 2
    standalone.write_text("cut off")
    assert build(["9.0"], standalone=True) == standalone
    assert standalone.read_text() != "cut off"
    assert len(machine.toolkit.compiled) == 4


def test_nodes_of_autograd_are_for_python_alone(machine):
    for name in ("autograd/node.cpp", "part/first.cpp", "standalone.cpp"):
        path = machine.sources / name
        path.parent.mkdir(exist_ok=True)
        path.write_text("// host\n")
    library, standalone = (build(["9.0"], standalone=alone).read_text() for alone in (False, True))
    assert "part/first.cpp.o" in library
    assert "part/first.cpp.o" in standalone
    assert ("autograd/node.cpp.o" in library, "standalone.cpp.o" in library) == (True, False)
    assert ("autograd/node.cpp.o" in standalone, "standalone.cpp.o" in standalone) == (False, True)


def test_build_is_for_the_gpus_at_hand(machine):
    machine.gpus((8, 0), (9, 0))
    assert "-sm80_sm90-" in str(build())


def test_build_without_gpu_wants_architectures(machine):
    machine.gpus()
    with pytest.raises(BuildError, match=r"--arch 9\.0"):
        build()


@pytest.mark.parametrize("architectures", [[], "9.0"])
def test_build_wants_a_list(machine, architectures):
    with pytest.raises(BuildError, match="must look like"):
        build(architectures)


def test_build_for_an_architecture_that_nvcc_does_not_know(machine):
    with pytest.raises(BuildError, match="does not know sm_130"):
        build(["13.0"])


def test_the_key_depends_on_everything_that_matters(machine):
    def key():
        flags = compilation.compile_flags()
        return Fingerprint.of(machine.sources, flags).key([Target((9, 0))])

    def changed():
        keys.append(key())
        return len(set(keys)) == len(keys)

    keys = [key()]
    (machine.sources / "README.md").write_text("not compiled")
    assert key() == keys[0]
    (machine.sources / "part" / "first.cu").write_text("// another\n")
    assert changed()
    (machine.sources / "part" / "shared.cuh").write_text("// new\n")
    assert changed()
    (machine.sources / "part" / "shared.cuh").rename(machine.sources / "part" / "moved.cuh")
    assert changed()
    machine.monkeypatch.setenv("DWSWAP_NVCC_FLAGS", "-lineinfo")
    assert changed()
    machine.monkeypatch.setattr(torch, "__version__", "9.9.9+cu130")
    assert changed()
    assert keys[-1].startswith("torch9.9.9-cu130-sm90-")
    machine.monkeypatch.setattr(torch.version, "cuda", "13.1")
    assert changed()
    machine.monkeypatch.setattr("platform.machine", lambda: "aarch64")
    assert changed()


def test_extra_flags_reach_nvcc(machine):
    machine.monkeypatch.setenv("DWSWAP_NVCC_FLAGS", "-lineinfo '-DNAME=a b'")
    build(["9.0"])
    assert all("-lineinfo -DNAME=a b" in line for line in machine.toolkit.compiled)


def test_awkward_paths(machine):
    machine.sources = write_sources(machine.root / "a $dir: it's", **{"x y": "", "z$": ""})
    machine.monkeypatch.setenv("DWSWAP_CACHE_DIR", str(machine.root / "c $ache: it's"))
    assert build(["9.0"]).exists()
    assert len(machine.toolkit.compiled) == 2


# Progress


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_progress_away_from_a_terminal_is_a_first_and_a_last_line(machine, capsys):
    build(["8.0", "9.0"])
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == "dwswap: building CUDA kernels for sm_80, sm_90 (once)"
    assert re.fullmatch(r"dwswap: built CUDA kernels for sm_80, sm_90 after \d+ s", lines[1])
    assert len(lines) == 2


def test_progress_on_a_terminal_is_updated_in_place(machine):
    machine.install(body="sleep 0.8")
    machine.monkeypatch.setenv("MAX_JOBS", "1")
    terminal = Terminal()
    machine.monkeypatch.setattr(sys, "stderr", terminal)
    build(["9.0"])
    lines = terminal.getvalue().split("\r\x1b[K")
    assert any(
        re.fullmatch(r"dwswap: building CUDA kernels for sm_90 \(once\) \[1/4\] \d+ s", line)
        for line in lines
    )
    assert re.fullmatch(r"dwswap: built CUDA kernels for sm_90 after \d+ s\n", lines[-1])
    assert terminal.getvalue().count("\n") == 1


def test_a_failure_ends_the_progress_line(machine, capsys):
    machine.install(body="exit 1")
    with pytest.raises(BuildError):
        build(["9.0"])
    assert "dwswap: could not build CUDA kernels for sm_90" in capsys.readouterr().err


def test_no_console(machine):
    machine.monkeypatch.setattr(sys, "stderr", None)
    assert build(["9.0"]).exists()


# The real compiler

REAL_SOURCE = """
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <cuda_runtime.h>

__global__ void twice_kernel(float* output, const float* input, int64_t count) {
  const int64_t i = blockIdx.x * int64_t{blockDim.x} + threadIdx.x;
  if (i < count) {
    output[i] = 2 * input[i];
  }
}

torch::stable::Tensor twice(const torch::stable::Tensor& input) {
  auto output = torch::stable::empty_like(input);
  void* stream = nullptr;
  aoti_torch_get_current_cuda_stream(input.get_device_index(), &stream);
  twice_kernel<<<1, 32, 0, static_cast<cudaStream_t>(stream)>>>(
      static_cast<float*>(output.data_ptr()), static_cast<const float*>(input.data_ptr()),
      input.numel());
  return output;
}

STABLE_TORCH_LIBRARY_FRAGMENT(dwswap_build_test, m) { m.def("twice(Tensor input) -> Tensor"); }
STABLE_TORCH_LIBRARY_IMPL(dwswap_build_test, CUDA, m) { m.impl("twice", TORCH_BOX(&twice)); }
"""

REAL_CHILD = """
    import sys, time
    from pathlib import Path
    import torch
    before = set(sys.modules)
    if not torch.cuda.is_available():
        torch.cuda.is_available = lambda: True
        torch.cuda.device_count = lambda: 1
        torch.cuda.get_device_capability = lambda index: (9, 0)
    from dwswap import build
    build.csrc_dir = lambda: Path(sys.argv[1])
    start = time.perf_counter()
    assert build.load(), build.status()
    print(time.perf_counter() - start)
    torch.ops.dwswap_build_test.twice  # AttributeError where it is not registered
    heavy = {"setuptools", "torch.utils.cpp_extension", "filelock", "asyncio"}
    print(" ".join(sorted((heavy & sys.modules.keys()) - before)))
"""


STANDALONE_CHILD = """
    import sys
    import torch
    torch.ops.load_library(sys.argv[1])
    assert "dwswap" not in sys.modules
    torch.ops.dwswap_build_test.twice
    print(torch.ops.dwswap.depthwise_conv2d.default._schema)
    print(torch.ops.dwswap.squeeze_excitation.default._schema)
    try:
        import dwswap
    except ImportError as error:
        print(error)
"""


def fresh_process(code: str, argument: Path) -> subprocess.CompletedProcess[str]:
    process = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code), argument],
        capture_output=True,
        text=True,
        timeout=SECONDS,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    assert process.returncode == 0, process.stderr
    return process


@pytest.mark.slow
def test_a_real_library_builds_and_a_second_process_has_it_at_once(tmp_path, monkeypatch):
    if torch.version.cuda is None:
        pytest.skip("this PyTorch is built without CUDA")
    try:
        toolkit.find_nvcc(torch.version.cuda)
        toolkit.find_host_compiler()
    except BuildError as error:
        pytest.skip(f"nothing to compile with: {error}")
    standalone = ROOT / "csrc" / "standalone.cpp"
    sources = write_sources(tmp_path / "with space", twice=REAL_SOURCE)
    (sources / standalone.name).write_text(standalone.read_text())
    monkeypatch.setattr(build_module, "csrc_dir", lambda: sources)
    monkeypatch.setenv("DWSWAP_CACHE_DIR", str(tmp_path / "cache"))
    architectures = ["9.0"]
    if torch.cuda.is_available():
        architectures = [f"{major}.{minor}" for major, minor in build_module._capabilities()]
    library = build(architectures)
    assert library_cache.intact(library.parent) == library

    process = fresh_process(REAL_CHILD, sources)
    seconds, imported = process.stdout.split("\n")[:2]
    assert float(seconds) < 1
    assert imported == ""
    assert process.stderr == ""

    standalone = build(architectures, standalone=True)
    assert standalone.parent == library.parent
    *schemas, error = fresh_process(STANDALONE_CHILD, standalone).stdout.splitlines()
    operators = (torch.ops.dwswap.depthwise_conv2d, torch.ops.dwswap.squeeze_excitation)
    assert schemas == [str(operator.default._schema) for operator in operators]
    assert error == (
        "dwswap cannot be imported where its standalone operator library has been loaded before: "
        "import dwswap first, or not at all"
    )
    # The other way round nothing is defined twice.
    fresh_process("import sys, torch, dwswap; torch.ops.load_library(sys.argv[1])", standalone)
