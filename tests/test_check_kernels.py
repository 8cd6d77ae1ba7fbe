"""scripts/check_kernels.py: what it reads from ptxas, and what it fails on."""

from __future__ import annotations

import importlib.util
import json
import re
import shutil
import sys
from pathlib import Path

import pytest

from dwswap import toolkit
from dwswap.toolkit import BuildError

SCRIPT = Path(__file__).resolve().parents[1] / "scripts" / "check_kernels.py"

REPORT = """\
ptxas info    : 0 bytes gmem
ptxas info    : Compiling entry function '_Z1aPf' for 'sm_80'
ptxas info    : Function properties for _Z1aPf
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 40 registers, used 1 barriers, 4096 bytes smem, 380 bytes cmem[0]
ptxas info    : Compile time = 5.120 ms
ptxas info    : Compiling entry function '_Z1bPf' for 'sm_80'
ptxas info    : Function properties for _Z1bPf
    16 bytes stack frame, 20 bytes spill stores, 24 bytes spill loads
ptxas info    : Used 255 registers, used 0 barriers, 16 bytes cumulative stack size
ptxas info    : 0 bytes gmem
ptxas info    : Compiling entry function '_Z1aPf' for 'sm_90'
ptxas info    : Function properties for _Z1aPf
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Function properties for helper
    8 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 32 registers, used 0 barriers
"""

CLEAN = """
template <typename T, int size>
__global__ void scale_kernel(T* out) { out[threadIdx.x] *= size; }
template __global__ void scale_kernel<float, 3>(float*);
"""

SPILLING = """
__global__ __launch_bounds__(1024, 2) void spill_kernel(const float* in, float* out, int count) {
  float values[96];
#pragma unroll
  for (int i = 0; i < 96; ++i) values[i] = in[i * 1024 + threadIdx.x];
  for (int k = 0; k < count; ++k) {
#pragma unroll
    for (int i = 0; i < 96; ++i) values[i] = values[i] * values[(i + 7) % 96] + k;
  }
#pragma unroll
  for (int i = 0; i < 96; ++i) out[i * 1024 + threadIdx.x] = values[i];
}
"""


@pytest.fixture(scope="module")
def script():
    if not SCRIPT.exists():
        pytest.skip("scripts/ is part of a checkout only")
    spec = importlib.util.spec_from_file_location("check_kernels", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    sys.modules["check_kernels"] = module  # dataclasses look their module up
    path = list(sys.path)
    spec.loader.exec_module(module)
    yield module
    sys.path[:] = path
    del sys.modules["check_kernels"]


@pytest.fixture
def compiler():
    try:
        toolkit.find_nvcc()
        toolkit.find_host_compiler()
    except BuildError as error:
        pytest.skip(f"nothing to compile with: {error}")


def test_the_report_of_ptxas(script):
    usages = script.parse_ptxas(REPORT)
    assert [(usage.name, usage.architecture, usage.registers) for usage in usages] == [
        ("_Z1aPf", "sm_80", 40),
        ("_Z1bPf", "sm_80", 255),
        ("_Z1aPf", "sm_90", 32),
    ]
    assert [usage.shared for usage in usages] == [4096, 0, 0]
    assert [(usage.stack, usage.spill_stores, usage.spill_loads) for usage in usages] == [
        (0, 0, 0),
        (16, 20, 24),
        (8, 0, 0),
    ]
    assert [usage.faulty for usage in usages] == [False, True, True]


def test_a_report_in_another_format_is_an_error(script):
    with pytest.raises(ValueError, match="no resources for _Z1aPf on sm_80"):
        script.parse_ptxas(REPORT.replace("registers", "regs"))


@pytest.mark.parametrize(
    ("full", "short"),
    [
        ("plain(float*)", "plain"),
        ("void a::ns::kernel<float, 3>(a::Params)", "ns::kernel<float, 3>"),
        ("void (anonymous namespace)::k<float, (int)3>(P<int>)", "k<float, 3>"),
        ("void a::k<a::T<__half, (bool)1>, (a::Act)2>(a::P, int)", "a::k<T<__half, 1>, 2>"),
        ("void k<(unsigned int)4, -1>(float (*)(int))", "k<4, -1>"),
        ("_Zmangled", "_Zmangled"),
    ],
)
def test_short_names(script, full, short):
    assert script.shorten(full) == short


def test_clean_kernels_pass(script, compiler, tmp_path, capsys):
    (tmp_path / "a.cu").write_text(CLEAN)
    assert script.main(["--csrc", str(tmp_path), "8.0", "9.0"]) == 0
    lines = capsys.readouterr().out.splitlines()
    name = "scale_kernel<float, 3>" if shutil.which("c++filt") else "scale_kernel"
    assert [name in line for line in lines] == [False, True, True, True]
    assert lines[-1].startswith("check_kernels: 1 kernels x 2 architectures")
    assert "0 spills" in lines[-1]


def test_a_sample_has_each_type_on_one_architecture(script, compiler, tmp_path, capsys):
    names = ("a_float32", "b_float16", "b_bfloat16", "c_float16_wide", "c_float32_wide")
    for name in names:
        (tmp_path / f"{name}.cu").write_text(CLEAN.replace("scale_kernel", name))
    everywhere = {"sm_80", "sm_90", "sm_120"}
    expected = {
        "a_float32": everywhere,  # with no other type beside it
        "b_float16": {"sm_90"},
        "b_bfloat16": {"sm_120"},
        "c_float16_wide": {"sm_90"},
        "c_float32_wide": {"sm_80"},
    }
    assert script.main(["--csrc", str(tmp_path), "--sample"]) == 0
    lines = capsys.readouterr().out.splitlines()
    for name, architectures in expected.items():
        rows = [line for line in lines[1:-1] if re.search(rf"{name}[<I]", line)]
        assert {a for row in rows for a in everywhere if a in row} == architectures, name
    assert "5 kernels x 3 architectures" in lines[-1]
    assert "(7 of these pairs)" in lines[-1]
    # Perhaps nowhere.
    assert script.main(["--csrc", str(tmp_path), "--sample", "8.0", "9.0"]) == 0
    assert "b_bfloat16" not in capsys.readouterr().out


def test_spills_fail(script, compiler, tmp_path, capsys):
    (tmp_path / "a.cu").write_text(CLEAN)
    (tmp_path / "b.cu").write_text(SPILLING)
    assert script.main(["--csrc", str(tmp_path), "9.0"]) == 1
    output = capsys.readouterr().out
    faults = [line for line in output.splitlines() if "FAULT" in line]
    assert faults[0].startswith("spill_kernel")
    assert "FAULT: spill_kernel" in faults[1]
    assert len(faults) == 2
    assert "1 spill," in output


def test_errors_fail(script, compiler, tmp_path, capsys):
    (tmp_path / "a.cu").write_text("__global__ void k() { oops }")
    assert script.main(["--csrc", str(tmp_path), "9.0"]) == 1
    assert 'identifier "oops" is undefined' in capsys.readouterr().out


def test_nothing_to_check_fails(script, compiler, tmp_path):
    assert script.main(["--csrc", str(tmp_path)]) == 1
    (tmp_path / "a.cu").write_text("int host() { return 1; }")
    assert script.main(["--csrc", str(tmp_path), "9.0"]) == 1


@pytest.fixture
def record(script, tmp_path, monkeypatch):
    path = tmp_path / "record.json"
    monkeypatch.setattr(script, "RECORD", path)
    return path


def test_only_what_has_changed(script, compiler, record, tmp_path, capsys):
    """Since it was recorded: a file, what it includes, its architectures."""
    sources = tmp_path / "csrc"
    (sources / "common").mkdir(parents=True)
    (sources / "common/inner.cuh").write_text("#define FACTOR 2\n")
    (sources / "common/outer.cuh").write_text('#pragma once\n#include "common/inner.cuh"\n')
    plain = CLEAN.replace("scale_kernel", "plain_kernel")
    (sources / "plain.cu").write_text(plain)
    (sources / "factor.cu").write_text('#include "common/outer.cuh"\n' + CLEAN)

    def compiled(*arguments):
        assert script.main(["--csrc", str(sources), *arguments]) == 0
        lines = capsys.readouterr().out.splitlines()
        return {name for name in ("plain", "scale") if any(f"{name}_kernel" in x for x in lines)}

    assert compiled("--changed", "9.0") == {"plain", "scale"}
    assert not record.exists()
    assert compiled("--record", "9.0") == {"plain", "scale"}
    assert compiled("--changed", "9.0") == set()
    (sources / "common/inner.cuh").write_text("#define FACTOR 3\n")
    assert compiled("--changed", "9.0") == {"scale"}
    assert compiled("--changed", "--record", "9.0") == {"scale"}
    assert compiled("--changed", "9.0") == set()
    assert compiled("--changed", "--record", "8.0", "9.0") == {"plain", "scale"}
    assert json.loads(record.read_text()).keys() == {
        f"{file}.cu {tag}" for file in ("factor", "plain") for tag in ("sm80", "sm90")
    }
    (sources / "plain.cu").unlink()
    assert compiled("--changed", "--record", "9.0") == set()
    assert {name.split()[0] for name in json.loads(record.read_text())} == {"factor.cu"}


def test_what_fails_is_not_recorded(script, compiler, record, tmp_path, capsys):
    sources = tmp_path / "csrc"
    sources.mkdir()
    (sources / "a.cu").write_text(CLEAN)
    (sources / "b.cu").write_text(SPILLING)
    for changed in ([], ["--changed"]):
        assert script.main(["--csrc", str(sources), *changed, "--record", "9.0"]) == 1
        assert "FAULT: spill_kernel" in capsys.readouterr().out
        assert not record.exists()
    (sources / "b.cu").write_text("__global__ void k() { oops }")
    assert script.main(["--csrc", str(sources), "--record", "9.0"]) == 1
    assert not record.exists()


@pytest.mark.parametrize("changed", ["flags", "nvcc", "torch"])
def test_a_digest_is_of_flags_and_versions(script, tmp_path, monkeypatch, changed):
    file = tmp_path / "a.cu"
    file.write_text(CLEAN)
    nvcc, target = toolkit.Nvcc(Path("nvcc"), "13.0"), toolkit.Target.parse("9.0")
    before = script.digest(file, tmp_path, target, nvcc)
    assert before == script.digest(file, tmp_path, target, nvcc)
    if changed == "flags":
        monkeypatch.setenv("DWSWAP_NVCC_FLAGS", "-lineinfo")
    elif changed == "torch":
        monkeypatch.setattr(script.torch, "__version__", "9.9")
    else:
        nvcc = toolkit.Nvcc(Path("nvcc"), "13.1")
    assert script.digest(file, tmp_path, target, nvcc) != before


def test_the_record_is_of_files_that_exist(script):
    """What CI leaves out; files that have changed since it compiles."""
    assert script.RECORD.exists()
    names = {name.split()[0] for name in json.loads(script.RECORD.read_text())}
    assert names
    assert all((script.csrc_dir() / name).exists() for name in names)
