"""ONNX files of standard operators, and ONNX Runtime as a callable."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.export import ExportedProgram
from torch.utils import _pytree as pytree

from dwswap.export.errors import ExportError, required
from dwswap.export.program import to_aten

__all__ = ["OnnxModel", "check_packages", "save_onnx"]

# What a protobuf message can hold, less 64 MiB for the graph.
MOST_BYTES = 2**31 - 2**26


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
        ExportError: the weights do not fit into one file.
    """
    size = sum(t.numel() * t.element_size() for t in program.state_dict.values())
    if size > MOST_BYTES:
        raise ExportError(f"an ONNX file holds less than 2 GiB, the weights are {size:,} bytes")
    program = to_aten(program)
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
            output_names=["output"] if outputs == 1 else [f"output_{i}" for i in range(outputs)],
        )
    assert exported is not None
    batches = _batch_symbols(program)
    if len(batches) == 1:
        exported.rename_axes({batches.pop(): "batch"})
    exported.save(path)


def _batch_symbols(program: ExportedProgram) -> set[str]:
    """The symbols of the inputs' first dimensions."""
    inputs = set(program.graph_signature.user_inputs)
    values = [node.meta["val"] for node in program.graph.nodes if node.name in inputs]
    sizes = [value.shape[0] for value in values if isinstance(value, Tensor) and value.dim()]
    return {str(size) for size in sizes if type(size) is not int}


class OnnxModel:
    """An ONNX file in ONNX Runtime, called with tensors.

    Positional arguments go to the inputs of the file in their order, keyword arguments by name.
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

    def __call__(self, *args: Any, **kwargs: Any) -> Tensor | tuple[Tensor, ...]:
        """Outputs on the CPU: a tensor, or a tuple of them where there are several.

        Raises:
            TypeError: the arguments are not those of the file.
        """
        leaves = [leaf for leaf in pytree.tree_leaves(args) if isinstance(leaf, Tensor)]
        given = {**dict(zip(self.names, leaves, strict=False)), **kwargs}
        if len(leaves) + len(kwargs) != len(self.names) or given.keys() != set(self.names):
            raise TypeError(
                f"the inputs must be {', '.join(self.names)}, got {len(leaves)} positional ones "
                f"and {', '.join(kwargs) or 'no names'}"
            )
        feed = {name: value.detach().cpu().numpy() for name, value in given.items()}
        outputs = tuple(torch.from_numpy(array) for array in self.session.run(None, feed))
        return outputs[0] if len(outputs) == 1 else outputs
