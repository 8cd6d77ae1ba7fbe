"""The build when things go wrong: bad caches, failing compilers, kills, several processes."""

from __future__ import annotations

import contextlib
import logging
import os
import re
import signal
import subprocess
import sys
import tempfile
import textwrap
import time
from pathlib import Path

import pytest
import torch
from fake_toolkit import Machine, leftovers

from dwswap import build as build_module
from dwswap import library_cache
from dwswap.build import BuildError, build, load, status

ROOT = Path(build_module.__file__).resolve().parents[1]
SECONDS = 60.0


@pytest.fixture
def machine(tmp_path, monkeypatch):
    return Machine(tmp_path, monkeypatch)


# A cache in a bad state


@pytest.mark.parametrize("damage", ["truncated", "altered", "no manifest", "no library", "empty"])
def test_a_damaged_library_is_built_again(machine, damage):
    library = build(["9.0"])
    manifest = library.with_name(library_cache.MANIFEST)
    original = library.read_bytes()
    if damage == "truncated":
        library.write_bytes(original[:-3])
    elif damage == "altered":
        library.write_bytes(b"X" + original[1:])
    elif damage == "empty":
        manifest.write_text("")
    else:
        (manifest if damage == "no manifest" else library).unlink()
    assert machine.load_silently()
    assert len(machine.toolkit.compiled) == 4
    assert library_cache.intact(library.parent) == library == status().library
    assert leftovers(machine.cache) == []


def test_a_library_that_does_not_load_is_built_again(machine):
    library = build(["9.0"])
    outcomes = iter([OSError("undefined symbol: of_another_torch"), None])

    def load_library(path):
        outcome = next(outcomes)
        if outcome:
            raise OSError("Could not load this library") from outcome

    machine.monkeypatch.setattr(torch.ops, "load_library", load_library)
    assert machine.load_silently()
    assert status().library == library
    assert len(machine.toolkit.compiled) == 4


def test_a_library_that_never_loads_is_built_again_only_once(machine):
    build(["9.0"])

    def load_library(path):
        raise OSError("Could not load this library") from OSError("undefined symbol: f")

    machine.monkeypatch.setattr(torch.ops, "load_library", load_library)
    assert "was built but does not load: undefined symbol: f" in machine.load_with_warning()
    assert len(machine.toolkit.compiled) == 4


def test_an_unwritable_cache_is_replaced_by_a_private_folder(machine, caplog):
    (machine.root / "file").write_text("")
    machine.monkeypatch.setenv("DWSWAP_CACHE_DIR", str(machine.root / "file" / "cache"))
    with caplog.at_level(logging.WARNING, "dwswap"):
        assert machine.load_silently()
    folder = machine.root / "tmp" / f"dwswap-{os.getuid()}"
    assert status().library.parent.parent == folder
    assert folder.stat().st_mode & 0o777 == 0o700
    assert [record.getMessage() for record in caplog.records if "cannot be written" in record.msg]
    assert len(caplog.records) == 1

    machine.new_process()
    machine.remove_compiler()
    assert machine.load_silently()
    assert len(caplog.records) == 1


def test_no_place_to_build_in(machine):
    (machine.root / "file").write_text("")
    machine.monkeypatch.setenv("DWSWAP_CACHE_DIR", str(machine.root / "file" / "cache"))
    machine.monkeypatch.setattr(tempfile, "tempdir", str(machine.root / "file"))
    assert "Set DWSWAP_CACHE_DIR to a folder" in machine.load_with_warning()


def test_a_fallback_that_others_can_write_is_not_trusted(machine):
    (machine.root / "file").write_text("")
    machine.monkeypatch.setenv("DWSWAP_CACHE_DIR", str(machine.root / "file" / "cache"))
    folder = build(["9.0"]).parent.parent
    folder.chmod(0o777)
    assert "is not a folder that only this user can write" in machine.load_with_warning()
    assert machine.loaded == []


def test_a_fallback_that_is_a_link_is_not_trusted(machine):
    (machine.root / "file").write_text("")
    machine.monkeypatch.setenv("DWSWAP_CACHE_DIR", str(machine.root / "file" / "cache"))
    target = machine.root / "elsewhere"
    target.mkdir(mode=0o700)
    (machine.root / "tmp" / f"dwswap-{os.getuid()}").symlink_to(target)
    assert "is not a folder that only this user can write" in machine.load_with_warning()


def test_cache_dir(monkeypatch, tmp_path):
    monkeypatch.setenv("DWSWAP_CACHE_DIR", str(tmp_path))
    assert build_module.cache_dir() == tmp_path
    monkeypatch.delenv("DWSWAP_CACHE_DIR")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert build_module.cache_dir() == tmp_path / ".cache" / "dwswap"


# Failures, kills and other processes


def test_a_compiler_error_is_shown(machine):
    machine.install(body='echo "first.cu(3): error: expected a ;"; seq 100 199; exit 2')
    machine.monkeypatch.setenv("MAX_JOBS", "1")
    with pytest.raises(BuildError) as caught:
        build(["9.0"])
    message = str(caught.value)
    assert re.match(r"building part/\w+\.cu\.o failed \(full log: .*\.log\)\n", message)
    assert "199" in message
    log = Path(re.search(r"full log: (.*?)\)", message)[1])
    assert log.parent == machine.cache
    assert "error: expected a ;" in log.read_text()
    assert list(machine.cache.rglob("*.so")) == leftovers(machine.cache) == []
    assert "full log" in machine.load_with_warning()


def test_mixed_parts_of_nvcc_are_explained(machine):
    machine.install(body='echo "ptxas fatal : Unsupported .version 9.5"; exit 1')
    with pytest.raises(BuildError, match="parts are of different versions"):
        build(["9.0"])


def test_sources_that_change_during_the_build(machine):
    machine.install(body=f'echo "// edited" >> "{machine.sources}/part/first.cu"')
    with pytest.raises(BuildError, match="changed during the build"):
        build(["9.0"])
    assert list(machine.cache.rglob("*.so")) == leftovers(machine.cache) == []


def test_no_sources(machine):
    machine.sources = machine.root / "nothing"
    with pytest.raises(BuildError, match=r"no \.cu or \.cpp files"):
        build(["9.0"])


def test_an_interrupted_build_can_be_tried_again(machine):
    def interrupted(*arguments):
        raise KeyboardInterrupt

    with machine.monkeypatch.context() as patch:
        patch.setattr(build_module, "compile_library", interrupted)
        with pytest.raises(KeyboardInterrupt):
            load()
    assert leftovers(machine.cache) == []
    assert not status().attempted
    assert machine.load_silently()


CHILD = """
    import signal
    import sys
    signal.signal(signal.SIGINT, signal.default_int_handler)
    from pathlib import Path
    import torch
    torch.version.cuda = "13.0"
    from dwswap import build, toolkit
    build.csrc_dir = lambda: Path(sys.argv[1])
    toolkit.nvcc_candidates = lambda: iter([Path(sys.argv[2])])
    print(build.build(["9.0"]))
"""


def start_build(machine: Machine) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(CHILD), machine.sources, machine.toolkit.nvcc],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )


def running(machine: Machine) -> list[int]:
    """The processes with a path of this machine on their command line."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):  # it has just ended
            if str(machine.root).encode() in path.read_bytes():
                found.append(int(path.parent.name))
    return found


def wait_until(condition) -> None:
    end = time.monotonic() + SECONDS
    while not condition():
        assert time.monotonic() < end, "timed out"
        time.sleep(0.02)


@pytest.fixture
def held(machine):
    """A machine whose nvcc works only once the file ``go`` exists."""
    go = machine.root / "go"
    machine.install(body=f'for i in $(seq 600); do [ -e "{go}" ] && break; sleep 0.1; done')
    machine.monkeypatch.setenv("MAX_JOBS", "2")
    yield machine
    go.touch()  # lets go of every compiler that a failed test leaves behind


@pytest.mark.slow
def test_two_processes_build_once(held):
    first = start_build(held)
    wait_until(lambda: len(held.toolkit.compiled) == 2)
    second = start_build(held)
    waiting = second.stderr.readline()
    (held.root / "go").touch()
    outputs = [process.communicate(timeout=SECONDS) for process in (first, second)]
    assert [first.returncode, second.returncode] == [0, 0], outputs
    assert waiting.startswith("dwswap: waiting for another process that builds the CUDA kernels")
    assert outputs[0][0] == outputs[1][0]
    assert "built CUDA kernels" in outputs[0][1]
    assert outputs[1][1] == ""
    assert len(held.toolkit.compiled) == 2


@pytest.mark.parametrize("victims", ["python alone", "everything"])
def test_a_killed_build_leaves_nothing_behind(held, victims):
    process = start_build(held)
    wait_until(lambda: len(held.toolkit.compiled) == 2)
    assert len(running(held)) >= 4  # Python, ninja and two compilers
    for victim in running(held) if victims == "everything" else [process.pid]:
        os.kill(victim, signal.SIGKILL)
    process.wait(SECONDS)
    process.stdout.close()
    process.stderr.close()
    assert len(leftovers(held.cache)) == 1
    assert [path for path in held.cache.glob("*/*.so") if "partial" not in str(path)] == []
    (held.root / "go").touch()
    assert held.load_silently()
    assert len(held.toolkit.compiled) == 4
    if victims == "everything":
        assert leftovers(held.cache) == []


def test_ctrl_c_stops_the_compilers(held):
    process = start_build(held)
    wait_until(lambda: len(held.toolkit.compiled) == 2)
    process.send_signal(signal.SIGINT)
    assert "KeyboardInterrupt" in process.communicate(timeout=SECONDS)[1]
    wait_until(lambda: not running(held))
    assert leftovers(held.cache) == []


def test_waiting_for_the_lock_has_an_end(held):
    held.monkeypatch.setattr(build_module, "LOCK_SECONDS", 0.2)
    process = start_build(held)
    wait_until(lambda: len(held.toolkit.compiled) == 2)
    with pytest.raises(BuildError, match="another process has held"):
        build(["9.0"])
    (held.root / "go").touch()
    process.communicate(timeout=SECONDS)
    assert process.returncode == 0
