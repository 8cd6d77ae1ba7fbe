"""From a model to a ``torch.export.ExportedProgram``, and from our operators back to aten."""

from __future__ import annotations

import inspect
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.export import AdditionalInputs, Dim, ExportedProgram, ShapesCollection
from torch.utils import _pytree as pytree

from dwswap import excitation_registration, registration
from dwswap.example_inputs import Arguments, observe_shapes
from dwswap.export.errors import ExportError, summary
from dwswap.schema import depthwise_conv2d, squeeze_excitation
from dwswap.tracing import NotTraceable, check_not_compiled, is_training

__all__ = ["changed_buffers", "program_device", "to_aten", "to_program"]

# What our operators are made of, outside of CUDA.
_DECOMPOSITIONS = {
    depthwise_conv2d: registration.decomposed,
    squeeze_excitation: excitation_registration.decomposed,
}


def to_program(
    model: nn.Module | ExportedProgram,
    example_inputs: Any,
    dynamic_batch: bool,
    dynamic_shapes: Any,
) -> ExportedProgram:
    """``model`` as a program; the arguments are those of ``dwswap.export.save``."""
    if isinstance(model, ExportedProgram):
        if example_inputs is not None or dynamic_batch or dynamic_shapes is not None:
            raise ValueError(
                "example_inputs, dynamic_batch and dynamic_shapes must not be given for an "
                "ExportedProgram, which has inputs and shapes of its own"
            )
        _check_tensors((*model.state_dict.values(), *model.constants.values()))
        return model
    _check_model(model)
    if example_inputs is None:
        raise ValueError(
            "example_inputs must be given to export a model: a tensor, a tuple of positional "
            "arguments or a dict of keyword arguments; got None"
        )
    if dynamic_batch and dynamic_shapes is not None:
        raise ValueError("dynamic_batch=True and dynamic_shapes must not both be given")
    arguments = Arguments.parse(model, example_inputs).map(_plain_layout)
    tensors = [t for t in pytree.tree_leaves((arguments.args, arguments.kwargs)) if _is_tensor(t)]
    _check_tensors((*model.parameters(), *model.buffers(), *tensors))
    if dynamic_batch:
        arguments = _traceable_batch(arguments, tensors)
        dynamic_shapes = _batch_shapes(model, arguments)
    elif dynamic_shapes is not None:
        _check_dynamic_shapes(model, arguments, dynamic_shapes)
    try:
        with torch.no_grad():
            program = torch.export.export(
                _plain_module(model),
                arguments.args,
                arguments.kwargs,
                dynamic_shapes=dynamic_shapes,
            )
    except Exception as error:  # whatever a user's model, or a trace of it, raises
        try:
            observe_shapes(model, arguments)
        except ValueError as refused:
            if str(refused).startswith("example_inputs"):  # not that the model cannot be copied
                raise
        raise ExportError(
            f"torch.export cannot export {type(model).__name__}: {summary(error)}"
        ) from error
    _check_named(model, program)
    return program


def to_aten(program: ExportedProgram) -> ExportedProgram:
    """``program`` with every call of our operators made of aten's: conv2d, add, activations.

    Everything else stays as it is; a program without our operators is returned itself.
    """
    graphs = [m.graph for m in program.graph_module.modules() if isinstance(m, fx.GraphModule)]
    if not any(node.target in _DECOMPOSITIONS for graph in graphs for node in graph.nodes):
        return program
    with torch.no_grad():
        return program.run_decompositions(dict(_DECOMPOSITIONS))


def changed_buffers(program: ExportedProgram) -> list[str]:
    """The names of the buffers that ``program`` changes and that its outputs depend on."""
    if not program.graph_signature.inputs_to_buffers:
        return []
    with torch.no_grad():
        program = program.run_decompositions({})  # in-place calls become new values of buffers
    signature = program.graph_signature
    needed: set[fx.Node] = set()
    for node in reversed(program.graph.nodes):
        if node.name in signature.user_outputs or not needed.isdisjoint(node.users):
            needed.add(node)
    names = {signature.inputs_to_buffers.get(node.name) for node in needed}
    return [name for name in signature.buffers_to_mutate.values() if name in names]


def program_device(program: ExportedProgram) -> torch.device:
    """The one device of a program; the CPU where it has no tensors."""
    inputs = program.example_inputs or ()
    leaves = (*program.state_dict.values(), *pytree.tree_leaves(inputs))
    return next((t.device for t in leaves if _is_tensor(t)), torch.device("cpu"))


def _check_model(model: Any) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(
            "model must be an nn.Module or a torch.export.ExportedProgram, "
            f"got {type(model).__name__}"
        )
    try:
        check_not_compiled(model)
    except NotTraceable as error:
        raise TypeError(f"model must not be compiled: {error}") from error
    if type(model).__module__.startswith("torch._dynamo"):
        raise TypeError(
            "model must not be compiled, got the result of torch.compile: give the model itself"
        )
    if isinstance(model, torch.jit.ScriptModule):
        raise ExportError(
            f"torch.export takes no TorchScript, got a {type(model).__name__}: export the model "
            "that it was made from"
        )
    if is_training(model):
        raise ValueError("model must be in eval mode, got one in train mode: call model.eval()")


def _plain_module(model: nn.Module) -> nn.Module:
    """A graph as a module with the same code and the same attributes.

    torch.export hands keyword arguments to a graph by their order, without defaults, and gives what
    it returns in containers of torch.fx, which cannot be changed.
    """
    if not isinstance(model, fx.GraphModule):
        return model
    cls = type(type(model).__name__, (nn.Module,), {"forward": type(model).forward})
    plain: nn.Module = cls()
    plain.__dict__.update(model.__dict__)
    return plain


def _check_named(model: nn.Module, program: ExportedProgram) -> None:
    """Refuse comparisons of sizes in ``**kwargs``: torch.export writes code for them that fails."""
    parameters = inspect.signature(model.forward).parameters.values()
    compared = " ".join(getattr(program, "_guards_code", ()))
    for parameter in parameters:
        if parameter.kind is parameter.VAR_KEYWORD and f"L['{parameter.name}']" in compared:
            raise ExportError(
                "sizes that vary together must be of inputs that the forward names: "
                f"{type(model).__name__} takes some by **{parameter.name}"
            )


def _check_tensors(tensors: Iterable[Any]) -> None:
    """Refuse meta tensors, and tensors of several devices."""
    devices = {str(t.device) for t in tensors if _is_tensor(t)}
    if "meta" in devices:
        raise ValueError("model and example_inputs must have data, got tensors on the meta device")
    if len(devices) > 1:
        raise ValueError(
            "model and example_inputs must be on one device, got tensors on "
            f"{', '.join(sorted(devices))}"
        )


def _plain_layout(tensor: Tensor) -> Tensor:
    """A view with other strides than a whole tensor would be a promise for every later input."""
    if tensor.dim() == 4 and tensor.is_contiguous(memory_format=torch.channels_last):
        return tensor
    return tensor.contiguous()


def _traceable_batch(arguments: Arguments, tensors: list[Tensor]) -> Arguments:
    """``arguments`` with a batch of at least 2: what is 1 in a trace stays 1."""
    sizes = {t.shape[0] if t.dim() else None for t in tensors}
    if len(sizes) != 1 or None in sizes:
        shapes = ", ".join(str(list(t.shape)) for t in tensors)
        raise ValueError(
            "dynamic_batch=True needs example_inputs whose tensors all have the batch as their "
            f"first dimension, got shapes {shapes or 'of no tensor'}"
        )
    if sizes != {1}:
        return arguments
    return arguments.map(lambda t: _plain_layout(torch.cat([t, t])))


def _batch_shapes(model: nn.Module, arguments: Arguments) -> dict[str, Any]:
    batch = Dim("batch")
    bound = inspect.signature(model.forward).bind(*arguments.args, **arguments.kwargs)
    return {
        name: pytree.tree_map(lambda leaf: {0: batch} if _is_tensor(leaf) else None, value)
        for name, value in bound.arguments.items()
    }


def _check_dynamic_shapes(model: nn.Module, arguments: Arguments, shapes: Any) -> None:
    """Refuse ``dynamic_shapes`` that torch.export fails on without naming them.

    Raises:
        TypeError: it is no dict, tuple or list.
        ValueError: a dimension that the tensor does not have.
    """
    if isinstance(shapes, (ShapesCollection, AdditionalInputs)):
        return
    if not isinstance(shapes, (dict, tuple, list)):
        raise TypeError(
            "dynamic_shapes must be a dict by names of arguments or a tuple in their order, as "
            f"torch.export.export takes it, got {shapes!r}"
        )
    bound = inspect.signature(model.forward).bind(*arguments.args, **arguments.kwargs).arguments
    if not isinstance(shapes, dict):
        shapes = dict(zip(bound, shapes, strict=False))
    for name, sizes in shapes.items():
        value = bound.get(name)
        if not isinstance(sizes, dict) or not isinstance(value, Tensor):
            continue
        for dim in sizes:
            if dim not in range(value.dim()):
                raise ValueError(
                    f"dynamic_shapes must name dimensions from 0 to {value.dim() - 1} of {name}, "
                    f"which has shape {list(value.shape)}, got {dim!r}"
                )


def _is_tensor(value: Any) -> bool:
    return isinstance(value, Tensor)
