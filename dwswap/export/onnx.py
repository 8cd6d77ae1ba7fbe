"""ONNX files of standard operators, and ONNX Runtime as a callable."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.export import ExportedProgram

from dwswap.export.errors import ExportError, required
from dwswap.export.input_specs import check_constant, constants_of, leaves_by_path
from dwswap.export.program import changed_buffers, to_aten

__all__ = ["OnnxModel", "check_packages", "save_onnx"]

# What a protobuf message can hold, less 64 MiB for the graph.
MOST_BYTES = 2**31 - 2**26
# Keys of the file's metadata: the paths of its inputs in the arguments of a call, and the values of
# the arguments that are no tensors.
INPUTS, CONSTANTS = "dwswap_inputs", "dwswap_constants"
# The first in which convolutions and the like take bfloat16.
_OPSET_OF_BFLOAT16 = 22


def check_packages() -> None:
    """Look whether what :func:`save_onnx` needs is installed.

    Raises:
        ModuleNotFoundError: it is not.
    """
    for package in ("onnx", "onnxscript"):
        required(package, 'format="onnx"')


def save_onnx(program: ExportedProgram, path: Path) -> None:
    """Write ``program`` in operators of the ONNX standard; weights inside the file.

    Raises:
        ExportError: the weights do not fit into one file, or outputs depend on a buffer that the
            forward changes.
    """
    size = sum(t.numel() * t.element_size() for t in program.state_dict.values())
    if size > MOST_BYTES:
        raise ExportError(f"an ONNX file holds less than 2 GiB, the weights are {size:,} bytes")
    program = to_aten(program)
    changed = changed_buffers(program)
    if changed:
        raise ExportError(
            "an ONNX file has the same values for buffers in every call, the forward changes "
            + ", ".join(changed)
        )
    outputs = len(program.graph_signature.user_outputs)
    with warnings.catch_warnings():
        # They are about the exporter's own use of other packages.
        warnings.simplefilter("ignore", DeprecationWarning)
        warnings.simplefilter("ignore", FutureWarning)
        exported = torch.onnx.export(
            program,
            dynamo=True,
            verbose=False,
            external_data=False,
            opset_version=_OPSET_OF_BFLOAT16 if _has_bfloat16(program) else None,
            output_names=["output"] if outputs == 1 else [f"output_{i}" for i in range(outputs)],
        )
    assert exported is not None
    batches = _batch_symbols(program)
    if len(batches) == 1:
        exported.rename_axes({batches.pop(): "batch"})
    leaves = leaves_by_path(*(program.example_inputs or ((), {})))
    paths = [path for path, leaf in leaves.items() if isinstance(leaf, Tensor)]
    if len(paths) == len(exported.model.graph.inputs):
        exported.model.metadata_props[INPUTS] = json.dumps(paths)
        exported.model.metadata_props[CONSTANTS] = json.dumps(constants_of(leaves))
    exported.save(path)


def _has_bfloat16(program: ExportedProgram) -> bool:
    values = (node.meta.get("val") for node in program.graph.nodes)
    return any(getattr(value, "dtype", None) is torch.bfloat16 for value in values)


def _batch_symbols(program: ExportedProgram) -> set[str]:
    """The symbols of the inputs' first dimensions."""
    inputs = set(program.graph_signature.user_inputs)
    values = [node.meta["val"] for node in program.graph.nodes if node.name in inputs]
    sizes = [value.shape[0] for value in values if isinstance(value, Tensor) and value.dim()]
    return {str(size) for size in sizes if type(size) is not int}


class OnnxModel:
    """An ONNX file in ONNX Runtime, called with tensors.

    They are arguments as in the export, dicts and lists of tensors included. Tensors by themselves
    may also come in the order of the file's inputs, and by their names. Numbers and the like are
    part of the file, and may be left out.
    """

    def __init__(self, path: Path) -> None:
        """Load ``path``.

        Raises:
            ModuleNotFoundError: ONNX Runtime is not installed.
        """
        runtime = required("onnxruntime", "running an ONNX file", "onnxruntime")
        providers = runtime.get_available_providers()
        self.session = runtime.InferenceSession(str(path), providers=providers)
        self.names = [entry.name for entry in self.session.get_inputs()]
        self._by_path = {f"args[{i}]": name for i, name in enumerate(self.names)}
        self._by_path |= {f"kwargs[{name!r}]": name for name in self.names}
        metadata = self.session.get_modelmeta().custom_metadata_map
        self._by_path |= dict(zip(json.loads(metadata.get(INPUTS, "[]")), self.names, strict=False))
        self._constants: dict[str, Any] = json.loads(metadata.get(CONSTANTS, "{}"))

    def __call__(self, *args: Any, **kwargs: Any) -> Tensor | tuple[Tensor, ...]:
        """Outputs on the CPU: a tensor, or a tuple of them where there are several.

        Raises:
            TypeError: the arguments are not those of the file.
            ValueError: one that is no tensor is not what it was in the export.
        """
        leaves = leaves_by_path(args, kwargs)
        tensors = {path: leaf for path, leaf in leaves.items() if isinstance(leaf, Tensor)}
        for path in leaves.keys() - tensors.keys():
            if path not in self._constants:
                raise TypeError(
                    f"{path} must be left out, as it was in the export, got {leaves[path]!r}"
                )
            check_constant(path, self._constants[path], leaves[path])
        given = {self._by_path.get(path): tensor for path, tensor in tensors.items()}
        if len(given) != len(tensors) or given.keys() != set(self.names):
            raise TypeError(
                f"the inputs must be {', '.join(self.names)}, got {', '.join(tensors) or 'none'}"
            )
        feed = {name: value.detach().cpu().numpy() for name, value in given.items()}
        outputs = tuple(torch.from_numpy(array) for array in self.session.run(None, feed))
        return outputs[0] if len(outputs) == 1 else outputs
