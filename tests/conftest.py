"""Shared by all tests: the marker ``gpu``, fixtures, float32 that is float32."""

from __future__ import annotations

import functools
import importlib
import importlib.util
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from autograd_nodes import compile_nodes
from cuts_program import Cuts, Problem, compile_cuts, run_cuts
from emulated_kernels import Emulator, compile_emulator, lacks
from filelock import FileLock

from dwswap import build
from dwswap.toolkit import BuildError

CUDA = torch.cuda.is_available()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests marked ``gpu`` are skipped, with the reason, where there is no GPU."""
    if not CUDA:
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="needs a CUDA GPU"))


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="session")
def readme_table() -> ModuleType:
    """``scripts/readme_table.py`` as a module."""
    script = Path(__file__).resolve().parents[1] / "scripts" / "readme_table.py"
    # Python adds the folder of a script that it runs.
    sys.path.insert(0, str(script.parent))
    spec = importlib.util.spec_from_file_location("dwswap_readme_table", script)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="session")
def cuts_compiler(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Compiles the program once per set of flags."""
    folder = tmp_path_factory.mktemp("cuts")

    @functools.cache
    def program(*flags: str) -> Path:
        path = folder / f"cuts{''.join(flags)}"
        try:
            compile_cuts(path, *flags)
        except BuildError as error:
            pytest.skip(f"needs nvcc: {error}")
        return path

    return program


@pytest.fixture(scope="session")
def cuts(cuts_compiler) -> Cuts:
    program = cuts_compiler()

    def run(family: str, problems: list[tuple[Problem, tuple[int, int, int]]]) -> list[list[int]]:
        return run_cuts(program, [(family, *problem, *device) for problem, device in problems])

    return run


@pytest.fixture
def products(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pointwise convolutions become matrix products, as in half precision on CUDA."""
    for module in ("dwswap.pointwise", "dwswap.passes.pointwise_call"):
        monkeypatch.setattr(f"{module}.suits", lambda tensor: True)


def _shared_folder(tmp_path_factory: pytest.TempPathFactory, name: str) -> Path:
    """A folder that the processes that test side by side have in common."""
    base = tmp_path_factory.getbasetemp()
    shared = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / name
    shared.mkdir(exist_ok=True)
    return shared


@pytest.fixture(scope="session")
def autograd_nodes(tmp_path_factory: pytest.TempPathFactory) -> None:
    """The nodes of autograd in C++, which come with the kernels where there is a GPU."""
    if build.load():
        return
    shared = _shared_folder(tmp_path_factory, "autograd_nodes")
    with FileLock(shared / "lock"):  # one of the processes compiles them
        library = shared / "libnodes.so"
        if not library.exists():
            try:
                compile_nodes(shared)
            except BuildError as error:
                pytest.skip(str(error))
    torch.ops.load_library(str(library))


@pytest.fixture(scope="session")
def emulator_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """That of the library which runs kernels on the CPU."""
    shared = _shared_folder(tmp_path_factory, "emulator")
    with FileLock(shared / "lock"):  # one of the processes compiles it
        if not (shared / "libemulator.so").exists():
            try:
                reason = lacks(shared)
            except BuildError as error:
                reason = str(error)
            if reason is not None:
                pytest.skip(reason)
            compile_emulator(shared)
    return shared


@pytest.fixture(scope="session")
def emulator(emulator_folder: Path) -> Emulator:
    return Emulator(emulator_folder / "libemulator.so")


@pytest.fixture
def norm_calls(autograd_nodes: None, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """BatchNorm in training runs the operator on the CPU, by aten; with which activations."""
    return _runs_on_cpu(
        monkeypatch, "dwswap.batch_norm", "batch_norm", "dwswap.training_modules", 8
    )


@pytest.fixture
def excitation_calls(autograd_nodes: None, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Squeeze-and-excitation in training runs its operators on the CPU; with which gates."""
    return _runs_on_cpu(
        monkeypatch, "dwswap.channel_scale", "excite", "dwswap.excitation_modules", 2
    )


def _runs_on_cpu(
    monkeypatch: pytest.MonkeyPatch, name: str, function: str, user: str, argument: int
) -> list[str]:
    """The kernels of a module seem to be there; the argument of each call of its function."""
    module = importlib.import_module(name)  # batch_norm has a function of its name
    seen: list[str] = []

    def counted(*arguments: Any) -> torch.Tensor:
        seen.append(arguments[argument])
        return getattr(module, function)(*arguments)

    monkeypatch.setattr(module, "has_kernels", lambda tensor: tensor.dtype is not torch.float64)
    loaded = SimpleNamespace(load=lambda: True, load_for=lambda device: True)
    monkeypatch.setattr(module, "build", loaded)
    monkeypatch.setattr(f"{user}.{function}", counted)
    return seen


@pytest.fixture(autouse=True)
def _no_tf32() -> Iterator[None]:
    """PyTorch's own error is the measure of ours, so it must not be that of TF32."""
    before = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = False
    yield
    torch.backends.cudnn.allow_tf32 = before
