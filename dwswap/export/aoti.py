"""AOTInductor packages: compiled ahead of time, run without tracing or compiling."""

from __future__ import annotations

import os
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch.export import ExportedProgram

from dwswap.export.errors import ExportError
from dwswap.export.input_specs import InputSpecs
from dwswap.export.program import changed_buffers, program_device, to_aten
from dwswap.toolkit import find_libstdcxx

__all__ = ["CompiledModel", "load_compiled", "save_compiled"]

# Keys of the package's metadata; the C++ example reads the second.
INPUTS = "dwswap_inputs"
DTYPE = "dwswap_dtype"


def save_compiled(program: ExportedProgram, path: Path) -> None:
    """Compile ``program`` for its device.

    On CUDA it keeps our operator. Elsewhere it is made of aten's: what computes our operator there
    is Python, and a package must run without.

    Raises:
        ExportError: outputs depend on a buffer of one element that the forward changes.
    """
    specs = InputSpecs.of_program(program)
    # AOTInductor takes its first value for a constant.
    buffers = {**program.constants, **program.state_dict}
    changed = [name for name in changed_buffers(program) if buffers[name].numel() == 1]
    if changed:
        raise ExportError(
            "a package of AOTInductor has the same values for buffers of one element in every "
            "call, the forward changes " + ", ".join(changed)
        )
    if program_device(program).type != "cuda":
        program = to_aten(program)
    configs = {
        "aot_inductor.metadata": {INPUTS: specs.to_json(), DTYPE: specs.dtype},
        # A trace holds 1 for special, but code for a dynamic size is right for it too. Without this
        # a host that sets AOTI_RUNTIME_CHECK_INPUTS could not run a single picture.
        "aot_inductor.check_lowerbound": False,
        "aot_inductor.custom_op_libs": libraries_to_link(),
    }
    with torch.no_grad():
        torch._inductor.aoti_compile_and_package(
            program, package_path=str(path), inductor_configs=configs
        )


def libraries_to_link() -> list[str]:
    """What AOTInductor passes to the linker as ``-lNAME`` beside its own libraries.

    The libstdc++ that torch has loaded, as in our own library: the compiler's static one behind it
    is then left with nothing to add.
    """
    from torch._inductor import config  # not loaded before a program is compiled

    libraries: list[str] = list(config.aot_inductor.custom_op_libs or ())
    shared = find_libstdcxx()
    if shared is not None:
        # A file (":") is looked for below each -L folder, and that of torch is one of them.
        folder = Path(torch.__file__).resolve().parent / "lib"
        libraries.append(shlex.quote(":" + os.path.relpath(shared, folder)))
    return libraries


class CompiledModel:
    """A package of AOTInductor that is called like the model.

    The compiled code takes its inputs for what the example inputs were, and reads wrong numbers
    where they are not. So dtype, device and shape are checked here, and strides are made right.
    """

    def __init__(self, runner: Callable[..., Any], specs: InputSpecs) -> None:
        self.runner = runner
        self.specs = specs

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """What the model returns.

        Raises:
            TypeError, ValueError: naming the argument, what it must be and what it is.
        """
        args, kwargs = self.specs.conform(args, kwargs)
        return self.runner(*args, **kwargs)


def load_compiled(path: Path) -> CompiledModel:
    """Load a package that :func:`save_compiled` wrote.

    Raises:
        ExportError: it is a package of another program.
    """
    runner = torch._inductor.aoti_load_package(str(path))
    metadata = runner.get_metadata()
    if INPUTS not in metadata:
        raise ExportError(
            f"{path} was not written by dwswap.export: use torch._inductor.aoti_load_package"
        )
    return CompiledModel(runner, InputSpecs.from_json(metadata[INPUTS]))
